"""A small T5 v1.1 (Raffel et al. 2019, arXiv:1910.10683) on Python's own standard library.

    lmjax train --config configs/t5.py --workdir runs/t5
    lmjax train --config configs/t5.py:tiny --workdir runs/t5-tiny

The objective is span corruption: the encoder reads rows in which spans of tokens are hidden, and
the decoder writes the hidden tokens. The corpus comes with the interpreter, so nothing is
downloaded. It takes about ten minutes on two CPU cores. `configs/t5.py:tiny` is the same recipe,
made small for tests: it takes seconds.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/t5.py: expected no variant or tiny, got {variant!r}; "
                         "leave it out")
    config = ConfigDict()
    config.model = dict(
        preset="t5-v1.1-base",
        num_layers=3,  # in the encoder and in the decoder
        embed_dim=192,
        num_heads=6,
        num_kv_heads=6,
        head_dim=32,  # embed_dim / num_heads; the preset's is 64
        mlp_dim=512,  # 8/3 * embed_dim, as usual for an MLP with a gate
        vocab_size=0,  # as large as the tokenizer's
        scan_layers=False,  # on a CPU, three layers run faster without a scan, and compile fast
    )
    config.data = dict(
        sources=[dict(name="python-stdlib", uri="builtin:python-stdlib")],
        tokenizer=dict(
            vocab_size=3996,  # 4096 with the sentinels, which divides over a mesh
            train_bytes=8_000_000,  # a sample of the corpus is enough for so few tokens
        ),
        seq_len=256,  # of the encoder; the length of the decoder's rows follows from it
        objective=dict(
            name="span_corruption",
            denoisers=[dict(density=0.15, mean_span=3.0)],  # the paper's
            sentinels=100,  # the paper's
        ),
    )
    config.optimizer = dict(
        name="adamw",  # the paper's Adafactor saves memory that a small model does not need
        peak_lr=2e-3,
        b2=0.98,  # a longer memory would still hold the first steps when the run ends
        weight_decay=0.01,
        clip_norm=1.0,
        schedule="cosine",
        warmup_steps=100,
    )
    config.train = dict(
        steps=2000,
        batch_size=16,  # 4096 encoder tokens per step
    )
    config.eval = dict(
        every=200,
        batches=16,
    )
    config.checkpoint = dict(every=200)  # with each evaluation
    if variant == "tiny":
        config.model.update(
            num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=128)
        config.data.update(seq_len=64)
        config.data.objective.update(sentinels=16)
        config.data.tokenizer.update(vocab_size=400, train_bytes=200_000)
        config.optimizer.update(peak_lr=5e-3, warmup_steps=10)
        config.train.update(steps=150)
        config.eval.update(every=75, batches=2)
        config.checkpoint.update(every=75)
    return config
