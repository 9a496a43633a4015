"""Llama's relatives among the decoders of `lmjax.huggingface.model_types`.

They have RoPE and a gated MLP, and differ in their norms, layers and branches.
"""

from collections.abc import Mapping
from typing import Any

from lmjax.errors import UserError
from lmjax.huggingface.common_settings import ATTENTION_BIAS, MLP_BIAS, MODERN, WINDOW, biases
from lmjax.huggingface.decoder_tables import (
    GLM4_TABLE,
    GLM_TABLE,
    GPT_OSS_TABLE,
    OLMO2_TABLE,
    STABLELM_TABLE,
    STARCODER2_TABLE,
    gpt_oss_experts,
)
from lmjax.huggingface.schema import UNGATED, ModelType, Setting, defaults
from lmjax.huggingface.tables import LLAMA_TABLE
from lmjax.models.config import is_rotated
from lmjax.models.decoder import DecoderConfig

# A class that has one norm before both branches -> our `parallel_residual`.
ONE_NORM = {True: "one_norm", False: "none"}
LAYER_NORM_EPS = Setting("layer_norm_eps", "norm_eps", 1e-5)


def without(rows: tuple[Setting, ...], *names: str) -> tuple[Setting, ...]:
    """`rows` without those of these settings of theirs."""
    return tuple(row for row in rows if row.theirs not in names)


OLMO_SETTINGS = (
    *defaults(MODERN, vocab_size=50304, rms_norm_eps=1e-5), *ATTENTION_BIAS)
OLMO = ModelType(
    "olmo", "OlmoForCausalLM",
    (*without(OLMO_SETTINGS, "rms_norm_eps"),
     Setting("clip_qkv", "qkv_clip", None, also={None: 0.0})),
    LLAMA_TABLE,
    fixed={"norm": "layernorm_plain", "norm_eps": 1e-5},
    prefix="model.")
OLMO2_FIXED = {"norm_position": "after", "qk_norm": True, "qk_norm_over": "all_heads"}
OLMO2 = ModelType(
    "olmo2", "Olmo2ForCausalLM",
    OLMO_SETTINGS,
    OLMO2_TABLE,
    fixed=OLMO2_FIXED,
    prefix="model.")
OLMO3 = ModelType(
    "olmo3", "Olmo3ForCausalLM",
    (*OLMO_SETTINGS, WINDOW),
    OLMO2_TABLE,
    fixed=OLMO2_FIXED,
    prefix="model.",
    is_local=lambda settings, i: (i + 1) % 4 != 0,
    # Its class reads rope_theta for the global layers alone: no setting beside rope_parameters has
    # the theta of the local ones.
    rope={"rope_theta": 500_000.0, "": 500_000.0})


def has_no_rope(settings: Mapping[str, Any], i: int) -> bool:
    """Whether layer i of a SmolLM3 is one without RoPE."""
    listed, interval = settings.get("no_rope_layers"), settings.get("no_rope_layer_interval", 4)
    if listed is not None and len(listed) <= i:
        raise UserError(f"an entry for layer {i}", f"{len(listed)} entries", "correct it",
                        where="no_rope_layers in config.json")
    if listed is not None:
        return not listed[i]
    if not interval:
        raise UserError("1 or more", interval, "correct it",
                        where="no_rope_layer_interval in config.json")
    return (i + 1) % interval == 0


def tell_nope(config: DecoderConfig) -> dict[str, Any]:
    """SmolLM3's list of the layers with RoPE; the config's pattern covers all layers."""
    return {"no_rope_layers": [int(is_rotated(kind)) for kind in config.layer_pattern]}


SMOLLM3 = ModelType(
    "smollm3", "SmolLM3ForCausalLM",
    (*defaults(MODERN, vocab_size=128256, hidden_size=2048, num_hidden_layers=36,
               num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=32768,
               tie_word_embeddings=True),
     *ATTENTION_BIAS, MLP_BIAS, WINDOW._replace(default=None)),
    LLAMA_TABLE,
    prefix="model.",
    neutral=("use_sliding_window", "no_rope_layers", "no_rope_layer_interval"),
    rope={"rope_theta": 2_000_000.0},
    is_local=lambda settings, i: (bool(settings.get("use_sliding_window"))
                                  and settings.get("sliding_window") is not None
                                  and has_no_rope(settings, i)),
    nope=lambda settings, i, local: has_no_rope(settings, i),
    tell=tell_nope)
MINISTRAL = ModelType(
    "ministral", "MinistralForCausalLM",
    (*defaults(MODERN, intermediate_size=14336, num_key_value_heads=8,
               max_position_embeddings=131072), WINDOW),
    LLAMA_TABLE,
    prefix="model.",
    is_local=lambda settings, i: settings.get("sliding_window", 4096) is not None)
