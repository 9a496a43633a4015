"""Learns by DPO to prefer a function's own summary, with the decoder of configs/quickstart.py.

    lmjax train --config configs/quickstart.py --workdir runs/quickstart
    python examples/python_functions.py preferences runs/data/python-preferences.jsonl
    lmjax train --config configs/tasks/preferences.py --workdir runs/preferences

For a reward model, set config.task.kind=reward. `configs/tasks/preferences.py:tiny` is the same
recipe, made small for tests; it starts from `runs/tiny`.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/tasks/preferences.py: expected no variant or tiny, "
                         f"got {variant!r}; leave it out")
    config = ConfigDict()
    config.task = dict(
        name="preferences",
        prompt="{prompt}",
        chosen="{chosen}",
        rejected="{rejected}",
        kind="dpo",
        beta=0.1,  # the usual pull to the model that the run starts from
    )
    config.data = dict(
        sources=[dict(name="python-preferences", uri="jsonl:runs/data/python-preferences.jsonl")],
        seq_len=256,  # as in pretraining
        heldout_fraction=0.2,
    )
    config.optimizer = dict(
        name="adamw",
        peak_lr=1e-4,  # small: each step moves both likelihoods, and they fall if it is large
        schedule="linear",
        warmup_steps=20,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    config.train = dict(
        init_from="runs/quickstart",
        steps=200,
        batch_size=16,  # pairs: twice as many rows go through the model
    )
    config.eval = dict(every=50, metric="accuracy")
    config.checkpoint = dict(every=50, keep_best=True)
    if variant == "tiny":
        config.data.update(seq_len=64)
        config.optimizer.update(warmup_steps=2)
        config.train.update(init_from="runs/tiny", steps=8, batch_size=8)
        config.eval.update(every=4)
        config.checkpoint.update(every=4)
    return config
