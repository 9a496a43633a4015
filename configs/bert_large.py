"""BERT-large (Devlin et al. 2018, arXiv:1810.04805) on 16 chips of TPU v5e, 64 x 512 tokens each.

    lmjax train --config configs/bert_large.py --workdir /mnt/runs/bert_large
    lmjax plan --config configs/bert_large.py --topology v5e-16
    # 0.744 .. 1.17 s per step, MFU 30.7% .. 48.2%, 10.1 of 15.75 GiB per device
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod


def get_config() -> ConfigDict:
    config = pod(
        "bert-large",
        batch_size=1024,  # 524k tokens per step
        seq_len=512,  # from the first step; the paper begins with rows of 128 tokens
        tokens=1.37e11,
        peak_lr=2e-4,
        reserved=1,  # the id of [MASK]
        mesh=dict(data=-1),  # the weights fit on each chip, so only gradients travel
        remat="kernel",
        loss_chunk=128,
    )
    config.train.microbatches = 2  # half of the rows at a time leaves room for activations
    return config
