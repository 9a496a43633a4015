"""Settings that several decoders of `lmjax.huggingface.model_types` have; defaults are Llama's."""

from lmjax.huggingface.schema import GATED, UNTIED, Setting

SIZES = (
    Setting("vocab_size", "vocab_size", 32000),
    Setting("hidden_size", "embed_dim", 4096),
    Setting("num_hidden_layers", "num_layers", 32),
    Setting("num_attention_heads", "num_heads", 32),
    Setting("intermediate_size", "mlp_dim", 11008),
    Setting("max_position_embeddings", "max_positions", 2048),
)
MODERN = (
    *SIZES,
    Setting("num_key_value_heads", "num_kv_heads", None, also={None: 0}),
    Setting("rms_norm_eps", "norm_eps", 1e-6),
    Setting("hidden_act", "mlp", "silu", only=GATED),
    Setting("head_dim", "head_dim", None, also={None: 0}),
    UNTIED,
)
ATTENTION_BIAS = (Setting("attention_bias", "qkv_bias", False),
                  Setting("attention_bias", "out_bias", False))
MLP_BIAS = Setting("mlp_bias", "mlp_bias", False)
WINDOW = Setting("sliding_window", "sliding_window", 4096, also={None: 0})


def biases(theirs: str, default: bool) -> tuple[Setting, ...]:
    """The rows of one setting for the biases of all matrices of a layer."""
    return tuple(Setting(theirs, ours, default) for ours in ("qkv_bias", "out_bias", "mlp_bias"))
