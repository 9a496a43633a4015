"""Where each parameter of lmjax lies in a Hugging Face checkpoint: one table per kind of model.

Tables only; `lmjax.huggingface.weights` says what the columns of `Stored` mean.
"""

from lmjax.huggingface.weights import Stored, Table

DENSE_BLOCK = "dense_layers/block/"  # that of layers before the first with experts
BLOCK = "layers/block/"  # lmjax's path of a decoder's or an encoder's stacked layers
# lmjax's projection -> (the letter in most Hugging Face names, how its matrix lies)
PROJECTIONS = {
    "query": ("q", "out,in"), "key": ("k", "out,in"), "value": ("v", "out,in"),
    "out": ("o", "out,in2")}


def both(ours: str, theirs: str, how: str = "",
         part: tuple[int, int] = (0, 1)) -> dict[str, Stored]:
    """The rows of a weight and of its bias; of a norm, those of its scale and of its bias."""
    is_norm = "norm" in ours.split("/")[-1]
    kernel, flat = ("scale", "") if is_norm else ("kernel", "flat")
    return {f"{ours}/{kernel}": Stored(f"{theirs}.weight", how, part),
            f"{ours}/bias": Stored(f"{theirs}.bias", flat, part)}


def joined(*parts: Table) -> dict[str, Stored]:
    """Joins tables into one. A later row replaces an earlier one of the same name."""
    return {name: row for part in parts for name, row in part.items()}


def attention(block: str, theirs: str, names: str = "{}_proj",
              ours: str = "attention") -> dict[str, Stored]:
    """The rows of an attention layer's four projections."""
    return joined(*(
        both(f"{block}{ours}/{projection}", f"{theirs}.{names.format(letter)}", how)
        for projection, (letter, how) in PROJECTIONS.items()))


def experts(theirs: str, gate: str, up: str, down: str) -> Table:
    """The rows of a mixture's experts. Each expert has three matrices of its own."""
    return {f"{BLOCK}mlp/{ours}/kernel": Stored(f"{theirs}.{{}}.{name}.weight", "out,in")
            for ours, name in (("gate", gate), ("up", up), ("down", down))}


LAYER = "model.layers.{}"
LLAMA_TABLE = joined(
    {"embedding/table": Stored("model.embed_tokens.weight"),
     "head/table": Stored("lm_head.weight")},
    both("norm", "model.norm"),
    attention(BLOCK, f"{LAYER}.self_attn"),
    both(f"{BLOCK}attention/query_norm", f"{LAYER}.self_attn.q_norm"),
    both(f"{BLOCK}attention/key_norm", f"{LAYER}.self_attn.k_norm"),
    both(f"{BLOCK}attention_norm", f"{LAYER}.input_layernorm"),
    both(f"{BLOCK}mlp_norm", f"{LAYER}.post_attention_layernorm"),
    *(both(f"{BLOCK}mlp/{name}", f"{LAYER}.mlp.{name}_proj", "out,in")
      for name in ("gate", "up", "down")))
PHI3_TABLE = joined(
    LLAMA_TABLE,
    *(both(f"{BLOCK}attention/{name}", f"{LAYER}.self_attn.qkv_proj", "out,in", (i, 3))
      for i, name in enumerate(("query", "key", "value"))),
    *(both(f"{BLOCK}mlp/{name}", f"{LAYER}.mlp.gate_up_proj", "out,in", (i, 2))
      for i, name in enumerate(("gate", "up"))))
GEMMA_TABLE = joined(
    LLAMA_TABLE,
    both(f"{BLOCK}attention_post_norm", f"{LAYER}.post_attention_layernorm"),
    both(f"{BLOCK}mlp_norm", f"{LAYER}.pre_feedforward_layernorm"),
    both(f"{BLOCK}mlp_post_norm", f"{LAYER}.post_feedforward_layernorm"))
MIXTRAL_TABLE = joined(
    LLAMA_TABLE,
    experts(f"{LAYER}.block_sparse_moe.experts", "w1", "w3", "w2"),
    both(f"{BLOCK}mlp/router", f"{LAYER}.block_sparse_moe.gate", "out,in"))
QWEN_MOE_TABLE = joined(
    LLAMA_TABLE,
    experts(f"{LAYER}.mlp.experts", "gate_proj", "up_proj", "down_proj"),
    both(f"{BLOCK}mlp/router", f"{LAYER}.mlp.gate", "out,in"),
    both(f"{BLOCK}mlp/shared_gate", f"{LAYER}.mlp.shared_expert_gate", "out,in"),
    *(both(f"{BLOCK}mlp/shared/{name}", f"{LAYER}.mlp.shared_expert.{name}_proj", "out,in")
      for name in ("gate", "up", "down")))

