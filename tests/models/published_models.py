"""Tiny versions of published models: their config in transformers, ours, and their parameters.

A map of names goes from ours to (theirs, how). "block/" in our name stands for every layer, {} in
theirs for the layer's number. `how` is a sequence of steps: T transposes an (out, in) matrix; 0, 1
and 2 take a third of a fused matrix; a and b take a half.
"""

from typing import NamedTuple

import numpy as np

V, D, H, G, K, F, LAYERS, WINDOW = 48, 32, 4, 2, 8, 48, 2, 5
PARTS = {"0": (3, 0), "1": (3, 1), "2": (3, 2), "a": (2, 0), "b": (2, 1)}
PROJECTIONS = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))


class Published(NamedTuple):
    their: str  # the prefix of the class in transformers
    head: str  # the rest of the class's name
    config: dict  # theirs
    ours: dict  # the keys of our config
    names: dict  # the map of parameter names
    inputs: dict = {}  # their inputs -> arrays of our batch, beyond the usual ones


# A norm that ModernBERT has at another place than we have.
MOVED = {"model.layers.0.attn_norm.weight": "model.embeddings.norm.weight"}


def both(ours, theirs, how=""):
    """The names of a weight and of a bias."""
    kernel = "scale" if "norm" in ours else "kernel"
    return {f"{ours}/{kernel}": (f"{theirs}.weight", how),
            f"{ours}/bias": (f"{theirs}.bias", how.replace("T", ""))}


# --- decoders

LLAMA = {
    "embedding/table": ("model.embed_tokens.weight", ""),
    "norm/scale": ("model.norm.weight", ""),
    "head/table": ("lm_head.weight", ""),
}
BLOCK, THEIRS = "layers/block", "model.layers.{}"
for ours, letter in PROJECTIONS:
    LLAMA |= both(f"{BLOCK}/attention/{ours}", f"{THEIRS}.self_attn.{letter}_proj", "T")
for part in ("gate", "up", "down"):
    LLAMA |= both(f"{BLOCK}/mlp/{part}", f"{THEIRS}.mlp.{part}_proj", "T")
for ours, theirs in (("attention_norm", "input_layernorm"),
                     ("mlp_norm", "post_attention_layernorm"),
                     ("attention/query_norm", "self_attn.q_norm"),
                     ("attention/key_norm", "self_attn.k_norm")):
    LLAMA |= both(f"{BLOCK}/{ours}", f"{THEIRS}.{theirs}")
GEMMA = dict(LLAMA)
for ours, theirs in (("attention_post_norm", "post_attention_layernorm"),
                     ("mlp_norm", "pre_feedforward_layernorm"),
                     ("mlp_post_norm", "post_feedforward_layernorm")):
    GEMMA |= both(f"{BLOCK}/{ours}", f"{THEIRS}.{theirs}")
GPT2 = {
    "embedding/table": ("transformer.wte.weight", ""),
    "positions/table": ("transformer.wpe.weight", ""),
} | both("norm", "transformer.ln_f")
for ours, theirs, how in (("attention_norm", "ln_1", ""), ("mlp_norm", "ln_2", ""),
                          ("attention/query", "attn.c_attn", "0"),
                          ("attention/key", "attn.c_attn", "1"),
                          ("attention/value", "attn.c_attn", "2"),
                          ("attention/out", "attn.c_proj", ""),
                          ("mlp/up", "mlp.c_fc", ""), ("mlp/down", "mlp.c_proj", "")):
    GPT2 |= both(f"{BLOCK}/{ours}", f"transformer.h.{{}}.{theirs}", how)
MOE = dict(LLAMA)  # their experts are [E, out, in]
for ours, theirs, how in (("router", "gate.weight", "T"), ("gate", "experts.gate_up_proj", "Ta"),
                          ("up", "experts.gate_up_proj", "Tb"), ("down", "experts.down_proj", "T"),
                          ("shared/gate", "shared_expert.gate_proj.weight", "T"),
                          ("shared/up", "shared_expert.up_proj.weight", "T"),
                          ("shared/down", "shared_expert.down_proj.weight", "T"),
                          ("shared_gate", "shared_expert_gate.weight", "T")):
    MOE[f"{BLOCK}/mlp/{ours}/kernel"] = (f"{THEIRS}.mlp.{theirs}", how)


def llama(theta=100.0, **keys):
    return dict(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS,
                num_attention_heads=H, num_key_value_heads=G, max_position_embeddings=32,
                rms_norm_eps=1e-5, tie_word_embeddings=False, pad_token_id=0,
                rope_parameters={"rope_type": "default", "rope_theta": theta}) | keys


