"""The Hugging Face model types that lmjax supports: their settings and tensor tables, as data.

The same rows read a config.json into our config and write it back. A setting that has no row is
refused, because it may change what the model computes. Only settings that are empty (null, false,
"", [] or {}) or listed as neutral pass.

A row is Setting(their name, our field, their default); "" as our field means that the setting must
have its default. `lmjax.huggingface.schema` explains the other columns: `also`, `only`, `alias`,
`times` and `plus` of a setting, and `fixed`, `prefix`, `ignore`, `neutral`, `present`, `rope` and
`is_local` of a model type.
"""

from collections.abc import Mapping
from typing import Any

from lmjax.huggingface.schema import ModelType, Setting
from lmjax.huggingface.tables import (
    GEMMA_TABLE,
    GPT2_TABLE,
    LLAMA_TABLE,
    MIXTRAL_TABLE,
    QWEN_MOE_TABLE,
    T5_TABLE,
    T5_UNGATED,
    bert_table,
    marian_table,
    modernbert_table,
)
from lmjax.huggingface.weights import Stored
from lmjax.models.encdec import EncDecConfig
from lmjax.models.encoder import EncoderConfig

# Their activation -> our MLP, with and without a gate.
GATED = {
    "silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu",
    "gelu": "geglu_erf"}
UNGATED = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu",
    "silu": "silu", "swish": "silu"}

# Decoders

MODERN = (
    Setting("vocab_size", "vocab_size"),
    Setting("hidden_size", "embed_dim"),
    Setting("num_hidden_layers", "num_layers"),
    Setting("num_attention_heads", "num_heads"),
    Setting("num_key_value_heads", "num_kv_heads", None, also={None: 0}),
    Setting("intermediate_size", "mlp_dim"),
    Setting("max_position_embeddings", "max_positions"),
    Setting("rms_norm_eps", "norm_eps", 1e-6),
    Setting("hidden_act", "mlp", "silu", only=GATED),
)
HEAD_DIM = Setting("head_dim", "head_dim", None, also={None: 0})
# Both read tie_word_embeddings. Where config.json leaves it out, UNTIED means that the embeddings
# are not tied, and TIED that they are.
UNTIED = Setting("tie_word_embeddings", "tie_embeddings", False)
TIED = UNTIED._replace(default=True)
NO_ATTENTION_BIAS = Setting("attention_bias", "", False)
WINDOW = Setting("sliding_window", "sliding_window", 4096, also={None: 0})

LLAMA = ModelType(
    "llama", "LlamaForCausalLM",
    (*MODERN, HEAD_DIM, UNTIED, NO_ATTENTION_BIAS, Setting("mlp_bias", "", False)),
    LLAMA_TABLE,
    prefix="model.")
MISTRAL = ModelType(
    "mistral", "MistralForCausalLM",
    (*MODERN, HEAD_DIM, UNTIED, WINDOW),
    LLAMA_TABLE,
    prefix="model.",
    is_local=lambda settings, i: True)
MIXTRAL = ModelType(
    "mixtral", "MixtralForCausalLM",
    (*MODERN, HEAD_DIM, UNTIED, WINDOW._replace(default=None),
     Setting("num_local_experts", "moe.experts", 8),
     Setting("num_experts_per_tok", "moe.per_token", 2)),
    MIXTRAL_TABLE,
    prefix="model.",
    rope={"rope_theta": 1e6},
    is_local=lambda settings, i: True)


def qwen_is_local(settings: Mapping[str, Any], i: int) -> bool:
    """Whether layer i of a Qwen model has the window: the later layers have it, if any has."""
    return bool(settings.get("use_sliding_window")) and i >= settings.get("max_window_layers", 28)


QWEN_SETTINGS = (*MODERN, UNTIED, WINDOW)
QWEN_MOE_SETTINGS = (
    Setting("num_experts", "moe.experts", alias="num_local_experts"),
    Setting("num_experts_per_tok", "moe.per_token"),
    Setting("moe_intermediate_size", "moe.mlp_dim"),
    Setting("norm_topk_prob", "moe.normalize", False),
    Setting("decoder_sparse_step", "", 1),
    Setting("mlp_only_layers", "", []),
)
# All four: use_sliding_window is neutral only because `qwen_is_local` reads it.
QWEN2 = ModelType(
    "qwen2", "Qwen2ForCausalLM",
    QWEN_SETTINGS,
    LLAMA_TABLE,
    fixed={"qkv_bias": True},
    prefix="model.",
    neutral=("use_sliding_window",),
    is_local=qwen_is_local)
QWEN3 = ModelType(
    "qwen3", "Qwen3ForCausalLM",
    (*QWEN_SETTINGS, HEAD_DIM._replace(default=128), NO_ATTENTION_BIAS),
    LLAMA_TABLE,
    fixed={"qk_norm": True},
    prefix="model.",
    neutral=("use_sliding_window",),
    is_local=qwen_is_local)
