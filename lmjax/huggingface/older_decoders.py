"""The decoders between GPT-2 and Llama: GPT-NeoX, GPT-J, Phi, Falcon and OPT.

They have LayerNorm, an MLP without a gate, and (all but OPT) branches that run side by side.
"""

from collections.abc import Mapping
from typing import Any

from lmjax.errors import UserError
from lmjax.huggingface.common_settings import SIZES, biases
from lmjax.huggingface.decoder_tables import (
    FALCON_TABLE,
    GPTJ_TABLE,
    NEOX_TABLE,
    OPT_TABLE,
    PHI_TABLE,
    falcon_norms,
)
from lmjax.huggingface.schema import TIED, UNGATED, UNTIED, ModelType, Setting, defaults
from lmjax.models.decoder import DecoderConfig

LAYER_NORM_EPS = Setting("layer_norm_eps", "norm_eps", 1e-5)
GPT_NEOX = ModelType(
    "gpt_neox", "GPTNeoXForCausalLM",
    (*defaults(SIZES, vocab_size=50432, hidden_size=6144, num_hidden_layers=44,
               num_attention_heads=64, intermediate_size=24576),
     Setting("hidden_act", "mlp", "gelu", only=UNGATED),
     LAYER_NORM_EPS, UNTIED,
     Setting("use_parallel_residual", "parallel_residual", True,
             only={True: "own_norms", False: "none"}),
     Setting("attention_bias", "qkv_bias", True),
     Setting("attention_bias", "out_bias", True)),
    NEOX_TABLE,
    fixed={"norm": "layernorm", "mlp_bias": True},
    shared=(("embed_out.weight", "lm_head.weight"),),
    prefix="gpt_neox.",
    ignore=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)",),
    neutral=("hidden_dropout",),
    rope={"rotary_emb_base": 10_000.0},
    rotary=("rotary_pct", 0.25),
    grouped=True)
PHI = ModelType(
    "phi", "PhiForCausalLM",
    (*defaults(SIZES, vocab_size=51200, hidden_size=2048, intermediate_size=8192,
               num_hidden_layers=24),
     Setting("num_key_value_heads", "num_kv_heads", None, also={None: 0}),
     Setting("hidden_act", "mlp", "gelu_new", only=UNGATED),
     LAYER_NORM_EPS, UNTIED,
     Setting("qk_layernorm", "qk_norm", False)),
    PHI_TABLE,
    fixed={"norm": "layernorm", "use_bias": True, "output_bias": True, "qk_norm_kind": "layernorm",
           "parallel_residual": "one_norm"},
    prefix="model.",
    rotary=("partial_rotary_factor", 0.5))


def gptj_rotation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of each head that GPT-J rotates, from its number of dimensions."""
    embed_dim = settings.get("n_embd", settings.get("hidden_size", 4096))
    num_heads = settings.get("n_head", settings.get("num_attention_heads", 16))
    if settings.get("rotary_dim", 64) is None:
        raise UserError("a number of dimensions", "null", "lmjax rotates a part of each head",
                        where="rotary_dim in config.json")
    return {"rotary_fraction": settings.get("rotary_dim", 64) / (embed_dim // num_heads)}


GPT_J = ModelType(
    "gptj", "GPTJForCausalLM",
    (Setting("vocab_size", "vocab_size", 50400),
     Setting("n_embd", "embed_dim", 4096, alias="hidden_size"),
     Setting("n_layer", "num_layers", 28, alias="num_hidden_layers"),
     Setting("n_head", "num_heads", 16, alias="num_attention_heads"),
     Setting("n_inner", "mlp_dim", None),
     Setting("n_positions", "max_positions", 2048, alias="max_position_embeddings"),
     Setting("layer_norm_epsilon", "norm_eps", 1e-5),
     Setting("activation_function", "mlp", "gelu_new", only=UNGATED),
     UNTIED),
    GPTJ_TABLE,
    fixed={"norm": "layernorm", "mlp_bias": True, "output_bias": True, "rope_theta": 10_000.0,
           "parallel_residual": "one_norm"},
    prefix="transformer.",
    ignore=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)",),
    neutral=("rotary_dim",  # read by `gptj_rotation`
             "rotary", "scale_attn_weights"),
    rope={},
    interleaved=True,
    told=gptj_rotation,
    tell=lambda config: {"rotary_dim": config.rotary_dim})


def falcon_shape(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The key heads and the branches of a Falcon: those of 7B, of 40B or of 11B."""
    heads, kv_heads = settings.get("num_attention_heads", 71), settings.get("num_kv_heads")
    new, parallel = (bool(settings.get(name, default)) for name, default in (
        ("new_decoder_architecture", False), ("parallel_attn", True)))
    if not new:
        kv_heads = 1 if settings.get("multi_query", True) else heads
    norms = settings.get("num_ln_in_parallel_attn")
    norms = (2 if new else 1) if norms is None else norms
    # Other combinations have parts that their class does not build.
    sides = {(True, True, 2): "own_norms", (True, True, 1): "one_norm",
             (False, True, 1): "one_norm", (False, False, norms): "none"}
    return {"num_kv_heads": heads if kv_heads is None else kv_heads,
            "parallel_residual": sides.get((new, parallel, norms), "norms of another number")}


