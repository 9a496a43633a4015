"""Llama 3.1 405B (Grattafiori et al. 2024, arXiv:2407.21783) on a slice of TPU v5p-2048 (1024 chips), 8192 tokens a
chip.

    lmjax train --config configs/llama3_405b.py --workdir /mnt/runs/llama3_405b
    lmjax plan --config configs/llama3_405b.py --topology v5p-2048
    # 60.6 .. 70.5 s a step, MFU 63.9% .. 74.3%, 69.2 of 95.74 GiB a chip
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod


def get_config() -> ConfigDict:
    # A quarter of the rows at a time, each over four chips: then all but `gate` can be kept of what the matmuls made.
    config = pod("llama3.1-405b", batch_size=1024, seq_len=8192, tokens=15e12, peak_lr=8e-5, loss_chunk=1024,
                 remat="query+key+value+kernel+out+up",
                 mesh=dict(data=8, fsdp=-1, tensor=4, rules=dict(embed=("data", "fsdp"))))
    config.train.microbatches = 4
    return config
