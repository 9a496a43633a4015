"""A small modern decoder on the source and documentation text of Python's own standard library.

    lmjax train --config configs/quickstart.py --workdir runs/quickstart
    lmjax train --config configs/quickstart.py:tiny --workdir runs/tiny

The corpus comes with the interpreter, so nothing is downloaded. It takes a few minutes on two CPU
cores. `configs/quickstart.py:tiny` is the same recipe, made small for tests: it takes seconds.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/quickstart.py: expected no variant or tiny, got {variant!r}; "
                         "leave it out")
    config = ConfigDict()
    config.model = dict(
        num_layers=4,  # few and narrow, for minutes on a CPU
        embed_dim=192,
        num_heads=6,  # of 32 dimensions each
        num_kv_heads=3,  # halves the key/value cache
        mlp_dim=512,  # 8/3 * embed_dim, as usual for an MLP with a gate
        qk_norm=True,  # keeps attention logits in range at this learning rate
        tie_embeddings=False,  # tables of inputs and outputs want different rates
        scan_layers=False,  # on a CPU, four layers run faster without a scan, and compile fast
    )
    config.data = dict(
        sources=[dict(name="python-stdlib", uri="builtin:python-stdlib")],
        tokenizer=dict(
            vocab_size=4096,  # small: a larger table would be most of the model
            train_bytes=8_000_000,  # a sample of the corpus is enough for so few tokens
        ),
        seq_len=256,
        packing="best_fit",  # cuts fewer documents
    )
    config.optimizer = dict(
        name="muon",  # for matrices; tables and scales learn by AdamW
        muon_momentum=0.9,  # less than usual: the run is short
        peak_lr=6e-3,  # of the matrices
        # Most tokens are rare, so the tables see few gradients. They learn best at a high rate that
        # forgets old gradients early; docs/learning.md compares rates.
        groups=[
            dict(kind="embedding", multiplier=20.0, b1=0.7),
            dict(kind="unembedding", multiplier=7.0, b1=0.7),
            dict(kind="vector", b1=0.7),
        ],
        schedule="wsd",  # keeps the full rate for most of a short run
        warmup_steps=20,
        decay_fraction=0.4,
        final_lr_fraction=0.05,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.train = dict(
        steps=600,  # 1.2M tokens: three to six minutes on two cores
        batch_size=8,  # 2048 tokens per step
    )
    # Batches twice as large as those of training, as evaluation keeps no activations.
    config.eval = dict(every=50, batches=16, batch_size=16)
    config.checkpoint = dict(every=50, keep_last=2)  # with each evaluation
    config.watch = dict(statistics_every=25)  # 24 columns of heat maps; such a step takes 6% longer
    config.sample = dict(
        every=100,
        prompts=["def read(self", "import ", "class ", "Return the "],
        max_tokens=64,
    )
    if variant == "tiny":
        shrink(config)
    return config


def shrink(config: ConfigDict) -> None:
    """Makes the recipe small enough for tests."""
    config.model.update(num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1, mlp_dim=64)
    config.data.update(seq_len=64)
    config.data.tokenizer.update(vocab_size=512, train_bytes=200_000)
    config.train.update(steps=20, batch_size=8)
    config.eval.update(every=10, batches=2, batch_size=8)
    config.checkpoint.update(every=5)
    config.sample.update(every=10, max_tokens=8)
    config.optimizer.update(warmup_steps=5)
