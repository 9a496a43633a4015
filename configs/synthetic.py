"""A tiny decoder on a synthetic Markov chain: needs no corpus, no tokenizer and no TensorFlow.

    lmjax train --config configs/synthetic.py --workdir runs/synthetic
    lmjax train --config configs/synthetic.py:tiny --workdir runs/synthetic-tiny

The entropy of the chain is known, and so is the loss that a perfect model reaches. It takes
seconds on a CPU: a smoke test of a new machine, mesh or kernel. `configs/synthetic.py:tiny` is even
smaller.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/synthetic.py: expected no variant or tiny, got {variant!r}; "
                         "leave it out")
    config = ConfigDict()
    config.model = dict(
        num_layers=2,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=4,  # 4 divides over most small meshes
        mlp_dim=128,
    )
    config.data = dict(
        sources=[dict(name="chain", uri="synthetic")],
        tokenizer=dict(vocab_size=64),  # states of the chain
        seq_len=64,
    )
    config.optimizer = dict(
        name="adamw",
        peak_lr=1e-2,  # high, as the model is tiny
        warmup_steps=10,
    )
    config.train = dict(
        steps=60,  # seconds on a CPU
        batch_size=16,  # divides over 16 devices
    )
    config.eval = dict(every=20, batches=4)
    config.checkpoint = dict(every=20)
    if variant == "tiny":
        config.model.update(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4, mlp_dim=64)
        config.data.update(seq_len=32)
        config.data.tokenizer.update(vocab_size=64)
    return config
