"""What lmjax has to know about a Hugging Face model type: the columns of `model_types`.

"Theirs" is a name or a value in config.json or the name of a tensor; "ours" is a field of lmjax's
model config or its value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lmjax.errors import UserError
from lmjax.huggingface.weights import Table
from lmjax.models.decoder import DecoderConfig


class Setting(NamedTuple):
    """One setting of config.json."""

    theirs: str
    # The field of our config that it sets; "moe.experts" is a field of a group. "" means that no
    # field stands for it: it must be `default` or null, because lmjax computes nothing else.
    ours: str
    default: Any = None  # that of their class, for a config.json that leaves the setting out
    # Two ways to translate values, theirs -> ours. `only` lists all values: any other is refused.
    # `also` lists exceptions: any other value is the same in both.
    only: Mapping[Any, Any] | None = None
    also: Mapping[Any, Any] | None = None
    times: int = 1  # for integers: theirs = ours * times + plus
    plus: int = 0
    # Another name that their class knows for it; exports use `theirs`. Two that differ are refused.
    alias: str = ""
    power: float = 0.0  # not 0: ours = theirs ** power


class HeadType(NamedTuple):
    """A class of a model type that has the head of a task."""

    architecture: str  # the class in transformers
    kind: str  # of `lmjax.models.heads`
    table: Table  # where the head's parameters are stored
    prefix: str = ""  # of the other tensors' names, if it is not that of the model type
    settings: tuple[Setting, ...] = ()  # further ones


@dataclass(frozen=True)
class ModelType:
    """One `model_type` of config.json."""

    name: str
    architecture: str  # the class in transformers
    settings: tuple[Setting, ...]
    table: Table  # where each parameter is stored
    ungated: Table = field(default_factory=dict)  # rows that replace others if the MLP has no gate
    untied: Table = field(default_factory=dict)  # rows that replace others without tied embeddings
    # Groups of names of one tensor, which must be equal if a file holds several: always, and if
    # the embeddings are tied. The name of the table comes first.
    shared: tuple[tuple[str, ...], ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields that all its models have alike
    # Of the tensors' names. A directory in which no name has it was saved without the head: there,
    # it is put before every name.
    prefix: str = ""
    # The setting that counts layers after the last one, which predict further tokens: their tensors
    # are passed over, as in transformers.
    further_layers: str = ""
    ignore: tuple[str, ...] = ()  # patterns of tensors that hold nothing the model needs
    # More settings like NEUTRAL. They have no row and are never refused: they change nothing, or
    # other code than the rows reads them (`is_local`, `lmjax.huggingface.settings`).
    neutral: tuple[str, ...] = ()
    # Fields that no setting tells, but the presence of a tensor does:
    # field of ours -> (the tensor, the field's value if it is stored, the value if it is not).
    present: Mapping[str, tuple[str, Any, Any]] = field(default_factory=dict)
    config: type = DecoderConfig
    # (config.json, i) -> whether layer i is local, if config.json has no layer_types.
    is_local: Callable[[Mapping[str, Any], int], bool] | None = None
    # Whether the class reads layer_types; if not, `is_local` says all, and a list that contradicts
    # it is refused.
    reads_layer_types: bool = True
    # config.json -> settings that follow from others, which config.json must not contradict.
    implied: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    # Code that its first repositories point to (auto_map), which transformers has as this class.
    own_code: tuple[str, ...] = ()
    heads: Mapping[str, HeadType] = field(default_factory=dict)  # task -> its class
    scaling: bool = True  # whether the class has the RoPE scalings that lmjax has
    # Whether the class rotates neighbouring dimensions, 2i and 2i + 1, as a pair. lmjax pairs i
    # with i + rotary_dim / 2, so rows of queries and keys are read and written in another order.
    interleaved: bool = False
    # Whether the fused matrix of queries, keys and values has, for each key head, the rows of its
    # query heads, then those of the key and those of the value.
    grouped: bool = False
    # The setting of the part of each head that is rotated, and its default.
    rotary: tuple[str, float] | None = None
    # (config.json, i, whether layer i is local) -> whether the layer has no RoPE.
    nope: Callable[[Mapping[str, Any], int, bool], bool] | None = None
    # Settings that are not one to one with fields, which `neutral` lists: fields of ours that
    # follow from config.json, and the settings that follow from our config.
    told: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    tell: Callable[[Any], Mapping[str, Any]] | None = None
    by_config: Callable[[Any], Table] | None = None  # our config -> rows that replace others
    # The settings of the global and the local RoPE theta with their defaults; empty without RoPE.
    rope: Mapping[str, float] = field(default_factory=lambda: {"rope_theta": 10_000.0})
    # The group of RoPE settings that the class takes where config.json has none.
    default_rope: Mapping[str, Any] = field(default_factory=dict)


# Settings that any class of transformers may read, with the values that lmjax computes with.
ONLY: dict[str, tuple[Any, ...]] = {"is_causal": (True,), "partial_rotary_factor": (1.0, None)}
# Settings of every model type that are never refused. They change nothing about what a model
# computes from ids and weights outside training, or other code than the rows reads them: the
# layers' kinds (layer_types, max_window_layers) and RoPE (rope_theta, rope_scaling and others).
NEUTRAL = frozenset("""
    _name_or_path architectures auto_map bos_token_id bos_token cls_token_id decoder_start_token_id
    dtype eos_token_id finetuning_task gradient_checkpointing id2label initializer_factor
    initializer_range label2id model_type output_attentions output_hidden_states output_past
    pad_token_id sep_token_id task_specific_params tokenizer_class torch_dtype torchscript
    transformers_version unk_token_id use_cache pretraining_tp attention_dropout attn_pdrop
    embd_pdrop resid_pdrop hidden_dropout_prob attention_probs_dropout_prob classifier_dropout
    dropout dropout_rate n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj max_window_layers chunk_size_feed_forward
    is_decoder return_dict problem_type layer_types rope_theta rope_scaling rope_parameters
    output_router_logits router_aux_loss_coef router_jitter_noise _num_labels num_labels
    cache_implementation predict_special_tokens max_sequence_length is_llama_config
    transformers.js_config
    do_sample early_stopping length_penalty max_length min_length num_beam_groups num_beams
    num_return_sequences no_repeat_ngram_size repetition_penalty temperature top_k top_p typical_p
    diversity_penalty bad_words_ids forced_bos_token_id forced_eos_token_id suppress_tokens
    begin_suppress_tokens
