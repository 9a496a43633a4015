"""Tokenizers: every text comes back exactly."""

import io
import random

import numpy as np
import pytest
import sentencepiece

from lmjax.data.tokenizers import (
    SentencePieceTokenizer,
    TokenizerConfig,
    sentencepiece_tokenizer,
    tokenizer_from_bytes,
    train_tokenizer,
    word_tables,
)
from lmjax.data.tokenizers.sentencepiece import BOS_ID, EOS_ID, PAD_ID

NASTY = [
    "", " ", "  ", "a  b   c    d", "  lead", "trail  ", "\n", "\n\n\n", "\r", "\r\n\r", "\t\tx\t",
    "a\x0b\x0cb",
    "\u2581", "\u2581x \u2581\u2581 ", " \u2581 ", "\x00", "a\x00\x00b", "<s>", "</s><unk><pad><s>",
    "<0x41><0xE2>", "a\u2581<0xE2>\u2581", "\u00e9 e\u0301", "\ufffd", "\ufeffbom",
    "\U0001d11e\U0001f600",
    "a\u2028b\u2029c\u0085d", "\u2585 \u2047 ", "\u65e5\u672c\u8a9e \u30c6", "\x7f\x01\x1b[0m",
    "\xa0\u3000\u200b\u200d", "\ue000\uffff\U0010ffff", "        return x12345", "x" * 5000,
    "\u0627\u0644\u0639 \u05d0",
]


def corpus():
    rng = random.Random(0)
    words = ["alpha", "beta", "return self", "print(x)", "    if", "42", "e\u0301", "<s>", "</s>",
             "<unk>"]
    return [f"{i}\n" + "\n".join(" ".join(rng.choices(words, k=6)) for _ in range(40))
            for i in range(20)]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request):
    size = {"bpe": 330, "unigram": 290}[request.param]
    return sentencepiece_tokenizer(TokenizerConfig(vocab_size=size, model=request.param), corpus())


def test_every_text_comes_back(tokenizer):
    rng = random.Random(1)
    pool = [chr(c) for c in [*range(0x300), *range(0x2570, 0x2590), *[0x2581] * 5, 0x1F600, 0xD7FF,
                             0xE000]]
    texts = NASTY + ["".join(rng.choices(pool, k=rng.randint(1, 60)))
                     for _ in range(500)] + corpus()
    ids = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(i) for i in ids] == texts
    assert [tokenizer.encode(t) for t in texts] == [i.tolist() for i in ids]
    assert tokenizer.changed(texts, ids) == {}
    assert max(int(i.max()) for i in ids if len(i)) < tokenizer.vocab_size
    # The texts spell special tokens out, and never mean them.
    assert not {PAD_ID, BOS_ID, EOS_ID, 3} & {int(n) for i in ids for n in i}


def test_words_are_encoded_once_where_that_is_the_same_and_only_there(tokenizer):
    """For BPE, but not for unigram models, nor where a piece reaches into the next word."""
    integers = tokenizer._sp.get_score(tokenizer.vocab_size - 1).is_integer()
    assert tokenizer._by_unit == integers
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=330, model_type="bpe",
        byte_fallback=True, split_by_whitespace=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2)
    over = SentencePieceTokenizer(model.getvalue())
    assert any("\u2581" in over._sp.id_to_piece(i).strip("\u2581") for i in range(330))
    assert not over._by_unit
    ids = [i.tolist() for i in over.encode_batch(corpus())]
    assert ids == [over.encode(text) for text in corpus()]


def test_our_decoding_is_sentencepieces_own(tokenizer):
    for text in NASTY:
        assert tokenizer._sp.decode(tokenizer.encode(text)) == text


