"""GPT-2 124M (Radford et al. 2019) on 16 chips of TPU v5e, 32 x 1024 tokens a chip.

    lmjax train --config configs/gpt2_124m.py --workdir /mnt/runs/gpt2_124m
    lmjax plan --config configs/gpt2_124m.py --topology v5e-16
    # 0.255 .. 0.386 s a step, MFU 34.4% .. 52.1%, 5.2 of 15.75 GiB a chip
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod


def get_config() -> ConfigDict:
    # A replica of the weights a chip: there are few, and only their gradients travel. Matrices as narrow as these are
    # multiplied as fast as what they make is written and read, so little is kept.
    return pod("gpt2", batch_size=512, seq_len=1024, tokens=3e11, peak_lr=6e-4, mesh=dict(data=-1), dropout=0.0,
               max_positions=1024, remat="kernel", loss_chunk=256)
