"""Answers questions about Python's functions, with the decoder of configs/quickstart.py.

    lmjax train --config configs/quickstart.py --workdir runs/quickstart
    python examples/python_functions.py chats runs/data/python-chats.jsonl
    lmjax train --config configs/tasks/chat.py --workdir runs/chat
    lmjax chat runs/chat

The corpus is made of the standard library of the interpreter, so nothing is downloaded. For
conversations of your own, set config.data.sources to files of records with a column `messages`,
`conversations` (ShareGPT), or `prompt` and `completion`. `configs/tasks/chat.py:tiny` is the same
recipe, made small for tests; it starts from `runs/tiny`.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError("configs/tasks/chat.py: expected no variant or tiny, got "
                         f"{variant!r}; leave it out")
    config = ConfigDict()
    config.task = dict(
        name="chat",
        template="plain",  # chatml would spend a dozen tokens per turn: the tokenizer lacks its own
        turns="all",
        metric="rouge",  # of the last turn
        max_tokens=48,
        eval_examples=128,  # of the held-out ones: writing takes longer than reading
    )
    config.model = dict(family="decoder")  # the rest is that of the model it starts from
    config.data = dict(
        sources=[dict(name="python-chats", uri="jsonl:runs/data/python-chats.jsonl")],
        seq_len=384,  # two turns about a function of up to 600 characters
        heldout_fraction=0.1,
    )
    config.optimizer = dict(
        name="adamw",
        peak_lr=1e-3,
        schedule="linear",
        warmup_steps=50,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    config.train = dict(
        init_from="runs/quickstart",
        steps=600,
        batch_size=8,
    )
    config.eval = dict(
        every=100,
        metric="rougeL",
    )
    config.checkpoint = dict(every=100, keep_best=True)
    if variant == "tiny":
        config.task.update(max_tokens=8, eval_examples=8)
        config.data.update(seq_len=512)  # with so few tokens, code is long
        config.optimizer.update(warmup_steps=2)
        config.train.update(init_from="runs/tiny", steps=8, batch_size=8)
        config.eval.update(every=4, batches=2)
        config.checkpoint.update(every=4)
    return config
