"""DeepSeek-V2 and V3: latent attention, first layers with an MLP, and then small experts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmjax.huggingface.common_settings import ATTENTION_BIAS, MODERN
from lmjax.huggingface.row_orders import paired
from lmjax.huggingface.schema import ModelType, Setting, defaults
from lmjax.huggingface.tables import BLOCK, DENSE_BLOCK, LAYER, LLAMA_TABLE, both, experts, joined
from lmjax.huggingface.weights import Stored, Table
from lmjax.models.decoder import DecoderConfig

ATTENTION = f"{LAYER}.self_attn"
# The first layers are numbered on from 0, and those with experts after them (`latent_rows`).
LATENT_TABLE = joined(
    {path: row for path, row in LLAMA_TABLE.items() if f"{BLOCK}attention/" not in path},
    both(f"{BLOCK}attention/query_down", f"{ATTENTION}.q_a_proj", "out,in"),
    both(f"{BLOCK}attention/query_latent_norm", f"{ATTENTION}.q_a_layernorm"),
    both(f"{BLOCK}attention/query", f"{ATTENTION}.q_proj", "out,in"),
    both(f"{BLOCK}attention/key_value_down", f"{ATTENTION}.kv_a_proj_with_mqa", "out,in"),
    both(f"{BLOCK}attention/latent_norm", f"{ATTENTION}.kv_a_layernorm"),
    both(f"{BLOCK}attention/key_value", f"{ATTENTION}.kv_b_proj", "out,in"),
    both(f"{BLOCK}attention/out", f"{ATTENTION}.o_proj", "out,in2"))
EXPERTS = joined(
    experts(f"{LAYER}.mlp.experts", "gate_proj", "up_proj", "down_proj"),
    both(f"{BLOCK}mlp/router", f"{LAYER}.mlp.gate", "out,in"),
    {f"{BLOCK}mlp/correction": Stored(f"{LAYER}.mlp.gate.e_score_correction_bias")},
    *(both(f"{BLOCK}mlp/shared/{name}", f"{LAYER}.mlp.shared_experts.{name}_proj", "out,in")
      for name in ("gate", "up", "down")))


def latent_rows(config: DecoderConfig) -> Table:
    """The rows that depend on the sizes of heads, and those of layers without and with experts.

    Their class rotates neighbouring dimensions, so the rotated rows have another order.
    """
    c, first = config.latent, config.first_dense
    turned = paired(c.rope_dim, c.rope_dim)
    head = np.concatenate([np.arange(c.nope_dim), c.nope_dim + turned])
    heads = np.arange(config.num_heads)[:, None] * c.key_dim + head
    down = np.concatenate([np.arange(c.kv_rank), c.kv_rank + turned])
    rows = dict(LATENT_TABLE)
    orders = {f"{BLOCK}attention/query/": heads, f"{BLOCK}attention/key_value_down/": down}
    for path, row in LATENT_TABLE.items():
        if c.query_rank and path.startswith(f"{BLOCK}attention/query/"):
            row = row._replace(theirs=row.theirs.replace("q_proj", "q_b_proj"))
        for start, order in orders.items():
            if path.startswith(start):
                row = row._replace(order=tuple(order.reshape(-1).tolist()))
        rows[path] = row
    dense = {path.replace(BLOCK, DENSE_BLOCK): row for path, row in rows.items()
             if path.startswith(BLOCK)}
    rows |= EXPERTS
    return dense | {path: row._replace(shift=first) if path.startswith(BLOCK) else row
                    for path, row in rows.items()}


def told(settings: Mapping[str, Any], shared: int, mlp_dim: int) -> dict[str, Any]:
    """The width of the expert that computes all tokens, from how many small ones make it up."""
    return {"moe.shared_dim": settings.get("n_shared_experts", shared) * settings.get(
        "moe_intermediate_size", mlp_dim)}


def told_v2(settings: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSeek-V2 reads its groups only if topk_method says so."""
    limited = settings.get("topk_method", "greedy") == "group_limited_greedy"
    groups = {ours: settings.get(theirs) if limited else 0
              for ours, theirs in (("moe.groups", "n_group"), ("moe.top_groups", "topk_group"))}
    return groups | told(settings, 2, 1407)


def tell(config: DecoderConfig) -> dict[str, Any]:
    """The settings that follow from our config."""
    if not (config.latent.kv_rank and config.moe.experts):
        raise ValueError("latent.kv_rank=0" if config.moe.experts else "moe.experts=0")
    count, rest = divmod(config.moe.shared_dim, config.moe.mlp_dim)
    if rest or not count:
        raise ValueError(f"moe.shared_dim={config.moe.shared_dim}")
    return {"n_shared_experts": count}


