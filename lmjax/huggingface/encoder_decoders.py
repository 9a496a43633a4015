"""The encoder-decoders of `lmjax.huggingface.model_types`: T5, BART and their kin."""

from collections.abc import Mapping
from typing import Any

from lmjax.huggingface.schema import TIED, UNGATED, ModelType, Setting, defaults
from lmjax.huggingface.tables import T5_TABLE, T5_UNGATED, bart_table
from lmjax.models.encdec import EncDecConfig

# T5's activation, with the prefix "gated-" if a second matrix gates it -> our MLP.
PROJECTIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu", "swish": "silu",
    "gated-relu": "reglu", "gated-gelu": "geglu", "gated-gelu_new": "geglu", "gated-silu": "swiglu",
    "gated-swish": "swiglu"}


def t5_implied(settings: Mapping[str, Any], default: str) -> dict[str, Any]:
    """What feed_forward_proj says of the two settings that its class derives from it."""
    projection = str(settings.get("feed_forward_proj", default))
    activation = "gelu_new" if projection == "gated-gelu" else projection.split("-")[-1]
    return {"dense_act_fn": activation, "is_gated_act": projection.startswith("gated-")}


T5_SETTINGS = (
    Setting("vocab_size", "vocab_size", 32128),
    Setting("d_model", "embed_dim", 512, alias="hidden_size"),
    Setting("d_kv", "head_dim", 64, alias="head_dim"),
    Setting("d_ff", "mlp_dim", 2048),
    Setting("num_layers", "num_encoder_layers", 6, alias="num_hidden_layers"),
    Setting("num_decoder_layers", "num_layers", None),
    Setting("num_heads", "num_heads", 8, alias="num_attention_heads"),
    Setting("relative_attention_num_buckets", "relative_buckets", 32),
    Setting("relative_attention_max_distance", "relative_distance", 128),
    Setting("layer_norm_epsilon", "norm_eps", 1e-6),
    Setting("feed_forward_proj", "mlp", "relu", only=PROJECTIONS),
    Setting("is_encoder_decoder", "", True))
T5_FIXED = {"positions": "relative", "query_scalar": 1.0}
T5 = ModelType(
    "t5", "T5ForConditionalGeneration",
    (*T5_SETTINGS, Setting("scale_decoder_outputs", "scale_output", None)),
    T5_TABLE,
    ungated=T5_UNGATED,
    fixed=T5_FIXED,
    shared=(("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),),
    # In some files, although T5's cross-attention has no position bias.
    ignore=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    neutral=("tie_word_embeddings",  # read where scale_decoder_outputs is missing
             "n_positions"),
    implied=lambda settings: t5_implied(settings, "relu"),
    present={"tie_embeddings": ("lm_head.weight", False, True)},
    config=EncDecConfig,
    rope={})
MT5 = ModelType(
    "mt5", "MT5ForConditionalGeneration",
    defaults(T5_SETTINGS, vocab_size=250112, d_ff=1024, num_layers=8, num_heads=6,
             feed_forward_proj="gated-gelu"),
    T5_TABLE,
    ungated=T5_UNGATED,
    fixed=T5_FIXED | {"scale_output": False},
    shared=T5.shared,
    ignore=T5.ignore,
    neutral=("tie_word_embeddings", "n_positions"),
    implied=lambda settings: t5_implied(settings, "gated-gelu"),
    present=T5.present,
    config=EncDecConfig,
    rope={})
# Where two settings have the same field of ours, such as the heads and the MLP of the two halves, a
# model in which they differ is refused.
BART_SETTINGS = (
    Setting("vocab_size", "vocab_size", 50265),
    Setting("d_model", "embed_dim", 1024, alias="hidden_size"),
    Setting("encoder_layers", "num_encoder_layers", 12, alias="num_hidden_layers"),
    Setting("decoder_layers", "num_layers", 12),
    Setting("encoder_attention_heads", "num_heads", 16, alias="num_attention_heads"),
    Setting("decoder_attention_heads", "num_heads", 16),
    Setting("encoder_ffn_dim", "mlp_dim", 4096),
    Setting("decoder_ffn_dim", "mlp_dim", 4096),
    Setting("max_position_embeddings", "max_positions", 1024),
    Setting("activation_function", "mlp", "gelu", only=UNGATED),
    Setting("scale_embedding", "scale_embeddings", False),
    TIED,
    Setting("is_encoder_decoder", "", True))
BART_FIXED = {"norm": "layernorm", "norm_eps": 1e-5, "use_bias": True}


def bart(name: str, architecture: str, settings: tuple[Setting, ...], *, neutral: tuple[str, ...],
         biased: bool = True, **fixed: Any) -> ModelType:
    """BART, or a model type that is BART with other norms and positions.

    Args:
      neutral: further settings that change nothing.
      biased: whether files may hold a bias of the logits.
      fixed: fields of ours that all its models have alike.
    """
    return ModelType(
        name, architecture, settings, bart_table(),
        fixed=BART_FIXED | fixed,
        prefix="model.",
        shared=(("model.shared.weight", "model.encoder.embed_tokens.weight",
                 "model.decoder.embed_tokens.weight"),),
        neutral=("activation_dropout", "decoder_layerdrop", "encoder_layerdrop", "init_std",
                 *neutral),
        present={"output_bias": ("final_logits_bias", True, False)} if biased else {},
        config=EncDecConfig,
        rope={})


# Older files of BART say how its norms lie; its class does not read it.
BART_NEUTRAL = ("add_bias_logits", "add_final_layer_norm", "classif_dropout",
                "extra_pos_embeddings", "force_bos_token_to_be_generated", "normalize_before",
                "normalize_embedding", "save_step", "static_position_embeddings")
MARIAN = bart(
    "marian", "MarianMTModel",
    (*defaults(BART_SETTINGS, vocab_size=58101),
     Setting("decoder_vocab_size", "vocab_size", None),
     Setting("share_encoder_decoder_embeddings", "", True)),
    neutral=("classif_dropout", "extra_pos_embeddings", "static_position_embeddings"),
    positions="sinusoidal", norm_position="post")
BART = bart(
    "bart", "BartForConditionalGeneration", BART_SETTINGS, neutral=BART_NEUTRAL,
    positions="learned", position_offset=2, embedding_norm="own", norm_position="post")
MBART = bart(
    "mbart", "MBartForConditionalGeneration", BART_SETTINGS, neutral=BART_NEUTRAL,
    positions="learned", position_offset=2, embedding_norm="own")
PEGASUS = bart(
    "pegasus", "PegasusForConditionalGeneration", BART_SETTINGS, neutral=BART_NEUTRAL,
    positions="sinusoidal")
M2M_100 = bart(
    "m2m_100", "M2M100ForConditionalGeneration",
    (*defaults(BART_SETTINGS, vocab_size=128112, activation_function="relu", scale_embedding=True),
     # Positions are counted from the id of padding on.
     Setting("pad_token_id", "position_offset", 1, plus=-1)),
    neutral=("add_bias_logits", "add_final_layer_norm", "normalize_before", "normalize_embedding",
             "static_position_embeddings"),
    biased=False, positions="sinusoidal_t2t")
