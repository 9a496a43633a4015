"""The Hugging Face model types that lmjax supports: their settings and tensor tables, as data.

The same rows read a config.json into our config and write it back. A setting that has no row is
refused, because it may change what the model computes. Only settings that are empty (null, false,
"", [] or {}) or listed as neutral pass.

A row is Setting(their name, our field, their default); "" as our field means that the setting must
have its default. `lmjax.huggingface.schema` explains the other columns: `also`, `only`, `alias`,
`times` and `plus` of a setting, and `fixed`, `prefix`, `ignore`, `neutral`, `present`, `rope` and
`is_local` of a model type; `lmjax.huggingface.heads` has its classes with the head of a task.
"""

from collections.abc import Mapping
from typing import Any

from lmjax.huggingface.common_settings import ATTENTION_BIAS, MLP_BIAS, MODERN, WINDOW
from lmjax.huggingface.decoders import (
    COHERE,
    COHERE2,
    GLM,
    GLM4,
    GPT_OSS,
    MINISTRAL,
    OLMO,
    OLMO2,
    OLMO3,
    SMOLLM3,
    STABLELM,
    STARCODER2,
)
from lmjax.huggingface.encoder_decoders import BART, M2M_100, MARIAN, MBART, MT5, PEGASUS, T5
from lmjax.huggingface.encoders import (
    ALBERT,
    BERT,
    CAMEMBERT,
    DISTILBERT,
    ELECTRA,
    MODERNBERT,
    ROBERTA,
    XLM_ROBERTA,
)
from lmjax.huggingface.heads import decoder_heads
from lmjax.huggingface.latent_decoders import DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2
from lmjax.huggingface.older_decoders import FALCON, GPT_J, GPT_NEOX, OPT, PHI
from lmjax.huggingface.schema import GATED, TIED, UNGATED, ModelType, Setting, defaults
from lmjax.huggingface.tables import (
    GEMMA_TABLE,
    GPT2_TABLE,
    LLAMA_TABLE,
    MIXTRAL_TABLE,
    PHI3_TABLE,
    QWEN_MOE_TABLE,
)

LLAMA = ModelType(
    "llama", "LlamaForCausalLM",
    (*MODERN, *ATTENTION_BIAS, MLP_BIAS),
    LLAMA_TABLE,
    prefix="model.",
    heads=decoder_heads("Llama", prefix="transformer."))
GRANITE = ModelType(
    "granite", "GraniteForCausalLM",
    (*LLAMA.settings,
     Setting("embedding_multiplier", "embedding_multiplier", 1.0),
     Setting("residual_multiplier", "residual_multiplier", 1.0),
     Setting("logits_scaling", "logit_divisor", 1.0),
     Setting("attention_multiplier", "query_scalar", 1.0, power=-2)),
    LLAMA_TABLE,
    prefix="model.")
MISTRAL_SETTINGS = defaults(
    MODERN, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072)
MISTRAL = ModelType(
    "mistral", "MistralForCausalLM",
    (*MISTRAL_SETTINGS, WINDOW),
    LLAMA_TABLE,
    prefix="model.",
    is_local=lambda settings, i: True,
    reads_layer_types=False,
    heads=decoder_heads("Mistral"))
PHI3 = ModelType(
    "phi3", "Phi3ForCausalLM",
    (*defaults(MODERN, vocab_size=32064, hidden_size=3072, intermediate_size=8192,
               max_position_embeddings=4096, rms_norm_eps=1e-5),
     WINDOW._replace(default=None)),
    PHI3_TABLE,
    prefix="model.",
    is_local=lambda settings, i: True,
    reads_layer_types=False,
    scaling=False,  # its class has longrope, which lmjax does not compute
    rotary=("partial_rotary_factor", 1.0),
    own_code=("configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"),
    heads=decoder_heads("Phi3", only=("classification", "tagging")))
MIXTRAL = ModelType(
    "mixtral", "MixtralForCausalLM",
    (*defaults(MISTRAL_SETTINGS, rms_norm_eps=1e-5), WINDOW._replace(default=None),
     Setting("num_local_experts", "moe.experts", 8, alias="num_experts"),
     Setting("num_experts_per_tok", "moe.per_token", 2)),
    MIXTRAL_TABLE,
    prefix="model.",
    rope={"rope_theta": 1e6},
    is_local=lambda settings, i: True,
    reads_layer_types=False,
    heads=decoder_heads("Mixtral"))


