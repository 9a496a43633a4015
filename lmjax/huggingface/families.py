"""What the families call things: their settings, their tensors, and where each lies in ours. Tables only.

A family's settings are read into our config and written from it by the same rows. A setting that no row
knows is refused unless it is empty or listed as `NEUTRAL`: it may change what the model computes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lmjax.huggingface.weights import Row, Table
from lmjax.models.decoder import DecoderConfig
from lmjax.models.encdec import EncDecConfig
from lmjax.models.encoder import EncoderConfig

REQUIRED = object()


class Key(NamedTuple):
    """One setting of theirs.

    ours: the field of our config ("moe.experts": of a group in it); "" for one
    that must have the value `default`, else we compute something else.
    default: what it is where config.json leaves it out. only: their values -> ours, and no others. also: their
    values -> ours, others pass as they are. times, plus: theirs is ours * times + plus. alias: another name of theirs.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    only: Mapping[Any, Any] | None = None
    also: Mapping[Any, Any] | None = None
    times: int = 1
    plus: int = 0
    alias: str = ""


@dataclass(frozen=True)
class Family:
    """A `model_type`.

    fixed: switches of ours that all its models have. prefix: what the tensors of a model saved without its head lack.
    ungated: rows of the table for an MLP without a gate. ignore: patterns of tensors that carry nothing. neutral:
    settings that change nothing. rope: the settings of the global and of the local theta, if it rotates, with their
    defaults. present: field of ours -> (a tensor, the field's value where
    it is there, where it is not). layer_types: whether layer i is local, where their settings do not list it.
    """

    model_type: str
    architecture: str
    keys: tuple[Key, ...]
    table: Table
    ungated: Table = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    ignore: tuple[str, ...] = ()
    neutral: tuple[str, ...] = ()
    present: Mapping[str, tuple[str, Any, Any]] = field(default_factory=dict)
    config: type = DecoderConfig
    layer_types: Callable[[Mapping[str, Any], int], bool] | None = None
    rope: Mapping[str, float] = field(default_factory=lambda: {"rope_theta": 10_000.0})


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
    output_router_logits router_aux_loss_coef router_jitter_noise _num_labels num_labels cache_implementation
    predict_special_tokens max_sequence_length is_llama_config transformers.js_config
    do_sample early_stopping length_penalty max_length min_length num_beam_groups num_beams num_return_sequences
    no_repeat_ngram_size repetition_penalty temperature top_k top_p typical_p diversity_penalty bad_words_ids
    forced_bos_token_id forced_eos_token_id
""".split())

GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "gelu": "geglu_erf"}
PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu",
         "swish": "silu"}

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


def both(ours: str, theirs: str, how: str = "", part: tuple[int, int] = (0, 1)) -> dict[str, Row]:
    """The rows of a weight and its bias."""
    kernel, flat = ("scale", "") if "norm" in ours.split("/")[-1] else ("kernel", "flat")
    return {f"{ours}/{kernel}": Row(f"{theirs}.weight", how, part), f"{ours}/bias": Row(f"{theirs}.bias", flat, part)}


def joined(*parts: Table) -> Table:
    """One table of several."""
    return {name: row for part in parts for name, row in part.items()}


BLOCK = "layers/block/"
PROJECTIONS = {"query": ("q", "out,in"), "key": ("k", "out,in"), "value": ("v", "out,in"), "out": ("o", "out,in2")}


def attention(block: str, theirs: str, names: str = "{}_proj", ours: str = "attention") -> Table:
    """The rows of an attention layer's four matrices."""
    return joined(*(both(f"{block}{ours}/{part}", f"{theirs}.{names.format(letter)}", how)
                    for part, (letter, how) in PROJECTIONS.items()))


def experts(theirs: str, gate: str, up: str, down: str) -> Table:
    """The rows of a mixture's experts, each of which has three matrices of its own."""
    return {f"{BLOCK}mlp/{ours}/kernel": Row(f"{theirs}.{{}}.{name}.weight", "out,in")
            for ours, name in (("gate", gate), ("up", up), ("down", down))}


LAYER = "model.layers.{}"
LLAMA_TABLE = joined(
    {"embedding/table": Row("model.embed_tokens.weight"), "head/table": Row("lm_head.weight")},
    both("norm", "model.norm"),
    attention(BLOCK, f"{LAYER}.self_attn"),
    both(f"{BLOCK}attention/query_norm", f"{LAYER}.self_attn.q_norm"),
    both(f"{BLOCK}attention/key_norm", f"{LAYER}.self_attn.k_norm"),
    both(f"{BLOCK}attention_norm", f"{LAYER}.input_layernorm"),
    both(f"{BLOCK}mlp_norm", f"{LAYER}.post_attention_layernorm"),
    *(both(f"{BLOCK}mlp/{part}", f"{LAYER}.mlp.{part}_proj", "out,in") for part in ("gate", "up", "down")))
