"""Where the parameters of more decoders lie in Hugging Face checkpoints, as in `tables`."""

from lmjax.huggingface.tables import BLOCK, LAYER, LLAMA_TABLE, PHI3_TABLE, attention, both, joined
from lmjax.huggingface.weights import Stored, Table
from lmjax.models.decoder import DecoderConfig

MLP_FUSED: Table = {path: row for path, row in PHI3_TABLE.items()
                    if path.startswith(f"{BLOCK}mlp/")}
OLMO2_TABLE = joined(
    {path: row for path, row in LLAMA_TABLE.items() if "mlp_norm" not in path},
    both(f"{BLOCK}attention_post_norm", f"{LAYER}.post_attention_layernorm"),
    both(f"{BLOCK}mlp_post_norm", f"{LAYER}.post_feedforward_layernorm"))
STARCODER2_TABLE = joined(
    LLAMA_TABLE,
    both(f"{BLOCK}mlp/up", f"{LAYER}.mlp.c_fc", "out,in"),
    both(f"{BLOCK}mlp/down", f"{LAYER}.mlp.c_proj", "out,in"))
STABLELM_TABLE = joined(
    LLAMA_TABLE,
    *(both(f"{BLOCK}attention/{ours}_norm", f"{LAYER}.self_attn.{theirs}_layernorm.norms.{{}}")
      for ours, theirs in (("query", "q"), ("key", "k"))))
GLM_TABLE = joined(LLAMA_TABLE, MLP_FUSED)
# All experts of a layer are one tensor, [E, in, out].
GPT_OSS_EXPERTS = f"{LAYER}.mlp.experts"
GPT_OSS_TABLE: Table = joined(
    {path: row for path, row in LLAMA_TABLE.items() if "/mlp/" not in path},
    {f"{BLOCK}attention/sinks": Stored(f"{LAYER}.self_attn.sinks"),
     **{f"{BLOCK}mlp/{name}/{leaf}": Stored(f"{GPT_OSS_EXPERTS}.gate_up_proj{ending}", "", (i, 2))
        for i, name in enumerate(("gate", "up"))
        for leaf, ending in (("kernel", ""), ("bias", "_bias"))},
     f"{BLOCK}mlp/down/kernel": Stored(f"{GPT_OSS_EXPERTS}.down_proj"),
     f"{BLOCK}mlp/down/bias": Stored(f"{GPT_OSS_EXPERTS}.down_proj_bias")},
    both(f"{BLOCK}mlp/router", f"{LAYER}.mlp.router", "out,in"))


def gpt_oss_experts(config: DecoderConfig) -> Table:
    """The rows of gpt-oss's fused matrices, in which the outputs of gate and up take turns."""
    width = 2 * (config.moe.mlp_dim or config.mlp_dim)
    return {path: row._replace(order=tuple(range(row.part[0], width, 2)))
            for path, row in GPT_OSS_TABLE.items() if "gate_up_proj" in row.theirs}


GLM4_TABLE = joined(
    GLM_TABLE,
    both(f"{BLOCK}attention_post_norm", f"{LAYER}.post_self_attn_layernorm"),
    both(f"{BLOCK}mlp_post_norm", f"{LAYER}.post_mlp_layernorm"))
PHI_TABLE = joined(
    LLAMA_TABLE,
    {"head_bias": Stored("lm_head.bias")},
    both("norm", "model.final_layernorm"),
    both(f"{BLOCK}attention/out", f"{LAYER}.self_attn.dense", "out,in2"),
    *(both(f"{BLOCK}attention/{ours}_norm", f"{LAYER}.self_attn.{theirs}_layernorm")
      for ours, theirs in (("query", "q"), ("key", "k"))),
    both(f"{BLOCK}mlp/up", f"{LAYER}.mlp.fc1", "out,in"),
    both(f"{BLOCK}mlp/down", f"{LAYER}.mlp.fc2", "out,in"))