def gpt2(activation):
    return dict(vocab_size=V, n_embd=D, n_layer=LAYERS, n_head=H, n_inner=F, n_positions=32,
                activation_function=activation, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                bos_token_id=1, eos_token_id=2)


def scaled(kind, **keys):
    return dict(rope_parameters={"rope_type": kind, "rope_theta": 100.0, **keys})


COMMON = dict(num_layers=LAYERS, embed_dim=D, num_heads=H, num_kv_heads=G, mlp_dim=F, vocab_size=V,
              max_positions=32, rope_theta=100.0)
GPT2_OURS = dict(num_kv_heads=H, positions="learned", norm="layernorm", use_bias=True,
                 tie_embeddings=True)
GEMMA_KEYS = dict(head_dim=16, query_pre_attn_scalar=20, hidden_activation="gelu_pytorch_tanh",
                  sliding_window=WINDOW, tie_word_embeddings=True, num_hidden_layers=3,
                  layer_types=["sliding_attention", "full_attention", "sliding_attention"])
GEMMA_OURS = dict(head_dim=16, query_scalar=20.0, mlp="geglu", norm="rmsnorm_1p",
                  norm_position="both", scale_embeddings=True, tie_embeddings=True, num_layers=3,
                  layer_pattern=("local", "global"), sliding_window=WINDOW)
QWEN2_WINDOW = dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)

DECODERS = {
    "gpt2": Published("GPT2", "LMHeadModel", gpt2("gelu_new"), GPT2_OURS | dict(mlp="gelu_tanh"),
                      GPT2),
    "gpt2-erf": Published("GPT2", "LMHeadModel", gpt2("gelu"), GPT2_OURS | dict(mlp="gelu"), GPT2),
    "llama": Published("Llama", "ForCausalLM", llama(), {}, LLAMA),
    "llama-tied": Published("Llama", "ForCausalLM", llama(tie_word_embeddings=True),
                            dict(tie_embeddings=True), LLAMA),
    "llama3": Published("Llama", "ForCausalLM", llama() | scaled(
        "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16),
        dict(rope_scaling=dict(kind="llama3", factor=4.0, original_positions=16)), LLAMA),
    "mistral": Published("Mistral", "ForCausalLM", llama(sliding_window=4),
                         dict(sliding_window=4), LLAMA),
    "qwen2": Published("Qwen2", "ForCausalLM", llama(**QWEN2_WINDOW), dict(
        qkv_bias=True, sliding_window=WINDOW, layer_pattern=("global", "local")), LLAMA),
    "qwen3": Published("Qwen3", "ForCausalLM", llama(head_dim=16),
                       dict(head_dim=16, qk_norm=True), LLAMA),
    "gemma2": Published(
        "Gemma2", "ForCausalLM",
        llama(attn_logit_softcapping=2.0, final_logit_softcapping=3.0) | GEMMA_KEYS,
        GEMMA_OURS | dict(attention_softcap=2.0, logit_softcap=3.0), GEMMA),
    "gemma3": Published("Gemma3", "ForCausalLM", llama() | GEMMA_KEYS | dict(rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}}),
        GEMMA_OURS | dict(qk_norm=True, rope_theta=1000.0, local_rope_theta=10.0,
                          rope_scaling=dict(kind="linear", factor=8.0)), GEMMA),
    "mixtral": Published("Mixtral", "ForCausalLM",
                         llama(num_local_experts=4, num_experts_per_tok=2),
                         dict(moe=dict(experts=4, per_token=2, balance_loss=0.0)), MOE),
    "qwen2-moe": Published("Qwen2Moe", "ForCausalLM", llama(
        num_experts=4, num_experts_per_tok=3, moe_intermediate_size=24,
        shared_expert_intermediate_size=40, norm_topk_prob=False), dict(qkv_bias=True, moe=dict(
            experts=4, per_token=3, mlp_dim=24, normalize=False, shared_dim=40, shared_gate=True,
            balance_loss=0.0)), MOE),
}

# --- encoders

BERT = {"embedding/table": ("bert.embeddings.word_embeddings.weight", ""),
        "positions/table": ("bert.embeddings.position_embeddings.weight", ""),
        "token_types/table": ("bert.embeddings.token_type_embeddings.weight", ""),
        "head_bias": ("cls.predictions.bias", "")}
