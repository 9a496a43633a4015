"""The encoders of `lmjax.huggingface.model_types`: BERT and what came after it."""

from typing import Any

from lmjax.huggingface.common_settings import SIZES
from lmjax.huggingface.heads import MODERNBERT_HEADS, encoder_heads
from lmjax.huggingface.schema import GATED, TIED, UNGATED, ModelType, Setting, defaults
from lmjax.huggingface.tables import (
    albert_table,
    bert_table,
    distilbert_table,
    electra_table,
    modernbert_table,
)
from lmjax.huggingface.weights import Stored
from lmjax.models.encoder import EncoderConfig

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
    rope={},
    heads=encoder_heads("Bert", "bert.pooler.dense", "classifier"))


def roberta(name: str, architecture: str, vocab_size: int) -> ModelType:
    """RoBERTa, or one of the model types that are RoBERTa with another vocabulary."""
    return ModelType(
        name, architecture,
        (*defaults(BERT_LIKE, vocab_size=vocab_size),
         # Theirs counts the rows up to that of padding, which `position_offset` adds in ours.
         Setting("max_position_embeddings", "max_positions", 512),
         # Positions are counted from the id of padding on: position 0 has the row after it.
         Setting("pad_token_id", "position_offset", 1, plus=-1)),
        bert_table("roberta", "lm_head.dense", "lm_head.layer_norm", "lm_head.bias",
                   "lm_head.decoder.weight"),
        untied={"head_bias": Stored("lm_head.decoder.bias")},
        tied=(("lm_head.bias", "lm_head.decoder.bias"),),
        # Whatever hidden_act is, the head has gelu.
        fixed=BERT_FIXED | {"head_activation": "gelu"},
        prefix="roberta.",
        present={"mlm_head": ("lm_head.dense.weight", True, False),
                 "pooler": ("roberta.pooler.dense.weight", True, False)},
        config=EncoderConfig,
        rope={},
        heads=encoder_heads(architecture.removesuffix("ForMaskedLM"), "classifier.dense",
                            "classifier.out_proj"))


ROBERTA = roberta("roberta", "RobertaForMaskedLM", 50265)
XLM_ROBERTA = roberta("xlm-roberta", "XLMRobertaForMaskedLM", 30522)
CAMEMBERT = roberta("camembert", "CamembertForMaskedLM", 30522)
DISTILBERT = ModelType(
    "distilbert", "DistilBertForMaskedLM",
    (Setting("vocab_size", "vocab_size", 30522),
     Setting("dim", "embed_dim", 768, alias="hidden_size"),
     Setting("n_layers", "num_layers", 6, alias="num_hidden_layers"),
     Setting("n_heads", "num_heads", 12, alias="num_attention_heads"),
     Setting("hidden_dim", "mlp_dim", 3072),
     Setting("activation", "mlp", "gelu", only=UNGATED),
     Setting("max_position_embeddings", "max_positions", 512),
     TIED),
    distilbert_table(),
    untied={"head_bias": Stored("vocab_projector.bias")},
    fixed=BERT_FIXED | {"norm_eps": 1e-12},
    prefix="distilbert.",
    # The sinusoids are only where its training begins: they are stored like any table.
    neutral=("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout"),
    present={"mlm_head": ("vocab_transform.weight", True, False)},
    config=EncoderConfig,
    rope={},
    heads=encoder_heads("DistilBert", "pre_classifier", "classifier", "pooler_relu"))
ELECTRA = ModelType(
    "electra", "ElectraForMaskedLM",
    (*defaults(BERT_LIKE, hidden_size=256, num_attention_heads=4, intermediate_size=1024),
     Setting("embedding_size", "table_dim", 128),
     Setting("max_position_embeddings", "max_positions", 512)),
    electra_table(),
    untied={"head_bias": Stored("generator_lm_head.bias")},
    fixed=BERT_FIXED | {"head_activation": "gelu"},
    prefix="electra.",
    ignore=(r"discriminator_predictions\..*",),
    neutral=("summary_last_dropout",),
    present={"mlm_head": ("generator_predictions.dense.weight", True, False)},
    config=EncoderConfig,
    rope={},
    heads=encoder_heads("Electra", "classifier.dense", "classifier.out_proj", "pooler_gelu"))
def tell_albert(config: EncoderConfig) -> dict[str, Any]:
    """Refuses embeddings as wide as the layers: its class has a matrix after these, too."""
    if config.table_dim == config.embed_dim:
        raise ValueError(f"table_dim={config.table_dim}")
    return {}


ALBERT = ModelType(
    "albert", "AlbertForMaskedLM",
    (*defaults(tuple(row for row in BERT_LIKE if row.theirs not in (
        "is_decoder", "add_cross_attention")), vocab_size=30000, hidden_size=4096,
        num_attention_heads=64, intermediate_size=16384, hidden_act="gelu_new"),
     Setting("embedding_size", "table_dim", 128),
     Setting("max_position_embeddings", "max_positions", 512),
     Setting("num_hidden_groups", "", 1),
     Setting("inner_group_num", "", 1)),
    albert_table(),
    untied={"head_bias": Stored("predictions.decoder.bias")},
    tied=(("predictions.bias", "predictions.decoder.bias"),),
    fixed=BERT_FIXED | {"shared_layers": True},
    prefix="albert.",
    ignore=(r"sop_classifier\..*",),
    # Of its first repositories; no class reads them.
    neutral=("classifier_dropout_prob", "down_scale_factor", "gap_size", "layers_to_keep",
             "net_structure_type", "num_memory_blocks"),
    present={"mlm_head": ("predictions.dense.weight", True, False),
             "pooler": ("albert.pooler.weight", True, False)},
    config=EncoderConfig,
    rope={},
    tell=tell_albert,
    heads=encoder_heads("Albert", "albert.pooler", "classifier"))
MODERNBERT = ModelType(
    "modernbert", "ModernBertForMaskedLM",
    (*defaults(SIZES, vocab_size=50368, hidden_size=768, intermediate_size=1152,
               num_hidden_layers=22, num_attention_heads=12, max_position_embeddings=8192),
     Setting("hidden_activation", "mlp", "gelu", only=GATED),
     Setting("classifier_activation", "head_activation", "gelu", only=UNGATED),
     Setting("rope_scaling", "", None),  # it would scale the local layers, too
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
    rope={"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0},
    heads=MODERNBERT_HEADS)