GPT2_LAYER = "transformer.h.{}"
GPT2_TABLE = joined(
    {"embedding/table": Stored("transformer.wte.weight"),
     "positions/table": Stored("transformer.wpe.weight"),
     "head/table": Stored("lm_head.weight")},
    both("norm", "transformer.ln_f"),
    both(f"{BLOCK}attention_norm", f"{GPT2_LAYER}.ln_1"),
    both(f"{BLOCK}mlp_norm", f"{GPT2_LAYER}.ln_2"),
    *(both(f"{BLOCK}attention/{name}", f"{GPT2_LAYER}.attn.c_attn", "in,out", (i, 3))
      for i, name in enumerate(("query", "key", "value"))),
    both(f"{BLOCK}attention/out", f"{GPT2_LAYER}.attn.c_proj", "in2,out"),
    both(f"{BLOCK}mlp/up", f"{GPT2_LAYER}.mlp.c_fc", "in,out"),
    both(f"{BLOCK}mlp/down", f"{GPT2_LAYER}.mlp.c_proj", "in,out"))


def bert_table(model: str, transform: str, norm: str, bias: str, head: str) -> Table:
    """The rows of BERT and of RoBERTa.

    Args:
      model: their name of the encoder.
      transform: their name of the masked-LM head's dense layer.
      norm: their name of that head's LayerNorm.
      bias: their name of the logits' bias.
      head: their name of the logits' matrix.
    """
    layer = f"{model}.encoder.layer.{{}}"
    return joined(
        {"embedding/table": Stored(f"{model}.embeddings.word_embeddings.weight"),
         "positions/table": Stored(f"{model}.embeddings.position_embeddings.weight"),
         "token_types/table": Stored(f"{model}.embeddings.token_type_embeddings.weight"),
         "head/table": Stored(head),
         "head_bias": Stored(bias)},
        both("embedding_norm", f"{model}.embeddings.LayerNorm"),
        both("pooler", f"{model}.pooler.dense", "out,in"),
        both("transform", transform, "out,in"),
        both("transform_norm", norm),
        *(both(f"{BLOCK}attention/{name}", f"{layer}.attention.self.{name}", "out,in")
          for name in ("query", "key", "value")),
        both(f"{BLOCK}attention/out", f"{layer}.attention.output.dense", "out,in2"),
        both(f"{BLOCK}attention_norm", f"{layer}.attention.output.LayerNorm"),
        both(f"{BLOCK}mlp/up", f"{layer}.intermediate.dense", "out,in"),
        both(f"{BLOCK}mlp/down", f"{layer}.output.dense", "out,in"),
        both(f"{BLOCK}mlp_norm", f"{layer}.output.LayerNorm"))


def distilbert_table() -> Table:
    """The rows of DistilBERT, whose layers have names of their own."""
    layer = "distilbert.transformer.layer.{}"
    return joined(
        bert_table("distilbert", "vocab_transform", "vocab_layer_norm", "vocab_projector.bias",
                   "vocab_projector.weight"),
        *(both(f"{BLOCK}attention/{ours}", f"{layer}.attention.{theirs}", how)
          for ours, theirs, how in (("query", "q_lin", "out,in"), ("key", "k_lin", "out,in"),
                                    ("value", "v_lin", "out,in"), ("out", "out_lin", "out,in2"))),
        both(f"{BLOCK}attention_norm", f"{layer}.sa_layer_norm"),
        both(f"{BLOCK}mlp/up", f"{layer}.ffn.lin1", "out,in"),
        both(f"{BLOCK}mlp/down", f"{layer}.ffn.lin2", "out,in"),
        both(f"{BLOCK}mlp_norm", f"{layer}.output_layer_norm"))


def electra_table() -> Table:
    """The rows of ELECTRA, whose generator has the head of masked language models."""
    return joined(
        bert_table("electra", "generator_predictions.dense", "generator_predictions.LayerNorm",
                   "generator_lm_head.bias", "generator_lm_head.weight"),
        both("widening", "electra.embeddings_project", "out,in"))


def albert_table() -> Table:
    """The rows of ALBERT, all of whose layers are one."""
    layer = "albert.encoder.albert_layer_groups.{}.albert_layers.0"
    return joined(
        bert_table("albert", "predictions.dense", "predictions.LayerNorm", "predictions.bias",
                   "predictions.decoder.weight"),
        both("widening", "albert.encoder.embedding_hidden_mapping_in", "out,in"),
        both("pooler", "albert.pooler", "out,in"),
        *(both(f"{BLOCK}attention/{name}", f"{layer}.attention.{name}", "out,in")
          for name in ("query", "key", "value")),
        both(f"{BLOCK}attention/out", f"{layer}.attention.dense", "out,in2"),
        both(f"{BLOCK}attention_norm", f"{layer}.attention.LayerNorm"),
        both(f"{BLOCK}mlp/up", f"{layer}.ffn", "out,in"),
        both(f"{BLOCK}mlp/down", f"{layer}.ffn_output", "out,in"),
        both(f"{BLOCK}mlp_norm", f"{layer}.full_layer_layer_norm"))


