"""Tokens that other files name, add or give flags: read as transformers reads them, or refused."""

import json

import numpy as np
import pytest

tokenizers = pytest.importorskip(
    "tokenizers", reason="tokenizers is not installed: pip install lmjax[hf]")
transformers = pytest.importorskip("transformers", reason="transformers is not installed, so "
                                   "nothing is compared with it: pip install lmjax[oracle]")

from hub_tokenizers import TEXTS, byte_level, llama, unigram, word_piece  # noqa: E402

from lmjax.data.tokenizers import tokenizer_from_bytes  # noqa: E402
from lmjax.errors import UserError  # noqa: E402
from lmjax.huggingface.added import CLASS_OF, CLASSES, NAMED  # noqa: E402
from lmjax.huggingface.tokenizers import read_tokenizer  # noqa: E402

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEXT = "The <new> cat <mask> b<more>. [MASK] x"
SIZE = 280  # of the byte-level tokenizer: the id of the first token that is added


def token(name, **flags):
    return {"content": name, **dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"),
                                             False), **flags}


def typed(name, **flags):
    """As transformers writes a token into tokenizer_config.json."""
    return {"__type": "AddedToken", "special": True, **token(name, **flags)}


# case -> what the files hold beside BOS and EOS
CASES = {
    "a name": {CONFIG: {"mask_token": "<mask>"}},
    "a name with lstrip": {CONFIG: {"mask_token": typed("<mask>", lstrip=True)}},
    "of the map, with lstrip": {MAP: {"mask_token": token("<mask>", lstrip=True)}},
    "of the map, with rstrip": {MAP: {"mask_token": token("<mask>", rstrip=True)}},
    "of the map, single words": {MAP: {"mask_token": token("<mask>", single_word=True)}},
    "two names": {CONFIG: {"pad_token": "<pad>", "unk_token": "<new>"}},
    "a list": {CONFIG: {"additional_special_tokens": ["<new>", typed("<more>", lstrip=True)]}},
    "a list of version 5": {CONFIG: {"extra_special_tokens": ["<new>", "<more>"]}},
    "both lists": {CONFIG: {"extra_special_tokens": ["<new>"],
                            "additional_special_tokens": ["<more>"]}},
    "a list of the map": {MAP: {"additional_special_tokens": ["<new>", "<more>"]}},
    "names of their own": {CONFIG: {"extra_special_tokens": {"image_token": "<new>"}}},
    "a key of its own": {CONFIG: {"image_token": "<new>"}},
    "decoder with flags": {CONFIG: {"added_tokens_decoder": {
        "280": token("<new>", lstrip=True, special=True), "281": token("<more>", rstrip=True)}}},
    "decoder changes flags": {CONFIG: {"added_tokens_decoder": {
        "3": token("[MASK]", lstrip=True, rstrip=True, special=True)}}},
    "decoder lacks a name": {CONFIG: {"mask_token": "<mask>", "added_tokens_decoder": {
        "280": token("<new>", special=True)}}},
    "decoder before the map": {CONFIG: {"added_tokens_decoder": {
        "280": token("<new>")}}, MAP: {"mask_token": token("<mask>", lstrip=True)}},
    "tokenizer.json before the map": {MAP: {"mask_token": token("[MASK]", lstrip=True)}},
    "added_tokens.json and a name": {ADDED: {"<new>": 280, "<more>": 281},
                                     CONFIG: {"mask_token": "<mask>"}},
    "added_tokens.json with a name": {ADDED: {"<new>": 280, "<mask>": 281},
                                      CONFIG: {"mask_token": "<mask>"}},
    "a piece": {CONFIG: {"mask_token": "he"}},
}


