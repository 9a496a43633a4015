"""A small ModernBERT (Warner et al. 2024, arXiv:2412.13663): masked LM on Python's own texts.

    lmjax train --config configs/bert.py --workdir runs/bert
    lmjax train --config configs/bert.py:tiny --workdir runs/bert-tiny

The corpus is the standard library of the interpreter, so nothing is downloaded. It takes about
twenty minutes on two CPU cores. `configs/bert.py:tiny` is the same recipe, made small for tests: it
takes seconds. ModernBERT is BERT (Devlin et al. 2018, arXiv:1810.04805) with norms before the
layers, rotary positions and local attention. A model of this size needs them: this one ends with a
held-out loss of 2.27 nats (perplexity 9.6), and one with `preset="bert-base"` with 5.35.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/bert.py: expected no variant or tiny, got {variant!r}; "
                         "leave it out")
    config = ConfigDict()
    config.model = dict(
        preset="modernbert-base",
        num_layers=4,  # a fifth of the layers and a quarter of the width, for a CPU
        embed_dim=192,
        num_heads=6,  # of 32 dimensions each
        num_kv_heads=6,
        mlp_dim=512,  # 8/3 * embed_dim, as usual for an MLP with a gate
        vocab_size=0,  # as large as the tokenizer's
        dropout=0.0,  # the model is too small to overfit in so few steps
        scan_layers=False,  # on a CPU, four layers run faster without a scan, and compile fast
    )
    config.data = dict(
        sources=[dict(name="python-stdlib", uri="builtin:python-stdlib")],
        tokenizer=dict(
            vocab_size=4095,  # 4096 with [MASK], which divides over a mesh
            train_bytes=8_000_000,  # a sample of the corpus is enough for so few tokens
        ),
        seq_len=256,
        objective=dict(
            name="masked_lm",
            whole_word=True,  # a word whose other half is visible is too easy to guess
        ),
    )
    config.optimizer = dict(
        name="muon",  # learns more than token frequencies in a fraction of AdamW's steps
        peak_lr=1e-2,
        schedule="linear",
        warmup_steps=100,
        weight_decay=0.01,  # BERT's
        clip_norm=1.0,
    )
    config.train = dict(
        steps=2000,
        batch_size=16,  # 4096 tokens per step
    )
    config.eval = dict(
        every=200,
        batches=16,
    )
    config.checkpoint = dict(every=200)  # with each evaluation
    if variant == "tiny":
        config.model.update(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=4, mlp_dim=128)
        config.data.update(seq_len=64)
        config.data.tokenizer.update(vocab_size=399, train_bytes=200_000)
        config.optimizer.update(warmup_steps=10)
        config.train.update(steps=150)
        config.eval.update(every=75, batches=2)
        config.checkpoint.update(every=75)
    return config
