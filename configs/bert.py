"""A small BERT (Devlin et al. 2018, arXiv:1810.04805) on the text of Python's own standard library: masked LM.

    lmjax train --config configs/bert.py --workdir runs/bert

Nothing is downloaded; some ten minutes on two CPU cores. `configs/bert.py:tiny` is the same recipe shrunk to seconds,
for tests. For the published model take out the dimensions, and the paper's batch of 256 rows of 512 tokens and its
rate of 1e-4 over a million steps.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/bert.py: expected no variant or tiny, got {variant!r}; leave it out")
    config = ConfigDict()
    config.model = dict(
        preset="bert-base",
        num_layers=4,
        embed_dim=192,
        num_heads=6,
        num_kv_heads=6,
        mlp_dim=768,
        vocab_size=0,  # as large as the tokenizer's
        pooler=False,  # no second sentence is predicted, so nothing would train it
        dropout=0.0,  # too small to overfit in so few steps
        scan_layers=False,  # four layers compile fast enough one by one, and run faster on a CPU
    )
    config.data = dict(
        sources=[dict(name="python-stdlib", uri="builtin:python-stdlib")],
        tokenizer=dict(vocab_size=4095, train_bytes=8_000_000),  # 4096 with [MASK]: divides over a mesh
        seq_len=256,
        objective=dict(name="masked_lm", whole_word=True),  # a word whose other half is there is no riddle
    )
    config.optimizer = dict(
        name="muon",  # leaves the plateau where only the tokens' frequencies are known in a fraction of AdamW's steps
        peak_lr=1e-2,
        schedule="linear",
        warmup_steps=100,  # norms behind the sums make the first steps steep
        weight_decay=0.01,
        clip_norm=1.0,
    )
    config.train = dict(steps=2000, batch_size=16)
    config.eval = dict(every=200, batches=16)
    config.checkpoint = dict(every=200)
    if variant == "tiny":
        config.model.update(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=4, mlp_dim=128)
        config.data.update(seq_len=64)
        config.data.tokenizer.update(vocab_size=399, train_bytes=200_000)
        config.optimizer.update(warmup_steps=10)
        config.train.update(steps=150)
        config.eval.update(every=75, batches=2)
        config.checkpoint.update(every=75)
    return config
