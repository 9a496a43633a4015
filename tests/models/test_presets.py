"""The presets against the published models' parameter counts, and how a config takes them up."""

import jax.numpy as jnp
import pytest

from lmjax.config import Text
from lmjax.models.flops import flops_per_row, flops_per_token
from lmjax.models.model import build_model
from lmjax.models.presets import PRESETS, with_preset
from lmjax.training.recipe import build_recipe
from lmjax.tree import num_elements

COUNTS = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
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
    "bert-base": 109_514_298 + 768 * 769, "bert-large": 335_174_458 + 1024 * 1025,  # with the pooler
    "roberta-base": 124_697_433, "roberta-large": 355_412_057, "modernbert-base": 149_655_232,
    "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096, "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152, "t5-v1.1-base": 247_577_856, "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184, "t5-v1.1-xxl": 11_135_332_352,
}


def model_of(name):
    return build_model(build_recipe({"model": {"preset": name}}).model, vocab_size=2, platform="cpu", dtype=jnp.float32)


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_the_parameters_of_the_published_models(name):
    assert num_elements(model_of(name).shapes) == COUNTS[name]


def test_presets_without_a_published_count_are_of_about_the_size_of_their_name():
    sizes = {"m": 1e6, "b": 1e9}
    for name in set(PRESETS) - set(COUNTS) - {"gpt3-350m"}:  # which the paper calls so, and has 356M
        size = name.split("-")[1]
        if size[-1] in sizes and size[:-1].replace(".", "").isdigit():
            count = num_elements(model_of(name).shapes)
            assert count == pytest.approx(float(size[:-1]) * sizes[size[-1]], rel=0.2), name


def test_own_keys_go_over_those_of_the_preset():
    model = build_recipe({"model": {"preset": "llama3.1-8b", "num_layers": Text("3"), "vocab_size": 0,
                                    "rope_scaling": {"factor": Text("4")}}}).model
    assert (model.num_layers, model.embed_dim, model.vocab_size, model.rope_theta) == (3, 4096, 0, 5e5)
    assert (model.rope_scaling.kind, model.rope_scaling.factor, model.rope_scaling.original_positions) == (
        "llama3", 4.0, 8192)
    assert PRESETS["llama3.1-8b"]["rope_scaling"]["factor"] == 8.0


def test_a_family_picks_its_config_and_refuses_the_keys_of_others():
    assert build_recipe({"model": {"preset": "bert-base"}}).model.pooler
    assert build_recipe({"model": {"family": "encdec", "scale_output": True}}).model.scale_output
    assert build_recipe({"model": {}}).model.family == "decoder"
    with pytest.raises(ValueError, match="config.model.pooler: expected one of .*got an unknown key"):
        build_recipe({"model": {"pooler": True}})
    with pytest.raises(ValueError, match="config.model.family: expected one of decoder, encoder, encdec, got 'bert'"):
        build_recipe({"model": {"family": "bert"}})
    with pytest.raises(ValueError, match="config.sample.every: expected 0, .* for the family encoder"):
        build_recipe({"model": {"family": "encoder"}, "sample": {"every": 1}})
    with pytest.raises(ValueError, match="config.model.preset: .*got 'llama3-9b'; nearest: llama3-8b"):
        with_preset({"preset": "llama3-9b"})


@pytest.mark.parametrize("name, active", [
    ("llama3-8b", COUNTS["llama3-8b"] - 128256 * 4096),  # the token table is looked up, not multiplied with
    ("mixtral-8x7b", COUNTS["mixtral-8x7b"] - 32000 * 4096 - 32 * 6 * 3 * 4096 * 14336),  # 6 of 8 experts rest
    ("t5-base", COUNTS["t5-base"]),  # one encoder token and one decoder token; the table serves as the head
    ("bert-base", COUNTS["bert-base"] - 768 * 769 - 512 * 768)])
def test_flops_are_six_a_weight_that_is_multiplied_with(name, active):
    assert flops_per_token(model_of(name), 1) == pytest.approx(6 * active, rel=2e-3)


def test_flops_of_a_row_of_an_encoder_decoder():
    """By hand: the encoder's weights for each of its tokens, the decoder's and the logits for each of its own."""
    model = model_of("t5-base")
    layer = 4 * 768 * 768 + 2 * 768 * 3072
    encoder, decoder, sees = 12 * layer, 12 * (layer + 2 * 768 * 768) + 32128 * 768, 12 * 2 * 768 * 768
    pairs = 12 * (512 * 512 + 114 * 114 / 2 + 114 * 512)
    want = 6 * (512 * (encoder + sees) + 114 * decoder) + 12 * 768 * pairs
    assert flops_per_row(model, {"tokens": 114, "encoder_tokens": 512}) == pytest.approx(want, rel=0.01)


def test_flops_of_attention_grow_with_the_keys_that_are_seen():
    """12 FLOPs a query and key, head and head_dim, over training's three passes."""
    for name, layers_keys in (("bert-base", 12 * 512), ("gemma3-1b", 22 * 512 * (1 - 512 / 8192) + 4 * 2048),
                              ("t5-base", 12 * (512 + 512 + 256))):
        model = model_of(name)
        length = 4096 if name == "gemma3-1b" else 512
        c = model.config.dims
        grown = flops_per_token(model, length) - flops_per_token(model, 1)
        assert grown == pytest.approx(12 * c.num_heads * c.head_dim * layers_keys, rel=0.01), name
