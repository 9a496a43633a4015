"""Tags what the names in lines of Python stand for (IOB2), with the BERT of configs/bert.py.

    lmjax train --config configs/bert.py --workdir runs/bert
    python examples/python_tags.py runs/data/python-tags.jsonl
    lmjax train --config configs/tasks/tagging.py --workdir runs/tagging

The corpus is made of the standard library of the interpreter, so nothing is downloaded. For tags of
your own, set config.data.sources to files with the columns `words` and `tags`.
`configs/tasks/tagging.py:tiny` is the same recipe, made small for tests; it starts from
`runs/bert-tiny`.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/tasks/tagging.py: expected no variant or tiny, got {variant!r}; "
                         "leave it out")
    config = ConfigDict()
    config.task = dict(
        name="tagging",
        tokens="words",
        tags="tags",
    )
    config.model = dict(family="encoder")  # the rest is that of the model it starts from
    config.data = dict(
        sources=[dict(name="python-tags", uri="jsonl:runs/data/python-tags.jsonl")],
        seq_len=128,  # a line of code has 17 tokens, so a row holds seven
        heldout_fraction=0.2,  # of few examples: enough for figures to a percent
    )
    config.optimizer = dict(
        name="adamw",
        peak_lr=1e-3,  # a few times the rate for models of full size: this one is narrow
        schedule="linear",
        warmup_steps=30,
        weight_decay=0.01,  # BERT's
        clip_norm=1.0,
    )
    config.train = dict(
        init_from="runs/bert",
        steps=300,  # about six times over the 6,400 lines that train
        batch_size=16,
    )
    config.eval = dict(
        every=50,
        metric="f1",  # of whole entities
    )
    config.checkpoint = dict(every=50, keep_best=True)
    if variant == "tiny":
        config.data.update(seq_len=64)
        config.optimizer.update(warmup_steps=2)
        config.train.update(init_from="runs/bert-tiny", steps=8, batch_size=8)
        config.eval.update(every=4)
        config.checkpoint.update(every=4)
    return config
