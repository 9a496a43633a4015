"""Llama-2 70B (Touvron et al. 2023, arXiv:2307.09288) on a slice of TPU v5p-1024 (512 chips), 4 x 4096 tokens a chip.

    lmjax train --config configs/llama2_70b.py --workdir /mnt/runs/llama2_70b
    lmjax plan --config configs/llama2_70b.py --topology v5p-1024
    # 18.8 .. 22.5 s a step, MFU 67.9% .. 81.5%, 80.0 of 95.74 GiB a chip
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod


def get_config() -> ConfigDict:
    # Replicas along one side of the torus: weights split over all three would be gathered by all-reduce. What replicas
    # sum is only a shard of the gradients. A quarter of the rows at a time leaves room to keep what the MLP's matmuls
    # made, worth more than gathering the weights four times; halved by `tensor`, those are half as many bytes.
    config = pod("llama2-70b", batch_size=2048, seq_len=4096, tokens=2e12, peak_lr=1.5e-4,
                 remat="query+key+value+kernel+out+gate+up", mesh=dict(data=8, fsdp=-1, tensor=2))
    config.train.microbatches = 4
    return config