def qwen_is_local(settings: Mapping[str, Any], i: int) -> bool:
    """Whether layer i of a Qwen model has the window: the later layers have it, if any has."""
    return (bool(settings.get("use_sliding_window"))
            and settings.get("sliding_window", 4096) is not None
            and i >= settings.get("max_window_layers", 28))


def qwen2_moe_is_local(settings: Mapping[str, Any], i: int) -> bool:
    """Whether layer i of a Qwen2-MoE model has the window: every second of the earlier layers."""
    return (bool(settings.get("use_sliding_window"))
            and i % 2 == 0 and i < settings.get("max_window_layers", 28))


QWEN_SETTINGS = (
    *defaults(MODERN, vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
              max_position_embeddings=32768), WINDOW)
QWEN_MOE_SETTINGS = (
    Setting("num_experts_per_tok", "moe.per_token", 8),
    Setting("moe_intermediate_size", "moe.mlp_dim", 768),
    Setting("norm_topk_prob", "moe.normalize", False),
    Setting("decoder_sparse_step", "", 1),
    Setting("mlp_only_layers", "", []),
)
# All four: use_sliding_window is neutral only because it decides about the window elsewhere.
QWEN2 = ModelType(
    "qwen2", "Qwen2ForCausalLM",
    QWEN_SETTINGS,
    LLAMA_TABLE,
    fixed={"qkv_bias": True},
    prefix="model.",
    neutral=("use_sliding_window",),
    is_local=qwen_is_local,
    heads=decoder_heads("Qwen2", prefix="transformer."))
QWEN3 = ModelType(
    "qwen3", "Qwen3ForCausalLM",
    (*defaults(QWEN_SETTINGS, head_dim=128), *ATTENTION_BIAS),
    LLAMA_TABLE,
    fixed={"qk_norm": True},
    prefix="model.",
    neutral=("use_sliding_window",),
    is_local=qwen_is_local,
    heads=decoder_heads("Qwen3", prefix="transformer."))
QWEN2_MOE = ModelType(
    "qwen2_moe", "Qwen2MoeForCausalLM",
    (*defaults(QWEN_SETTINGS, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
               num_attention_heads=16, num_key_value_heads=16),
     *defaults(QWEN_MOE_SETTINGS, num_experts_per_tok=4, moe_intermediate_size=1408),
     Setting("num_experts", "moe.experts", 60),
     Setting("shared_expert_intermediate_size", "moe.shared_dim", 5632),
     Setting("qkv_bias", "qkv_bias", True)),
    QWEN_MOE_TABLE,
    fixed={"moe.shared_gate": True},
    prefix="model.",
    neutral=("use_sliding_window",),
    is_local=qwen2_moe_is_local,
    heads=decoder_heads("Qwen2Moe"))
QWEN3_MOE = ModelType(
    "qwen3_moe", "Qwen3MoeForCausalLM",
    (*defaults(QWEN_SETTINGS, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24,
               num_key_value_heads=4),
     *ATTENTION_BIAS, *QWEN_MOE_SETTINGS,
     Setting("num_experts", "moe.experts", 128, alias="num_local_experts")),
    QWEN_MOE_TABLE,
    fixed={"qk_norm": True},
    prefix="model.",
    neutral=("use_sliding_window",),
    is_local=lambda settings, i: bool(settings.get("use_sliding_window")),
    reads_layer_types=False,
    heads=decoder_heads("Qwen3Moe", prefix="transformer."))

GEMMA_ROWS = (
    *defaults(tuple(row for row in MODERN if row.ours != "mlp"), vocab_size=256000, head_dim=256,
              max_position_embeddings=8192, tie_word_embeddings=True),
    *ATTENTION_BIAS,
    Setting("use_bidirectional_attention", "", False),
)
GEMMA_SETTINGS = (
    *defaults(GEMMA_ROWS, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
              num_attention_heads=8, num_key_value_heads=4),
    Setting("hidden_activation", "mlp", "gelu_pytorch_tanh", only=GATED),
    WINDOW,
    Setting("query_pre_attn_scalar", "query_scalar", 256, also={None: 0}),
)
SOFTCAPS = (
    Setting("attn_logit_softcapping", "attention_softcap", 50.0, also={None: 0.0}),
    Setting("final_logit_softcapping", "logit_softcap", 30.0, also={None: 0.0}))