def tell_falcon(config: DecoderConfig) -> dict[str, Any]:
    """The settings of `falcon_shape`."""
    dims, sides = config.dims, config.parallel_residual
    one, all_heads = dims.num_kv_heads == 1, dims.num_kv_heads == dims.num_heads
    new = sides == "own_norms" or (sides == "one_norm" and not one and not all_heads)
    return {"num_kv_heads": dims.num_kv_heads, "new_decoder_architecture": new,
            "multi_query": one and not new, "parallel_attn": sides != "none",
            "num_ln_in_parallel_attn": 2 if sides == "own_norms" else 1}


FALCON = ModelType(
    "falcon", "FalconForCausalLM",
    (Setting("vocab_size", "vocab_size", 65024),
     Setting("hidden_size", "embed_dim", 4544),
     Setting("num_hidden_layers", "num_layers", 32),
     Setting("num_attention_heads", "num_heads", 71),
     Setting("ffn_hidden_size", "mlp_dim", None),
     Setting("max_position_embeddings", "max_positions", 2048),
     Setting("layer_norm_epsilon", "norm_eps", 1e-5),
     Setting("activation", "mlp", "gelu", only=UNGATED),
     *biases("bias", False),
     Setting("alibi", "", False),
     TIED),
    FALCON_TABLE,
    fixed={"norm": "layernorm"},
    prefix="transformer.",
    neutral=("num_kv_heads", "multi_query", "new_decoder_architecture", "parallel_attn",
             "num_ln_in_parallel_attn",  # all five are read by `falcon_shape`
             "hidden_dropout"),
    own_code=("configuration_falcon.FalconConfig", "modeling_falcon.FalconModel",
              "modeling_falcon.FalconForCausalLM", "modeling_falcon.FalconForQuestionAnswering",
              "modeling_falcon.FalconForSequenceClassification",
              "modeling_falcon.FalconForTokenClassification"),
    grouped=True,
    told=falcon_shape,
    tell=tell_falcon,
    by_config=falcon_norms)
OPT = ModelType(
    "opt", "OPTForCausalLM",
    (*defaults(tuple(row for row in SIZES if row.ours != "mlp_dim"), vocab_size=50272,
               hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
     Setting("ffn_dim", "mlp_dim", 3072),
     Setting("activation_function", "mlp", "relu", only=UNGATED),
     Setting("do_layer_norm_before", "norm_position", True, only={True: "pre", False: "post"}),
     Setting("layer_norm_elementwise_affine", "norm", True,
             only={True: "layernorm", False: "layernorm_plain"}),
     *biases("enable_bias", True),
     Setting("_remove_final_layer_norm", "", False),
     Setting("word_embed_proj_dim", "embed_dim", None),
     TIED),
    OPT_TABLE,
    fixed={"positions": "learned", "position_offset": 2, "norm_eps": 1e-5},
    prefix="model.",
    neutral=("activation_dropout", "layerdrop", "init_std"),
    rope={})