for ours, theirs in (("embedding_norm", "bert.embeddings.LayerNorm"),
                     ("transform_norm", "cls.predictions.transform.LayerNorm"),
                     (f"{BLOCK}/attention_norm",
                      "bert.encoder.layer.{}.attention.output.LayerNorm"),
                     (f"{BLOCK}/mlp_norm", "bert.encoder.layer.{}.output.LayerNorm")):
    BERT |= both(ours, theirs)
for ours, theirs in (("transform", "cls.predictions.transform.dense"),
                     (f"{BLOCK}/attention/query", "bert.encoder.layer.{}.attention.self.query"),
                     (f"{BLOCK}/attention/key", "bert.encoder.layer.{}.attention.self.key"),
                     (f"{BLOCK}/attention/value", "bert.encoder.layer.{}.attention.self.value"),
                     (f"{BLOCK}/attention/out", "bert.encoder.layer.{}.attention.output.dense"),
                     (f"{BLOCK}/mlp/up", "bert.encoder.layer.{}.intermediate.dense"),
                     (f"{BLOCK}/mlp/down", "bert.encoder.layer.{}.output.dense")):
    BERT |= both(ours, theirs, "T")


def roberta_name(bert):
    name = bert.replace("bert.", "roberta.").replace("cls.predictions.transform.", "lm_head.")
    return (name.replace("lm_head.LayerNorm", "lm_head.layer_norm")
            .replace("cls.predictions", "lm_head"))


ROBERTA = {ours: (roberta_name(theirs), how) for ours, (theirs, how) in BERT.items()}
MODERN = {"embedding/table": ("model.embeddings.tok_embeddings.weight", ""),
          "head_bias": ("decoder.bias", ""),
          f"{BLOCK}/attention_norm/scale": ("model.layers.{}.attn_norm.weight", "")}
for ours, theirs, how in (("transform", "head.dense", "T"), ("transform_norm", "head.norm", ""),
                          ("norm", "model.final_norm", ""),
                          (f"{BLOCK}/mlp_norm", "model.layers.{}.mlp_norm", ""),
                          (f"{BLOCK}/attention/query", "model.layers.{}.attn.Wqkv", "T0"),
                          (f"{BLOCK}/attention/key", "model.layers.{}.attn.Wqkv", "T1"),
                          (f"{BLOCK}/attention/value", "model.layers.{}.attn.Wqkv", "T2"),
                          (f"{BLOCK}/attention/out", "model.layers.{}.attn.Wo", "T"),
                          (f"{BLOCK}/mlp/gate", "model.layers.{}.mlp.Wi", "Ta"),
                          (f"{BLOCK}/mlp/up", "model.layers.{}.mlp.Wi", "Tb"),
                          (f"{BLOCK}/mlp/down", "model.layers.{}.mlp.Wo", "T")):
    MODERN |= both(ours, theirs, how)


def bert(**keys):
    return dict(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS,
                num_attention_heads=H, max_position_embeddings=32, layer_norm_eps=1e-12,
                pad_token_id=0) | keys


BERT_OURS = dict(num_kv_heads=H, positions="learned", norm="layernorm", norm_eps=1e-12,
                 norm_position="post", embedding_norm="own", mlp="gelu", use_bias=True,
                 token_types=2, tie_embeddings=True)
ENCODERS = {
    "bert": Published("Bert", "ForMaskedLM", bert(), BERT_OURS, BERT,
                      dict(token_type_ids="token_types")),
    "roberta": Published("Roberta", "ForMaskedLM", bert(
        max_position_embeddings=34, type_vocab_size=1, pad_token_id=1),
        BERT_OURS | dict(position_offset=2, token_types=1), ROBERTA),
    "modernbert": Published("ModernBert", "ForMaskedLM", dict(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=4,
        num_attention_heads=H, pad_token_id=0, max_position_embeddings=32, local_attention=8,
        global_rope_theta=1000.0, local_rope_theta=10.0),
        dict(num_kv_heads=H, num_layers=4, norm="layernorm_no_bias", embedding_norm="first",
             mlp="geglu_erf", rope_theta=1000.0, local_rope_theta=10.0, sliding_window=5,
             layer_pattern=("global", "local", "local"), tie_embeddings=True), MODERN),
}

# --- encoder-decoders

