"""Answers as text during generation: streaming, stop strings, and rows that end early."""

import pytest
from tiny_decoder import PROMPTS, tiny_decoder

from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.decoding.generate import CHUNK, Generator
from lmjax.decoding.sampling import Sampling
from lmjax.decoding.stopping import TextStream, cut


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TokenizerConfig(vocab_size=300), ["ab abc abcd é 日本 stop here\n"] * 50)


@pytest.mark.parametrize("stop, expected", [
    ((), "ab é日本 abcd stop here"), (("stop",), "ab é日本 abcd "), (("zz", "日"), "ab é")])
def test_streamed_pieces_are_the_answer_and_never_show_a_stop_string(tokenizer, stop, expected):
    ids = tokenizer.encode("ab é日本 abcd stop here")
    pieces, ended = [], False
    stream = TextStream(tokenizer, [[1]], stop, lambda row, piece: pieces.append(piece))
    for n in range(1, len(ids) + 1):
        ended = stream([ids[:n]])[0]
        if ended:
            break
    assert stream.finish([ids[:n]]) == ["".join(pieces)] == [expected]
    assert ended == bool(stop) and "\ufffd" not in "".join(pieces) and len(pieces) > 1


def test_the_first_stop_string_cuts():
    assert cut("abcabc", ("c", "ab")) == ("", True)
    assert cut("abc", ()) == ("abc", False)


@pytest.mark.long
def test_a_watched_answer_is_the_same_and_ends_when_told():
    model, params = tiny_decoder()
    setting, count = Sampling(0.9), CHUNK + 5
    generator = Generator(model)
    free = generator(params, PROMPTS, max_tokens=count, sampling=setting, seed=2)
    seen = []

    def watch(answers):
        seen.append([len(a) for a in answers])
        return [False, len(seen) == 1, False, False]

    watched = generator(params, PROMPTS, max_tokens=count, sampling=setting, seed=2, watch=watch)
    assert watched[0] == free[0] and watched[2:] == free[2:] and watched[1] == free[1][:CHUNK]
    assert seen == [[CHUNK] * 4, [count, CHUNK, count, count]]
