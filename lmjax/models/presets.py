"""Published models as data.

`model=dict(preset="llama3-8b", num_layers=8)` is that model with 8 layers. A preset is a row of
dimensions and the switches of its series. Its `vocab_size` is that of the model's own tokenizer,
padding included. For another tokenizer, set `vocab_size=0`: the model then takes that tokenizer's
size.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from lmjax.errors import UserError

Switches = dict[str, Any]

DIMS = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "head_dim")

# Settings whose values say little by themselves (`models.config` describes all of them):
#   norm_position    "both": norms before and after each branch, the latter before the branch is
#                    added; "after": the latter alone; "post": after it is added. The default is
#                    before the branch only.
#   embedding_norm   "own": the embeddings have a norm of their own; "first": the first layer's
#                    attention norm also serves as the embeddings' norm.
#   position_offset  position p reads row p + position_offset of the table.
#   query_scalar     attention scores are divided by its square root, instead of head_dim's.
#   sliding_window   counts the token itself: 65 in an encoder is 64 tokens on each side and itself.

GPT2 = dict(positions="learned", norm="layernorm", mlp="gelu_tanh", use_bias=True,
            tie_embeddings=True, vocab_size=50257, dropout=0.1)
# Brown et al. 2020 (arXiv:2005.14165), table 2.1. Here the attention of every layer is dense; in
# GPT-3, dense layers alternate with banded ones. In two rows of the table, heads x head size
# differs from the width: 1.3B has 24 heads of 128 for a width of 2048 (here: 16 heads), and 13B has
# 40 heads of 128 for a width of 5140 (here: 5120).
GPT3 = GPT2 | dict(max_positions=2048, dropout=0.0)
LLAMA2 = dict(max_positions=4096, vocab_size=32000)
LLAMA3 = dict(max_positions=8192, vocab_size=128256, rope_theta=500_000.0)
LLAMA31_SCALING = dict(kind="llama3", factor=8.0, original_positions=8192)
LLAMA31 = LLAMA3 | dict(max_positions=131072, rope_scaling=LLAMA31_SCALING)
LLAMA32 = LLAMA31 | dict(tie_embeddings=True, rope_scaling=LLAMA31_SCALING | dict(factor=32.0))
QWEN25 = dict(qkv_bias=True, norm_eps=1e-6, rope_theta=1e6, max_positions=32768, vocab_size=152064)
QWEN25_SMALL = QWEN25 | dict(tie_embeddings=True, vocab_size=151936)
QWEN3 = dict(qk_norm=True, norm_eps=1e-6, rope_theta=1e6, max_positions=40960, vocab_size=151936)
QWEN3_SMALL = QWEN3 | dict(tie_embeddings=True)
MISTRAL = dict(max_positions=32768, vocab_size=32000, sliding_window=4096)
MIXTRAL = dict(max_positions=32768, vocab_size=32000, rope_theta=1e6,
               moe=dict(experts=8, per_token=2, balance_loss=0.02))
QWEN3_MOE = QWEN3 | dict(moe=dict(experts=128, per_token=8, balance_loss=0.001))
GEMMA = dict(norm="rmsnorm_1p", norm_eps=1e-6, norm_position="both", mlp="geglu",
             scale_embeddings=True, tie_embeddings=True)
GEMMA2 = GEMMA | dict(max_positions=8192, vocab_size=256000, layer_pattern=("local", "global"),
                      sliding_window=4096, attention_softcap=50.0, logit_softcap=30.0)
GEMMA3 = GEMMA | dict(max_positions=131072, vocab_size=262208, qk_norm=True,
                      layer_pattern=("local",) * 5 + ("global",), sliding_window=1024,
                      rope_theta=1e6, local_rope_theta=10_000.0,
                      rope_scaling=dict(kind="linear", factor=8.0))
GEMMA1 = GEMMA | dict(norm_position="pre", max_positions=8192, vocab_size=256000)
PHI3 = dict(max_positions=4096, vocab_size=32064)
OLMO = dict(norm="layernorm_plain", max_positions=2048, vocab_size=50304)
OLMO2 = dict(norm_eps=1e-6, norm_position="after", qk_norm=True, qk_norm_over="all_heads",
             rope_theta=500_000.0, max_positions=4096, vocab_size=100352)
OLMO3 = OLMO2 | dict(max_positions=65536, vocab_size=100278, sliding_window=4096,
                     layer_pattern=("local",) * 3 + ("global",), local_rope_theta=500_000.0,
                     rope_scaling=dict(kind="yarn", factor=8.0, original_positions=8192))
SMOLLM3 = dict(norm_eps=1e-6, rope_theta=5e6, max_positions=65536, vocab_size=128256,
               layer_pattern=("global",) * 3 + ("global_nope",), tie_embeddings=True)
LAYERNORM = dict(norm="layernorm", use_bias=True)
STARCODER2 = LAYERNORM | dict(mlp="gelu_tanh", rope_theta=1e6, max_positions=16384,
                              vocab_size=49152, sliding_window=4096, tie_embeddings=True)
STABLELM = dict(norm="layernorm", rotary_fraction=0.25, max_positions=4096, vocab_size=100352)
NEOX = LAYERNORM | dict(mlp="gelu", rotary_fraction=0.25, parallel_residual="own_norms",
                        max_positions=2048)
PYTHIA = NEOX | dict(vocab_size=50304)
GPTJ = dict(norm="layernorm", mlp="gelu_tanh", mlp_bias=True, output_bias=True,
            rotary_fraction=0.25, parallel_residual="one_norm", max_positions=2048,
            vocab_size=50400)
PHI = LAYERNORM | dict(mlp="gelu_tanh", output_bias=True, rotary_fraction=0.5,
                       parallel_residual="one_norm", max_positions=2048, vocab_size=51200)
FALCON = dict(norm="layernorm", mlp="gelu", parallel_residual="own_norms", tie_embeddings=True,
              max_positions=2048, vocab_size=65024)
COHERE = dict(norm="layernorm_no_bias", parallel_residual="one_norm", max_positions=131072,
              logit_divisor=16.0, tie_embeddings=True, vocab_size=256000)
GLM4 = dict(norm_eps=1.5625e-07, qkv_bias=True, rotary_fraction=0.5, max_positions=131072,
            vocab_size=151552)
GPT_OSS = dict(attention_sinks=True, qkv_bias=True, out_bias=True, mlp="swiglu_clamped",
               sliding_window=128, layer_pattern=("local", "global"), rope_theta=150_000.0,
               rope_scaling=dict(kind="yarn", factor=32.0, original_positions=4096,
                                 truncate=False),
               max_positions=131072, vocab_size=201088)
YARN40 = dict(kind="yarn", factor=40.0, original_positions=4096, mscale=1.0, mscale_all_dim=1.0)
LATENT = dict(kv_rank=512, query_rank=1536, nope_dim=128, rope_dim=64, value_dim=128)
DEEPSEEK_V2 = dict(
    norm_eps=1e-6, max_positions=163840, vocab_size=102400, rope_scaling=YARN40, latent=LATENT,
    moe=dict(experts=160, per_token=6, mlp_dim=1536, shared_dim=3072, normalize=False, scale=16.0,
             groups=8, top_groups=3, first_dense=1, balance_loss=0.003))
V3_MOE: Switches = dict(
    experts=256, per_token=8, mlp_dim=2048, shared_dim=2048, scores="sigmoid", groups=8,
    top_groups=4, correction=True, correction_rate=0.001, scale=2.5, first_dense=3,
    balance_loss=0.0001)
DEEPSEEK_V3 = DEEPSEEK_V2 | dict(vocab_size=129280, moe=V3_MOE)
KIMI_K2 = DEEPSEEK_V3 | dict(
    max_positions=131072, vocab_size=163840, rope_theta=50_000.0,
    rope_scaling=YARN40 | dict(factor=32.0, beta_fast=1.0, beta_slow=1.0),
    moe=V3_MOE | dict(experts=384, groups=1, top_groups=1, scale=2.827, first_dense=1))
OPT = LAYERNORM | dict(positions="learned", position_offset=2, mlp="relu", max_positions=2048,
                       tie_embeddings=True, vocab_size=50272, dropout=0.1)
BERT = dict(family="encoder", positions="learned", max_positions=512, norm="layernorm",
            norm_eps=1e-12, norm_position="post", embedding_norm="own", mlp="gelu", use_bias=True,
            token_types=2, pooler=True, tie_embeddings=True, vocab_size=30522, dropout=0.1)
ROBERTA = BERT | dict(norm_eps=1e-5, token_types=1, pooler=False, position_offset=2,
                      vocab_size=50265)
MODERNBERT = dict(family="encoder", norm="layernorm_no_bias", embedding_norm="first",
                  mlp="geglu_erf", max_positions=8192, rope_theta=160_000.0,
                  local_rope_theta=10_000.0, sliding_window=65,
                  layer_pattern=("global", "local", "local"), tie_embeddings=True,
                  vocab_size=50368)
DISTILBERT = {key: value for key, value in BERT.items() if key not in ("token_types", "pooler")}
ELECTRA = BERT | dict(pooler=False, head_activation="gelu")
ALBERT = BERT | dict(mlp="gelu_tanh", table_dim=128, shared_layers=True, vocab_size=30000,
                     dropout=0.0)
TRANSFORMER = dict(family="encdec", positions="sinusoidal", norm="layernorm", norm_position="post",
                   scale_embeddings=True, mlp="relu", use_bias=True, tie_embeddings=True,
                   vocab_size=37000)
BART = dict(family="encdec", positions="learned", position_offset=2, norm="layernorm",
            norm_position="post", embedding_norm="own", mlp="gelu", use_bias=True, output_bias=True,
            tie_embeddings=True, vocab_size=50265, dropout=0.1)
MBART = BART | dict(norm_position="pre", scale_embeddings=True, vocab_size=250027)
PEGASUS = BART | dict(positions="sinusoidal", position_offset=0, norm_position="pre",
                      embedding_norm="none", scale_embeddings=True, mlp="relu", vocab_size=96103)
M2M_100 = PEGASUS | dict(positions="sinusoidal_t2t", position_offset=2, output_bias=False,
                         vocab_size=128112)
NLLB = M2M_100 | dict(vocab_size=256206)
T5 = dict(family="encdec", positions="relative", norm_eps=1e-6, query_scalar=1.0, mlp="relu",
          tie_embeddings=True, scale_output=True, vocab_size=32128, embedding_std=1.0,
          init_std=0.04, dropout=0.1)
T5_V1_1 = T5 | dict(mlp="geglu", tie_embeddings=False, scale_output=False, dropout=0.0)

# name -> (switches of the series, dimensions in the order of DIMS, switches of this model alone);
# the last dimensions may be left out
TABLE: dict[str, tuple[Any, ...]] = {
    "gpt2": (GPT2, (12, 768, 12, 12, 3072)),
    "gpt2-medium": (GPT2, (24, 1024, 16, 16, 4096)),
    "gpt2-large": (GPT2, (36, 1280, 20, 20, 5120)),
    "gpt2-xl": (GPT2, (48, 1600, 25, 25, 6400)),
    "gpt3-125m": (GPT3, (12, 768, 12, 12, 3072)),
    "gpt3-350m": (GPT3, (24, 1024, 16, 16, 4096)),
    "gpt3-760m": (GPT3, (24, 1536, 16, 16, 6144)),
    "gpt3-1.3b": (GPT3, (24, 2048, 16, 16, 8192)),
    "gpt3-2.7b": (GPT3, (32, 2560, 32, 32, 10240)),
    "gpt3-6.7b": (GPT3, (32, 4096, 32, 32, 16384)),
    "gpt3-13b": (GPT3, (40, 5120, 40, 40, 20480)),
    "gpt3-175b": (GPT3, (96, 12288, 96, 96, 49152)),
    "llama2-7b": (LLAMA2, (32, 4096, 32, 32, 11008)),
    "llama2-13b": (LLAMA2, (40, 5120, 40, 40, 13824)),
    "llama2-70b": (LLAMA2, (80, 8192, 64, 8, 28672)),
    "llama3-8b": (LLAMA3, (32, 4096, 32, 8, 14336)),
    "llama3-70b": (LLAMA3, (80, 8192, 64, 8, 28672)),
    "llama3.1-8b": (LLAMA31, (32, 4096, 32, 8, 14336)),
    "llama3.1-70b": (LLAMA31, (80, 8192, 64, 8, 28672)),
    "llama3.1-405b": (LLAMA31, (126, 16384, 128, 8, 53248)),
    "llama3.2-1b": (LLAMA32, (16, 2048, 32, 8, 8192)),
    "llama3.2-3b": (LLAMA32, (28, 3072, 24, 8, 8192)),
    "qwen2.5-0.5b": (QWEN25_SMALL, (24, 896, 14, 2, 4864)),
    "qwen2.5-1.5b": (QWEN25_SMALL, (28, 1536, 12, 2, 8960)),
    "qwen2.5-3b": (QWEN25_SMALL, (36, 2048, 16, 2, 11008)),
    "qwen2.5-7b": (QWEN25, (28, 3584, 28, 4, 18944)),
    "qwen2.5-14b": (QWEN25, (48, 5120, 40, 8, 13824), dict(norm_eps=1e-5)),
    "qwen2.5-32b": (QWEN25, (64, 5120, 40, 8, 27648), dict(norm_eps=1e-5)),
    "qwen2.5-72b": (QWEN25, (80, 8192, 64, 8, 29568), dict(norm_eps=1e-5)),
    "qwen3-0.6b": (QWEN3_SMALL, (28, 1024, 16, 8, 3072, 128)),
    "qwen3-1.7b": (QWEN3_SMALL, (28, 2048, 16, 8, 6144, 128)),
    "qwen3-4b": (QWEN3_SMALL, (36, 2560, 32, 8, 9728, 128)),
    "qwen3-8b": (QWEN3, (36, 4096, 32, 8, 12288, 128)),
    "qwen3-14b": (QWEN3, (40, 5120, 40, 8, 17408, 128)),
    "qwen3-32b": (QWEN3, (64, 5120, 64, 8, 25600, 128)),
    "mistral-7b": (MISTRAL, (32, 4096, 32, 8, 14336)),
    "mistral-7b-v0.3": (MISTRAL, (32, 4096, 32, 8, 14336), dict(
        sliding_window=0, rope_theta=1e6, vocab_size=32768)),
    "mixtral-8x7b": (MIXTRAL, (32, 4096, 32, 8, 14336)),
    "qwen3-30b-a3b": (QWEN3_MOE, (48, 2048, 32, 4, 768, 128)),
    "qwen3-235b-a22b": (QWEN3_MOE, (94, 4096, 64, 4, 1536, 128)),
    "gemma2-2b": (GEMMA2, (26, 2304, 8, 4, 9216, 256)),
    "gemma2-9b": (GEMMA2, (42, 3584, 16, 8, 14336, 256)),
    "gemma2-27b": (GEMMA2, (46, 4608, 32, 16, 36864, 128), dict(query_scalar=144.0)),
    "gemma3-1b": (GEMMA3, (26, 1152, 4, 1, 6912, 256), dict(
        rope_scaling=dict(kind="none"), sliding_window=512, vocab_size=262144,
        max_positions=32768)),
    "gemma3-4b": (GEMMA3, (34, 2560, 8, 4, 10240, 256)),
    "gemma3-12b": (GEMMA3, (48, 3840, 16, 8, 15360, 256)),
    "gemma3-27b": (GEMMA3, (62, 5376, 32, 16, 21504, 128), dict(query_scalar=168.0)),
    "gemma-2b": (GEMMA1, (18, 2048, 8, 1, 16384, 256)),
    "gemma-7b": (GEMMA1, (28, 3072, 16, 16, 24576, 256)),
    "phi3-mini": (PHI3, (32, 3072, 32, 32, 8192)),
    "phi4": (PHI3, (40, 5120, 40, 10, 17920), dict(
        rope_theta=250_000.0, max_positions=16384, vocab_size=100352)),
    "olmo-1b": (OLMO, (16, 2048, 16, 16, 8192), dict(tie_embeddings=True)),
    "olmo-7b": (OLMO, (32, 4096, 32, 32, 11008)),
    "olmo2-1b": (OLMO2, (16, 2048, 16, 16, 8192)),
    "olmo2-7b": (OLMO2, (32, 4096, 32, 32, 11008)),
    "olmo2-13b": (OLMO2, (40, 5120, 40, 40, 13824)),
    "olmo2-32b": (OLMO2, (64, 5120, 40, 8, 27648)),
    "olmo3-7b": (OLMO3, (32, 4096, 32, 32, 11008)),
    "olmo3-32b": (OLMO3, (64, 5120, 40, 8, 27648)),
    "smollm3-3b": (SMOLLM3, (36, 2048, 16, 4, 11008)),
    "starcoder2-3b": (STARCODER2, (30, 3072, 24, 2, 12288), dict(rope_theta=999999.4420358813)),
    "starcoder2-7b": (STARCODER2, (32, 4608, 36, 4, 18432)),
    "starcoder2-15b": (STARCODER2, (40, 6144, 48, 4, 24576), dict(
        rope_theta=100_000.0, tie_embeddings=False)),
    "stablelm-3b": (STABLELM, (32, 2560, 32, 32, 6912), dict(vocab_size=50304)),
    "stablelm2-1.6b": (STABLELM, (24, 2048, 32, 32, 5632), dict(qkv_bias=True)),
    "pythia-70m": (PYTHIA, (6, 512, 8, 8, 2048)),
    "pythia-160m": (PYTHIA, (12, 768, 12, 12, 3072)),
    "pythia-410m": (PYTHIA, (24, 1024, 16, 16, 4096)),
    "pythia-1b": (PYTHIA, (16, 2048, 8, 8, 8192)),
    "pythia-1.4b": (PYTHIA, (24, 2048, 16, 16, 8192)),
    "pythia-2.8b": (PYTHIA, (32, 2560, 32, 32, 10240)),
    "pythia-6.9b": (PYTHIA, (32, 4096, 32, 32, 16384), dict(vocab_size=50432)),
    "pythia-12b": (PYTHIA, (36, 5120, 40, 40, 20480), dict(vocab_size=50688)),
    "gpt-neox-20b": (NEOX, (44, 6144, 64, 64, 24576), dict(mlp="gelu_tanh", vocab_size=50432)),
    "gpt-j-6b": (GPTJ, (28, 4096, 16, 16, 16384)),
    "phi-1.5": (PHI, (24, 2048, 32, 32, 8192)),
    "phi-2": (PHI, (32, 2560, 32, 32, 10240), dict(rotary_fraction=0.4)),
    "falcon-7b": (FALCON, (32, 4544, 71, 1, 18176), dict(parallel_residual="one_norm")),
    "falcon-40b": (FALCON, (60, 8192, 128, 8, 32768)),
    "command-r": (COHERE, (40, 8192, 64, 64, 22528), dict(rope_theta=8e6)),
    "command-r-plus": (COHERE, (64, 12288, 96, 8, 33792), dict(
        rope_theta=75e6, logit_divisor=1.2, qk_norm=True, qk_norm_over="each_head",
        qk_norm_kind="layernorm_no_bias")),
    "command-r7b": (COHERE, (32, 4096, 32, 8, 14336), dict(
        rope_theta=50_000.0, logit_divisor=4.0, sliding_window=4096,
        layer_pattern=("local",) * 3 + ("global_nope",))),
    "glm4-9b": (GLM4, (40, 4096, 32, 2, 13696, 128)),
    "glm4-9b-0414": (GLM4, (40, 4096, 32, 2, 13696, 128), dict(
        norm_position="both", max_positions=32768, norm_eps=1e-5)),
    "deepseek-v2-lite": (DEEPSEEK_V2, (27, 2048, 16, 16, 10944), dict(
        latent=LATENT | dict(query_rank=0),
        rope_scaling=YARN40 | dict(mscale=0.707, mscale_all_dim=0.707),
        moe=dict(experts=64, per_token=6, mlp_dim=1408, shared_dim=2816, normalize=False,
                 first_dense=1, balance_loss=0.003))),
    "deepseek-v2": (DEEPSEEK_V2, (60, 5120, 128, 128, 12288)),
    "deepseek-v3": (DEEPSEEK_V3, (61, 7168, 128, 128, 18432)),
    "kimi-k2": (KIMI_K2, (61, 7168, 64, 64, 18432)),
    "gpt-oss-20b": (GPT_OSS, (24, 2880, 64, 8, 2880, 64), dict(
        moe=dict(experts=32, per_token=4, bias=True, balance_loss=0.001))),
    "gpt-oss-120b": (GPT_OSS, (36, 2880, 64, 8, 2880, 64), dict(
        moe=dict(experts=128, per_token=4, bias=True, balance_loss=0.001))),
    "opt-125m": (OPT, (12, 768, 12, 12, 3072)),
    "opt-1.3b": (OPT, (24, 2048, 32, 32, 8192)),
    "opt-2.7b": (OPT, (32, 2560, 32, 32, 10240)),
    "opt-6.7b": (OPT, (32, 4096, 32, 32, 16384)),
    "opt-13b": (OPT, (40, 5120, 40, 40, 20480)),
    "opt-30b": (OPT, (48, 7168, 56, 56, 28672)),
    "bert-base": (BERT, (12, 768, 12, 12, 3072)),
    "bert-large": (BERT, (24, 1024, 16, 16, 4096)),
    "roberta-base": (ROBERTA, (12, 768, 12, 12, 3072)),
    "roberta-large": (ROBERTA, (24, 1024, 16, 16, 4096)),
    "modernbert-base": (MODERNBERT, (22, 768, 12, 12, 1152)),
    "modernbert-large": (MODERNBERT, (28, 1024, 16, 16, 2624)),
    "distilbert-base": (DISTILBERT, (6, 768, 12, 12, 3072)),
    "electra-small": (ELECTRA, (12, 256, 4, 4, 1024), dict(table_dim=128)),
    "electra-base": (ELECTRA, (12, 768, 12, 12, 3072)),
    "electra-large": (ELECTRA, (24, 1024, 16, 16, 4096)),
    "albert-base": (ALBERT, (12, 768, 12, 12, 3072)),
    "albert-large": (ALBERT, (24, 1024, 16, 16, 4096)),
    "albert-xlarge": (ALBERT, (24, 2048, 16, 16, 8192)),
    "albert-xxlarge": (ALBERT, (12, 4096, 64, 64, 16384)),
    "transformer-base": (TRANSFORMER, (6, 512, 8, 8, 2048), dict(dropout=0.1)),
    "transformer-big": (TRANSFORMER, (6, 1024, 16, 16, 4096), dict(dropout=0.3)),
    "bart-base": (BART, (6, 768, 12, 12, 3072)),
    "bart-large": (BART, (12, 1024, 16, 16, 4096)),
    "mbart-large": (MBART, (12, 1024, 16, 16, 4096)),
    "pegasus-large": (PEGASUS, (16, 1024, 16, 16, 4096)),
    "m2m100-418m": (M2M_100, (12, 1024, 16, 16, 4096)),
    "nllb-600m": (NLLB, (12, 1024, 16, 16, 4096)),
    "nllb-1.3b": (NLLB, (24, 1024, 16, 16, 8192)),
    "nllb-3.3b": (NLLB, (24, 2048, 16, 16, 8192)),
    "t5-small": (T5, (6, 512, 8, 8, 2048, 64)),
    "t5-base": (T5, (12, 768, 12, 12, 3072, 64)),
    "t5-large": (T5, (24, 1024, 16, 16, 4096, 64)),
    "t5-3b": (T5, (24, 1024, 32, 32, 16384, 128)),
    "t5-11b": (T5, (24, 1024, 128, 128, 65536, 128)),
    "t5-v1.1-small": (T5_V1_1, (8, 512, 6, 6, 1024, 64)),
    "t5-v1.1-base": (T5_V1_1, (12, 768, 12, 12, 2048, 64)),
    "t5-v1.1-large": (T5_V1_1, (24, 1024, 16, 16, 2816, 64)),
    "t5-v1.1-xl": (T5_V1_1, (24, 2048, 32, 32, 5120, 64)),
    "t5-v1.1-xxl": (T5_V1_1, (24, 4096, 64, 64, 10240, 64)),
}

PRESETS: dict[str, Switches] = {
    name: switches | dict(zip(DIMS, dims, strict=False)) | (own[0] if own else {})
    for name, (switches, dims, *own) in TABLE.items()}


def with_preset(model: Mapping[str, Any]) -> Switches:
    """The keys of `model` on top of those of its `preset`; groups of keys are merged key by key.

    Raises:
      UserError: there is no such preset.
    """
    keys = dict(model)
    name = keys.pop("preset", None)
    if name is None:
        return keys
    if str(name) not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, 3)
        fix = f"nearest: {', '.join(near)}" if near else f"choose one of {', '.join(PRESETS)}"
        raise UserError("a published model", repr(name), fix, where="config.model.preset")
    base = PRESETS[str(name)]
    return base | {
        key: base[key] | dict(value) if isinstance(value, Mapping) and key in base else value
        for key, value in keys.items()}
