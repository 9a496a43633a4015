"""Adapters against PEFT itself: logits, losses, gradients, and files in both directions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax import huggingface
from lmjax.errors import UserError
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.peft import adapter_table
from lmjax.huggingface.weights import tensor_getter, tensor_shapes
from lmjax.nn.adapters import is_adapter
from lmjax.tasks.losses import next_token_loss
from lmjax.tree import join_trees, split_tree

MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
peft = pytest.importorskip("peft", reason=f"peft {MISSING}")

pytestmark = [
    pytest.mark.long,
    # PEFT reads an attribute of transformers that has another name now.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             vocab_size=64, max_position_embeddings=32)
BASES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SMALL, num_key_value_heads=2, initializer_range=0.2)),
    # Its rows of queries and keys lie in another order than ours.
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(
        **SMALL, num_key_value_heads=2, initializer_range=0.2)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(
        **SMALL, initializer_range=0.2)),
}
TARGETS = {  # names that adapt all matrices of a layer, and names that adapt some
    "llama": (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
              ["q_proj", "v_proj"]),
    "cohere": (["q_proj", "k_proj", "v_proj"], ["k_proj"]),
    "bert": (["query", "key", "value", "attention.output.dense", "intermediate.dense"],
             ["query", "value"]),
}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """kind of model -> the directory of a base."""
    folder = tmp_path_factory.mktemp("bases")
    for name, make in BASES.items():
        torch.manual_seed(0)
        make().eval().save_pretrained(folder / name)
    return {name: folder / name for name in BASES}


def adapted(base, name, kind, targets, **settings):
    """Their base with adapters of random values, not trained ones."""
    torch.manual_seed(1)
    model = type(BASES[name]()).from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False,
                             **KINDS[kind], **settings)
    return peft.get_peft_model(model, config).eval()


def their_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()


def our_logits(lm):
    return np.asarray(lm.logits(TOKENS.astype(np.int32)))


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("name, kind", [
    ("llama", "dora"), ("bert", "lora"),
    *(pytest.param(name, kind, marks=pytest.mark.slow) for name, kind in (
        ("cohere", "dora"), ("llama", "rslora"), ("llama", "lora"), ("bert", "dora"),
        ("bert", "rslora")))])
def test_an_adapter_of_peft_computes_the_same_here_and_comes_back(name, kind, bases, tmp_path):
    theirs = adapted(bases[name], name, kind, TARGETS[name][0])
    theirs.save_pretrained(tmp_path / "theirs")
    expected = their_logits(theirs)
    lm = lmjax.load(tmp_path / "theirs")
    assert_close(our_logits(lm), expected)
    assert np.abs(our_logits(lmjax.load(bases[name])) - expected).max() > 0.01
    assert_close(our_logits(lm.merge()), expected)

    lm.export(tmp_path / "ours", peft_base=str(bases[name]), log=lambda line: None)
    base = type(BASES[name]()).from_pretrained(bases[name])
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert again.targeted_module_names and sorted(again.targeted_module_names) == sorted(
        theirs.targeted_module_names)
    assert_close(their_logits(again), expected)
    assert_close(our_logits(lmjax.load(tmp_path / "ours")), expected)

    lm.save(tmp_path / "saved")
    assert_close(our_logits(lmjax.load(tmp_path / "saved")), expected)


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=() if kind == "dora" else pytest.mark.slow) for kind in KINDS])
def test_loss_and_gradients_are_those_of_peft(kind, bases, tmp_path):
    theirs = adapted(bases["llama"], "llama", kind, TARGETS["llama"][0])
    theirs.save_pretrained(tmp_path)
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    logits = theirs(input_ids=torch.tensor(inputs)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    grads = {key.replace(".default", ""): p.grad.numpy()
             for key, p in theirs.named_parameters() if p.requires_grad}

    lm = lmjax.load(tmp_path)
    own, base = split_tree(lm.params, is_adapter)
    batch = {"tokens": inputs.astype(np.int32), "targets": targets.astype(np.int32),
             "positions": np.tile(np.arange(11, dtype=np.int32), (2, 1)),
             "segment_ids": np.ones((2, 11), np.int32), "loss_mask": np.ones((2, 11), np.float32)}
    loss_fn = next_token_loss(lm.model)

    def mean(own):
        sums = loss_fn(join_trees(own, base), batch, None)
        return sums.total / sums.weight

    value, gradient = jax.jit(jax.value_and_grad(mean))(own)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    table = adapter_table(MODEL_TYPES["llama"], lm.model.config)
    get = tensor_getter(gradient, table)
    names = tensor_shapes(gradient, table)
    assert len(names) == len(grads) == 2 * 7 * (3 if kind == "dora" else 2)
    for name in names:
        wanted = name + ".weight" * name.endswith("vector")
        assert_close(get(name), grads[f"base_model.model.{wanted}"])


def test_new_adapters_begin_as_those_of_peft(bases, tmp_path):
    """Those of DoRA have lengths, which follow from the base alone."""
    torch.manual_seed(2)
    model = BASES["llama"]().from_pretrained(bases["llama"])
    theirs = peft.get_peft_model(model, peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS["llama"][1]))
    lm = lmjax.load(bases["llama"])
    from lmjax.nn.adapters import AdapterConfig, initial_magnitudes

    model = lm.model.with_adapters(AdapterConfig(kind="dora", rank=4, alpha=6))
    fresh = split_tree(jax.jit(model.init)(jax.random.key(0)), is_adapter)[0]
    ours = split_tree(initial_magnitudes(join_trees(fresh, lm.params)), is_adapter)[0]
    get = tensor_getter(ours, adapter_table(MODEL_TYPES["llama"], model.config))
    for key, value in theirs.named_parameters():
        if not value.requires_grad:
            continue
        name = key.replace("base_model.model.", "").replace(".default", "")
        got, value = get(name.replace("vector.weight", "vector")), value.detach().numpy()
        if "lora_A" in name:  # uniform within the same bound
            bound = 1 / np.sqrt(32)
            assert max(np.abs(got).max(), np.abs(value).max()) <= bound
            assert np.std(got) == pytest.approx(np.std(value), rel=0.2)
        else:
            np.testing.assert_allclose(got, value, rtol=1e-5)
    assert_close(our_logits(type(lm)(model, join_trees(ours, lm.params), lm.layout, lm.tokenizer,
                                     lm.recipe, lm.about)), our_logits(lm))


def test_names_of_targets_are_short_where_they_are_clear(bases, tmp_path):
    for name, short in (("llama", True), ("bert", False)):
        theirs = adapted(bases[name], name, "lora", ["o_proj"] if short else ["output.dense"])
        theirs.save_pretrained(tmp_path / name)
        lmjax.load(tmp_path / name).export(tmp_path / f"{name}-out", peft_base=str(bases[name]),
                                           log=lambda line: None)
        written = json.loads((tmp_path / f"{name}-out/adapter_config.json").read_text())
        assert (written["target_modules"] == ["o_proj"]) == short
        again = peft.PeftModel.from_pretrained(
            type(BASES[name]()).from_pretrained(bases[name]), tmp_path / f"{name}-out").eval()
        assert_close(their_logits(again), their_logits(theirs))


def test_what_lmjax_does_not_compute_is_refused_in_one_line(bases, tmp_path):
    adapted(bases["llama"], "llama", "lora", ["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    for change, message in [
        ({"peft_type": "IA3"}, "expected peft_type to be 'LORA', .* got 'IA3'; merge it"),
        ({"bias": "all"}, "expected bias to be 'none'"),
        ({"rank_pattern": {"q_proj": 2}}, "expected rank_pattern to be None"),
        ({"init_lora_weights": "pissa"}, "expected init_lora_weights to be True, .* got 'pissa'"),
        ({"base_model_name_or_path": None}, "expected base_model_name_or_path, got none; say"),
        ({"base_model_name_or_path": str(tmp_path / "no")}, r"expected the model that it is for at "
         r"\S+no, got none \(.*; say where it is with lmjax.load\(path, base="),
    ]:
        file.write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=message):
            lmjax.load(tmp_path)
    file.write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    lmjax.load(tmp_path, base=bases["llama"])
    assert huggingface.identify(tmp_path).fault is None
    adapted(bases["llama"], "llama", "lora", ["lm_head"]).save_pretrained(
        tmp_path / "head", save_embedding_layers=False)
    with pytest.raises(UserError, match="expected adapters of the layers' matrices alone, got lm_"):
        lmjax.load(tmp_path / "head")


def test_other_matrices_of_a_base_are_refused(bases, tmp_path):
    """An adapter of some layers, and one of another base."""
    adapted(bases["llama"], "llama", "lora", ["q_proj"],
            layers_to_transform=[0]).save_pretrained(tmp_path / "some")
    file = tmp_path / "some" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layers_to_transform": None}))
    with pytest.raises(UserError, match=r"expected tensor \S+layers.1.self_attn.*, got none"):
        lmjax.load(tmp_path / "some")
    adapted(bases["llama"], "llama", "lora", ["q_proj"]).save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="expected .*adapters"):
        lmjax.load(tmp_path / "whole", base=bases["bert"])
    assert jnp.isfinite(our_logits(lmjax.load(tmp_path / "whole"))).all()
