"""Learns to add from some sums: a small decoder from random weights, by the task `pairs`.

    python examples/sums.py runs/data/sums
    lmjax train --config configs/tasks/sums.py --workdir runs/sums

It stops while it is still often wrong, as a start for configs/tasks/grpo.py. It takes seconds on a
CPU. `configs/tasks/sums.py:tiny` is the same recipe, made small for tests.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/tasks/sums.py: expected no variant or tiny, got {variant!r}; "
                         "leave it out")
    config = ConfigDict()
    config.task = dict(
        name="pairs",
        input="{question}",
        target="{answer}",
        separator="",  # the question ends with an equals sign
        metric="exact_match",
        max_tokens=4,  # two digits and the end
    )
    config.model = dict(
        num_layers=3,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=4,
        mlp_dim=256,
        scan_layers=False,  # on a CPU, three layers run faster without a scan
    )
    config.data = dict(
        sources=[dict(name="sums", uri="jsonl:runs/data/sums/sums.jsonl")],
        tokenizer=dict(vocab_size=274),  # all bytes, and the digits and signs of the sums
        seq_len=32,
        heldout_fraction=0.2,
    )
    config.optimizer = dict(
        name="muon",  # after 1,000 steps 96% of held-out sums are right; with AdamW under 10%
        peak_lr=1e-2,
        schedule="linear",
        warmup_steps=20,
    )
    config.train = dict(steps=100, batch_size=16)  # two of three held-out sums are right
    config.eval = dict(every=20)
    config.checkpoint = dict(every=100)
    if variant == "tiny":
        config.model.update(num_layers=2, embed_dim=32, mlp_dim=64)
        config.train.update(steps=8, batch_size=8)
        config.optimizer.update(warmup_steps=2)
        config.eval.update(every=4)
        config.checkpoint.update(every=4)
    return config
