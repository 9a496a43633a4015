"""Whole config.json files whose switches are drawn at random: sizes, norms, biases, RoPE, layers.

Unlike those of `config_fuzz`, they are meant to be right, so most of them load in transformers.
"""

import json
import random

from config_values import BASES, V

SWITCHES = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "qk_layernorm",
    "use_qk_norm", "use_parallel_residual", "bias", "enable_bias", "multi_query", "parallel_attn",
    "new_decoder_architecture", "do_layer_norm_before", "layer_norm_elementwise_affine")
# Settings by the names of the classes, with values that fit each other.
VALUES = {
    "vocab_size": (V, V + 1, 101, 127),
    "hidden_act": ("silu", "gelu", "gelu_new", "relu", "gelu_pytorch_tanh"),
    "activation_function": ("gelu", "gelu_new", "relu", "silu"),
    "activation": ("gelu", "relu", "gelu_new"),
    "rms_norm_eps": (1e-6, 1e-3), "layer_norm_eps": (1e-5, 1e-3), "norm_epsilon": (1e-5, 1e-3),
    "layer_norm_epsilon": (1e-5, 1e-3),
    "partial_rotary_factor": (0.25, 0.5, 0.75, 1.0), "rotary_pct": (0.25, 0.5, 1.0),
    "rotary_emb_base": (10, 500, 10_000), "rope_theta": (10.0, 500.0, 10_000.0),
    "logit_scale": (0.0625, 0.8, 3.0), "clip_qkv": (None, 0.2, 8.0),
    "sliding_window": (None, 1, 3, 4, 9, 64), "sliding_window_pattern": (1, 2, 3, 4),
    "no_rope_layer_interval": (1, 2, 3, 4), "use_sliding_window": (False, True),
    "num_ln_in_parallel_attn": (None, 1, 2), "num_kv_heads": (None, 1, 2, 4),
    "rotary_dim": (4, 8, 12, 16), "n_inner": (None, 40), "ffn_dim": (40, 64),
    "ffn_hidden_size": (None, 40), "intermediate_size": (40, 64)}
SCALED = (
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "dynamic", "factor": 2.0})


def switched(seed: int, model_types: tuple[str, ...]) -> dict:
    """A config.json, made from the seed alone; the model types take turns."""
    rng = random.Random(seed)
    model_type = model_types[seed % len(model_types)]
    raw = json.loads(json.dumps(BASES[model_type]))
    for name in raw:
        if name in VALUES and rng.random() < 0.5:
            raw[name] = rng.choice(VALUES[name])
        if name in SWITCHES and rng.random() < 0.5:
            raw[name] = not raw[name]
    heads, layers = rng.choice([2, 4, 8]), rng.choice([1, 2, 3, 4])
    for name in ("num_attention_heads", "n_head"):
        if name in raw:
            raw[name] = heads
    for name in ("num_hidden_layers", "n_layer"):
        if name in raw:
            raw[name] = layers
    if "num_key_value_heads" in raw:
        raw["num_key_value_heads"] = rng.choice([n for n in (1, 2, 4, 8) if heads % n == 0])
    if "head_dim" in raw or rng.random() < 0.1:
        raw["head_dim"] = rng.choice([4, 8, 16])
    if "layer_types" in raw or rng.random() < 0.15:
        raw["layer_types"] = [rng.choice(["full_attention", "sliding_attention"])
                              for _ in range(layers)]
    if model_type == "smollm3" and rng.random() < 0.4:
        raw["no_rope_layers"] = [rng.choice([0, 1]) for _ in range(layers)]
    if rng.random() < 0.35:
        raw[rng.choice(["rope_scaling", "rope_parameters"])] = rng.choice(SCALED)
    return raw | {"model_type": model_type}
