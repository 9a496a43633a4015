"""Finds answers in the source of Python's functions, with the BERT of configs/bert.py.

    lmjax train --config configs/bert.py --workdir runs/bert
    python examples/python_questions.py runs/data/python-questions.jsonl
    lmjax train --config configs/tasks/questions.py --workdir runs/questions

The corpus is made of the standard library of the interpreter, so nothing is downloaded. For SQuAD,
set config.data.sources to its files: the columns have the same names.
`configs/tasks/questions.py:tiny` is the same recipe, made small for tests; it starts from
`runs/bert-tiny`.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError("configs/tasks/questions.py: expected no variant or tiny, got "
                         f"{variant!r}; leave it out")
    config = ConfigDict()
    config.task = dict(
        name="questions",
        stride=64,  # a quarter of a row: some window has almost every answer whole
        max_question=32,  # none here is longer
        max_answer=16,  # of the answers here, 99% have at most 9 tokens
    )
    config.model = dict(family="encoder")  # the rest is that of the model it starts from
    config.data = dict(
        sources=[dict(name="python-questions", uri="jsonl:runs/data/python-questions.jsonl")],
        seq_len=256,  # as in pretraining: longer contexts become several windows
        heldout_fraction=0.2,  # of few examples: enough for figures to a percent
    )
    config.optimizer = dict(
        name="adamw",
        peak_lr=1e-3,  # a few times the rate for models of full size: this one is narrow
        schedule="linear",
        warmup_steps=50,
        weight_decay=0.01,  # BERT's
        clip_norm=1.0,
    )
    config.train = dict(
        init_from="runs/bert",
        steps=800,  # almost three times over the rows
        batch_size=16,
    )
    config.eval = dict(
        every=100,
        metric="f1",
    )
    config.checkpoint = dict(every=100, keep_best=True)
    if variant == "tiny":
        config.task.update(stride=16, max_question=24)
        config.data.update(seq_len=64)
        config.optimizer.update(warmup_steps=2)
        config.train.update(init_from="runs/bert-tiny", steps=8, batch_size=8)
        config.eval.update(every=4)
        config.checkpoint.update(every=4)
    return config
