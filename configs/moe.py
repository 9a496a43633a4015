"""A small mixture of experts like Mixtral (Jiang et al. 2024, arXiv:2401.04088).

    lmjax train --config configs/moe.py --workdir runs/moe
    lmjax train --config configs/moe.py:tiny --workdir runs/moe-tiny

Every layer has eight experts, of which two compute each token. The corpus is the text of Python's
own standard library, so nothing is downloaded. It takes about twelve minutes on two CPU cores.
`configs/moe.py:tiny` is the same recipe, made small for tests: it takes seconds.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/moe.py: expected no variant or tiny, got {variant!r}; "
                         "leave it out")
    config = ConfigDict()
    config.model = dict(
        num_layers=4,  # the dense quickstart's dimensions
        embed_dim=192,
        num_heads=6,
        num_kv_heads=3,
        mlp_dim=256,  # two experts together are as wide as the quickstart's MLP
        tie_embeddings=True,
        scan_layers=False,  # on a CPU, four layers run faster without a scan
        moe=dict(
            experts=8,
            per_token=2,
            balance_loss=0.01,  # Switch Transformer's (arXiv:2101.03961); at 0 few experts take all
            z_loss=1e-3,  # ST-MoE's (arXiv:2202.08906): keeps the router's logits small
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
    if variant == "tiny":
        config.model.update(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=32)
        config.model.moe.update(experts=4)
        config.data.update(seq_len=64)
        config.data.tokenizer.update(vocab_size=400, train_bytes=200_000)
        config.optimizer.update(warmup_steps=5)
        config.train.update(steps=60, batch_size=16)
        config.eval.update(every=30, batches=2)
        config.checkpoint.update(every=30)
    return config