""".split())
# Settings that nothing in transformers reads for these model types, or nothing before tokens are
# drawn. They are passed over whatever they say, and named in one line.
PASSED_OVER = frozenset("""
    unsloth_fixed unsloth_version name_or_path base_model_name_or_path attn_implementation
    use_flash_attn use_flash_attention use_flash_attention_2 fp16 bf16 use_bfloat16 xla_device
    tf_legacy_loss keys_to_ignore_at_inference pad_to_multiple_of neftune_noise_alpha seq_length
    max_seq_len max_seq_length model_max_length tokenizer_model_max_length tokenizer_padding_side
    eos_token mask_token mask_token_id pad_token eos_token_ids sentence_transformers language
    license prefix embedding_size n_special output_scores return_dict_in_generate
    encoder_no_repeat_ngram_size exponential_decay_length_penalty remove_invalid_values
    num_assistant_tokens max_new_tokens
""".split())

# Their activation -> our MLP, with and without a gate.
GATED = {
    "silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu",
    "gelu": "geglu_erf", "gelu_python": "geglu_erf", "gelu_fast": "geglu", "relu": "reglu"}
UNGATED = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu",
    "silu": "silu", "swish": "silu", "gelu_python": "gelu", "gelu_fast": "gelu_tanh"}
# Both read tie_word_embeddings. Where config.json leaves it out, UNTIED means that the embeddings
# are not tied, and TIED that they are.
UNTIED = Setting("tie_word_embeddings", "tie_embeddings", False)
TIED = UNTIED._replace(default=True)


def not_computed(expected: str, got: str, where: str, fix: str = "without it") -> UserError:
    """The refusal of a setting that lmjax does not compute with."""
    return UserError(expected, f"{got}, which lmjax cannot compute", f"take a model {fix}", where)


def defaults(rows: tuple[Setting, ...], **values: Any) -> tuple[Setting, ...]:
    """`rows` with the defaults of another class."""
    return tuple(row._replace(default=values.get(row.theirs, row.default)) for row in rows)
