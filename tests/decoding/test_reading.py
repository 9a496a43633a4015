"""The ids that a directory's files name for answers: each end token, banned ones, the start."""

import json

import jax
import jax.numpy as jnp
import pytest

import lmjax
from lmjax import huggingface
from lmjax.data.config import DataConfig
from lmjax.data.reading import check_told, make_reader, told_ids
from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.decoding.sampling import Sampling
from lmjax.errors import UserError
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model

KNOWN = 300
GREEDY = Sampling(temperature=0.0)
TEXT = "Document 7 tells"


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["Document 7 tells of the number 49.\n"] * 40
    return train_tokenizer(TokenizerConfig(vocab_size=KNOWN), texts)


@pytest.fixture
def directory(tokenizer, tmp_path):
    """A decoder with random weights, as a Hugging Face directory."""
    config = DecoderConfig(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, mlp_dim=24,
                           vocab_size=KNOWN, init_std=0.4)
    model = build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0))
    huggingface.write_directory(tmp_path / "hf", model, params,
                                make_reader(tokenizer, "decoder", DataConfig(), {}),
                                log=lambda line: None)
    return tmp_path / "hf"


def tell(directory, file, **keys):
    told = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(told | keys))


@pytest.mark.long
def test_every_end_token_of_a_list_ends_an_answer(directory, tmp_path):
    lm = lmjax.load(directory)
    prompt = [lm.tokenizer.bos_id, *lm.tokenizer.encode(TEXT)]
    greedy = dict(temperature=0, max_tokens=12)
    free = lm._generator(lm.params, [prompt], max_tokens=12, sampling=GREEDY)[0]
    at = max(i for i in range(12) if free[i] not in free[:i])
    second = free[at]
    assert at > 0
    tell(directory, "generation_config.json", eos_token_id=[lm.tokenizer.eos_id, second])
    found = lmjax.load(directory)
    expected = lm.tokenizer.decode(free[:at])
    pieces = []
    assert found.generate([TEXT], **greedy) == [expected]
    assert found.generate([TEXT], stream=lambda row, text: pieces.append(text), **greedy) == [
        expected] == ["".join(pieces)]
    assert found.generate([TEXT], draft=found, **greedy) == [expected]
    assert found.generate([TEXT], num_beams=1, stop=["zzz"], **greedy) == [expected]
    found.export(tmp_path / "again", log=lambda line: None)  # the list survives
    for name in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "again" / name).read_text())["eos_token_id"] == json.loads(
            (directory / name).read_text())["eos_token_id"]


@pytest.mark.parametrize("generation, settings, end, start, banned", [
    ({}, {"eos_token_id": [5, 6]}, (5, 6), 0, ()),
    ({"eos_token_id": 7}, {"eos_token_id": [5, 6]}, (7,), 0, ()),
    ({"eos_token_id": None, "top_k": 3}, {"eos_token_id": 5}, (), 0, ()),
    ({"bos_token_id": 1}, {}, (2,), 1, ()),
    ({}, {}, (2,), 0, ()),
    ({"decoder_start_token_id": 4, "bos_token_id": 1}, {"bos_token_id": 3}, (2,), 4, ()),
    ({"suppress_tokens": [9, 8], "bad_words_ids": [[7], [2]]}, {}, (2,), 0, (7, 8, 9)),
    ({"top_k": 3}, {"suppress_tokens": [9]}, (2,), 0, ())])
def test_generation_config_decides_and_config_json_fills_in(tokenizer, generation, settings, end,
                                                            start, banned):
    told = told_ids({"generation": generation, "settings": settings}, tokenizer)
    assert (told.end, told.start, told.banned) == (end, start, banned)


@pytest.mark.long
def test_banned_tokens_are_never_drawn(directory):
    lm = lmjax.load(directory)
    ids = lm._generator(lm.params, [[1, 40]], max_tokens=1, sampling=GREEDY)[0]
    tell(directory, "generation_config.json", suppress_tokens=ids)
    found = lmjax.load(directory)
    other = found._generator(found.params, [[1, 40]], max_tokens=1, sampling=GREEDY)[0]
    assert other != ids


@pytest.mark.parametrize("keys", [
    {"forced_bos_token_id": 0}, *(pytest.param(keys, marks=pytest.mark.long) for keys in (
        {"begin_suppress_tokens": [5]}, {"bad_words_ids": [[5], [6, 7]]},
        {"decoder_start_token_id": [5, 6]}, {"no_repeat_ngram_size": 3}))])
def test_what_is_not_followed_is_refused_where_it_matters(directory, keys):
    tell(directory, "generation_config.json", **keys)
    lm = lmjax.load(directory)
    assert lm.score([TEXT])[0].tokens > 0
    message = f"generation_config.json: expected no {next(iter(keys))} .*; set it to null"
    with pytest.raises(UserError, match=message):
        lm.generate([TEXT])


@pytest.mark.parametrize("keys", [
    {"no_repeat_ngram_size": 3}, {"min_length": 5}, {"min_new_tokens": 2},
    {"encoder_no_repeat_ngram_size": 2}, {"guidance_scale": 1.5}, {"stop_strings": ["x"]},
    {"bos_token_id": "1"}, {"bad_words_ids": [[5, 6]]}, {"forced_bos_token_id": 0}])
@pytest.mark.parametrize("file", ["generation", "settings"])
def test_what_would_decide_tokens_of_an_answer_is_refused(file, keys):
    key = next(iter(keys))
    with pytest.raises(UserError, match=f"expected no {key} in .*; set it to null"):
        check_told({"generation": {}, "settings": {}} | {file: keys})


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("keys", [
    {"eos_token_id": "2"}, {"eos_token_id": [2, "5"]}, {"eos_token_id": 2.5},
    {"eos_token_id": True}, {"eos_token_id": [[2]]}, {"eos_token_id": {"a": 2}},
    {"bad_words_ids": [5]}, {"bad_words_ids": "5"}, {"bad_words_ids": [["a"]]},
    {"suppress_tokens": 5}, {"suppress_tokens": [None]}])
def test_ids_of_another_type_are_one_line(tokenizer, file, keys):
    source = {"generation": {}, "settings": {}}
    source["settings" if file == "config.json" else "generation"] = keys
    key, value = next(iter(keys.items()))
    with pytest.raises(UserError, match=f"^{file}: expected .* of ids, got {key}=") as raised:
        told_ids(source, tokenizer)
    assert "\n" not in str(raised.value) and repr(value) in str(raised.value)


def test_settings_that_decide_nothing_are_passed():
    check_told({"settings": {}, "generation": {
        "no_repeat_ngram_size": 0, "min_length": 0, "forced_bos_token_id": None,
        "encoder_repetition_penalty": 1, "guidance_scale": None, "bad_words_ids": None,
        "begin_suppress_tokens": [], "temperature": 0.6, "num_beams": 4}})
