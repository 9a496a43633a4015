"""Finds functions of Python by their summaries: vectors from the BERT of configs/bert.py.

    lmjax train --config configs/bert.py --workdir runs/bert
    python examples/python_functions.py partners runs/data/python-partners.jsonl
    lmjax train --config configs/tasks/embeddings.py --workdir runs/embeddings

`lm.embed` then gives the vectors. `configs/tasks/embeddings.py:tiny` is the same recipe, made small
for tests; it starts from `runs/bert-tiny`.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/tasks/embeddings.py: expected no variant or tiny, "
                         f"got {variant!r}; leave it out")
    config = ConfigDict()
    config.task = dict(
        name="embeddings",
        first="{first}",
        second="{second}",
    )
    config.model = dict(family="encoder")  # the rest is that of the model it starts from
    config.data = dict(
        sources=[dict(name="python-partners", uri="jsonl:runs/data/python-partners.jsonl")],
        seq_len=192,  # a row holds one text; longer functions are cut
        heldout_fraction=0.2,
    )
    config.optimizer = dict(
        name="adamw",
        peak_lr=5e-4,
        schedule="linear",
        warmup_steps=30,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    config.train = dict(
        init_from="runs/bert",
        steps=300,
        batch_size=32,  # each text is told from 31 others: more is better, and costs memory
    )
    config.eval = dict(every=50, metric="mrr")
    config.checkpoint = dict(every=50, keep_best=True)
    if variant == "tiny":
        config.data.update(seq_len=64)
        config.optimizer.update(warmup_steps=2)
        config.train.update(init_from="runs/bert-tiny", steps=8, batch_size=8)
        config.eval.update(every=4)
        config.checkpoint.update(every=4)
    return config
