"""Llama 3.1 405B (Grattafiori et al. 2024, arXiv:2407.21783) on a slice of TPU v5p-2048 (1024 chips), 8192 tokens a
chip.

    lmjax train --config configs/llama3_405b.py --workdir /mnt/runs/llama3_405b
    lmjax plan --config configs/llama3_405b.py --topology v5p-2048
"""

from ml_collections import ConfigDict

from lmjax.pods import pod


def get_config() -> ConfigDict:
    return pod("llama3.1-405b", batch_size=1024, seq_len=8192, tokens=15e12, peak_lr=8e-5, remat="kernel",
               mesh=dict(data=16, fsdp=-1, rules=dict(embed=("data", "fsdp"))), loss_chunk=1024)
