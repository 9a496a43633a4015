"""Learns to add by practice: GRPO (arXiv:2402.03300) with a reward for each right sum.

    python examples/sums.py runs/data/sums
    lmjax train --config configs/tasks/sums.py --workdir runs/sums
    lmjax train --config configs/tasks/grpo.py --workdir runs/grpo

The sums are others than those of configs/tasks/sums.py, and the model never sees their answers:
they only decide the reward. It takes a minute or two on two CPU cores. `configs/tasks/grpo.py:tiny`
is the same recipe, made small for tests; it starts from `runs/sums-tiny`.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/tasks/grpo.py: expected no variant or tiny, got {variant!r}; "
                         "leave it out")
    config = ConfigDict()
    config.task = dict(
        name="grpo",
        input="{question}",
        target="{answer}",
        separator="",
        rewards={"exact_match": 1.0},
        group=8,  # a question that is right once in ten tries earns something in most groups
        max_tokens=4,
    )
    config.data = dict(
        sources=[dict(name="practice", uri="jsonl:runs/data/sums/practice.jsonl")],
        seq_len=32,
        heldout_fraction=0.2,
    )
    config.optimizer = dict(
        name="adamw",
        peak_lr=3e-4,  # at 1e-3 the model forgets what it could before it learns more
        schedule="linear",
        warmup_steps=10,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    config.train = dict(
        init_from="runs/sums",
        steps=600,
        batch_size=128,  # 16 questions, with 8 answers each
    )
    config.eval = dict(every=100)
    config.checkpoint = dict(every=100)
    if variant == "tiny":
        config.train.update(init_from="runs/sums-tiny", steps=4, batch_size=16)
        config.optimizer.update(warmup_steps=1)
        config.eval.update(every=2)
        config.checkpoint.update(every=2)
    return config
