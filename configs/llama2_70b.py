"""Llama-2 70B (Touvron et al. 2023, arXiv:2307.09288) on a slice of TPU v5p-1024 (512 chips), 4 x 4096 tokens a chip.

    lmjax train --config configs/llama2_70b.py --workdir /mnt/runs/llama2_70b
    lmjax plan --config configs/llama2_70b.py --topology v5p-1024

Its plan (jax 0.12.0.1, libtpu 0.0.52): 22.2 .. 24.0 s a step, MFU 63.8% .. 68.9%, 89.1 of 95.74 GiB.
"""

from ml_collections import ConfigDict

from lmjax.pods import pod


def get_config() -> ConfigDict:
    # Replicas along one side of the torus, weights split over the other two: over all three, this compiler gathers
    # them by all-reduce. What replicas sum is only a shard of the gradients.
    return pod("llama2-70b", batch_size=2048, seq_len=4096, tokens=2e12, peak_lr=1.5e-4, remat="query+key+value+kernel",
               mesh=dict(data=8, fsdp=-1))