GEMMA_TABLE = joined(
    LLAMA_TABLE,
    both(f"{BLOCK}attention_post_norm", f"{LAYER}.post_attention_layernorm"),
    both(f"{BLOCK}mlp_norm", f"{LAYER}.pre_feedforward_layernorm"),
    both(f"{BLOCK}mlp_post_norm", f"{LAYER}.post_feedforward_layernorm"))
MIXTRAL_TABLE = joined(
    LLAMA_TABLE, experts(f"{LAYER}.block_sparse_moe.experts", "w1", "w3", "w2"),
    both(f"{BLOCK}mlp/router", f"{LAYER}.block_sparse_moe.gate", "out,in"))
QWEN_MOE_TABLE = joined(
    LLAMA_TABLE, experts(f"{LAYER}.mlp.experts", "gate_proj", "up_proj", "down_proj"),
    both(f"{BLOCK}mlp/router", f"{LAYER}.mlp.gate", "out,in"),
    both(f"{BLOCK}mlp/shared_gate", f"{LAYER}.mlp.shared_expert_gate", "out,in"),
    *(both(f"{BLOCK}mlp/shared/{part}", f"{LAYER}.mlp.shared_expert.{part}_proj", "out,in")
      for part in ("gate", "up", "down")))

H = "transformer.h.{}"
GPT2_TABLE = joined(
    {"embedding/table": Row("transformer.wte.weight"), "positions/table": Row("transformer.wpe.weight"),
     "head/table": Row("lm_head.weight")},
    both("norm", "transformer.ln_f"),
    both(f"{BLOCK}attention_norm", f"{H}.ln_1"), both(f"{BLOCK}mlp_norm", f"{H}.ln_2"),
    *(both(f"{BLOCK}attention/{part}", f"{H}.attn.c_attn", "in,out", (i, 3))
      for i, part in enumerate(("query", "key", "value"))),
    both(f"{BLOCK}attention/out", f"{H}.attn.c_proj", "in2,out"),
    both(f"{BLOCK}mlp/up", f"{H}.mlp.c_fc", "in,out"), both(f"{BLOCK}mlp/down", f"{H}.mlp.c_proj", "in,out"))


def bert_table(model: str, transform: str, norm: str, bias: str) -> Table:
    """BERT's and RoBERTa's rows, which differ in what their model and their head are called."""
    layer = f"{model}.encoder.layer.{{}}"
    return joined(
        {"embedding/table": Row(f"{model}.embeddings.word_embeddings.weight"),
         "positions/table": Row(f"{model}.embeddings.position_embeddings.weight"),
         "token_types/table": Row(f"{model}.embeddings.token_type_embeddings.weight"), "head_bias": Row(bias)},
        both("embedding_norm", f"{model}.embeddings.LayerNorm"), both("pooler", f"{model}.pooler.dense", "out,in"),
        both("transform", transform, "out,in"), both("transform_norm", norm),
        *(both(f"{BLOCK}attention/{part}", f"{layer}.attention.self.{part}", "out,in")
          for part in ("query", "key", "value")),
        both(f"{BLOCK}attention/out", f"{layer}.attention.output.dense", "out,in2"),
        both(f"{BLOCK}attention_norm", f"{layer}.attention.output.LayerNorm"),
        both(f"{BLOCK}mlp/up", f"{layer}.intermediate.dense", "out,in"),
        both(f"{BLOCK}mlp/down", f"{layer}.output.dense", "out,in"),
        both(f"{BLOCK}mlp_norm", f"{layer}.output.LayerNorm"))


