"""GPT-2 124M (Radford et al. 2019) on 16 chips of TPU v5e, 32 x 1024 tokens per chip.

    lmjax train --config configs/gpt2_124m.py --workdir /mnt/runs/gpt2_124m
    lmjax plan --config configs/gpt2_124m.py --topology v5e-16
    # 0.255 .. 0.386 s per step, MFU 34.4% .. 52.1%, 5.2 of 15.75 GiB per device
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod


def get_config() -> ConfigDict:
    return pod(
        "gpt2",
        batch_size=512,  # 524k tokens per step
        seq_len=1024,
        tokens=3e11,
        peak_lr=6e-4,
        mesh=dict(data=-1),  # the weights fit on each chip, so only gradients travel
        dropout=0.0,  # no row is seen often enough to overfit
        max_positions=1024,
        # Matrices this narrow are multiplied as fast as their results are written and read, so that
        # it costs little to compute most of them again.
        remat="kernel",
        loss_chunk=256,
    )