def test_the_number_of_threads_changes_nothing(tokenizer):
    one, many = (tokenizer.encode_batch(corpus(), num_threads=n) for n in (1, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


def test_a_text_that_does_not_come_back_is_found(tokenizer):
    texts = ["one two", "three", "four five"]
    ids = tokenizer.encode_batch(texts)
    assert tokenizer.changed(["one two", "threw", "four five"], ids) == {1: "three"}
    # The same bytes in all.
    assert list(tokenizer.changed(["one twot", "hree", "four five"], ids)) == [0, 1]


def test_half_a_character_decodes_to_a_replacement(tokenizer):
    ids = tokenizer.encode("\U0001f600")
    assert tokenizer.decode([tokenizer.bos_id, *ids[:2]]) == "\ufffd"
    assert tokenizer.decode([]) == ""


def test_the_model_is_a_pure_function_and_describes_itself(tokenizer):
    again = tokenizer_from_bytes(tokenizer.to_bytes())
    assert again.hash == tokenizer.hash and again.encode("a b") == tokenizer.encode("a b")
    config = TokenizerConfig(vocab_size=300, train_bytes=5000)
    model = train_tokenizer(config, corpus()).to_bytes()
    assert train_tokenizer(config, corpus()).to_bytes() == model
    assert train_tokenizer(TokenizerConfig(300, "bpe", 5000, seed=1), corpus()).to_bytes() != model
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (PAD_ID, BOS_ID, EOS_ID)


def test_long_lines_are_not_left_out_of_training():
    tokenizer = sentencepiece_tokenizer(TokenizerConfig(vocab_size=278), ["needle " * 20_000])
    assert len(tokenizer.encode("needle needle")) <= 4


def test_runs_of_spaces_are_one_token():
    code = sentencepiece_tokenizer(TokenizerConfig(vocab_size=272), ["        x = 1\n    y\n" * 50])
    assert len(code.encode("        ")) <= 2


@pytest.mark.parametrize("config, message", [
    (TokenizerConfig(vocab_size=100),
     "vocab_size: expected .* got 100 .*smaller than required_chars"),
    (TokenizerConfig(vocab_size=9000), "vocab_size: expected .* got 9000 .*too high"),
    (TokenizerConfig(path="/no/such.model"),
     "path: expected a SentencePiece model, got '/no/such.model', which does not exist"),
])
def test_a_tokenizer_that_cannot_be_made(config, message):
    with pytest.raises(ValueError, match=message):
        sentencepiece_tokenizer(config, corpus())


def test_a_directory_is_no_sentencepiece_model(tmp_path):
    with pytest.raises(ValueError, match="a SentencePiece model, got .*, which is a directory"):
        sentencepiece_tokenizer(TokenizerConfig(path=str(tmp_path)), [])


def test_an_existing_model(tmp_path, tokenizer):
    path = tmp_path / "t.model"
    path.write_bytes(tokenizer.to_bytes())
    again = sentencepiece_tokenizer(TokenizerConfig(tokenizer.vocab_size, path=str(path)), [])
    assert again.hash == tokenizer.hash
    with pytest.raises(ValueError, match=f"expected {tokenizer.vocab_size}.*, got 4096"):
        sentencepiece_tokenizer(TokenizerConfig(path=str(path)), [])
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="expected a SentencePiece model, got 4 bytes"):
        sentencepiece_tokenizer(TokenizerConfig(path=str(path)), [])


def test_words_end_where_letters_do(tokenizer):
    """Cut by the tables, tokens give the words of the text, however the words were split."""
    begins, ends = word_tables(tokenizer)
    text = "return self.alpha42 (beta)\n    e\u0301t\u00e9 \u65e5\u672c x"
    ids = np.array(tokenizer.encode(text))
    assert len(ids) > 20
    cut = begins[ids] | np.concatenate([[True], ends[ids[:-1]]])
    words = {tokenizer.decode(part).strip() for part in np.split(ids, np.flatnonzero(cut)[1:])}
    assert {"return", "self", "alpha42", "beta", "e\u0301t\u00e9", "x"} <= words
    assert begins[[PAD_ID, BOS_ID, EOS_ID]].all() and ends[[PAD_ID, BOS_ID, EOS_ID]].all()


def test_spaces_come_back_that_the_training_text_did_not_have():
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), ["学而时习之不亦说乎有朋自远方来"])
    text = "  a b\u2581 c "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)
