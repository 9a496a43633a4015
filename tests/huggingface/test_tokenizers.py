"""Hugging Face tokenizers with our interface, and ours written as theirs."""

import json

import numpy as np
import pytest
from exports import reader

from lmjax.data import store
from lmjax.data.config import DataConfig
from lmjax.data.preparation.prepare import prepare
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import (
    HuggingFaceTokenizer,
    TokenizerConfig,
    prepared_tokenizer,
    tokenizer_from_bytes,
    train_tokenizer,
)
from lmjax.errors import UserError
from lmjax.huggingface.tokenizer_export import PROBES, write_tokenizer
from lmjax.huggingface.tokenizers import read_tokenizer
from lmjax.training.pretrained import make_tokenizer

tokenizers = pytest.importorskip(
    "tokenizers", reason="tokenizers is not installed: pip install lmjax[hf]")
TEXTS = ["The cat sat on the mat, 12 times.\n", "def f(x):\n    return x + 1\n",
         "naïve café — 日本 👩‍💻"] * 40
UNSEEN = ["A dog\tran 345 miles.", "  two\n\nlines ", "Ωμέγα 🇯🇵", ""]


@pytest.fixture(scope="module")
def ours():
    return train_tokenizer(TokenizerConfig(vocab_size=360), TEXTS)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A directory with a tokenizer like GPT-2's, which also has a BOS token."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|end|>", "<|begin|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "<|end|>", "bos_token": {"content": "<|begin|>"}}))
    return folder


def test_ours_as_tokenizer_json_splits_every_text_the_same(ours, tmp_path):
    said = []
    write_tokenizer(tmp_path, reader(ours), log=said.append)
    theirs = HuggingFaceTokenizer.from_files(
        {path.name: path.read_bytes() for path in tmp_path.glob("*.json")})
    assert "as tokenizer.model does" in said[0]
    for text in [*TEXTS[:3], *UNSEEN, *(p for p in PROBES if "<s>" not in p)]:
        assert theirs.encode(text) == ours.encode(text), text
        assert theirs.decode(theirs.encode(text)) == text
    assert (theirs.prefix, theirs.suffix) == ((ours.bos_id,), ())
    assert (theirs.bos_id, theirs.eos_id) == (ours.bos_id, ours.eos_id)
    assert theirs.vocab_size == ours.vocab_size
    # tokenizer.model is read, as it adds no space before a text.
    assert read_tokenizer(tmp_path).hash == ours.hash


def test_transformers_reads_what_we_write(ours, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="not installed: pip install lmjax[oracle]")
    write_tokenizer(tmp_path, reader(ours), log=lambda line: None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS[:3], *UNSEEN]:
        assert theirs.encode(text) == [ours.bos_id, *ours.encode(text)]
    assert theirs.eos_token_id == ours.eos_id


def test_a_tokenizer_that_cannot_be_converted_is_said_to_be(tmp_path):
    """Their unigram model reads the name of a byte's token in a text as that token."""
    ours = train_tokenizer(TokenizerConfig(vocab_size=300, model="unigram"), TEXTS)
    said = []
    write_tokenizer(tmp_path, reader(ours), log=said.append)
    assert "tokenizer.json is left out, use tokenizer.model: it would split '<0x41>'" in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]
    assert read_tokenizer(tmp_path).to_bytes() == ours.to_bytes()


def test_theirs_with_our_interface(byte_level, tmp_path):
    theirs = read_tokenizer(byte_level)
    assert (theirs.eos_id, theirs.bos_id, theirs.prefix, theirs.suffix) == (0, 1, (1,), ())
    texts = [*TEXTS[:3], *UNSEEN]
    batch = theirs.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids.tolist() == theirs.encode(text) and theirs.decode(ids) == text
        assert theirs.surface(ids)[0] == text.encode()
    assert theirs.changed(texts, batch) == {}
    assert list(theirs.changed(texts, [*batch[:-1], np.array([5], np.int32)])) == [len(texts) - 1]
    again = tokenizer_from_bytes(theirs.to_bytes())
    assert isinstance(again, HuggingFaceTokenizer)
    assert again.encode(texts[0]) == theirs.encode(texts[0])
    assert again.hash == theirs.hash
    write_tokenizer(tmp_path, reader(again, imported=True))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (byte_level / name).read_text()
    made = make_tokenizer(TokenizerConfig(path=str(byte_level), vocab_size=theirs.vocab_size), [])
    assert made.to_bytes() == theirs.to_bytes()


def test_a_corpus_is_prepared_with_theirs(byte_level, tmp_path):
    texts = [f"{text}{i}" for i, text in enumerate(TEXTS[:9])]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    theirs = read_tokenizer(byte_level)
    config = DataConfig(
        sources=(SourceConfig("a", f"jsonl:{tmp_path}/a.jsonl"),), min_chars=1, clean=(),
        tokenizer=TokenizerConfig(path=str(byte_level), vocab_size=theirs.vocab_size))
    out = prepare(config, str(tmp_path / "out"), make_tokenizer=make_tokenizer,
                  log=lambda line: None)
    tokenizer, found = prepared_tokenizer(out), []
    assert tokenizer.to_bytes() == theirs.to_bytes()
    for split, facts in store.read_manifest(out)["sources"]["a"].items():
        if split in ("train", "heldout"):
            part = store.SplitStore(out, "a", split, facts)
            found += [tokenizer.decode(ids[1:-1])
                      for ids in np.split(part.tokens(), part.offsets[1:-1])]
    assert sorted(found) == sorted(texts)


def test_a_continuation_keeps_its_first_space():
    """A decoder may strip the first space of a text, but not that of an answer."""
    from tokenizers import decoders, models

    made = tokenizers.Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "<s>": 2}, unk_token="<s>"))
    made.decoder = decoders.Metaspace()
    files = {"tokenizer.json": made.to_str(), "tokenizer_config.json": '{"bos_token": "<s>"}'}
    theirs = HuggingFaceTokenizer(json.dumps({"kind": "huggingface", "files": files}).encode())
    assert theirs.decode([1]) == "b" and theirs.continuation([0], [1]) == " b"


def test_refusals(byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a tokenizer.json, got"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xe9")
    message = "expected tokenizer.json .*in UTF-8, got .*; fetch the directory again"
    with pytest.raises(UserError, match=message):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((byte_level / "tokenizer.json").read_text())
    message = "expected bos_token or eos_token in tokenizer_config.json, got neither"
    with pytest.raises(UserError, match=message):
        read_tokenizer(tmp_path)
