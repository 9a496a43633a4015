"""BERT-large (Devlin et al. 2018, arXiv:1810.04805) on 16 chips of TPU v5e, 64 x 512 tokens a chip.

    lmjax train --config configs/bert_large.py --workdir /mnt/runs/bert_large
    lmjax plan --config configs/bert_large.py --topology v5e-16
    # 0.744 .. 1.17 s a step, MFU 30.7% .. 48.2%, 10.1 of 15.75 GiB a chip
"""

from ml_collections import ConfigDict

from lmjax.training.pods import pod


def get_config() -> ConfigDict:
    # One id is [MASK]. Rows are full from the first step on, where the paper's were of 128 tokens at first.
    config = pod("bert-large", batch_size=1024, seq_len=512, tokens=1.37e11, peak_lr=2e-4, reserved=1,
                 mesh=dict(data=-1), remat="kernel", loss_chunk=128)
    config.train.microbatches = 2
    return config
