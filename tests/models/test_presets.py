"""The presets: parameter counts of published models, how a config takes them up, and FLOPs."""

import functools
import pathlib

import jax.numpy as jnp
import pytest

from lmjax.config import Text
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.models.flops import flops_per_row, flops_per_token
from lmjax.models.model import build_model
from lmjax.models.presets import PRESETS, with_preset
from lmjax.training.recipe import build_recipe
from lmjax.tree import num_elements

COUNTS = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496, "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360, "qwen3-30b-a3b": 30_532_122_624,
    "mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704,
    "gemma2-2b": 2_614_341_888, "gemma2-9b": 9_241_705_984, "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    # BertForMaskedLM, plus the matrix and the bias of the pooler
    "bert-base": 109_514_298 + 768 * 769, "bert-large": 335_174_458 + 1024 * 1025,
    "roberta-base": 124_697_433, "roberta-large": 355_412_057, "modernbert-base": 149_655_232,
    "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336, "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152, "t5-v1.1-base": 247_577_856, "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184, "t5-v1.1-xxl": 11_135_332_352,
}


# Of the architectures that `huggingface.decoders` and `older_decoders` read: by their dimensions.
MORE_COUNTS = {
    "deepseek-v2-lite": 15_706_484_224, "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200, "kimi-k2": 1_026_408_232_448,
    "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "phi3-mini": 3_821_079_552,
    "phi4": 14_659_507_200, "olmo-1b": 1_176_764_416, "olmo-7b": 6_888_095_744,
    "olmo2-1b": 1_484_916_736, "olmo2-7b": 7_298_617_344, "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936, "olmo3-7b": 7_298_011_136, "olmo3-32b": 32_233_522_176,
    "smollm3-3b": 3_075_098_624, "starcoder2-3b": 3_030_371_328, "starcoder2-7b": 7_173_923_840,
    "starcoder2-15b": 15_957_889_024, "stablelm-3b": 2_795_443_200,
    "stablelm2-1.6b": 1_644_515_328,
    "pythia-70m": 70_426_624, "pythia-160m": 162_322_944, "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320, "gpt-neox-20b": 20_554_567_680,
    "gpt-j-6b": 6_050_882_784, "phi-1.5": 1_418_270_720, "phi-2": 2_779_683_840,
    "falcon-7b": 6_921_720_704, "falcon-40b": 41_303_293_952,
    "command-r": 34_980_831_232, "command-r-plus": 103_810_674_688,
    "command-r7b": 8_028_033_024, "glm4-9b": 9_399_951_360, "glm4-9b-0414": 9_400_279_040,
    "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672,
    "opt-125m": 125_239_296, "opt-1.3b": 1_315_758_080, "opt-2.7b": 2_651_596_800,
    # Those of transformers' classes, and a bias of the logits where that is a buffer there.
    "distilbert-base": 66_985_530, "electra-small": 13_546_682, "electra-base": 109_514_298,
    "electra-large": 335_174_458,
    "albert-base": 11_812_272, "albert-large": 17_845_424, "albert-xlarge": 59_017_392,
    "albert-xxlarge": 223_150_256,
    "bart-base": 139_420_416 + 50_265, "bart-large": 406_291_456 + 50_265,
    "mbart-large": 611_101_867, "pegasus-large": 568_796_007, "m2m100-418m": 483_905_536,
    "nllb-600m": 615_073_792, "nllb-1.3b": 1_370_638_336, "nllb-3.3b": 3_344_863_232,
    "opt-6.7b": 6_658_473_984, "opt-13b": 12_853_473_280, "opt-30b": 29_974_540_288,
}
# Each way to count is among these.
OFTEN = ("olmo2-7b", "deepseek-v3", "pythia-410m", "command-r-plus", "albert-base", "bart-base")


@functools.cache
def model_of(name):
    config = build_recipe({"model": {"preset": name}}).model
    return build_model(config, vocab_size=2, platform="cpu", dtype=jnp.float32)


@pytest.mark.parametrize("name", [*COUNTS, *(
    pytest.param(name, marks=pytest.mark.long if name in OFTEN else pytest.mark.slow)
    for name in MORE_COUNTS)])
def test_presets_have_the_parameters_of_the_published_models(name):
    assert num_elements(model_of(name).shapes) == (COUNTS | MORE_COUNTS)[name]


def test_own_keys_replace_those_of_the_preset():
    model = build_recipe({"model": {
        "preset": "llama3.1-8b", "num_layers": Text("3"), "vocab_size": 0,
        "rope_scaling": {"factor": Text("4")}}}).model
    assert (model.num_layers, model.embed_dim, model.vocab_size) == (3, 4096, 0)
    assert model.rope_theta == 5e5
    scaling = model.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_positions) == ("llama3", 4.0, 8192)
    assert PRESETS["llama3.1-8b"]["rope_scaling"]["factor"] == 8.0


def test_a_family_picks_its_config_and_refuses_the_keys_of_others():
    assert build_recipe({"model": {"preset": "bert-base"}}).model.pooler
    assert build_recipe({"model": {"family": "encdec", "scale_output": True}}).model.scale_output
    assert build_recipe({"model": {}}).model.family == "decoder"


