"""A small model like DeepSeek-V3 (arXiv:2412.19437): latent attention and many small experts.

    lmjax train --config configs/latent.py --workdir runs/latent
    lmjax train --config configs/latent.py:tiny --workdir runs/latent-tiny

The first layer has an MLP. Each of the others has sixteen experts, of which four compute each
token, and one that computes all tokens. The corpus is the text of Python's own standard library, so
nothing is downloaded. `configs/latent.py:tiny` is the same recipe, made small for tests: it takes
seconds.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/latent.py: expected no variant or tiny, got {variant!r}; "
                         "leave it out")
    config = ConfigDict()
    config.model = dict(
        num_layers=4,  # this and the next two are the dense quickstart's
        embed_dim=192,
        num_heads=6,
        mlp_dim=512,  # of the first layer
        latent=dict(
            kv_rank=64,  # a cache holds 64 + 16 numbers per token and layer; the quickstart's: 192
            query_rank=96,
            nope_dim=32, rope_dim=16, value_dim=32,
        ),
        tie_embeddings=True,
        scan_layers=False,  # on a CPU, four layers run faster without a scan
        moe=dict(
            experts=16,
            per_token=4,
            mlp_dim=96,  # with the shared one, five experts are about as wide as the first MLP
            shared_dim=96,
            first_dense=1,
            scores="sigmoid",
            groups=4,
            top_groups=2,
            scale=2.5,
            correction=True,
            correction_rate=0.001,  # V3's: balances the experts, with no loss to hold them back
            balance_loss=0.0,
        ),
    )
    config.data = dict(
        sources=[dict(name="python-stdlib", uri="builtin:python-stdlib")],
        tokenizer=dict(
            vocab_size=4096,
            train_bytes=8_000_000,  # a sample of the corpus is enough for so few tokens
        ),
        seq_len=256,
        packing="best_fit",  # cuts fewer documents
    )
    config.optimizer = dict(
        name="muon",  # also for the matrices of each expert
        peak_lr=1e-2,
        schedule="cosine",
        warmup_steps=50,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.train = dict(
        steps=1000,
        batch_size=8,  # 2048 tokens per step
    )
    config.eval = dict(
        every=100,
        batches=16,
        batch_size=16,  # twice that of training, as evaluation keeps no activations
    )
    config.checkpoint = dict(every=100)  # with each evaluation
    return make_tiny(config) if variant == "tiny" else config


def make_tiny(config: ConfigDict) -> ConfigDict:
    """The same recipe, small enough for tests."""
    config.model.update(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64)
    config.model.latent.update(kv_rank=16, query_rank=16, nope_dim=8, rope_dim=8, value_dim=8)
    config.model.moe.update(experts=8, per_token=2, mlp_dim=16, shared_dim=16)
    config.data.update(seq_len=64)
    config.data.tokenizer.update(vocab_size=400, train_bytes=200_000)
    config.optimizer.update(warmup_steps=5)
    config.train.update(steps=60, batch_size=16)
    config.eval.update(every=30, batches=2)
    config.checkpoint.update(every=30)
    return config