T5 = {"embedding/table": ("shared.weight", ""), "head/table": ("lm_head.weight", "")}
MARIAN = {"embedding/table": ("model.shared.weight", "")}
for half in ("encoder", "decoder"):
    block = f"{half}/layers/block"
    branches = ("attention", "mlp") if half == "encoder" else ("attention", "cross", "mlp")
    T5[f"{half}/relative_bias/table"] = (
        f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "")
    T5[f"{half}/norm/scale"] = (f"{half}.final_layer_norm.weight", "")
    for i, branch in enumerate(branches):
        T5[f"{block}/{branch}_norm/scale"] = (f"{half}.block.{{}}.layer.{i}.layer_norm.weight", "")
    for (ours, letter), (name, theirs) in [(p, n) for p in PROJECTIONS for n in (
            ("attention", "layer.0.SelfAttention"),
            ("cross_attention", "layer.1.EncDecAttention"))]:
        T5[f"{block}/{name}/{ours}/kernel"] = (f"{half}.block.{{}}.{theirs}.{letter}.weight", "T")
    for ours, theirs in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
        T5[f"{block}/mlp/{ours}/kernel"] = (
            f"{half}.block.{{}}.layer.{len(branches) - 1}.DenseReluDense.{theirs}.weight", "T")
    for (ours, letter), (name, theirs) in [(p, n) for p in PROJECTIONS for n in (
            ("attention", "self_attn"), ("cross_attention", "encoder_attn"))]:
        letter = "out" if letter == "o" else letter
        MARIAN |= both(f"{block}/{name}/{ours}",
                       f"model.{half}.layers.{{}}.{theirs}.{letter}_proj", "T")
    for ours, theirs, how in (("attention_norm", "self_attn_layer_norm", ""),
                              ("cross_norm", "encoder_attn_layer_norm", ""),
                              ("mlp_norm", "final_layer_norm", ""),
                              ("mlp/up", "fc1", "T"), ("mlp/down", "fc2", "T")):
        MARIAN |= both(f"{block}/{ours}", f"model.{half}.layers.{{}}.{theirs}", how)
T5_RELU = {ours: (theirs.replace("wi_1", "wi"), how) for ours, (theirs, how) in T5.items()}
SEQ2SEQ = dict(input_ids="encoder_tokens", attention_mask="encoder_segment_ids",
               decoder_input_ids="tokens", decoder_attention_mask="segment_ids")


def t5(**keys):
    return dict(vocab_size=V, d_model=D, d_kv=16, d_ff=F, num_layers=LAYERS, num_decoder_layers=3,
                num_heads=H, relative_attention_num_buckets=8,
                relative_attention_max_distance=12) | keys


T5_OURS = dict(num_kv_heads=H, head_dim=16, num_encoder_layers=LAYERS, num_layers=3,
               positions="relative", relative_buckets=8, relative_distance=12, norm_eps=1e-6,
               query_scalar=1.0)
ENCDECS = {
    "t5-v1.0": Published("T5", "ForConditionalGeneration", t5(), T5_OURS | dict(
        mlp="relu", tie_embeddings=True, scale_output=True), T5_RELU, SEQ2SEQ),
    "t5-v1.1": Published("T5", "ForConditionalGeneration", t5(
        feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        T5_OURS | dict(mlp="geglu"), T5, SEQ2SEQ),
    "transformer": Published("Marian", "MTModel", dict(
        vocab_size=V, d_model=D, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=H, decoder_attention_heads=H, encoder_ffn_dim=F,
        decoder_ffn_dim=F, activation_function="relu", pad_token_id=0, max_position_embeddings=32,
        scale_embedding=True, decoder_start_token_id=0, eos_token_id=1, forced_eos_token_id=None),
        dict(num_kv_heads=H, positions="sinusoidal", norm="layernorm", norm_position="post",
             scale_embeddings=True, mlp="relu", use_bias=True, tie_embeddings=True), MARIAN,
        SEQ2SEQ),
}
MODELS = DECODERS | ENCODERS | ENCDECS


def tree_of(shapes, names, tensors):
    """Their tensors (weights or gradients, by name) as a flat dict with our names and shapes."""

    def one(theirs, how, shape):
        x = np.asarray(tensors[MOVED.get(theirs, theirs)])
        for step in how:
            x = (np.swapaxes(x, -1, -2) if step == "T" else
                 np.split(x, PARTS[step][0], axis=-1)[PARTS[step][1]])
        return x.reshape(shape)

    out = {}
    for name, leaf in shapes:
        theirs, how = names[name]
        out[name] = (np.stack([one(theirs.format(i), how, leaf.shape[1:])
                               for i in range(leaf.shape[0])])
                     if "block/" in name else one(theirs, how, leaf.shape))
    return out
