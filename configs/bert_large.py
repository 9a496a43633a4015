"""BERT-large (Devlin et al. 2018, arXiv:1810.04805) on 16 chips of TPU v5e, 64 x 512 tokens a chip.

    lmjax train --config configs/bert_large.py --workdir /mnt/runs/bert_large
    lmjax plan --config configs/bert_large.py --topology v5e-16
"""

from ml_collections import ConfigDict

from lmjax.pods import pod


def get_config() -> ConfigDict:
    # One id is [MASK]. Rows are full from the first step on, where the paper's were of 128 tokens at first.
    return pod("bert-large", batch_size=1024, seq_len=512, tokens=1.37e11, peak_lr=2e-4, reserved=1,
               mesh=dict(data=-1), remat="attention")
