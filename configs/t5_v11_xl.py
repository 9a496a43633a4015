"""T5 v1.1 XL (Raffel et al. 2019, arXiv:1910.10683) on 64 chips of TPU v5e.

    lmjax train --config configs/t5_v11_xl.py --workdir /mnt/runs/t5_v11_xl
    lmjax plan --config configs/t5_v11_xl.py --topology v5e-64
    # 1.90 .. 2.34 s per step, MFU 37.1% .. 45.7%, 9.2 of 15.75 GiB per device

A chip computes 32 x 512 tokens and their targets per step.
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod


def get_config() -> ConfigDict:
    return pod(
        "t5-v1.1-xl",
        batch_size=2048,  # 1M encoder tokens per step
        seq_len=512,  # the paper's
        tokens=1e12,
        peak_lr=1e-3,
        reserved=128,  # 100 ids are sentinels, and 28 pad the table
        remat="full",  # T5's position biases need the dense kernel, which holds all scores
        mesh=dict(data=8, fsdp=-1, rules=dict(embed=("data", "fsdp"))),
    )
