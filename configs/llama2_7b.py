"""Llama-2 7B (Touvron et al. 2023, arXiv:2307.09288) on a slice of TPU v5e-256.

    lmjax train --config configs/llama2_7b.py --workdir /mnt/runs/llama2_7b
    lmjax plan --config configs/llama2_7b.py --topology v5e-256
    # 2.44 .. 2.83 s per step, MFU 60.7% .. 70.3%, 14.4 of 15.75 GiB per device
    lmjax plan --config configs/llama2_7b.py:v5p --topology v5p-128
    # 2.16 .. 2.60 s per step, MFU 58.9% .. 70.9%, 56.9 of 95.74 GiB per device

A chip of v5e-256 computes 4 x 2048 tokens per step. `configs/llama2_7b.py:v5p` is the same model on
v5p-128 (64 chips), with 4 x 4096 tokens per chip. `configs/llama2_7b.py:tiny` is the recipe, made
small for tests: it takes seconds.
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod

TOKENS = 2e12  # the paper's


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "v5p", "tiny"):
        raise ValueError("configs/llama2_7b.py: expected no variant, v5p or tiny, "
                         f"got {variant!r}; leave it out")
    if variant == "v5p":
        return pod(
            "llama2-7b",
            batch_size=256,  # 1M tokens per step
            seq_len=4096,  # the paper's
            tokens=TOKENS,
            remat="query+key+value+kernel+out+gate+up",  # there is room to keep these results
            # Replicas along one side of the torus, weights split over the other two. This compiler
            # gathers weights that are split over all three by all-reduce. Replicas sum only their
            # shard of the gradients.
            mesh=dict(data=4, fsdp=-1),
        )
    config = pod(
        "llama2-7b",
        batch_size=1024,  # 2.1M tokens per step, half of the paper's
        seq_len=2048,
        tokens=TOKENS,
        remat="attention",
        # Weights split over all chips: with 4 rows per chip, the weights of a layer arrive faster
        # than the layer is computed. They are split by two axes, each one side of the torus,
        # because gradients are reduce-scattered along one ring, and all-reduced over more.
        mesh=dict(data=16, fsdp=-1, rules=dict(embed=("data", "fsdp"))),
    )
    if variant == "tiny":
        config.model.update(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=4, mlp_dim=128,
                            vocab_size=256, remat="full")
        config.mesh = dict(data=1, fsdp=-1)
        config.data.update(sources=[dict(name="chain", uri="synthetic")],
                           tokenizer=dict(vocab_size=256), seq_len=64)
        config.optimizer.update(warmup_steps=5)
        config.train.update(steps=20, batch_size=16)
        config.eval.update(every=10, batches=2)
        config.checkpoint.update(every=10)
    return config
