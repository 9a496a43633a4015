"""The text of a growing answer: its parts join to what decoding it at once gives."""

import random

import pytest

from lmjax.data.tokenizers import NamedIds, TokenizerConfig, train_tokenizer
from lmjax.decoding.stopping import cut
from lmjax.serving.growing_text import GrowingText

TEXTS = ["\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002",
         "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 caf\u00e9 "
         "e\u0301",
         "def f(x):\n    return {'a': [1, 2]}  # \u2581 \t\r\n\n",
         "\ufffd a real \ufffd one \ufffd"]


@pytest.fixture(scope="module")
def names():
    texts = ["the cat sat on the mat", "def f(x): return x", "\u4f60\u597d \u4e16\u754c"] * 30
    return NamedIds(train_tokenizer(TokenizerConfig(vocab_size=320), texts))


def grow(names, before, ids, stop=(), size=1):
    """The parts of an answer that comes in groups of `size` tokens."""
    growing, shown = GrowingText(names, before, stop), []
    for at in range(0, len(ids), size):
        growing.add(ids[at : at + size])
        shown.append(growing.take())
        if growing.stopped:
            return growing, shown
    growing.finish()
    return growing, [*shown, growing.take(last=True)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_parts_join_to_the_whole_text(names, text, size):
    before = [names.tokenizer.bos_id, *names.encode("x = ")]
    ids = names.encode(text * 20)  # more than one window
    growing, shown = grow(names, before, ids, size=size)
    assert "".join(part.text for part in shown) == growing.text == text * 20
    assert [i for part in shown for i in range(part.first, part.end)] == list(range(len(ids)))
    # No part ends inside a character, which would have become U+FFFD.
    assert sum(part.text.count("\ufffd") for part in shown) == 20 * text.count("\ufffd")


def test_random_tokens_decode_as_all_at_once(names):
    rng = random.Random(0)
    for length in (1, 31, 32, 33, 200):
        ids = [rng.randrange(names.vocab_size) for _ in range(length)]
        before = ids[: rng.randrange(length)]
        growing, _ = grow(names, before, ids)
        assert growing.text == names.continuation(before, ids)


@pytest.mark.parametrize("stop", [("\u754c",), ("\n\n", "cd"), ("cde",), ("bcx", "cd"), ("zz",)])
def test_nothing_of_a_stop_string_is_shown(names, stop):
    for text in ("abcdabcd\n\nab", "\u4f60\u597d\u4e16\u754cabcde", "z" * 70):
        ids = [i for character in text for i in names.encode(character)]  # stops span tokens
        growing, shown = grow(names, [], ids, stop)
        assert "".join(part.text for part in shown) == cut(text, stop)[0]
        assert growing.stopped == cut(text, stop)[1]
        assert all(names.decode(ids[part.first : part.end]) == part.text for part in shown)


def test_what_cannot_become_a_stop_string_is_shown_at_once(names):
    ids = [i for character in "abcabd" for i in names.encode(character)]
    _, shown = grow(names, [], ids, ["abd"])
    assert [part.text for part in shown] == ["", "", "abc", "", "", ""]
