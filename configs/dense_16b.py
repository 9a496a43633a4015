"""A dense decoder of 16B parameters on a slice of TPU v5e-256, 6 x 2048 tokens per chip.

    lmjax train --config configs/dense_16b.py --workdir /mnt/runs/dense_16b
    lmjax plan --config configs/dense_16b.py --topology v5e-256
    # 9.12 .. 9.82 s per step, MFU 61.9% .. 66.7%, 14.6 of 15.75 GiB per device

It has 32 layers of width 4096, 64 heads of 128 dimensions and a SwiGLU of width 28,672.
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod


def get_config() -> ConfigDict:
    return pod(
        "llama2-7b",  # its depth, width and vocabulary; the rest is below
        batch_size=1536,  # 3.1M tokens per step
        seq_len=2048,
        tokens=1e12,
        remat="kernel",
        num_heads=64,
        head_dim=128,
        num_kv_heads=64,
        mlp_dim=28672,
        # Weights split over all chips: each of the two axes is one side of the torus.
        mesh=dict(data=16, fsdp=-1, rules=dict(embed=("data", "fsdp"))),
    )
