"""What tokens add to a likelihood: completeness, PyTorch's gradients, and the pictures."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.objectives import Objective
from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.models.model import build_model
from lmjax.sharding import MeshConfig, make_layout
from lmjax.training.recipe import build_recipe

MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
KNOWN = 300
SPANS = {"name": "span_corruption", "sentinels": 8}
# (model, objective, text, answer)
FAMILIES = {
    "llama": ({}, {}, "Document 7", " tells of"),
    "tied": ({"tie_embeddings": True}, {}, "Document 7 tells", ""),
    "gpt2": ({"preset": "gpt2"}, {}, "Document 7", " tells of"),
    "bert": ({"preset": "bert-base", "pooler": False}, {"name": "masked_lm"},
             "Document [MASK] tells of [MASK] number", "74"),
    "modernbert": ({"preset": "modernbert-base"}, {"name": "masked_lm"},
                   "Document [MASK] tells of", ""),
    "t5": ({"preset": "t5-small", "head_dim": 8}, SPANS, "Document <extra_id_0> tells",
           "<extra_id_0>749"),
}


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["Document 7 tells of the number 49.\n"] * 40
    return train_tokenizer(TokenizerConfig(vocab_size=KNOWN), texts)


def model_of(tokenizer, keys, objective, weights=True, task=False) -> LM:
    """An untrained model; without weights, one that only reads."""
    def recipe_of(vocab_size):
        return build_recipe({
            "model": dict(num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, mlp_dim=24,
                          init_std=0.5, embedding_std=0.3, vocab_size=vocab_size) | keys,
            "data": {"seq_len": 48, "objective": objective,
                     "tokenizer": {"vocab_size": KNOWN}},
            **({"task": {"name": "classification"}} if task else {})})

    made = Objective(recipe_of(2 * KNOWN).data.objective, seq_len=48, vocab_size=KNOWN,
                     tokenizer=tokenizer)
    recipe = recipe_of(made.vocab_size)
    model = build_model(recipe.model, vocab_size=0, platform="cpu", dtype=jnp.float32)
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    params = {}
    if weights:
        params = jax.device_put(jax.jit(model.init)(jax.random.key(1)), layout.replicated)
    return LM(model, params, layout, tokenizer, recipe, {"step": 0})


@pytest.fixture(scope="module")
def lm(tokenizer):
    return model_of(tokenizer, *FAMILIES["llama"][:2])


@pytest.mark.long
def test_the_values_add_up_to_the_difference_of_the_outputs(lm, tokenizer, tmp_path):
    """The outputs are those of `score`, with the embeddings of the model and with their mean."""
    text, answer = "Document 7", " tells of"
    found = lm.explain(text, answer, picture=tmp_path / "text.svg")
    table = lm.params["embedding"]["table"]
    mean = jnp.broadcast_to(table.mean(0, keepdims=True), table.shape)
    empty = copy.copy(lm)
    empty.params = {**lm.params, "embedding": {"table": mean}}
    row = [tokenizer.bos_id, *tokenizer.encode(text + answer)], len(tokenizer.encode(answer))
    whole, nothing = (model.continuations([row])[0][0] for model in (lm, empty))
    assert found.log_likelihood == pytest.approx(whole, rel=1e-5)
    assert found.baseline == pytest.approx(nothing, rel=1e-5)
    assert abs(whole - nothing) > 0.5 and abs(found.gap) < 0.01 * max(abs(whole - nothing), 1.0)
    assert found.values.sum() == pytest.approx(whole - nothing, abs=0.011 * abs(whole - nothing))
    assert "".join(found.tokens[1:]) + found.target[-1] == text + answer
    assert "".join(found.target) == answer and len(found.values) == len(found.tokens)
    written = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "text.svg").read_text())
    shown = [label if label.strip() else "\u2423" for label in (*found.tokens, found.target[-1])]
    assert [text for text in written if text in shown] == shown


def test_what_cannot_be_explained_is_refused(lm, tokenizer):
    with pytest.raises(UserError, match="expected a text of at least two tokens, or an answer, go"):
        lm.explain("")
    with pytest.raises(UserError, match="method: expected one of integrated_gradients, gradient_x"):
        lm.explain("a", method="magic")
    with pytest.raises(UserError, match="texts: expected one text for a picture, got 2"):
        lm.score(["a", "b"], picture="a.png")
    bert = model_of(tokenizer, *FAMILIES["bert"][:2], weights=False)
    with pytest.raises(UserError, match=r"text: expected a text with \[MASK\], whose token is exp"):
        bert.explain("Document 7")
    with pytest.raises(UserError, match=r"answer: expected 1 token\(s\), as many as masks, got 2"):
        bert.explain("Document [MASK]", "74")
    t5 = model_of(tokenizer, *FAMILIES["t5"][:2], weights=False)
    with pytest.raises(UserError, match="answer: expected an answer, whose likelihood is expl"):
        t5.explain("Document 7")


@pytest.mark.long
@pytest.mark.parametrize("family, at", [("bert", 0), ("llama", -1)])
def test_a_class_is_explained_by_the_head(family, at, tokenizer):
    """The head reads the first token of an encoder, the last of a decoder, as in training."""
    keys, objective, *_ = FAMILIES[family]
    lm = model_of(tokenizer, keys | {"head": {"outputs": 3}}, objective, task=True)
    text = "Document 7 tells"
    lm.about["task"] = {"labels": ["bad", "good", "odd"]}
    logits = np.asarray(lm.logits([lm.reader.ids(text)]), np.float64)[0, at]
    log_p = logits - np.log(np.exp(logits).sum())
    for chosen in range(3):
        found = lm.explain(text, str(chosen))
        assert found.target == ("bad", "good", "odd")[chosen : chosen + 1]
        assert found.log_likelihood == pytest.approx(log_p[chosen], rel=1e-4)
        assert abs(found.gap) < 0.011 * max(abs(found.log_likelihood - found.baseline), 1.0)
    assert lm.explain(text).target == ("bad", "good", "odd")[log_p.argmax() :][:1]
    by_name = lm.explain(text, "good", method="gradient_x_input")
    assert by_name.log_likelihood == pytest.approx(log_p[1], rel=1e-4)
    for wrong in ("3", "Good"):
        with pytest.raises(UserError, match=f"bad, good, odd, or its number, 0 to 2, got '{wrong}"):
            lm.explain(text, wrong)
    del lm.about["task"]
    assert lm.explain(text, "2", method="gradient_x_input").target == ("class 2",)
    other = model_of(tokenizer, keys | {"head": {"outputs": 3}}, objective, weights=False)
    with pytest.raises(UserError, match="expected a model of tokens, or a classifier of single"):
        other.explain(text)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.long if name == "tied" else pytest.mark.slow)
    for name in FAMILIES])
def test_gradients_are_those_of_transformers(name, tokenizer, tmp_path):
    """gradient x input, and the mean of 200 gradients on the path from the mean embedding."""
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    keys, objective, text, answer = FAMILIES[name]
    lm = model_of(tokenizer, keys, objective)
    simple = lm.explain(text, answer, method="gradient_x_input")
    found = lm.explain(text, answer)
    lm.export(tmp_path / "hf", log=lambda line: None)
    kind = {"decoder": "CausalLM", "encoder": "MaskedLM", "encdec": "Seq2SeqLM"}
    family = lm.model.config.family
    theirs = getattr(transformers, f"AutoModelFor{kind[family]}").from_pretrained(
        tmp_path / "hf", attn_implementation="eager").eval()
    table = theirs.get_input_embeddings().weight.detach()
    names = lm.reader.names
    source = lm.reader.ids(text, end=family != "decoder")
    if family == "encdec":
        target = names.encode(answer)
        read, halves = [*source, lm.reader.start_id, *target[:-1]], len(source)
        places = range(len(source), len(read))
    elif family == "encoder":
        [mask] = names.encode("[MASK]")
        read, halves = source, 0
        places = [i for i, token in enumerate(source) if token == mask]
        target = names.encode(answer)
    else:
        whole = lm.reader.ids(text + answer, end=False)
        begin = len(source) if answer else 1
        read, halves, target = whole[:-1], 0, whole[begin:]
        places = range(begin - 1, len(read))

    def f(x):
        if halves:
            logits = theirs(inputs_embeds=x[None, :halves],
                            decoder_inputs_embeds=x[None, halves:]).logits[0]
            logits = torch.cat([torch.zeros(halves, logits.shape[1]), logits])
        else:
            logits = theirs(inputs_embeds=x[None]).logits[0]
        log_p = logits.log_softmax(-1)
        ids = target or log_p[list(places), : names.vocab_size].argmax(-1).tolist()
        return log_p[list(places), ids].sum()

    def slope(x):
        x = x.clone().requires_grad_()
        value = f(x)
        value.backward()
        return value.item(), x.grad

    x, mean = table[read], table.mean(0, keepdim=True)
    value, gradient = slope(x)
    assert simple.log_likelihood == pytest.approx(value, rel=1e-4)
    expected, scale = (gradient * x).sum(1).numpy(), (gradient * x).abs().sum(1).max().item()
    np.testing.assert_allclose(simple.values, expected, atol=2e-5 * scale)
    if not target:  # those that are likeliest for the text, at every point of the path
        logits = theirs(inputs_embeds=x[None]).logits[0, list(places), : names.vocab_size]
        target = logits.argmax(-1).tolist()
    slopes = [slope(mean + (i + 0.5) / 200 * (x - mean))[1] for i in range(200)]
    expected = (torch.stack(slopes).mean(0) * (x - mean)).sum(1).numpy()
    np.testing.assert_allclose(found.values, expected, atol=0.02 * np.abs(expected).sum())
    assert abs(found.gap) < 0.01 * max(abs(value - found.baseline), 1.0)