def t5_table() -> Table:
    """The rows of T5, which numbers a block's branches; a decoder block has one branch more."""
    rows = {"embedding/table": Stored("shared.weight"), "head/table": Stored("lm_head.weight")}
    for half, branches in (("encoder", ("attention", "mlp")),
                           ("decoder", ("attention", "cross", "mlp"))):
        block, layer = f"{half}/layers/block/", f"{half}.block.{{}}.layer"
        rows[f"{half}/relative_bias/table"] = Stored(
            f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        rows |= both(f"{half}/norm", f"{half}.final_layer_norm")
        rows |= attention(block, f"{layer}.0.SelfAttention", "{}")
        rows |= attention(block, f"{layer}.1.EncDecAttention", "{}", "cross_attention")
        for i, branch in enumerate(branches):
            rows |= both(f"{block}{branch}_norm", f"{layer}.{i}.layer_norm")
        mlp = f"{layer}.{len(branches) - 1}.DenseReluDense"
        for ours, theirs in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            rows |= both(f"{block}mlp/{ours}", f"{mlp}.{theirs}", "out,in")
    return rows


T5_TABLE = t5_table()
# T5 v1.0 has an MLP without a gate, whose only input matrix has a name of its own.
T5_UNGATED = {ours: row._replace(theirs=row.theirs.replace(".wi_1.", ".wi."))
              for ours, row in T5_TABLE.items()}


def modernbert_table() -> Table:
    """The rows of ModernBERT, which fuses matrices.

    Its first layer has no attention norm: the embedding's norm takes that place.
    """
    return joined(
        {"embedding/table": Stored("model.embeddings.tok_embeddings.weight"),
         "head/table": Stored("decoder.weight"),
         "head_bias": Stored("decoder.bias"),
         f"{BLOCK}attention_norm/scale": Stored(
             f"{LAYER}.attn_norm.weight", first="model.embeddings.norm.weight")},
        both("norm", "model.final_norm"),
        both("transform_norm", "head.norm"),
        both("transform", "head.dense", "out,in"),
        *(both(f"{BLOCK}attention/{name}", f"{LAYER}.attn.Wqkv", "out,in", (i, 3))
          for i, name in enumerate(("query", "key", "value"))),
        both(f"{BLOCK}attention/out", f"{LAYER}.attn.Wo", "out,in2"),
        both(f"{BLOCK}mlp_norm", f"{LAYER}.mlp_norm"),
        *(both(f"{BLOCK}mlp/{name}", f"{LAYER}.mlp.Wi", "out,in", (i, 2))
          for i, name in enumerate(("gate", "up"))),
        both(f"{BLOCK}mlp/down", f"{LAYER}.mlp.Wo", "out,in"))


def bart_table() -> Table:
    """The rows of BART, whose names Marian, Pegasus and M2M-100 have too."""
    rows = {"embedding/table": Stored("model.shared.weight"),
            "head/table": Stored("lm_head.weight"),
            "head_bias": Stored("final_logits_bias", "in0,out")}
    for half in ("encoder", "decoder"):
        block, layer = f"{half}/layers/block/", f"model.{half}.layers.{{}}"
        rows[f"{half}/positions/table"] = Stored(f"model.{half}.embed_positions.weight")
        rows |= both(f"{half}/embedding_norm", f"model.{half}.layernorm_embedding")
        rows |= both(f"{half}/norm", f"model.{half}.layer_norm")
        for ours, theirs in (("attention", "self_attn"), ("cross_attention", "encoder_attn")):
            rows |= attention(block, f"{layer}.{theirs}", ours=ours)
            rows |= both(f"{block}{ours}/out", f"{layer}.{theirs}.out_proj", "out,in2")
        for ours, theirs in (("attention_norm", "self_attn_layer_norm"),
                             ("cross_norm", "encoder_attn_layer_norm"),
                             ("mlp_norm", "final_layer_norm")):
            rows |= both(f"{block}{ours}", f"{layer}.{theirs}")
        for ours, theirs in (("up", "fc1"), ("down", "fc2")):
            rows |= both(f"{block}mlp/{ours}", f"{layer}.{theirs}", "out,in")
    return rows
