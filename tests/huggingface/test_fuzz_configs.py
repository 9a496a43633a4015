"""config.json files that strangers have, compared with transformers: never another model."""

import collections
import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed, so nothing is compared with it: "
                    "pip install lmjax[oracle]")
transformers = pytest.importorskip("transformers", reason="transformers is not installed, so "
                                   "nothing is compared with it: pip install lmjax[oracle]")

from config_fuzz import compare, mutated, theirs  # noqa: E402
from config_switches import switched  # noqa: E402
from config_values import BASES, STRANGE  # noqa: E402

from lmjax.huggingface.model_types import MODEL_TYPES  # noqa: E402
from lmjax.huggingface.schema import PASSED_OVER  # noqa: E402
from lmjax.huggingface.settings import decided, difference, passed_over, read_settings  # noqa: E402

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# (model type, changes, outcome): what was computed as another model than transformers computes.
CASES = [
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 9.0}}},
     "refused"),
    ("mistral", {"rope_parameters": {"sliding_attention": {"rope_theta": 9.0}}}, "refused"),
    ("qwen2", {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 9.0}}, "refused"),
    ("llama", {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "agree"),
    ("llama", {"rope_scaling": YARN | {"attention_factor": 0.0}}, "refused"),
    ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "refused"),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "agree"),
    ("roberta", {"hidden_act": "relu"}, "agree"),
    ("modernbert", {"hidden_activation": "silu"}, "agree"),
    ("modernbert", {"classifier_activation": "relu"}, "agree"),
    ("t5", {"dense_act_fn": "silu"}, "refused"),
    ("t5", {"is_gated_act": True}, "refused"),
    ("t5", {"feed_forward_proj": "gated-relu"}, "agree"),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
     "refused"),
    ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 28}, "agree"),
    ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 28}, "agree"),
    ("gpt2", {"hidden_size": 64}, "refused"),
    ("llama", {"is_causal": False}, "refused"),
    ("llama", {"transformers_weights": "other.safetensors"}, "refused"),
    ("llama", {"sliding_window": 4}, "refused"),  # its class does not read it, its cache does
    ("llama", {"attention_bias": True, "mlp_bias": True}, "agree"),
    ("phi3", {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
                           "AutoModelForCausalLM": "a/b--modeling_phi3.Phi3ForCausalLM"}}, "agree"),
    ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Other"}}, "refused"),
    ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "agree"),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.5] * 4,
                               "long_factor": [2.0] * 4}}, "refused"),
    ("t5", {"scale_decoder_outputs": None}, "agree"), ("llama", {"rms_norm_eps": 0.0}, "refused"),
    ("roberta", {"pad_token_id": 0}, "agree"), ("camembert", {"pad_token_id": 4}, "agree"),
    ("bert", {"hidden_act": "gelu_python"}, "agree"),
    ("llama", {"hidden_act": "gelu_fast"}, "agree"),
    ("llama", {"hidden_act": "relu"}, "agree"), ("qwen3_moe", {"hidden_act": "relu"}, "agree"),
    ("gemma2", {"hidden_activation": "relu"}, "agree"), ("gemma", {"hidden_act": "relu"}, "agree"),
    ("llama", {"rope_scaling": YARN | {"finetuned": True}}, "agree"),
    ("gpt_oss", {"rope_scaling": None}, "agree"), ("gpt_oss", {"swiglu_alpha": 1.5}, "refused"),
    ("gpt_oss", {"hidden_act": "relu"}, "agree"), ("olmo3", {"rope_scaling": YARN | {
        "truncate": False}}, "refused"), ("llama", {"rope_scaling": YARN | {"truncate": False}},
                                          "agree"),
    ("llama", {"rope_scaling": YARN | {"truncate": None}}, "agree"),
    ("gemma", {}, "agree"), ("granite", {}, "agree"), ("mt5", {}, "agree"),
    ("xlm-roberta", {}, "agree"), ("camembert", {}, "agree")]
QUICK = (0, 5, 7, 10, 13)


@pytest.mark.parametrize("model_type, changes, outcome", [
    pytest.param(*case, marks=[] if i in QUICK else pytest.mark.long, id=f"{i}-{case[0]}")
    for i, case in enumerate(CASES)])
def test_a_config_is_computed_as_by_transformers_or_refused(model_type, changes, outcome):
    raw = {**BASES[model_type], **changes, "model_type": model_type}
    assert compare(raw)[0] == outcome, compare(raw)


