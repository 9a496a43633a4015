"""Llama 3 8B (Grattafiori et al. 2024, arXiv:2407.21783) on a slice of TPU v5e-256, 8192 tokens a chip.

    lmjax train --config configs/llama3_8b.py --workdir /mnt/runs/llama3_8b
    lmjax plan --config configs/llama3_8b.py --topology v5e-256
    # 3.43 .. 3.96 s a step, MFU 54.0% .. 62.4%, 12.6 of 15.75 GiB a chip
    lmjax plan --config configs/llama3_8b.py:v5p --topology v5p-128
    # 5.51 .. 6.30 s a step, MFU 58.3% .. 66.7%, 60.9 of 95.74 GiB a chip
    lmjax plan --config configs/llama3_8b.py:long --topology v5p-128
    # 27.4 .. 29.0 s a step, MFU 36.5% .. 38.5%, 38.0 of 95.74 GiB a chip

`configs/llama3_8b.py:v5p` is the same on v5p-128 (64 chips), 4 x 8192 tokens a chip, and `configs/llama3_8b.py:long`
Llama 3.1 8B on v5p-128 with rows of 131,072 tokens, each over eight chips.
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod

TOKENS = 15e12  # of the paper


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "v5p", "long"):
        raise ValueError(f"configs/llama3_8b.py: expected no variant, v5p or long, got {variant!r}; leave it out")
    if variant == "v5p":  # half of the rows at a time, and all that is worth keeping of them kept
        config = pod("llama3-8b", batch_size=256, seq_len=8192, tokens=TOKENS, mesh=dict(data=4, fsdp=-1),
                     remat="query+key+value+kernel+out+gate+up", loss_chunk=2048)
        config.train.microbatches = 2
        return config
    if variant == "long":  # the later part of a run, in which rows grow; its rate is where that of the first part ended
        return pod("llama3.1-8b", batch_size=16, seq_len=131072, tokens=1e11, peak_lr=3e-5,
                   mesh=dict(data=1, fsdp=-1, context=8), remat="kernel", loss_chunk=2048)
    return pod("llama3-8b", batch_size=256, seq_len=8192, tokens=TOKENS, remat="attention", loss_chunk=2048,
               mesh=dict(data=16, fsdp=-1, rules=dict(embed=("data", "fsdp"))))