def write(path, files):
    base = json.loads((path / CONFIG).read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in {CONFIG: {}, **files}.items():
        content = base | content if name == CONFIG else content
        (path / name).write_text(json.dumps(content))


def compare(path):
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    read = tokenizer_from_bytes(read_tokenizer(path).to_bytes())
    assert read.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert read.decode(read.encode(TEXT)) == theirs.decode(
        theirs.encode(TEXT, add_special_tokens=False), skip_special_tokens=True)
    assert read.vocab_size == len(theirs)
    return read


@pytest.mark.parametrize("case", CASES)
def test_what_other_files_say_of_tokens_is_read_as_transformers_reads_it(case, tmp_path):
    write(byte_level(tmp_path), CASES[case])
    compare(tmp_path)


@pytest.mark.parametrize("make", [llama, unigram, word_piece])
def test_every_kind_of_tokenizer_gets_them(make, tmp_path):
    write(make(tmp_path), {MAP: {"mask_token": token("<mask>", lstrip=True)},
                           CONFIG: {"additional_special_tokens": ["<new>"]}})
    read = compare(tmp_path)
    # In a document, their names are plain text.
    ids = np.concatenate(read.encode_batch(["a <mask> b<new>"]))
    assert not np.isin(ids, [read.encode("<mask>")[-1], read.encode("<new>")[-1]]).any()


def test_a_lone_model_that_lacks_a_named_token_is_refused(tmp_path):
    from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer

    model = train_tokenizer(TokenizerConfig(vocab_size=300), TEXTS)
    (tmp_path / "tokenizer.model").write_bytes(model.to_bytes())
    assert read_tokenizer(tmp_path).vocab_size == 300
    (tmp_path / CONFIG).write_text(json.dumps({"pad_token": "<|pad|>"}))
    with pytest.raises(UserError, match=r"add or name <\|pad\|>; write tokenizer.json"):
        read_tokenizer(tmp_path)


def test_tokens_that_were_kept_in_the_older_form_are_read(tmp_path):
    """Checkpoints hold them as pairs, and new ones whose pair says all keep their hash."""
    write(byte_level(tmp_path), CASES["added_tokens.json with a name"])
    read = read_tokenizer(tmp_path)
    kept = json.loads(read.to_bytes())
    assert kept["added"] == [["<new>", False], ["<mask>", True]]
    assert tokenizer_from_bytes(json.dumps(kept).encode()).hash == read.hash


@pytest.mark.parametrize("named", [CONFIG, "config.json", "model_type"])
def test_a_directory_that_leaves_the_names_to_the_class(named, tmp_path):
    """As those of gpt2, roberta-base and bert-base-uncased do."""
    byte_level(tmp_path)
    content = {"model_type": "roberta"} if named == "model_type" else {
        "tokenizer_class": "RobertaTokenizerFast"}
    (tmp_path / CONFIG).write_text(json.dumps({"model_max_length": 512}))
    with pytest.raises(UserError, match="expected bos_token or eos_token"):
        read_tokenizer(tmp_path)
    file = tmp_path / (CONFIG if named == CONFIG else "config.json")
    file.write_text(json.dumps(content))
    read = tokenizer_from_bytes(read_tokenizer(tmp_path).to_bytes())
    assert (read.bos_id, read.eos_id) == (0, 1)


def test_roberta_s_mask_takes_the_space_before_it(tmp_path):
    """In a directory as roberta-base has it: all is left to the class except tokenizer.json."""
    made = byte_level(tmp_path) / "tokenizer.json"
    rules = made.read_text().replace("[MASK]", "<mask>").replace("<|endoftext|>", "<pad>")
    rules = json.loads(rules)
    rules["added_tokens"][3]["lstrip"] = True
    made.write_text(json.dumps(rules))
    (tmp_path / CONFIG).write_text(json.dumps({"model_max_length": 512}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "RobertaTokenizer"
    read = read_tokenizer(tmp_path)
    assert read.encode("a <mask> b") == theirs.encode("a <mask> b", add_special_tokens=False)
    assert read.encode("a <mask> b")[1] == theirs.mask_token_id
    assert (read.bos_id, read.eos_id, read.pad_id) == (
        theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)


def test_the_names_of_a_class_are_those_of_transformers():
    import inspect

    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    for name, names in CLASSES.items():
        if name in ("T5Tokenizer", "CamembertTokenizer", "XLMRobertaTokenizer"):
            pytest.importorskip("sentencepiece")
        theirs = inspect.signature(getattr(transformers, name).__init__).parameters
        for key, ours in zip(NAMED, names, strict=False):
            default = theirs[key].default if key in theirs else None
            assert (None if default is None else str(default)) == ours, (name, key)
    for model_type, name in CLASS_OF.items():
        assert TOKENIZER_MAPPING_NAMES.get(model_type, name) == name
