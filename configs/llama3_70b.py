"""Llama 3 70B (Grattafiori et al. 2024, arXiv:2407.21783) on a slice of TPU v5p-512 (256 chips).

    lmjax train --config configs/llama3_70b.py --workdir /mnt/runs/llama3_70b
    lmjax plan --config configs/llama3_70b.py --topology v5p-512
    # 10.6 .. 12.5 s per step, MFU 64.2% .. 75.9%, 65.0 of 95.74 GiB per device
    lmjax plan --config configs/llama3_70b.py:v6e --topology v6e-256
    # 6.48 .. 8.36 s per step, MFU 48.0% .. 61.8%, 28.6 of 31.25 GiB per device

A chip computes 8192 tokens per step. `configs/llama3_70b.py:v6e` is the same on v6e-256.
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod

TOKENS = 15e12  # the paper's


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "v6e"):
        raise ValueError("configs/llama3_70b.py: expected no variant or v6e, "
                         f"got {variant!r}; leave it out")
    if variant == "v6e":
        return pod(
            "llama3-70b",
            batch_size=256,  # 2.1M tokens per step
            seq_len=8192,  # the paper's
            tokens=TOKENS,
            peak_lr=1.5e-4,  # the paper's
            loss_chunk=1024,
            remat="kernel",  # there is room for little else
            mesh=dict(data=16, fsdp=-1, rules=dict(embed=("data", "fsdp"))),
        )
    config = pod(
        "llama3-70b",
        batch_size=256,  # 2.1M tokens per step
        seq_len=8192,  # the paper's
        tokens=TOKENS,
        peak_lr=1.5e-4,  # the paper's
        loss_chunk=1024,
        remat="query+key+value+kernel+out+gate+up",  # keeps the results of all matmuls
        mesh=dict(data=4, fsdp=-1, tensor=2, rules=dict(embed=("data", "fsdp"))),
    )
    # Half of the rows at a time, each over two chips: that leaves room to keep the results.
    config.train.microbatches = 2
    return config