LINEAR = {"rope_type": "linear", "factor": 2.0}
# (model type, changes, what is told): two places say two things, and transformers takes one.
TWICE = [
    ("llama", {"rope_parameters": {"rope_theta": 9.0}}, "rope_theta=9.0 decides over 500.0"),
    ("llama", {"rope_scaling": LINEAR | {"rope_theta": 9.0}}, "rope_theta=9.0 decides over 500.0"),
    ("llama", {"rope_scaling": LINEAR | {"type": "dynamic"}},
     "rope_type='linear' decides over 'dynamic'"),
    ("qwen2", {"rope_parameters": LINEAR | {"rope_type": "default", "type": "linear"}},
     "rope_type='default' decides over 'linear'"),
    ("mistral", {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 3.0}},
     "rope_scaling decides over rope_parameters, whose factor differs"),
    ("gemma3_text", {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 7.0}}},
     "rope_theta=7.0 decides over 50.0"),
    ("gemma3_text", {"rope_scaling": LINEAR | {"type": "yarn"}},
     "rope_type='linear' decides over 'yarn'"),
    ("gemma2", {"rope_scaling": LINEAR | {"rope_theta": 500.0}}, "")]


@pytest.mark.parametrize("model_type, changes, told", [
    pytest.param(*case, marks=[] if i == 0 else pytest.mark.long, id=f"{i}-{case[0]}")
    for i, case in enumerate(TWICE)])
def test_of_two_values_of_rope_the_one_of_transformers_decides_and_is_told(
        model_type, changes, told):
    raw = {**BASES[model_type], **changes, "model_type": model_type}
    assert compare(raw)[0] == "agree", compare(raw)
    lines = decided(raw)
    assert len(lines) == bool(told) and (not told or told in lines[0])


def test_every_model_type_has_a_base():
    assert MODEL_TYPES.keys() <= BASES.keys()


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_the_defaults_are_those_of_the_class(name):
    model_type = MODEL_TYPES[name]
    theirs = getattr(transformers, model_type.architecture).config_class()
    derived = {"head_dim", "num_decoder_layers", "num_key_value_heads", "scale_decoder_outputs",
               "decoder_vocab_size", "rope_scaling", "ffn_hidden_size",
               "word_embed_proj_dim"}  # null in the class, until it is filled in
    for row in model_type.settings:
        if hasattr(theirs, row.theirs) and row.theirs not in derived:
            value = getattr(theirs, row.theirs)
            window_is_off = row.theirs == "sliding_window" and not value
            assert window_is_off or value in (row.default, None), row.theirs


EACH = [pytest.param(name, marks=[] if name == "llama" else pytest.mark.long)
        for name in MODEL_TYPES]


@pytest.mark.parametrize("name", EACH)
def test_no_class_reads_what_is_passed_over(name):
    base = {**BASES[name], "model_type": name}
    extra = {key: STRANGE.get(key) or 7 for key in PASSED_OVER - base.keys()} | {
        "_attn_implementation_autoset": True, "_of_its_own": [1]}
    assert not passed_over(base) and set(passed_over(base | extra)) == extra.keys()
    assert read_settings(base | extra, "config.json") == read_settings(base, "config.json")
    np.testing.assert_array_equal(theirs(base | extra)[1], theirs(base)[1])


@pytest.mark.parametrize("name", EACH)
def test_a_config_as_this_version_writes_it_in_full(name):
    cls = getattr(transformers, MODEL_TYPES[name].architecture).config_class
    full = json.loads(json.dumps(cls.from_dict(BASES[name]).to_dict()))
    base = BASES[name] | {"model_type": name}
    assert not difference(read_settings(full, "full"), read_settings(base, "base"))


def outcomes(seeds, case=mutated):
    """Counts the outcomes; fails on the first that is silent or without a word."""
    counts = collections.Counter()
    for seed in seeds:
        raw = case(seed)
        outcome, detail = compare(raw)
        assert outcome not in ("SILENT", "TRACEBACK"), (seed, outcome, detail, raw)
        counts[outcome] += 1
    return counts


@pytest.mark.slow
def test_some_mutated_configs_are_never_another_model():
    assert outcomes(range(40))["agree"] > 5


@pytest.mark.slow
def test_five_thousand_mutated_configs_are_never_another_model():
    counts = outcomes(range(5000))
    print(dict(counts))
    assert counts["refused"] < 0.35 * 5000


# The decoders that have switches of their own.
SWITCHED = ("olmo", "olmo2", "olmo3", "smollm3", "ministral", "starcoder2", "stablelm", "cohere",
            "cohere2", "glm", "glm4", "gpt_neox", "gptj", "phi", "falcon", "opt", "phi3", "gemma",
            "gpt_oss")


@pytest.mark.slow
def test_five_hundred_configs_with_random_switches_agree_or_are_refused():
    counts = outcomes(range(500), lambda seed: switched(seed, SWITCHED))
    print(dict(counts))
    assert counts["agree"] > 250
