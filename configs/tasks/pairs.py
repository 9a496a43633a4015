"""Writes summaries of Python's functions, with the T5 of configs/t5.py.

    lmjax train --config configs/t5.py --workdir runs/t5
    python examples/python_functions.py summaries runs/data/python-summaries.jsonl
    lmjax train --config configs/tasks/pairs.py --workdir runs/pairs

The corpus is made of the standard library of the interpreter, so nothing is downloaded. A decoder
learns the same with --config.model.family=decoder --config.train.init_from=runs/quickstart. For
pairs of your own, set config.data.sources to files of records, and name their columns in
config.task. `configs/tasks/pairs.py:tiny` is the same recipe, made small for tests; it starts from
`runs/t5-tiny`.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError("configs/tasks/pairs.py: expected no variant or tiny, got "
                         f"{variant!r}; leave it out")
    config = ConfigDict()
    config.task = dict(
        name="pairs",
        input="summarize: {code}",
        target="{summary}",
        target_len=48,  # no summary here is longer than 120 characters
        metric="rouge",
        max_tokens=48,
        eval_examples=128,  # of the held-out ones: writing takes longer than reading
    )
    config.model = dict(family="encdec")  # the rest is that of the model it starts from
    config.data = dict(
        sources=[dict(name="python-summaries", uri="jsonl:runs/data/python-summaries.jsonl")],
        seq_len=256,  # as in pretraining; the code of a function has up to 600 characters
        heldout_fraction=0.1,
    )
    config.optimizer = dict(
        name="adamw",
        peak_lr=1e-3,  # half the rate of pretraining
        schedule="linear",
        warmup_steps=50,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    config.train = dict(
        init_from="runs/t5",
        steps=600,
        batch_size=16,
    )
    config.eval = dict(
        every=100,
        metric="rougeL",
    )
    config.checkpoint = dict(every=100, keep_best=True)
    if variant == "tiny":
        config.task.update(target_len=24, max_tokens=8, eval_examples=8)
        config.data.update(seq_len=64)
        config.optimizer.update(warmup_steps=2)
        config.train.update(init_from="runs/t5-tiny", steps=8, batch_size=8)
        config.eval.update(every=4, batches=2)
        config.checkpoint.update(every=4)
    return config