QWEN2_MOE = ModelType(
    "qwen2_moe", "Qwen2MoeForCausalLM",
    (*QWEN_SETTINGS, *QWEN_MOE_SETTINGS,
     Setting("shared_expert_intermediate_size", "moe.shared_dim"),
     Setting("qkv_bias", "qkv_bias", True)),
    QWEN_MOE_TABLE,
    fixed={"moe.shared_gate": True},
    prefix="model.",
    neutral=("use_sliding_window",),
    is_local=qwen_is_local)
QWEN3_MOE = ModelType(
    "qwen3_moe", "Qwen3MoeForCausalLM",
    (*QWEN_SETTINGS, HEAD_DIM, NO_ATTENTION_BIAS, *QWEN_MOE_SETTINGS),
    QWEN_MOE_TABLE,
    fixed={"qk_norm": True},
    prefix="model.",
    neutral=("use_sliding_window",),
    is_local=qwen_is_local)

GEMMA_SETTINGS = (
    *(setting for setting in MODERN if setting.ours != "mlp"),
    Setting("hidden_activation", "mlp", "gelu_pytorch_tanh", only=GATED),
    HEAD_DIM._replace(default=256),
    TIED,
    NO_ATTENTION_BIAS,
    WINDOW,
    Setting("query_pre_attn_scalar", "query_scalar", 256),
    Setting("use_bidirectional_attention", "", False),
)
GEMMA_FIXED = {"norm": "rmsnorm_1p", "norm_position": "both", "scale_embeddings": True}
GEMMA2 = ModelType(
    "gemma2", "Gemma2ForCausalLM",
    (*GEMMA_SETTINGS,
     Setting("attn_logit_softcapping", "attention_softcap", 50.0, also={None: 0.0}),
     Setting("final_logit_softcapping", "logit_softcap", 30.0, also={None: 0.0})),
    GEMMA_TABLE,
    fixed=GEMMA_FIXED,
    prefix="model.",
    neutral=("hidden_act", "sliding_window_size"),
    is_local=lambda settings, i: i % 2 == 0)
GEMMA3 = ModelType(
    "gemma3_text", "Gemma3ForCausalLM",
    (*GEMMA_SETTINGS,
     Setting("attn_logit_softcapping", "", None),
     Setting("final_logit_softcapping", "", None)),
    GEMMA_TABLE,
    fixed=GEMMA_FIXED | {"qk_norm": True},
    prefix="model.",
    neutral=("hidden_act",
             "sliding_window_pattern",  # read by `is_local`
             "_sliding_window_pattern"),
    rope={"rope_theta": 1e6, "rope_local_base_freq": 10_000.0},
    is_local=lambda settings, i: (i + 1) % settings.get("sliding_window_pattern", 6) != 0)

