"""The model that `lmjax bench` measures on a CPU: 8.4M parameters, 16 rows of 256 tokens per step.

    lmjax bench --config configs/bench.py
    lmjax bench --config configs/bench.py:gpt2
    lmjax bench generate --config configs/bench.py:gpt2-small
    lmjax bench score --config configs/bench.py:gpt2-small

The data is synthetic, so that the benchmark runs anywhere. `configs/bench.py:gpt2` has learned
positions, LayerNorm, biases and GELU instead of RoPE, RMSNorm and SwiGLU.
`configs/bench.py:gpt2-small` is the smallest GPT-2, with 124M parameters.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "gpt2", "gpt2-small"):
        raise ValueError("configs/bench.py: expected no variant, gpt2 or gpt2-small, "
                         f"got {variant!r}; leave it out")
    config = ConfigDict()
    config.model = dict(
        num_layers=4,  # few and narrow, for a CPU
        embed_dim=256,
        num_heads=4,
        mlp_dim=1024,
        vocab_size=8192,  # small enough that the head is not most of the work
    )
    if variant == "gpt2":
        config.model.update(
            positions="learned",
            norm="layernorm",
            use_bias=True,
            mlp="gelu_tanh",
            mlp_dim=1536,  # without a gate, as many weights as 1024 with one
        )
    if variant == "gpt2-small":
        config.model = dict(
            preset="gpt2",
            dropout=0.0,  # generation, which this variant measures, has none
        )
    config.data = dict(
        sources=[dict(name="chain", uri="synthetic")],
        tokenizer=dict(vocab_size=8192),  # the model's
        seq_len=256,
    )
    config.optimizer = dict(
        name="adamw",
        peak_lr=1e-3,  # any rate costs the same time
    )
    config.train = dict(
        steps=1_000_000,  # more than any benchmark reaches; it stops by time
        batch_size=16,
    )
    config.checkpoint = dict(
        every=20,  # often, so that saving is part of what is measured
    )
    return config
