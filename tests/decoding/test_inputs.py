"""What callers pass in is checked before anything is run: texts, ids, positions, settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import tiny_decoder

from lmjax.config import build
from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.decoding.answers import DecodingOptions
from lmjax.decoding.generate import Generator
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.sharding import MeshConfig, make_layout
from lmjax.training.recipe import Recipe

V, POSITIONS = 300, 16


@pytest.fixture(scope="module")
def lm():
    """A model with learned positions, on one device."""
    model, params = tiny_decoder(positions="learned", max_positions=POSITIONS, num_layers=1,
                                 vocab_size=V)
    recipe = build(Recipe, {"model": {"positions": "learned", "max_positions": POSITIONS},
                            "data": {"seq_len": POSITIONS}})
    recipe = dataclasses.replace(recipe, model=model.config)
    texts = ["the cat sat on the mat", "a dog ran to the red house", "one two three four five"]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=V), texts * 20)
    return LM(model, params, make_layout(MeshConfig(), jax.devices()[:1]), tokenizer, recipe,
              {"step": 0})


@pytest.mark.parametrize("texts, words", [
    ("abc", "a list of texts, got one text; write"), (b"abc", "a list of texts, got bytes"),
    (None, "a list of texts, got NoneType"), ([1], "a text, got int 1"),
    ([b"a"], "a text, got bytes"), ({"a": 1}, "a list of texts, got dict"),
    (["a", "\ud800b"], "Unicode text, got half of a surrogate pair at character 0; read it")])
def test_texts_that_are_none(lm, texts, words):
    for use in (lm.score, lm.generate, lm.embed):
        with pytest.raises(UserError, match=f": expected {words}"):
            use(texts)


def test_one_text_is_no_list_of_texts(lm):
    for text in (["a"], None, b"a", "\udfff"):
        with pytest.raises(UserError, match="^text: expected "):
            lm.attention_maps(text)
    with pytest.raises(UserError, match="^layer: expected -1 to 0, got 1; "):
        lm.attention_maps("a", layer=1)


def test_nothing_is_an_answer_to_nothing(lm):
    assert lm.score([]) == lm.generate([]) == lm.generate_ids([]) == lm.continuations([]) == []
    assert lm.embed([]).shape == (0, 16)
    assert lm.score([""])[0].tokens == 0 and lm.embed(["", "a"]).shape == (2, 16)


@pytest.mark.parametrize("ids, words", [
    ([1, 2], "a list of rows of token ids, got one row; write"),
    (np.arange(3), "a list of rows of token ids, got one row"),
    ("ab", "a list of rows of token ids, got one text"), (None, "a list of rows"),
    ([[]], "at least one token id, got none"), ([[1.0, 2.0]], "whole numbers .*, got float 1.0"),
    ([[True]], "whole numbers .*, got bool True"), ([[None]], "whole numbers"),
    ([["a"]], "whole numbers"), ([b"ab"], "a list of token ids, got bytes"),
    ([[-1]], "ids of 0 to 299, got -1"), ([[V]], "ids of 0 to 299, got 300"),
    (np.array([[2**32 + 5]]), "ids of 0 to 299, got 4,294,967,301"),
    ([[1] * (POSITIONS + 1)], "(rows|prompt and answer) within max_positions=16, got 17")])
def test_ids_that_the_model_cannot_read(lm, ids, words):
    for use in (lm.logits, lambda rows: lm.generate_ids(rows, max_tokens=1),
                lambda rows: Generator(lm.model)(lm.params, rows, max_tokens=1)):
        with pytest.raises(UserError, match=f": expected {words}"):
            use(ids)


def test_rows_of_one_batch_have_one_length(lm):
    for ids, words in (([[1, 2], [3]], "rows of 1 to 2"), ([], "none")):
        with pytest.raises(UserError, match=f"^tokens: expected one or more rows .* got {words}"):
            lm.logits(ids)
    for ids in (np.array([[1, 2]], np.int64), jnp.array([[1, 2]]), [np.array([1, 2])], [(1, 2)]):
        np.testing.assert_array_equal(lm.logits(ids), lm.logits([[1, 2]]))


@pytest.mark.parametrize("row, words", [
    (([1, 2], 2), "0 to 1 ids to score, after the first, got 2"), (([1], 1), "0 to 0 ids"),
    (([1, 2], -1), "0 to 1 ids"), (([1, 2], 1.5), "an integer"), (([], 0), "at least one token"),
    (([1, V], 1), "ids of 0 to 299"), (([1] * (POSITIONS + 2), 1), "rows within max_positions")])
def test_continuations_score_what_a_row_has(lm, row, words):
    with pytest.raises(UserError, match=rf"^rows\[1\]: expected {words}"):
        lm.continuations([([1, 2, 3], 1), row])
    assert lm.continuations([([5], 0)]) == [(0.0, True)]


def test_a_text_longer_than_the_positions(lm):
    with pytest.raises(UserError, match="^text: expected rows within max_positions=16"):
        lm.attention_maps("the cat sat on the mat " * 9)
    assert lm.embed(["the cat sat on the mat " * 9]).shape == (1, 16)  # which cuts it


@pytest.mark.parametrize("option, words", [
    (dict(max_tokens=2.5), "an integer"), (dict(max_tokens=True), "an integer"),
    (dict(max_tokens="8"), "an integer"), (dict(max_tokens=10**12), "at most 16,777,216"),
    (dict(temperature=float("nan")), "a finite number"), (dict(temperature="hot"), "a number"),
    (dict(temperature=-1), "at least 0"), (dict(top_k=1.5), "an integer"),
    (dict(top_p=float("nan")), "a finite number"), (dict(top_p=0), "a probability"),
    (dict(seed=None), "an integer"), (dict(num_beams=0), "at least 1"),
    (dict(length_penalty=float("inf")), "a finite number"), (dict(stop=[1]), "a text"),
    (dict(stop=None), "a list of texts"), (dict(stop=[""]), "strings that end an answer"),
    (dict(stream="x"), "a function"), (dict(draft="path"), "an LM")])
def test_settings_out_of_range(lm, option, words):
    [name] = option
    with pytest.raises(UserError, match=rf"^{name}\S*: expected {words}"):
        lm.generate([], **option)


def test_one_stop_string_is_not_its_letters():
    assert DecodingOptions(stop="the end").stop == ("the end",)
    assert DecodingOptions(seed=np.int64(3), temperature=np.float32(0)).seed == 3
