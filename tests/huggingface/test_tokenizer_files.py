"""Tokenizers as published models have them: which files decide, lost text, ids without a row."""

import json
import sys

import numpy as np
import pytest
from exports import reader
from hub_tokenizers import NAMES, SPECIAL, TEXTS, byte_level, llama, save, unigram, word_piece

from lmjax.data.config import DataConfig
from lmjax.data.preparation.prepare import prepare
from lmjax.data.store import read_manifest
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TokenizerConfig,
    tokenizer_from_bytes,
    train_tokenizer,
    word_tables,
)
from lmjax.errors import UserError
from lmjax.huggingface.tokenizer_export import write_tokenizer
from lmjax.huggingface.tokenizers import read_tokenizer
from lmjax.training.pretrained import make_tokenizer

tokenizers = pytest.importorskip(
    "tokenizers", reason="tokenizers is not installed: pip install lmjax[hf]")


def _prepared(folder, texts, path):
    source = folder / "a.jsonl"
    source.write_text("\n".join(json.dumps({"id": f"doc-{i}", "text": text})
                                for i, text in enumerate(texts)))
    size = read_tokenizer(path).vocab_size
    said = []
    out = prepare(DataConfig(
        sources=(SourceConfig("a", f"jsonl:{source}"),), min_chars=1, clean=(),
        tokenizer=TokenizerConfig(path=str(path), vocab_size=size)), str(folder / "out"),
        make_tokenizer=make_tokenizer, log=said.append)
    entry = read_manifest(out)["sources"]["a"]
    return [entry["train"], entry["heldout"]], "\n".join(said)


@pytest.mark.parametrize("make", [llama, unigram, byte_level])
def test_a_document_with_the_names_of_special_tokens_is_plain_text(make, tmp_path):
    read = read_tokenizer(make(tmp_path))
    texts = [*NAMES, "The cat [MASK]", "x<s>"]
    ids = read.encode_batch(texts)
    assert read.changed(texts, ids) == {}
    names = [read.encode(name)[-1] for name in SPECIAL]  # in a prompt, a name is the token
    assert names == list(range(len(SPECIAL)))
    assert not np.isin(np.concatenate(ids), names).any()
    assert [read.decode(i) for i in ids] == texts


def test_a_tokenizer_that_returns_the_text_is_accepted_whatever_it_does_inside(tmp_path):
    splits, said = _prepared(tmp_path, [*TEXTS, *NAMES], llama(tmp_path))
    assert "every document comes back exactly" in said
    assert all("lost" not in split for split in splits)
    assert sum(s["bytes"] for s in splits) == sum(len(t.encode()) for t in [*TEXTS, *NAMES])


def test_a_lossy_tokenizer_is_accepted_with_a_count_of_what_it_loses(tmp_path):
    splits, said = _prepared(tmp_path, TEXTS, word_piece(tmp_path))
    # Of each document: T, A and the newline.
    lost = {key: sum(split["lost"][key] for split in splits) for key in ("documents", "characters")}
    assert lost == {"documents": len(TEXTS), "characters": 3 * len(TEXTS)}
    decoded = [text.lower().replace("\n", " ") for text in TEXTS]
    assert sum(split["bytes"] for split in splits) == sum(map(len, decoded))
    assert "12 of 12 documents do not come back exactly and lose 36 characters" in said
    assert "document a.jsonl" in said or "document doc-" in said, said
    assert "'The cat" in said and "comes back as 'the cat" in said


def test_pieces_of_word_piece_know_where_words_begin(tmp_path):
    read = read_tokenizer(word_piece(tmp_path))
    begins, ends = word_tables(read)
    first, *rest = read.encode("zebra")  # unknown words are split
    pieces = read.encode("rann")
    assert begins[pieces[0]] and not begins[pieces[1:]].any() and not ends[pieces].any()
    assert begins[first] or rest


@pytest.mark.parametrize("make, rows", [(llama, -1), (byte_level, -1), (unigram, -1)])
def test_ids_beyond_the_table_do_not_exist(make, rows, tmp_path):
    """As in Gemma 3, whose tokenizer has one token more than its table has rows."""
    whole = read_tokenizer(make(tmp_path))
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.add_special_tokens(["<image>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": whole.vocab_size}))
    read = tokenizer_from_bytes(read_tokenizer(tmp_path).to_bytes())
    assert read.vocab_size == whole.vocab_size
    assert read.encode("a<image>b") == whole.encode("a<image>b")
    assert read.decode([whole.vocab_size]) == ""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": whole.vocab_size + rows}))
    fewer = read_tokenizer(tmp_path)
    assert fewer.vocab_size == whole.vocab_size + rows
    assert max(fewer.encode(" ".join(map(chr, range(33, 127))))) < fewer.vocab_size
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(out, reader(read, imported=True))
    name = "tokenizer.json"
    assert (out / name).read_bytes() == (tmp_path / name).read_bytes()


