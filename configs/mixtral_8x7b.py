"""Mixtral 8x7B (Jiang et al. 2024, arXiv:2401.04088) on a slice of TPU v5p-128 (64 chips).

    lmjax train --config configs/mixtral_8x7b.py --workdir /mnt/runs/mixtral_8x7b
    lmjax plan --config configs/mixtral_8x7b.py --topology v5p-128
    # 4.99 .. 6.40 s per step, MFU 44.4% .. 57.0%, 70.7 of 95.74 GiB per device
    lmjax plan --config configs/mixtral_8x7b.py --topology v5p-256 --config.train.batch_size=512
    # 4.99 .. 6.40 s per step, MFU 44.5% .. 57.0%, 48.7 of 95.74 GiB per device

A chip computes 4 x 4096 tokens per step. On twice the chips, double the rows, as the second plan
does.
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod


def get_config() -> ConfigDict:
    return pod(
        "mixtral-8x7b",
        batch_size=256,  # 1M tokens per step
        seq_len=4096,
        tokens=2e12,
        remat="attention",
        # Replicas along one side of the torus, weights split over the other two. This compiler
        # gathers weights that are split over all three by all-reduce. Replicas sum only their
        # shard of the gradients.
        mesh=dict(data=4, fsdp=-1),
    )
