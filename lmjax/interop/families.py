"""What the families call things: their settings, their tensors, and where each lies in ours. Tables only.

A family's settings are read into our config and written from it by the same rows. A setting that no row
knows is refused unless it is empty or listed as `NEUTRAL`: it may change what the model computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lmjax.interop.weights import Row, Table

REQUIRED = object()


class Key(NamedTuple):
    """One setting of theirs.

    ours: the field of our config; "" for one that must have the value `default`, else we compute something else.
    default: what it is where config.json leaves it out. only: their values -> ours, and no others.
    also: their values -> ours, others pass as they are.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    only: Mapping[Any, Any] | None = None
    also: Mapping[Any, Any] | None = None


@dataclass(frozen=True)
class Family:
    """A `model_type`.

    fixed: switches of ours that all its models have. prefix: what the tensors of a model saved without its head lack.
    ignore: patterns of tensors that carry nothing. neutral: settings that change nothing. rope: whether it rotates.
    """

    model_type: str
    architecture: str
    keys: tuple[Key, ...]
    table: Table
    fixed: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    ignore: tuple[str, ...] = ()
    neutral: tuple[str, ...] = ()
    rope: bool = True


# Settings that say nothing about what the model computes from ids and weights when it is not being trained.
NEUTRAL = frozenset("""
    _name_or_path architectures auto_map bos_token_id bos_token cls_token_id decoder_start_token_id dtype eos_token_id
    finetuning_task gradient_checkpointing id2label initializer_factor initializer_range label2id model_type
    output_attentions output_hidden_states output_past pad_token_id sep_token_id task_specific_params
    tokenizer_class torch_dtype torchscript transformers_version unk_token_id use_cache pretraining_tp
    attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout_prob attention_probs_dropout_prob
    classifier_dropout dropout dropout_rate n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj max_window_layers chunk_size_feed_forward is_decoder
    return_dict problem_type layer_types rope_theta rope_scaling rope_parameters
""".split())

GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}

MODERN_KEYS = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "embed_dim"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Key("num_key_value_heads", "num_kv_heads", None, also={None: 0}),
    Key("intermediate_size", "mlp_dim"),
    Key("max_position_embeddings", "max_positions"),
    Key("rms_norm_eps", "norm_eps", 1e-6),
    Key("hidden_act", "mlp", "silu", only=GATED),
)
HEAD_DIM = Key("head_dim", "head_dim", None, also={None: 0})
UNTIED = Key("tie_word_embeddings", "tie_embeddings", False)
NO_BIAS = (Key("attention_bias", "", False), Key("mlp_bias", "", False))
FULL_ATTENTION = Key("use_sliding_window", "", False)