GEMMA1_FIXED = {"norm": "rmsnorm_1p", "scale_embeddings": True}
GEMMA_FIXED = GEMMA1_FIXED | {"norm_position": "both"}
# Gemma 1 was published with "gelu", which its class takes for the approximation by tanh.
GEMMA1_GATED = GATED | {"gelu": "geglu"}
GEMMA = ModelType(
    "gemma", "GemmaForCausalLM",
    (*defaults(GEMMA_ROWS, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
               num_attention_heads=16, num_key_value_heads=16),
     # The versions of transformers read one or the other, so both have to say the same.
     Setting("hidden_act", "mlp", "gelu_pytorch_tanh", only=GEMMA1_GATED),
     Setting("hidden_activation", "mlp", None, only=GEMMA1_GATED | {None: None})),
    LLAMA_TABLE,
    fixed=GEMMA1_FIXED,
    prefix="model.",
    heads=decoder_heads("Gemma", only=("classification", "tagging")))
GEMMA2 = ModelType(
    "gemma2", "Gemma2ForCausalLM",
    (*GEMMA_SETTINGS, *SOFTCAPS),
    GEMMA_TABLE,
    fixed=GEMMA_FIXED,
    prefix="model.",
    neutral=("hidden_act", "sliding_window_size"),
    is_local=lambda settings, i: i % 2 == 0,
    heads=decoder_heads("Gemma2", only=("classification", "tagging")))
GEMMA3 = ModelType(
    "gemma3_text", "Gemma3ForCausalLM",
    (*defaults(GEMMA_SETTINGS, vocab_size=262208, max_position_embeddings=131072),
     *defaults(SOFTCAPS, attn_logit_softcapping=None, final_logit_softcapping=None)),
    GEMMA_TABLE,
    fixed=GEMMA_FIXED | {"qk_norm": True},
    prefix="model.",
    neutral=("hidden_act",
             "sliding_window_pattern",  # read by `is_local`
             "_sliding_window_pattern"),
    rope={"rope_theta": 1e6, "rope_local_base_freq": 10_000.0},
    is_local=lambda settings, i: (i + 1) % settings.get("sliding_window_pattern", 6) != 0,
    heads=decoder_heads("Gemma3Text", only=("classification",)))

GPT2 = ModelType(
    "gpt2", "GPT2LMHeadModel",
    (Setting("vocab_size", "vocab_size", 50257),
     Setting("n_embd", "embed_dim", 768, alias="hidden_size"),
     Setting("n_layer", "num_layers", 12, alias="num_hidden_layers"),
     Setting("n_head", "num_heads", 12, alias="num_attention_heads"),
     Setting("n_inner", "mlp_dim", None),
     Setting("n_positions", "max_positions", 1024, alias="max_position_embeddings"),
     Setting("layer_norm_epsilon", "norm_eps", 1e-5),
     Setting("activation_function", "mlp", "gelu_new", only=UNGATED),
     TIED,
     Setting("scale_attn_weights", "", True),
     Setting("scale_attn_by_inverse_layer_idx", "", False),
     Setting("add_cross_attention", "", False)),
    GPT2_TABLE,
    fixed={"positions": "learned", "norm": "layernorm", "use_bias": True},
    prefix="transformer.",
    ignore=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    rope={},
    heads=decoder_heads("GPT2", tagging="classifier"))

# An export without --model-type takes the first of these that can express the whole model.
MODEL_TYPES = {model_type.name: model_type for model_type in (
    LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE, QWEN2_MOE, GEMMA, GEMMA2, GEMMA3, GRANITE,
    PHI3, GPT2, OLMO, OLMO2, OLMO3, SMOLLM3, MINISTRAL, STARCODER2, STABLELM, COHERE, COHERE2, GLM,
    GLM4, DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2, GPT_OSS, GPT_NEOX, GPT_J, PHI, FALCON, OPT, BERT,
    ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, ELECTRA, ALBERT, MODERNBERT, T5, MT5, MARIAN, BART,
    MBART, PEGASUS, M2M_100)}
