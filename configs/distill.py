"""A student of half the depth and width of the quickstart model, which teaches it.

    lmjax train --config configs/quickstart.py --workdir runs/quickstart
    lmjax train --config configs/distill.py --workdir runs/student
    lmjax train --config configs/distill.py --workdir runs/alone --config.distill.teacher=""

The last command trains the same student without a teacher, to compare. With
`--config.distill.stored_tokens=32` the teacher runs once, before the training, and not in
every step. `configs/distill.py:tiny` is the same recipe, made small for tests: its teacher is
runs/tiny.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/distill.py: expected no variant or tiny, got {variant!r}; "
                         "leave it out")
    teacher = "runs/tiny" if variant else "runs/quickstart"
    config = ConfigDict()
    config.distill = dict(
        teacher=teacher,
        hard=0.2,  # a teacher says more of a token than the token itself
        temperature=1.0,  # the distributions of a language model are broad enough
    )
    config.model = dict(
        num_layers=2,
        embed_dim=96,
        num_heads=3,  # of 32 dimensions each, as the teacher's
        num_kv_heads=1,
        mlp_dim=256,
        qk_norm=True,
        tie_embeddings=True,
        scan_layers=False,  # on a CPU, few layers run faster without a scan
    )
    config.data = dict(
        directory=f"{teacher}/data",  # with the teacher's tokenizer
        sources=[dict(name="python-stdlib", uri="builtin:python-stdlib")],
        tokenizer=dict(vocab_size=4096, train_bytes=8_000_000),  # as that was prepared
        seq_len=256,
    )
    config.optimizer = dict(
        name="muon",
        peak_lr=1e-2,  # that of the teacher
        schedule="wsd",
        warmup_steps=20,
        decay_fraction=0.4,
        final_lr_fraction=0.05,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.train = dict(steps=400, batch_size=8)
    config.eval = dict(every=100, batches=16, batch_size=16)
    config.checkpoint = dict(every=100, keep_last=2)
    if variant == "tiny":
        config.model.update(num_layers=1, embed_dim=16, num_heads=1, mlp_dim=32)
        config.data.update(seq_len=64)
        config.data.tokenizer.update(vocab_size=512, train_bytes=200_000)
        config.train.update(steps=20)
        config.eval.update(every=10, batches=2, batch_size=8)
        config.checkpoint.update(every=5)
        config.optimizer.update(warmup_steps=5)
    return config
