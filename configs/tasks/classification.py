"""Says whether two words of a Python function changed places, with the BERT of configs/bert.py.

    lmjax train --config configs/bert.py --workdir runs/bert
    python examples/python_functions.py swaps runs/data/python-swaps.jsonl
    lmjax train --config configs/tasks/classification.py --workdir runs/classification

A function has the same words before and after, so that counts of words tell nothing: logistic
regression on them is right half of the time. For examples of your own, set config.data.sources to
files of records, and name their columns in config.task; `pair` is the column of a second text.
`configs/tasks/classification.py:tiny` is the same recipe, made small for tests; it starts from
`runs/bert-tiny`.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/tasks/classification.py: expected no variant or tiny, "
                         f"got {variant!r}; leave it out")
    config = ConfigDict()
    config.task = dict(
        name="classification",
        input="{code}",
        label="label",
    )
    config.model = dict(family="encoder")  # the rest is that of the model it starts from
    config.data = dict(
        sources=[dict(name="python-swaps", uri="jsonl:runs/data/python-swaps.jsonl")],
        seq_len=256,  # as in pretraining; the code of a function has up to 600 characters
        heldout_fraction=0.2,  # of few examples: enough for figures to a few percent
    )
    config.optimizer = dict(
        name="adamw",
        peak_lr=5e-4,  # ten times the rate for models of full size: this one is narrow
        schedule="linear",
        warmup_steps=50,
        weight_decay=0.01,  # BERT's
        clip_norm=1.0,
    )
    config.train = dict(
        init_from="runs/bert",
        steps=400,  # about five times over the 4,000 examples that train
        batch_size=16,
    )
    config.eval = dict(every=50, metric="accuracy")
    config.checkpoint = dict(every=50, keep_best=True)
    if variant == "tiny":
        config.data.update(seq_len=64)
        config.optimizer.update(warmup_steps=2)
        config.train.update(init_from="runs/bert-tiny", steps=8, batch_size=8)
        config.eval.update(every=4)
        config.checkpoint.update(every=4)
    return config