def t5_table() -> Table:
    """T5's rows: branches are numbered, and the decoder has one more."""
    rows: dict[str, Row] = {"embedding/table": Row("shared.weight"), "head/table": Row("lm_head.weight")}
    for half, branches in (("encoder", ("attention", "mlp")), ("decoder", ("attention", "cross", "mlp"))):
        block, layer = f"{half}/layers/block/", f"{half}.block.{{}}.layer"
        rows[f"{half}/relative_bias/table"] = Row(
            f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        rows |= both(f"{half}/norm", f"{half}.final_layer_norm")
        rows |= attention(block, f"{layer}.0.SelfAttention", "{}")
        rows |= attention(block, f"{layer}.1.EncDecAttention", "{}", "cross_attention")
        for i, branch in enumerate(branches):
            rows |= both(f"{block}{branch}_norm", f"{layer}.{i}.layer_norm")
        for ours, theirs in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            rows |= both(f"{block}mlp/{ours}", f"{layer}.{len(branches) - 1}.DenseReluDense.{theirs}", "out,in")
    return rows


def modernbert_table() -> Table:
    """ModernBERT's rows: matrices are fused, and the first layer's attention norm is the embedding's."""
    layer = "model.layers.{}"
    return joined(
        {"embedding/table": Row("model.embeddings.tok_embeddings.weight"), "head/table": Row("decoder.weight"),
         "head_bias": Row("decoder.bias"),
         f"{BLOCK}attention_norm/scale": Row(f"{layer}.attn_norm.weight", first="model.embeddings.norm.weight")},
        both("norm", "model.final_norm"), both("transform_norm", "head.norm"),
        both("transform", "head.dense", "out,in"),
        *(both(f"{BLOCK}attention/{part}", f"{layer}.attn.Wqkv", "out,in", (i, 3))
          for i, part in enumerate(("query", "key", "value"))),
        both(f"{BLOCK}attention/out", f"{layer}.attn.Wo", "out,in2"), both(f"{BLOCK}mlp_norm", f"{layer}.mlp_norm"),
        *(both(f"{BLOCK}mlp/{part}", f"{layer}.mlp.Wi", "out,in", (i, 2)) for i, part in enumerate(("gate", "up"))),
        both(f"{BLOCK}mlp/down", f"{layer}.mlp.Wo", "out,in"))


def marian_table() -> Table:
    """The original Transformer's rows, as Marian's models have them."""
    rows: dict[str, Row] = {"embedding/table": Row("model.shared.weight"), "head/table": Row("lm_head.weight"),
                            "head_bias": Row("final_logits_bias", "in0,out")}
    for half in ("encoder", "decoder"):
        block, layer = f"{half}/layers/block/", f"model.{half}.layers.{{}}"
        for ours, theirs in (("attention", "self_attn"), ("cross_attention", "encoder_attn")):
            rows |= attention(block, f"{layer}.{theirs}", ours=ours)
            rows |= both(f"{block}{ours}/out", f"{layer}.{theirs}.out_proj", "out,in2")
        for ours, theirs in (("attention_norm", "self_attn_layer_norm"), ("cross_norm", "encoder_attn_layer_norm"),
                             ("mlp_norm", "final_layer_norm")):
            rows |= both(f"{block}{ours}", f"{layer}.{theirs}")
        for ours, theirs in (("up", "fc1"), ("down", "fc2")):
            rows |= both(f"{block}mlp/{ours}", f"{layer}.{theirs}", "out,in")
    return rows


T5_TABLE = t5_table()
ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
LLAMA_LIKE = dict(table=LLAMA_TABLE, prefix="model.", ignore=ROTARY_BUFFERS)
WINDOW = Key("sliding_window", "sliding_window", 4096, also={None: 0})
QWEN_KEYS = (*MODERN_KEYS, UNTIED, WINDOW)
QWEN_LIKE = dict(prefix="model.", neutral=("use_sliding_window",), layer_types=lambda s, i: bool(
    s.get("use_sliding_window")) and i >= s.get("max_window_layers", 28))
QWEN_MOE_KEYS = (
    Key("num_experts", "moe.experts", alias="num_local_experts"), Key("num_experts_per_tok", "moe.per_token"),
    Key("moe_intermediate_size", "moe.mlp_dim"), Key("norm_topk_prob", "moe.normalize", False),
    Key("decoder_sparse_step", "", 1), Key("mlp_only_layers", "", []))
GEMMA_KEYS = (
    *(key for key in MODERN_KEYS if key.ours != "mlp"),
    Key("hidden_activation", "mlp", "gelu_pytorch_tanh", only=GATED),
    HEAD_DIM._replace(default=256), UNTIED._replace(default=True), NO_BIAS[0], WINDOW,
    Key("query_pre_attn_scalar", "query_scalar", 256),
    Key("use_bidirectional_attention", "", False))
GEMMA_FIXED = {"norm": "rmsnorm_1p", "norm_position": "both", "scale_embeddings": True}
BERT_KEYS = (
    Key("vocab_size", "vocab_size", 30522), Key("hidden_size", "embed_dim", 768),
    Key("num_hidden_layers", "num_layers", 12), Key("num_attention_heads", "num_heads", 12),
    Key("intermediate_size", "mlp_dim", 3072), Key("hidden_act", "mlp", "gelu", only=PLAIN),
    Key("type_vocab_size", "token_types", 2), Key("layer_norm_eps", "norm_eps", 1e-12),
    UNTIED._replace(default=True), Key("position_embedding_type", "", "absolute"), Key("is_decoder", "", False),
    Key("add_cross_attention", "", False))
BERT_FIXED = {"positions": "learned", "norm": "layernorm", "norm_position": "post", "embedding_norm": "own",
              "use_bias": True}

# In the order in which a model that was not imported is offered to them for export.
FAMILIES = {family.model_type: family for family in (
    Family("llama", "LlamaForCausalLM", (*MODERN_KEYS, HEAD_DIM, UNTIED, *NO_BIAS), **LLAMA_LIKE),
    Family("mistral", "MistralForCausalLM", (*MODERN_KEYS, HEAD_DIM, UNTIED, WINDOW), **LLAMA_LIKE,
           layer_types=lambda s, i: True),
    Family("qwen2", "Qwen2ForCausalLM", QWEN_KEYS, LLAMA_TABLE, fixed={"qkv_bias": True}, **QWEN_LIKE),
    Family("qwen3", "Qwen3ForCausalLM", (*QWEN_KEYS, HEAD_DIM._replace(default=128), NO_BIAS[0]), LLAMA_TABLE,
           fixed={"qk_norm": True}, **QWEN_LIKE),
    Family("mixtral", "MixtralForCausalLM",
           (*MODERN_KEYS, HEAD_DIM, UNTIED, WINDOW._replace(default=None), Key("num_local_experts", "moe.experts", 8),
            Key("num_experts_per_tok", "moe.per_token", 2)), MIXTRAL_TABLE, prefix="model.",
           rope={"rope_theta": 1e6}, layer_types=lambda s, i: True),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", (*QWEN_KEYS, HEAD_DIM, NO_BIAS[0], *QWEN_MOE_KEYS), QWEN_MOE_TABLE,
           fixed={"qk_norm": True}, **QWEN_LIKE),
    Family("qwen2_moe", "Qwen2MoeForCausalLM",
           (*QWEN_KEYS, *QWEN_MOE_KEYS, Key("shared_expert_intermediate_size", "moe.shared_dim"),
            Key("qkv_bias", "qkv_bias", True)), QWEN_MOE_TABLE, fixed={"moe.shared_gate": True}, **QWEN_LIKE),
    Family("gemma2", "Gemma2ForCausalLM",
           (*GEMMA_KEYS, Key("attn_logit_softcapping", "attention_softcap", 50.0, also={None: 0.0}),
            Key("final_logit_softcapping", "logit_softcap", 30.0, also={None: 0.0})), GEMMA_TABLE, fixed=GEMMA_FIXED,
           prefix="model.", layer_types=lambda s, i: i % 2 == 0, neutral=("hidden_act", "sliding_window_size")),
    Family("gemma3_text", "Gemma3ForCausalLM",
           (*GEMMA_KEYS, Key("attn_logit_softcapping", "", None), Key("final_logit_softcapping", "", None)),
           GEMMA_TABLE, fixed=GEMMA_FIXED | {"qk_norm": True}, prefix="model.",
           neutral=("hidden_act", "sliding_window_pattern", "_sliding_window_pattern"),
           rope={"rope_theta": 1e6, "rope_local_base_freq": 10_000.0},
           layer_types=lambda s, i: (i + 1) % s.get("sliding_window_pattern", 6) != 0),
    Family("gpt2", "GPT2LMHeadModel", (
        Key("vocab_size", "vocab_size", 50257), Key("n_embd", "embed_dim", 768), Key("n_layer", "num_layers", 12),
        Key("n_head", "num_heads", 12), Key("n_inner", "mlp_dim", None), Key("n_positions", "max_positions", 1024),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("activation_function", "mlp", "gelu_new", only=PLAIN), UNTIED._replace(default=True),
        Key("scale_attn_weights", "", True), Key("scale_attn_by_inverse_layer_idx", "", False),
        Key("add_cross_attention", "", False)),
        GPT2_TABLE, fixed={"positions": "learned", "norm": "layernorm", "use_bias": True}, prefix="transformer.",
        ignore=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",), rope={}),
    Family("bert", "BertForMaskedLM", (*BERT_KEYS, Key("max_position_embeddings", "max_positions", 512)),
           bert_table("bert", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
                      "cls.predictions.bias"), fixed=BERT_FIXED, prefix="bert.", rope={}, config=EncoderConfig,
           ignore=(r"bert\.embeddings\.position_ids", r"cls\.seq_relationship\..*", r"cls\.predictions\.decoder\..*"),
           neutral=("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
                    "pooler_size_per_head", "pooler_type"),
           present={"mlm_head": ("cls.predictions.transform.dense.weight", True, False),
                    "pooler": ("bert.pooler.dense.weight", True, False)}),
    Family("roberta", "RobertaForMaskedLM",
           (*BERT_KEYS, Key("max_position_embeddings", "max_positions", 514, plus=2), Key("pad_token_id", "", 1)),
           bert_table("roberta", "lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
           fixed=BERT_FIXED | {"position_offset": 2}, prefix="roberta.", rope={}, config=EncoderConfig,
           ignore=(r"roberta\.embeddings\.position_ids", r"lm_head\.decoder\..*"),
           present={"mlm_head": ("lm_head.dense.weight", True, False),
                    "pooler": ("roberta.pooler.dense.weight", True, False)}),
    Family("modernbert", "ModernBertForMaskedLM", (
        *(key for key in MODERN_KEYS if key.ours not in ("num_kv_heads", "norm_eps", "mlp")),
        Key("hidden_activation", "mlp", "gelu", only=GATED), Key("classifier_activation", "", "gelu"),
        Key("rope_scaling", "", None), Key("local_attention", "sliding_window", 128, times=2, plus=-2),
        Key("norm_eps", "norm_eps", 1e-5), UNTIED._replace(default=True), Key("decoder_bias", "", True)),
        modernbert_table(), fixed={"norm": "layernorm_no_bias", "embedding_norm": "first"}, prefix="model.",
        config=EncoderConfig, rope={"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0},
        neutral=("classifier_pooling", "embedding_dropout", "global_attn_every_n_layers", "initializer_cutoff_factor",
                 "layer_norm_eps", "mlp_dropout", "position_embedding_type", "reference_compile",
                 "repad_logits_with_grad", "sparse_pred_ignore_index"),
        present={"mlm_head": ("head.dense.weight", True, False)},
        layer_types=lambda s, i: i % s.get("global_attn_every_n_layers", 3) != 0),
    Family("t5", "T5ForConditionalGeneration", (
        Key("vocab_size", "vocab_size"), Key("d_model", "embed_dim"), Key("d_kv", "head_dim"), Key("d_ff", "mlp_dim"),
        Key("num_layers", "num_encoder_layers"), Key("num_decoder_layers", "num_layers", None),
        Key("num_heads", "num_heads"), Key("relative_attention_num_buckets", "relative_buckets", 32),
        Key("relative_attention_max_distance", "relative_distance", 128), Key("layer_norm_epsilon", "norm_eps", 1e-6),
        Key("feed_forward_proj", "mlp", "relu", only={"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}),
        Key("is_encoder_decoder", "", True), Key("scale_decoder_outputs", "scale_output", None)), T5_TABLE,
        ungated={ours: row._replace(theirs=row.theirs.replace(".wi_1.", ".wi.")) for ours, row in T5_TABLE.items()},
        fixed={"positions": "relative", "query_scalar": 1.0}, rope={}, config=EncDecConfig,
        neutral=("dense_act_fn", "is_gated_act", "tie_word_embeddings", "n_positions"),
        ignore=(r"(encoder|decoder)\.embed_tokens\.weight",
                r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
        present={"tie_embeddings": ("lm_head.weight", False, True)}),
    Family("marian", "MarianMTModel", (
        Key("vocab_size", "vocab_size"), Key("decoder_vocab_size", "vocab_size", None), Key("d_model", "embed_dim"),
        Key("encoder_layers", "num_encoder_layers"), Key("decoder_layers", "num_layers"),
        Key("encoder_attention_heads", "num_heads"), Key("decoder_attention_heads", "num_heads"),
        Key("encoder_ffn_dim", "mlp_dim"), Key("decoder_ffn_dim", "mlp_dim"),
        Key("max_position_embeddings", "max_positions"), Key("activation_function", "mlp", "gelu", only=PLAIN),
        Key("scale_embedding", "scale_embeddings", False), UNTIED._replace(default=True),
        Key("is_encoder_decoder", "", True), Key("share_encoder_decoder_embeddings", "", True)),
        marian_table(), rope={}, config=EncDecConfig, prefix="model.",
        fixed={"positions": "sinusoidal", "norm": "layernorm", "norm_eps": 1e-5, "norm_position": "post",
               "use_bias": True},
        neutral=("activation_dropout", "classif_dropout", "decoder_layerdrop", "encoder_layerdrop",
                 "extra_pos_embeddings", "init_std", "num_hidden_layers", "static_position_embeddings"),
        ignore=(r"model\.(encoder|decoder)\.embed_(tokens|positions)\.weight",),
        present={"output_bias": ("final_logits_bias", True, False)}),
)}