def tell_v2(config: DecoderConfig) -> dict[str, Any]:
    """`tell`, and the groups of experts if there are any."""
    groups = config.moe.groups
    return tell(config) | {
        "topk_method": "group_limited_greedy" if groups else "greedy",
        "n_group": groups or None, "topk_group": config.moe.top_groups or None}


def implied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that their configs write beside those that they follow from."""
    rope = settings.get("qk_rope_head_dim", 64)
    return {"head_dim": rope, "qk_head_dim": settings.get("qk_nope_head_dim", 128) + rope}


LATENT_SETTINGS = (
    *(row for row in MODERN if row.theirs != "head_dim"), *ATTENTION_BIAS,
    Setting("kv_lora_rank", "latent.kv_rank", 512),
    Setting("q_lora_rank", "latent.query_rank", 1536, also={None: 0}),
    Setting("qk_nope_head_dim", "latent.nope_dim", 128),
    Setting("qk_rope_head_dim", "latent.rope_dim", 64),
    Setting("v_head_dim", "latent.value_dim", 128),
    Setting("moe_intermediate_size", "moe.mlp_dim", 1407),
    Setting("num_experts_per_tok", "moe.per_token", None),
    Setting("first_k_dense_replace", "moe.first_dense", 0),
    Setting("routed_scaling_factor", "moe.scale", 1.0),
    Setting("moe_layer_freq", "", 1))
# What their losses and their own code read.
NEUTRAL = ("n_shared_experts", "aux_loss_alpha", "seq_aux", "ep_size", "n_group", "topk_group",
           "topk_method", "max_window_layers")


def own_code(name: str) -> tuple[str, ...]:
    """The code that the first repositories of a class point to."""
    return (f"configuration_deepseek.Deepseek{name}Config", *(
        f"modeling_deepseek.Deepseek{name}{kind}" for kind in ("Model", "ForCausalLM")))


def tell_v3(config: DecoderConfig) -> dict[str, Any]:
    """`tell`, and one group for none, since the class divides by their number."""
    return tell(config) | ({} if config.moe.groups else {"n_group": 1, "topk_group": 1})


DEEPSEEK_V2 = ModelType(
    "deepseek_v2", "DeepseekV2ForCausalLM",
    (*defaults(LATENT_SETTINGS, vocab_size=102400),
     Setting("n_routed_experts", "moe.experts", 64, alias="num_experts"),
     # Its class never scales the weights to sum to 1, whatever its config says.
     Setting("norm_topk_prob", "moe.normalize", False, only={False: False, None: False}),
     Setting("scoring_func", "", "softmax"),
     Setting("mlp_bias", "", False)),
    LATENT_TABLE,
    prefix="model.",
    neutral=NEUTRAL,
    implied=implied,
    own_code=own_code("V2"),
    told=told_v2,
    tell=tell_v2,
    by_config=latent_rows)
DEEPSEEK_V3 = ModelType(
    "deepseek_v3", "DeepseekV3ForCausalLM",
    (*defaults(LATENT_SETTINGS, vocab_size=129280, hidden_size=7168, intermediate_size=18432,
               num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128,
               max_position_embeddings=4096, moe_intermediate_size=2048, num_experts_per_tok=8,
               first_k_dense_replace=3, routed_scaling_factor=2.5),
     Setting("n_routed_experts", "moe.experts", 256, alias="num_local_experts"),
     Setting("n_group", "moe.groups", 8),
     Setting("topk_group", "moe.top_groups", 4),
     Setting("norm_topk_prob", "moe.normalize", True,
             only={True: True, False: False, None: False}),
     Setting("topk_method", "", "noaux_tc"),
     Setting("scoring_func", "", "sigmoid"),
     Setting("rope_interleave", "", True)),
    LATENT_TABLE,
    fixed={"moe.scores": "sigmoid", "moe.correction": True},
    prefix="model.",
    neutral=(*NEUTRAL, "num_mtp_layers"),
    further_layers="num_nextn_predict_layers",
    implied=implied,
    own_code=own_code("V3"),
    told=lambda settings: told(settings, 1, 2048),
    tell=tell_v3,
    by_config=latent_rows)
# Its config.json has a type of its own, and its class is that of DeepSeek-V3.
KIMI_K2 = dataclasses.replace(DEEPSEEK_V3, name="kimi_k2")
