"""Llama-2 70B (Touvron et al. 2023, arXiv:2307.09288) on a slice of TPU v5p-1024 (512 chips).

    lmjax train --config configs/llama2_70b.py --workdir /mnt/runs/llama2_70b
    lmjax plan --config configs/llama2_70b.py --topology v5p-1024
    # 18.8 .. 22.5 s per step, MFU 67.9% .. 81.5%, 80.0 of 95.74 GiB per device

A chip computes 4 x 4096 tokens per step.
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod


def get_config() -> ConfigDict:
    config = pod(
        "llama2-70b",
        batch_size=2048,  # 8.4M tokens per step
        seq_len=4096,  # the paper's
        tokens=2e12,  # the paper's
        peak_lr=1.5e-4,  # the paper's
        # Keeps the results of the MLP's matmuls: that saves more time than gathering the weights
        # four times costs (see microbatches).
        remat="query+key+value+kernel+out+gate+up",
        # data: replicas along one side of the torus. Weights that are split over all three sides
        # would be gathered by all-reduce. Replicas sum only their shard of the gradients.
        # tensor: halves the bytes of the kept results.
        mesh=dict(data=8, fsdp=-1, tensor=2),
    )
    config.train.microbatches = 4  # a quarter of the rows at a time leaves room to keep results
    return config