GPT2 = ModelType(
    "gpt2", "GPT2LMHeadModel",
    (Setting("vocab_size", "vocab_size", 50257),
     Setting("n_embd", "embed_dim", 768),
     Setting("n_layer", "num_layers", 12),
     Setting("n_head", "num_heads", 12),
     Setting("n_inner", "mlp_dim", None),
     Setting("n_positions", "max_positions", 1024),
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
    rope={})

# Encoders

BERT_LIKE = (
    Setting("vocab_size", "vocab_size", 30522),
    Setting("hidden_size", "embed_dim", 768),
    Setting("num_hidden_layers", "num_layers", 12),
    Setting("num_attention_heads", "num_heads", 12),
    Setting("intermediate_size", "mlp_dim", 3072),
    Setting("hidden_act", "mlp", "gelu", only=UNGATED),
    Setting("type_vocab_size", "token_types", 2),
    Setting("layer_norm_eps", "norm_eps", 1e-12),
    TIED,
    Setting("position_embedding_type", "", "absolute"),
    Setting("is_decoder", "", False),
    Setting("add_cross_attention", "", False),
)
BERT_FIXED = {
    "positions": "learned", "norm": "layernorm", "norm_position": "post", "embedding_norm": "own",
    "use_bias": True}
BERT = ModelType(
    "bert", "BertForMaskedLM",
    (*BERT_LIKE, Setting("max_position_embeddings", "max_positions", 512)),
    bert_table("bert", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
               "cls.predictions.bias", "cls.predictions.decoder.weight"),
    untied={"head_bias": Stored("cls.predictions.decoder.bias")},
    tied=(("cls.predictions.bias", "cls.predictions.decoder.bias"),),
    fixed=BERT_FIXED,
    prefix="bert.",
    ignore=(r"cls\.seq_relationship\..*",),
    neutral=("directionality", "pooler_fc_size", "pooler_num_attention_heads",
             "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
    present={"mlm_head": ("cls.predictions.transform.dense.weight", True, False),
             "pooler": ("bert.pooler.dense.weight", True, False)},
    config=EncoderConfig,
    rope={})
ROBERTA = ModelType(
    "roberta", "RobertaForMaskedLM",
    (*BERT_LIKE,
     # Theirs counts the two rows before position 0, which `position_offset` adds in ours.
     Setting("max_position_embeddings", "max_positions", 514, plus=2),
     Setting("pad_token_id", "", 1)),
    bert_table("roberta", "lm_head.dense", "lm_head.layer_norm", "lm_head.bias",
               "lm_head.decoder.weight"),
    untied={"head_bias": Stored("lm_head.decoder.bias")},
    tied=(("lm_head.bias", "lm_head.decoder.bias"),),
    fixed=BERT_FIXED | {"position_offset": 2},
    prefix="roberta.",
    present={"mlm_head": ("lm_head.dense.weight", True, False),
             "pooler": ("roberta.pooler.dense.weight", True, False)},
    config=EncoderConfig,
    rope={})
MODERNBERT = ModelType(
    "modernbert", "ModernBertForMaskedLM",
    (*(setting for setting in MODERN if setting.ours not in ("num_kv_heads", "norm_eps", "mlp")),
     Setting("hidden_activation", "mlp", "gelu", only=GATED),
     Setting("classifier_activation", "", "gelu"),
     Setting("rope_scaling", "", None),
     # Theirs: 128 = 64 tokens on each side. Ours: 65 = 64 tokens on a side, and the token itself.
     Setting("local_attention", "sliding_window", 128, times=2, plus=-2),
     Setting("norm_eps", "norm_eps", 1e-5),
     TIED,
     Setting("decoder_bias", "", True)),
    modernbert_table(),
    fixed={"norm": "layernorm_no_bias", "embedding_norm": "first"},
    prefix="model.",
    neutral=("classifier_pooling", "embedding_dropout",
             "global_attn_every_n_layers",  # read by `is_local`
             "initializer_cutoff_factor", "layer_norm_eps", "mlp_dropout",
             "position_embedding_type", "reference_compile", "repad_logits_with_grad",
             "sparse_pred_ignore_index"),
    present={"mlm_head": ("head.dense.weight", True, False)},
    config=EncoderConfig,
    is_local=lambda settings, i: i % settings.get("global_attn_every_n_layers", 3) != 0,
    rope={"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0})

# Encoder-decoders

T5 = ModelType(
    "t5", "T5ForConditionalGeneration",
    (Setting("vocab_size", "vocab_size"),
     Setting("d_model", "embed_dim"),
     Setting("d_kv", "head_dim"),
     Setting("d_ff", "mlp_dim"),
     Setting("num_layers", "num_encoder_layers"),
     Setting("num_decoder_layers", "num_layers", None),
     Setting("num_heads", "num_heads"),
     Setting("relative_attention_num_buckets", "relative_buckets", 32),
     Setting("relative_attention_max_distance", "relative_distance", 128),
     Setting("layer_norm_epsilon", "norm_eps", 1e-6),
     Setting("feed_forward_proj", "mlp", "relu",
             only={"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}),
     Setting("is_encoder_decoder", "", True),
     Setting("scale_decoder_outputs", "scale_output", None)),
    T5_TABLE,
    ungated=T5_UNGATED,
    fixed={"positions": "relative", "query_scalar": 1.0},
    shared=(("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),),
    # In some files, although T5's cross-attention has no position bias.
    ignore=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    neutral=("dense_act_fn", "is_gated_act",
             "tie_word_embeddings",  # read where scale_decoder_outputs is missing
             "n_positions"),
    present={"tie_embeddings": ("lm_head.weight", False, True)},
    config=EncDecConfig,
    rope={})
# Where two settings have the same field of ours, such as the heads and the MLP of the two halves, a
# model in which they differ is refused.
MARIAN = ModelType(
    "marian", "MarianMTModel",
    (Setting("vocab_size", "vocab_size"),
     Setting("decoder_vocab_size", "vocab_size", None),
     Setting("d_model", "embed_dim"),
     Setting("encoder_layers", "num_encoder_layers"),
     Setting("decoder_layers", "num_layers"),
     Setting("encoder_attention_heads", "num_heads"),
     Setting("decoder_attention_heads", "num_heads"),
     Setting("encoder_ffn_dim", "mlp_dim"),
     Setting("decoder_ffn_dim", "mlp_dim"),
     Setting("max_position_embeddings", "max_positions"),
     Setting("activation_function", "mlp", "gelu", only=UNGATED),
     Setting("scale_embedding", "scale_embeddings", False),
     TIED,
     Setting("is_encoder_decoder", "", True),
     Setting("share_encoder_decoder_embeddings", "", True)),
    marian_table(),
    fixed={"positions": "sinusoidal", "norm": "layernorm", "norm_eps": 1e-5,
           "norm_position": "post", "use_bias": True},
    prefix="model.",
    shared=(("model.shared.weight", "model.encoder.embed_tokens.weight",
             "model.decoder.embed_tokens.weight"),),
    neutral=("activation_dropout", "classif_dropout", "decoder_layerdrop", "encoder_layerdrop",
             "extra_pos_embeddings", "init_std", "num_hidden_layers", "static_position_embeddings"),
    present={"output_bias": ("final_logits_bias", True, False)},
    config=EncDecConfig,
    rope={})

# An export without --model-type takes the first of these that can express the whole model.
MODEL_TYPES = {model_type.name: model_type for model_type in (
    LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE, QWEN2_MOE, GEMMA2, GEMMA3, GPT2,
    BERT, ROBERTA, MODERNBERT, T5, MARIAN)}
