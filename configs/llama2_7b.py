"""Llama-2 7B (Touvron et al. 2023, arXiv:2307.09288) on a slice of TPU v5e-256, 4 x 2048 tokens a chip.

    lmjax train --config configs/llama2_7b.py --workdir /mnt/runs/llama2_7b
    lmjax plan --config configs/llama2_7b.py --topology v5e-256

`configs/llama2_7b.py:v5p` is the same on v5p-128 (64 chips), 4 x 4096 tokens a chip.
`configs/llama2_7b.py:tiny` is the recipe shrunk to seconds, for tests.
"""

from ml_collections import ConfigDict

TOKENS = 2e12  # of the paper


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "v5p", "tiny"):
        raise ValueError(f"configs/llama2_7b.py: expected no variant, v5p or tiny, got {variant!r}; leave it out")
    config = ConfigDict()
    config.model = dict(
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        mlp_dim=11008,
        vocab_size=32_000,
        remat="full",
    )
    config.data = dict(
        sources=[dict(name="c4", uri="tfds:c4/en")],
        tokenizer=dict(vocab_size=32_000),
        seq_len=2048,
    )
    # Weights split over all chips: at 4 rows a chip a layer's arrive faster than it is computed. By both axes, each one
    # side of the torus, because along one ring gradients are reduce-scattered and over more they are all-reduced.
    config.mesh = dict(data=16, fsdp=-1, rules=dict(embed=("data", "fsdp")))
    config.optimizer = dict(name="adamw", peak_lr=3e-4, warmup_steps=2000, b2=0.95, weight_decay=0.1, clip_norm=1.0)
    config.train = dict(batch_size=1024)  # 2.1M tokens, half of the paper's: twice the steps on this slice
    config.eval = dict(every=1000, batches=16)
    config.checkpoint = dict(every=1000, keep_last=2)
    if variant == "v5p":
        config.data.update(seq_len=4096)
        config.train.update(batch_size=256)
        config.mesh = dict(data=1, fsdp=-1)
    config.train.steps = int(TOKENS / config.train.batch_size / config.data.seq_len)
    if variant == "tiny":
        config.model.update(num_layers=2, embed_dim=64, num_heads=4, mlp_dim=128, vocab_size=256)
        config.mesh = dict(data=1, fsdp=-1)
        config.data.update(sources=[dict(name="chain", uri="synthetic")], tokenizer=dict(vocab_size=256), seq_len=64)
        config.optimizer.update(warmup_steps=5)
        config.train.update(steps=20, batch_size=16)
        config.eval.update(every=10, batches=2)
        config.checkpoint.update(every=10)
    return config