def test_added_tokens_without_a_row_do_not_exist_either(tmp_path):
    byte_level(tmp_path)
    size = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    added = {"<pad>": size, "<image>": size + 1}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    for rows in (size, size + 1, size + 2):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": rows}))
        read = tokenizer_from_bytes(read_tokenizer(tmp_path).to_bytes())
        assert read.vocab_size == rows
        assert max(read.encode("a<pad>b<image>")) < rows


def test_a_tokenizer_of_another_model_is_refused_and_not_cut(tmp_path):
    byte_level(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100}))
    with pytest.raises(UserError, match="expected a tokenizer for an embedding of 100 rows"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("name, content", [
    ("added_tokens.json", "version https://git-lfs.github.com/spec/v1"),
    ("added_tokens.json", "[]"), ("special_tokens_map.json", "[]"),
    ("tokenizer_config.json", '{"added_tokens_decoder": [')])
def test_damaged_files_beside_tokenizer_json_are_refused_in_one_line(name, content, tmp_path):
    byte_level(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="expected .*, got .*; ") as raised:
        read_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_named_end_without_a_row_is_refused(tmp_path):
    byte_level(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    size = made.get_vocab_size()
    made.add_special_tokens(["<|im_end|>"])
    save(tmp_path, made, eos_token="<|im_end|>")
    assert read_tokenizer(tmp_path).eos_id == size
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
    with pytest.raises(UserError, match="expected an id for eos_token, got '<|im_end|>'"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("settings", [
    {"add_bos_token": False, "add_eos_token": False}, {"add_eos_token": True},
    {"add_bos_token": True, "add_eos_token": True}, {}])
def test_tokenizer_json_decides_what_stands_around_a_text(settings, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="not installed: pip install lmjax[oracle]")
    llama(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    save(tmp_path, made, tokenizer_class="PreTrainedTokenizerFast", **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    read = read_tokenizer(tmp_path)
    assert [*read.prefix, *read.encode("a b"), *read.suffix] == theirs("a b")["input_ids"]


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json", "map"])
def test_tokens_that_other_files_add_are_read_as_transformers_reads_them(where, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="not installed: pip install lmjax[oracle]")
    byte_level(tmp_path)
    size = read_tokenizer(tmp_path).vocab_size
    config = {"bos_token": "<s>", "eos_token": "</s>",
              "tokenizer_class": "PreTrainedTokenizerFast"}
    if where == "added_tokens.json":
        (tmp_path / where).write_text(json.dumps({"<new>": size, "<more>": size + 1}))
    elif where == "map":
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "[MASK]"}))
    else:
        config["added_tokens_decoder"] = {
            str(size + i): {"content": name, "special": bool(i), "normalized": False,
                            "lstrip": False, "rstrip": False, "single_word": False}
            for i, name in enumerate(["<new>", "<more>"])}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    read = tokenizer_from_bytes(read_tokenizer(tmp_path).to_bytes())
    text = "The <new> cat<more>."
    assert read.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert (read.vocab_size, read.eos_id) == (len(theirs), theirs.eos_token_id)


def test_an_added_token_with_another_id_than_its_place_is_refused(tmp_path):
    byte_level(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<new>": 900}')
    with pytest.raises(UserError, match="expected '<new>' as id 280, .* got id 900"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("names", [["vocab.txt"], ["vocab.json", "merges.txt"], ["spiece.model"],
                                   ["vocab.json", "source.spm"]])
def test_files_that_lmjax_cannot_put_together_get_one_line_with_a_fix(names, tmp_path):
    for name in names:
        (tmp_path / name).write_text("a")
    message = f"got .*{names[0]}.* without tokenizer.json; write tokenizer.json: .*save_pretrained"
    with pytest.raises(UserError, match=message):
        make_tokenizer(TokenizerConfig(path=str(tmp_path)), [])


@pytest.fixture(scope="module")
def model():
    return train_tokenizer(TokenizerConfig(vocab_size=300), TEXTS)


def test_of_two_tokenizers_tokenizer_json_decides(model, tmp_path):
    write_tokenizer(tmp_path, reader(model), log=lambda line: None)
    assert isinstance(read_tokenizer(tmp_path), SentencePieceTokenizer)  # both say the same
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.add_tokens(["<|im_start|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(tmp_path)
    assert isinstance(read, HuggingFaceTokenizer)
    assert read.encode("<|im_start|>") == [model.vocab_size]


@pytest.mark.parametrize("name, content", [
    ("added_tokens.json", {"<pad>": 300}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": "<|im_end|>"}}}),
    ("tokenizer_config.json", {"eos_token": "<|im_end|>"}),
    ("special_tokens_map.json", {"bos_token": {"content": "<begin>"}})])
def test_a_lone_model_is_refused_where_other_files_add_to_it(name, content, model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model.to_bytes())
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match="expected the tokens of tokenizer.model.*write tokenizer"):
        read_tokenizer(tmp_path)


def test_all_files_of_the_directory_come_back_byte_for_byte(model, tmp_path):
    files = {"chat_template.jinja": b"{{ bos_token }}\r\n\xff", "chat_templates/tool.jinja": b"{}",
             "additional_chat_templates/rag.jinja": b"x", "added_tokens.json": b"{}\r\n",
             "special_tokens_map.json": b'{"eos_token":\r\n"</s>"}'}
    for kind in ("json", "both", "model"):
        path, out = tmp_path / kind, tmp_path / f"{kind}-out"
        path.mkdir(), out.mkdir()
        mine = dict(files)
        if kind != "model":
            llama(path)
            mine |= {name: (path / name).read_bytes()
                     for name in ("tokenizer.json", "tokenizer_config.json")}
        if kind != "json":
            mine["tokenizer.model"] = model.to_bytes()
        for name, raw in mine.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(raw)
        kept = tokenizer_from_bytes(read_tokenizer(path).to_bytes())
        write_tokenizer(out, reader(kept, imported=True))
        assert {str(p.relative_to(out)): p.read_bytes()
                for p in out.rglob("*") if p.is_file()} == mine


def test_files_that_decide_no_id_do_not_change_the_hash(tmp_path):
    """Data that was prepared without them belongs to the same tokenizer."""
    llama(tmp_path)
    names = ("tokenizer.json", "tokenizer_config.json")
    before = {"kind": "huggingface", "files": {name: (tmp_path / name).read_text()
                                               for name in names}}
    old = tokenizer_from_bytes(json.dumps(before).encode())
    (tmp_path / "chat_template.jinja").write_text("x")
    assert read_tokenizer(tmp_path).hash == old.hash


def test_a_model_that_adds_a_space_decodes_without_it(tmp_path):
    """A lone tokenizer.model like Llama 2's."""
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=out, vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, minloglevel=2)
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    read = read_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    texts = ["The cat", " two  spaces ", "\nline", "<s>", "Ωμ", ""]
    ids = read.encode_batch(texts)
    assert [i.tolist() for i in ids] == [theirs.encode(text) for text in texts]
    assert read.changed(texts, ids) == {} and read.decode(ids[0]) == "The cat"
    assert read.changed(["a▁b"], read.encode_batch(["a▁b"])) == {0: "a b"}
    assert read.continuation([*ids[0]], read.encode("cat")) == " cat"


def test_without_the_package_a_line_says_so(tmp_path, monkeypatch):
    llama(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install lmjax\[hf\]"):
        read_tokenizer(tmp_path)


def test_bits_per_byte_of_decoded_text_are_marked(tmp_path):
    """In training metrics, in evaluation, in what is printed, and in a report."""
    from lmjax.data.pipeline import open_splits
    from lmjax.reporting.run_files import RunRecord
    from lmjax.training.evaluate import bits_per_byte, bits_unit

    path = word_piece(tmp_path)
    size = read_tokenizer(path).vocab_size
    splits, said = _prepared(tmp_path, TEXTS, path)
    config = DataConfig(
        sources=(SourceConfig("a", f"jsonl:{tmp_path}/a.jsonl"),), min_chars=1, clean=(),
        seq_len=16, tokenizer=TokenizerConfig(path=str(path), vocab_size=size))
    train, _ = open_splits(config, str(tmp_path / "out"))
    found = bits_per_byte(1.0, train)
    expected = train.predictions / splits[0]["bytes"] / np.log(2)
    assert found == {"bits_per_byte": pytest.approx(expected), "of_decoded_text": 1.0}
    assert bits_unit(train) == "bits/byte of decoded text"
    assert "bits per byte of decoded held-out text" in said
    columns = {name: np.array([value]) for name, value in found.items()}
    assert RunRecord(tmp_path, {}, {}, train=columns).of == " of decoded text"
    exact, _ = open_splits(DataConfig(sources=(SourceConfig("a", "synthetic:8"),)))
    assert bits_unit(exact) == "bits/byte" and "of_decoded_text" not in bits_per_byte(1.0, exact)
