"""Llama 3 70B (Grattafiori et al. 2024, arXiv:2407.21783) on a slice of TPU v5p-512 (256 chips), 8192 tokens a chip.

    lmjax train --config configs/llama3_70b.py --workdir /mnt/runs/llama3_70b
    lmjax plan --config configs/llama3_70b.py --topology v5p-512
    lmjax plan --config configs/llama3_70b.py:v6e --topology v6e-256

`configs/llama3_70b.py:v6e` is the same on v6e-256.
"""

from ml_collections import ConfigDict

from lmjax.pods import pod

TOKENS = 15e12  # of the paper


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "v6e"):
        raise ValueError(f"configs/llama3_70b.py: expected no variant or v6e, got {variant!r}; leave it out")
    v6e = variant == "v6e"
    return pod("llama3-70b", batch_size=256, seq_len=8192, tokens=TOKENS, peak_lr=1.5e-4, loss_chunk=1024,
               remat="full" if v6e else "attention",
               mesh=dict(data=16 if v6e else 4, fsdp=-1, rules=dict(embed=("data", "fsdp"))))