STARCODER2 = ModelType(
    "starcoder2", "Starcoder2ForCausalLM",
    (*without(defaults(MODERN, vocab_size=49152, hidden_size=3072, num_hidden_layers=30,
                       num_attention_heads=24, intermediate_size=12288, num_key_value_heads=2,
                       max_position_embeddings=4096, tie_word_embeddings=True),
              "rms_norm_eps", "hidden_act"),
     Setting("hidden_act", "mlp", "gelu_pytorch_tanh", only=UNGATED),
     Setting("norm_epsilon", "norm_eps", 1e-5),
     *biases("use_bias", True),
     WINDOW._replace(default=None)),
    STARCODER2_TABLE,
    fixed={"norm": "layernorm"},
    prefix="model.",
    neutral=("residual_dropout", "embedding_dropout", "layer_norm_epsilon", "mlp_type", "norm_type",
             "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "scale_attn_weights"),
    is_local=lambda settings, i: True,
    reads_layer_types=False)
STABLELM = ModelType(
    "stablelm", "StableLmForCausalLM",
    (*without(defaults(MODERN, vocab_size=50304, intermediate_size=6912, hidden_size=2560,
                       num_key_value_heads=32, max_position_embeddings=4096),
              "rms_norm_eps", "head_dim"),
     LAYER_NORM_EPS,
     Setting("use_qkv_bias", "qkv_bias", False),
     Setting("qk_layernorm", "qk_norm", False),
     Setting("use_parallel_residual", "parallel_residual", False, only=ONE_NORM)),
    STABLELM_TABLE,
    fixed={"norm": "layernorm", "qk_norm_over": "each_head", "qk_norm_kind": "layernorm_no_bias"},
    prefix="model.",
    neutral=("hidden_dropout",),
    rotary=("partial_rotary_factor", 0.25))

COHERE_SETTINGS = (
    *without(defaults(MODERN, vocab_size=256000, hidden_size=8192, intermediate_size=22528,
                      num_hidden_layers=40, num_attention_heads=64, max_position_embeddings=8192,
                      tie_word_embeddings=True), "rms_norm_eps"),
    *ATTENTION_BIAS, LAYER_NORM_EPS,
    Setting("logit_scale", "logit_divisor", 0.0625, power=-1))
COHERE_FIXED = {"norm": "layernorm_no_bias", "parallel_residual": "one_norm"}
COHERE = ModelType(
    "cohere", "CohereForCausalLM",
    (*COHERE_SETTINGS, Setting("use_qk_norm", "qk_norm", False)),
    LLAMA_TABLE,
    fixed=COHERE_FIXED | {"qk_norm_over": "each_head", "qk_norm_kind": "layernorm_no_bias"},
    prefix="model.",
    rope={"rope_theta": 500_000.0},
    interleaved=True)
COHERE2 = ModelType(
    "cohere2", "Cohere2ForCausalLM",
    (*COHERE_SETTINGS, WINDOW),
    LLAMA_TABLE,
    fixed=COHERE_FIXED,
    prefix="model.",
    neutral=("sliding_window_pattern",  # read by `is_local`
             "layer_switch", "order_of_interleaved_layers", "position_embedding_type", "rotary_pct",
             "use_embedding_sharing", "use_gated_activation", "use_parallel_block",
             "use_parallel_embedding"),
    is_local=lambda settings, i: (i + 1) % settings.get("sliding_window_pattern", 4) != 0,
    nope=lambda settings, i, local: not local,
    interleaved=True)

GLM_SETTINGS = (
    *defaults(MODERN, vocab_size=151552, intermediate_size=13696, num_hidden_layers=40,
              num_key_value_heads=2, head_dim=128, max_position_embeddings=131072,
              rms_norm_eps=1.5625e-07),
    Setting("attention_bias", "qkv_bias", True))
GLM = ModelType(
    "glm", "GlmForCausalLM",
    GLM_SETTINGS,
    GLM_TABLE,
    prefix="model.",
    rotary=("partial_rotary_factor", 0.5),
    interleaved=True)
GLM4 = ModelType(
    "glm4", "Glm4ForCausalLM",
    GLM_SETTINGS,
    GLM4_TABLE,
    fixed={"norm_position": "both"},
    prefix="model.",
    rotary=("partial_rotary_factor", 0.5),
    interleaved=True)
GPT_OSS = ModelType(
    "gpt_oss", "GptOssForCausalLM",
    (*without(defaults(MODERN, vocab_size=201088, hidden_size=2880, intermediate_size=2880,
                       num_hidden_layers=36, num_attention_heads=64, num_key_value_heads=8,
                       head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5),
              "hidden_act"),
     *defaults(ATTENTION_BIAS, attention_bias=True),
     WINDOW._replace(default=128),
     Setting("num_local_experts", "moe.experts", 128, alias="num_experts"),
     Setting("num_experts_per_tok", "moe.per_token", 4),
     Setting("swiglu_alpha", "", 1.702),
     Setting("swiglu_limit", "", 7.0)),
    GPT_OSS_TABLE,
    fixed={"mlp": "swiglu_clamped", "moe.bias": True, "attention_sinks": True},
    prefix="model.",
    neutral=("hidden_act", "experts_per_token", "initial_context_length"),
    is_local=lambda settings, i: i % 2 == 0,
    rope={"rope_theta": 150_000.0},
    default_rope={"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                  "truncate": False, "original_max_position_embeddings": 4096},
    by_config=gpt_oss_experts)
