"""Llama 3 8B (Grattafiori et al. 2024, arXiv:2407.21783) on a slice of TPU v5e-256.

    lmjax train --config configs/llama3_8b.py --workdir /mnt/runs/llama3_8b
    lmjax plan --config configs/llama3_8b.py --topology v5e-256
    # 3.43 .. 3.96 s per step, MFU 54.0% .. 62.4%, 12.6 of 15.75 GiB per device
    lmjax plan --config configs/llama3_8b.py:v5p --topology v5p-128
    # 5.51 .. 6.30 s per step, MFU 58.3% .. 66.7%, 60.9 of 95.74 GiB per device
    lmjax plan --config configs/llama3_8b.py:long --topology v5p-128
    # 27.4 .. 29.0 s per step, MFU 36.5% .. 38.5%, 38.0 of 95.74 GiB per device

A chip of v5e-256 computes 8192 tokens per step. `configs/llama3_8b.py:v5p` is the same model on
v5p-128 (64 chips), with 4 x 8192 tokens per chip. `configs/llama3_8b.py:long` is Llama 3.1 8B on
v5p-128 with rows of 131,072 tokens, each over eight chips.
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod

TOKENS = 15e12  # the paper's


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "v5p", "long"):
        raise ValueError("configs/llama3_8b.py: expected no variant, v5p or long, "
                         f"got {variant!r}; leave it out")
    if variant == "v5p":
        config = pod(
            "llama3-8b",
            batch_size=256,  # 2.1M tokens per step
            seq_len=8192,  # the paper's
            tokens=TOKENS,
            mesh=dict(data=4, fsdp=-1),
            remat="query+key+value+kernel+out+gate+up",  # all results that are worth keeping
            loss_chunk=2048,
        )
        config.train.microbatches = 2  # half of the rows at a time leaves room for these results
        return config
    if variant == "long":
        # The last part of a run, in which rows get longer.
        return pod(
            "llama3.1-8b",
            batch_size=16,  # 2.1M tokens per step
            seq_len=131072,
            tokens=1e11,
            peak_lr=3e-5,  # the rate with which the first part ended
            mesh=dict(data=1, fsdp=-1, context=8),  # a row over eight chips
            remat="kernel",
            loss_chunk=2048,
        )
    return pod(
        "llama3-8b",
        batch_size=256,  # 2.1M tokens per step
        seq_len=8192,  # the paper's
        tokens=TOKENS,
        remat="attention",
        loss_chunk=2048,
        mesh=dict(data=16, fsdp=-1, rules=dict(embed=("data", "fsdp"))),
    )