@pytest.mark.parametrize("keys, refusal", [
    ({"model": {"pooler": True}}, "config.model.pooler: expected one of .*got an unknown key"),
    ({"model": {"family": "bert"}},
     "config.model.family: expected one of decoder, encoder, encdec, got 'bert'"),
    ({"model": {"family": "encoder"}, "sample": {"every": 1}},
     "config.sample.every: expected 0, .* for the family encoder"),
    ({"model": {"parallel_residual": "one_norm", "norm_position": "after"}},
     "config.model.parallel_residual: expected none with norm_position=after, got one_norm"),
    ({"model": {"family": "encdec", "parallel_residual": "own_norms"}},
     "config.model.parallel_residual: expected none, .*got own_norms"),
    ({"model": {"rotary_fraction": 0.2, "head_dim": 16, "num_heads": 4}},
     "config.model.rotary_fraction: expected a part of head_dim with an even number .*got 0.2 of"),
    ({"model": {"layer_pattern": ["local_nope"]}}, "config.model.sliding_window: expected at leas"),
    ({"model": {"qk_norm_over": "heads"}}, "config.model.qk_norm_over: expected one of head, "),
    ({"model": {"preset": "llama3-9b"}},
     "config.model.preset: .*got 'llama3-9b'; nearest: llama3-8b")])
def test_refusals(keys, refusal):
    with pytest.raises(ValueError, match=refusal):
        build_recipe(keys)


def test_a_preset_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="config.model.preset: .*got 'gpt'; nearest: "):
        with_preset({"preset": "gpt"})


@pytest.mark.parametrize("name, active", [
    # The token table is looked up, not multiplied with.
    ("llama3-8b", COUNTS["llama3-8b"] - 128256 * 4096),
    # 2 of 8 experts compute a token.
    ("mixtral-8x7b", COUNTS["mixtral-8x7b"] - 32000 * 4096 - 32 * 6 * 3 * 4096 * 14336),
    # 4 of 128 experts; the published 5.1 billion of active parameters hold the head's table, too.
    pytest.param("gpt-oss-120b", MORE_COUNTS["gpt-oss-120b"] - 201088 * 2880
                 - 36 * (124 * 3 * 2880 * 2880 + 128 * 3 * 2880), marks=pytest.mark.long),
    # 8 of 256 experts in 58 of 61 layers. The published 37 billion hold the head's table, too.
    pytest.param("deepseek-v3", MORE_COUNTS["deepseek-v3"] - 129280 * 7168
                 - 58 * 248 * 3 * 7168 * 2048, marks=pytest.mark.long),
    # One encoder token and one decoder token; the table is also the unembedding.
    ("t5-base", COUNTS["t5-base"]),
    # Branches side by side, RoPE over a part of each head, norms of all heads together.
    *(pytest.param(name, MORE_COUNTS[name] - table, marks=pytest.mark.long) for name, table in (
        ("pythia-70m", 50304 * 512), ("command-r7b", 0), ("olmo2-1b", 100352 * 2048))),
    # Neither the pooler nor the positions are multiplied with.
    ("bert-base", COUNTS["bert-base"] - 768 * 769 - 512 * 768),
    # The layers' weights count twelve times; tables are looked up, but for the unembedding.
    ("albert-base", 11_812_272 - 768 * 769 - 512 * 128 + 11 * (4 * 768 * 768 + 2 * 768 * 3072))])
def test_flops_are_six_per_weight_that_is_multiplied_with(name, active):
    assert flops_per_token(model_of(name), 1) == pytest.approx(6 * active, rel=2e-3)


def test_flops_of_a_row_of_an_encoder_decoder():
    """By hand: the encoder's weights per encoder token, the decoder's weights per decoder token."""
    model = model_of("t5-base")
    layer = 4 * 768 * 768 + 2 * 768 * 3072
    encoder, keys_values = 12 * layer, 12 * 2 * 768 * 768
    decoder = 12 * (layer + 2 * 768 * 768) + 32128 * 768
    pairs = 12 * (512 * 512 + 114 * 114 / 2 + 114 * 512)
    expected = 6 * (512 * (encoder + keys_values) + 114 * decoder) + 12 * 768 * pairs
    lengths = {"tokens": 114, "encoder_tokens": 512}
    assert flops_per_row(model, lengths) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name, length, keys", [
    ("bert-base", 512, 12 * 512),
    ("gemma3-1b", 4096, 22 * 512 * (1 - 512 / 8192) + 4 * 2048),
    ("t5-base", 512, 12 * (512 + 512 + 256))])
def test_flops_of_attention_grow_with_the_visible_keys(name, length, keys):
    """12 FLOPs per query, visible key, head and head dimension; keys: seen in all layers."""
    model = model_of(name)
    dims = model.config.dims
    grown = flops_per_token(model, length) - flops_per_token(model, 1)
    assert grown == pytest.approx(12 * dims.num_heads * dims.head_dim * keys, rel=0.01)


def test_the_readme_counts_model_types_and_presets():
    readme = (pathlib.Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert f"{len(MODEL_TYPES)} model types" in readme and f"{len(PRESETS)} presets" in readme