def _fused(layer: str, attention: str) -> Table:
    """The rows of attention and MLP in GPT-NeoX and Falcon."""
    return joined(
        *(both(f"{BLOCK}attention/{name}", f"{layer}.{attention}.query_key_value", "out,in", (i, 3))
          for i, name in enumerate(("query", "key", "value"))),
        both(f"{BLOCK}attention/out", f"{layer}.{attention}.dense", "out,in2"),
        both(f"{BLOCK}mlp/up", f"{layer}.mlp.dense_h_to_4h", "out,in"),
        both(f"{BLOCK}mlp/down", f"{layer}.mlp.dense_4h_to_h", "out,in"))


NEOX_LAYER = "gpt_neox.layers.{}"
NEOX_TABLE = joined(
    {"embedding/table": Stored("gpt_neox.embed_in.weight"),
     "head/table": Stored("embed_out.weight")},
    both("norm", "gpt_neox.final_layer_norm"),
    both(f"{BLOCK}attention_norm", f"{NEOX_LAYER}.input_layernorm"),
    both(f"{BLOCK}mlp_norm", f"{NEOX_LAYER}.post_attention_layernorm"),
    _fused(NEOX_LAYER, "attention"))

FALCON_LAYER = "transformer.h.{}"
FALCON_TABLE = joined(
    {"embedding/table": Stored("transformer.word_embeddings.weight"),
     "head/table": Stored("lm_head.weight")},
    both("norm", "transformer.ln_f"),
    both(f"{BLOCK}attention_norm", f"{FALCON_LAYER}.input_layernorm"),
    both(f"{BLOCK}mlp_norm", f"{FALCON_LAYER}.post_attention_layernorm"),
    _fused(FALCON_LAYER, "self_attention"))


def falcon_norms(config: DecoderConfig) -> Table:
    """The rows of Falcon's norms, which have other names where both branches have their own."""
    if config.parallel_residual != "own_norms":
        return {}
    return joined(both(f"{BLOCK}attention_norm", f"{FALCON_LAYER}.ln_attn"),
                  both(f"{BLOCK}mlp_norm", f"{FALCON_LAYER}.ln_mlp"))


GPTJ_LAYER = "transformer.h.{}"
GPTJ_TABLE = joined(
    {"embedding/table": Stored("transformer.wte.weight"),
     "head/table": Stored("lm_head.weight"),
     "head_bias": Stored("lm_head.bias")},
    both("norm", "transformer.ln_f"),
    both(f"{BLOCK}attention_norm", f"{GPTJ_LAYER}.ln_1"),
    attention(BLOCK, f"{GPTJ_LAYER}.attn"),
    both(f"{BLOCK}attention/out", f"{GPTJ_LAYER}.attn.out_proj", "out,in2"),
    both(f"{BLOCK}mlp/up", f"{GPTJ_LAYER}.mlp.fc_in", "out,in"),
    both(f"{BLOCK}mlp/down", f"{GPTJ_LAYER}.mlp.fc_out", "out,in"))

OPT_LAYER = "model.decoder.layers.{}"
OPT_TABLE = joined(
    {"embedding/table": Stored("model.decoder.embed_tokens.weight"),
     "positions/table": Stored("model.decoder.embed_positions.weight"),
     "head/table": Stored("lm_head.weight")},
    both("norm", "model.decoder.final_layer_norm"),
    both(f"{BLOCK}attention_norm", f"{OPT_LAYER}.self_attn_layer_norm"),
    both(f"{BLOCK}mlp_norm", f"{OPT_LAYER}.final_layer_norm"),
    attention(BLOCK, f"{OPT_LAYER}.self_attn"),
    both(f"{BLOCK}attention/out", f"{OPT_LAYER}.self_attn.out_proj", "out,in2"),
    both(f"{BLOCK}mlp/up", f"{OPT_LAYER}.fc1", "out,in"),
    both(f"{BLOCK}mlp/down", f"{OPT_LAYER}.fc2", "out,in"))