LLAMA_TABLE: Table = {
    "embedding/table": Row("model.embed_tokens.weight"),
    "layers/block/attention_norm/scale": Row("model.layers.{}.input_layernorm.weight"),
    "layers/block/attention/query/kernel": Row("model.layers.{}.self_attn.q_proj.weight", "out,in"),
    "layers/block/attention/key/kernel": Row("model.layers.{}.self_attn.k_proj.weight", "out,in"),
    "layers/block/attention/value/kernel": Row("model.layers.{}.self_attn.v_proj.weight", "out,in"),
    "layers/block/attention/out/kernel": Row("model.layers.{}.self_attn.o_proj.weight", "out,in2"),
    "layers/block/attention/query/bias": Row("model.layers.{}.self_attn.q_proj.bias", "flat"),
    "layers/block/attention/key/bias": Row("model.layers.{}.self_attn.k_proj.bias", "flat"),
    "layers/block/attention/value/bias": Row("model.layers.{}.self_attn.v_proj.bias", "flat"),
    "layers/block/attention/query_norm/scale": Row("model.layers.{}.self_attn.q_norm.weight"),
    "layers/block/attention/key_norm/scale": Row("model.layers.{}.self_attn.k_norm.weight"),
    "layers/block/mlp_norm/scale": Row("model.layers.{}.post_attention_layernorm.weight"),
    "layers/block/mlp/gate/kernel": Row("model.layers.{}.mlp.gate_proj.weight", "out,in"),
    "layers/block/mlp/up/kernel": Row("model.layers.{}.mlp.up_proj.weight", "out,in"),
    "layers/block/mlp/down/kernel": Row("model.layers.{}.mlp.down_proj.weight", "out,in"),
    "norm/scale": Row("model.norm.weight"),
    "head/table": Row("lm_head.weight"),
}
GPT2_TABLE: Table = {
    "embedding/table": Row("transformer.wte.weight"),
    "positions/table": Row("transformer.wpe.weight"),
    "layers/block/attention_norm/scale": Row("transformer.h.{}.ln_1.weight"),
    "layers/block/attention_norm/bias": Row("transformer.h.{}.ln_1.bias"),
    "layers/block/attention/query/kernel": Row("transformer.h.{}.attn.c_attn.weight", "in,out", (0, 3)),
    "layers/block/attention/query/bias": Row("transformer.h.{}.attn.c_attn.bias", "flat", (0, 3)),
    "layers/block/attention/key/kernel": Row("transformer.h.{}.attn.c_attn.weight", "in,out", (1, 3)),
    "layers/block/attention/key/bias": Row("transformer.h.{}.attn.c_attn.bias", "flat", (1, 3)),
    "layers/block/attention/value/kernel": Row("transformer.h.{}.attn.c_attn.weight", "in,out", (2, 3)),
    "layers/block/attention/value/bias": Row("transformer.h.{}.attn.c_attn.bias", "flat", (2, 3)),
    "layers/block/attention/out/kernel": Row("transformer.h.{}.attn.c_proj.weight", "in2,out"),
    "layers/block/attention/out/bias": Row("transformer.h.{}.attn.c_proj.bias"),
    "layers/block/mlp_norm/scale": Row("transformer.h.{}.ln_2.weight"),
    "layers/block/mlp_norm/bias": Row("transformer.h.{}.ln_2.bias"),
    "layers/block/mlp/up/kernel": Row("transformer.h.{}.mlp.c_fc.weight", "in,out"),
    "layers/block/mlp/up/bias": Row("transformer.h.{}.mlp.c_fc.bias"),
    "layers/block/mlp/down/kernel": Row("transformer.h.{}.mlp.c_proj.weight", "in,out"),
    "layers/block/mlp/down/bias": Row("transformer.h.{}.mlp.c_proj.bias"),
    "norm/scale": Row("transformer.ln_f.weight"),
    "norm/bias": Row("transformer.ln_f.bias"),
    "head/table": Row("lm_head.weight"),
}

ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")

# In the order in which a model that was not imported is offered to them for export.
FAMILIES = {family.model_type: family for family in (
    Family("llama", "LlamaForCausalLM", (*MODERN_KEYS, HEAD_DIM, UNTIED, *NO_BIAS), LLAMA_TABLE,
           prefix="model.", ignore=ROTARY_BUFFERS),
    Family("mistral", "MistralForCausalLM",
           (*MODERN_KEYS, HEAD_DIM, UNTIED, Key("sliding_window", "sliding_window", 4096, also={None: 0})),
           LLAMA_TABLE, prefix="model.", ignore=ROTARY_BUFFERS),
    Family("qwen3", "Qwen3ForCausalLM",
           (*MODERN_KEYS, HEAD_DIM._replace(default=128), UNTIED, FULL_ATTENTION, NO_BIAS[0]),
           LLAMA_TABLE, fixed={"qk_norm": True}, prefix="model.", neutral=("sliding_window",)),
    Family("gpt2", "GPT2LMHeadModel", (
        Key("vocab_size", "vocab_size", 50257), Key("n_embd", "embed_dim", 768), Key("n_layer", "num_layers", 12),
        Key("n_head", "num_heads", 12), Key("n_inner", "mlp_dim", None), Key("n_positions", "max_positions", 1024),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("activation_function", "mlp", "gelu_new", only=PLAIN), UNTIED._replace(default=True),
        Key("scale_attn_weights", "", True), Key("scale_attn_by_inverse_layer_idx", "", False),
        Key("add_cross_attention", "", False)),
        GPT2_TABLE, fixed={"positions": "learned", "norm": "layernorm", "use_bias": True}, prefix="transformer.",
        ignore=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",), rope=False),
)}
