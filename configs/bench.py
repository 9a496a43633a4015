"""The shapes that `lmjax bench` is quoted for on a CPU: 8.4M parameters, 4 layers of 256, 16 x 256 tokens.

    lmjax bench --config configs/bench.py
    lmjax bench generate --config configs/bench.py:gpt2-small

Made-up data, so that it runs anywhere. `configs/bench.py:gpt2` has learned positions, LayerNorm, biases and GELU
instead of RoPE, RMSNorm and SwiGLU; `configs/bench.py:gpt2-small` is GPT-2's smallest model, 124M parameters.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "gpt2", "gpt2-small"):
        raise ValueError(f"configs/bench.py: expected no variant, gpt2 or gpt2-small, got {variant!r}; leave it out")
    config = ConfigDict()
    config.model = dict(num_layers=4, embed_dim=256, num_heads=4, mlp_dim=1024, vocab_size=8192)
    if variant == "gpt2":  # 1536 ungated are as many weights as 1024 gated
        config.model.update(positions="learned", norm="layernorm", use_bias=True, mlp="gelu_tanh", mlp_dim=1536)
    if variant == "gpt2-small":
        config.model = dict(preset="gpt2", dropout=0.0)
    config.data = dict(sources=[dict(name="chain", uri="synthetic")], tokenizer=dict(vocab_size=8192), seq_len=256)
    config.optimizer = dict(name="adamw", peak_lr=1e-3)
    config.train = dict(steps=1_000_000, batch_size=16)
    config.checkpoint = dict(every=20)
    return config
