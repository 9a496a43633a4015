"""Llama 3.1 405B (Grattafiori et al. 2024, arXiv:2407.21783) on a slice of TPU v5p-2048.

    lmjax train --config configs/llama3_405b.py --workdir /mnt/runs/llama3_405b
    lmjax plan --config configs/llama3_405b.py --topology v5p-2048
    # 60.6 .. 70.5 s per step, MFU 63.9% .. 74.3%, 69.2 of 95.74 GiB per device

Each of the 1024 chips computes 8192 tokens per step.
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod


def get_config() -> ConfigDict:
    config = pod(
        "llama3.1-405b",
        batch_size=1024,  # 8.4M tokens per step
        seq_len=8192,  # the paper's
        tokens=15e12,  # the paper's
        peak_lr=8e-5,  # the paper's
        loss_chunk=1024,
        remat="query+key+value+kernel+out+up",  # all results of matmuls except `gate`
        mesh=dict(data=8, fsdp=-1, tensor=4, rules=dict(embed=("data", "fsdp"))),
    )
    # A quarter of the rows at a time, each over four chips: that leaves room to keep the results.
    config.train.microbatches = 4
    return config
