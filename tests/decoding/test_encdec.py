"""Encoder-decoders behind `lmjax.LM`: they read as in training, and are exported as that."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax.data.objectives import Objective
from lmjax.data.rows import START_ID, Pieces
from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.decoding.sampling import Sampling
from lmjax.lm import LM
from lmjax.models.model import build_model
from lmjax.sharding import MeshConfig, make_layout
from lmjax.training.recipe import build_recipe

MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
KNOWN, SENTINELS, LENGTH = 300, 8, 32
DIMS = dict(vocab_size=KNOWN + SENTINELS + 4, num_layers=2, embed_dim=16, num_heads=2,
            num_kv_heads=2, mlp_dim=24, init_std=0.5, embedding_std=0.3)
MODELS = {"t5": dict(preset="t5-v1.1-small", head_dim=8),
          "marian": dict(preset="transformer-base", dropout=0.0)}
GREEDY = Sampling(temperature=0.0)
TEXT = "1234567890 is 3141592653"  # each digit is a token, whatever its neighbours


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["Document 7 tells of the number 49.\n"] * 40
    return train_tokenizer(TokenizerConfig(vocab_size=KNOWN), texts)


@pytest.fixture(scope="module", params=["t5", pytest.param("marian", marks=pytest.mark.long)])
def lm(request, tokenizer):
    """An untrained model."""
    recipe = build_recipe({"model": MODELS[request.param] | DIMS, "data": {
        "seq_len": LENGTH, "tokenizer": {"vocab_size": KNOWN},
        "objective": {"name": "span_corruption", "sentinels": SENTINELS}}})
    model = build_model(recipe.model, vocab_size=0, platform="cpu", dtype=jnp.float32)
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    params = jax.device_put(jax.jit(model.init)(jax.random.key(1)), layout.replicated)
    return LM(model, params, layout, tokenizer, recipe, {"step": 0})


def batch_of(source, target):
    """One row of each half."""
    row = {}
    for prefix, ids in (("encoder_", source), ("", target)):
        row |= {f"{prefix}tokens": np.array([ids], np.int32),
                f"{prefix}positions": np.arange(len(ids), dtype=np.int32)[None],
                f"{prefix}segment_ids": np.ones((1, len(ids)), np.int32)}
    return row


@pytest.mark.long
def test_a_prompt_is_read_like_a_training_row(lm, tokenizer, monkeypatch):
    objective = Objective(lm.recipe.data.objective, seq_len=LENGTH, vocab_size=KNOWN)
    ids = np.array(tokenizer.encode(TEXT), np.int64)
    pieces = Pieces(ids, *(np.array([n]) for n in (0, len(ids), 0)), np.array([5], np.uint64))
    row = objective.rows(pieces, 1, (tokenizer.bos_id, tokenizer.eos_id))
    source = row["encoder_tokens"][row["encoder_segment_ids"] > 0].tolist()
    asked, generator = [], lm._generator
    with monkeypatch.context() as patched:
        patched.setattr(lm, "generate_ids", asked.append)
        lm.generate([lm.reader.names.decode(source[:-1])])
    assert asked == [[source]] and source[-1] == tokenizer.eos_id and max(source) >= KNOWN
    assert row["tokens"][0, 0] == generator.ids.start == START_ID
    assert KNOWN <= row["targets"][0, 0] < generator.ids.vocab_size
    assert generator.ids.vocab_size == objective.vocab_size < lm.model.config.vocab_size


@pytest.mark.long
def test_answers_are_the_likeliest_sentinels_and_tokens(lm, tokenizer):
    logits = jax.jit(lm.model.logits)
    source, target = [*tokenizer.encode(TEXT), tokenizer.eos_id], [START_ID]
    while len(target) < 8:
        padded = [*target, *[0] * (8 - len(target))]
        last = logits(lm.params, batch_of(source, padded))[0, len(target) - 1]
        target.append(int(last[: KNOWN + SENTINELS].argmax()))
    ends = [*target[1:], tokenizer.eos_id].index(tokenizer.eos_id)
    expected = lm.reader.names.decode(target[1 : 1 + ends])
    rows = [TEXT] * 8  # always as many rows, so that one program serves all calls
    assert lm.generate(rows, temperature=0, max_tokens=7) == [expected] * 8


def test_streamed_answers_name_the_sentinels(lm):
    rows, shown = [TEXT] * 8, [""] * 8

    def show(row, text):
        shown[row] += text

    hot = lm.generate(rows, temperature=50, max_tokens=24, seed=3)
    assert any(f"<extra_id_{i}>" in "".join(hot) for i in range(SENTINELS))
    lm.generate(rows, temperature=50, max_tokens=24, seed=3, stream=show)
    assert shown == hot


def test_logits_of_one_row_are_refused(lm):
    refusal = "^expected a decoder or an encoder, .*got an encdec; use lm.model.logits"
    with pytest.raises(ValueError, match=refusal):
        lm.logits(np.ones((1, 4), np.int32))


@pytest.mark.long
def test_an_export_is_what_transformers_computes(lm, tokenizer, tmp_path):
    """Logits of labels, greedy answers, the encoder's states and its attention weights."""
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    lm.export(tmp_path / "hf", log=lambda line: None)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager").eval()
    assert theirs.config.pad_token_id == theirs.config.decoder_start_token_id == START_ID
    source = [*tokenizer.encode(TEXT), tokenizer.eos_id]
    labels = [KNOWN + 7, 9, 21, KNOWN + 6, tokenizer.eos_id]
    inputs = torch.tensor([source])
    with torch.no_grad():
        expected = theirs(input_ids=inputs, labels=torch.tensor([labels]), output_attentions=True)
        answer = theirs.generate(inputs, max_new_tokens=7, do_sample=False)[0, 1:].tolist()
    batch = batch_of(source, [START_ID, *labels[:-1]])
    logits = np.asarray(jax.jit(lm.model.logits)(lm.params, batch))
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=2e-5 * np.abs(logits).max())
    ours = lm._generator(lm.params, [source], max_tokens=7, sampling=GREEDY)[0]
    assert answer == [*ours, tokenizer.eos_id][:7]
    states = expected.encoder_last_hidden_state[0].numpy()
    np.testing.assert_allclose(lm.embed([TEXT], normalize=False)[0], states.mean(0), atol=1e-5)
    maps, tokens = lm.attention_maps(TEXT)
    assert tokens[:3] == ["1", "2", "3"] and len(tokens) == len(source)
    np.testing.assert_allclose(maps, torch.cat(expected.encoder_attentions).numpy(), atol=1e-5)


@pytest.mark.parametrize("settings, generation, start_id", [
    ({}, {}, 1),  # BOS, as in transformers
    pytest.param({"decoder_start_token_id": 5}, {}, 5, marks=pytest.mark.long),
    pytest.param({"decoder_start_token_id": 5}, {"decoder_start_token_id": 7}, 7,
                 marks=pytest.mark.long)])
def test_an_import_begins_and_reads_as_its_own_files_say(lm, tokenizer, tmp_path, settings,
                                                         generation, start_id):
    lm.export(tmp_path / "hf", log=lambda line: None)
    for name, keys in (("config.json", settings), ("generation_config.json", generation)):
        told = json.loads((tmp_path / "hf" / name).read_text())
        del told["decoder_start_token_id"]
        (tmp_path / "hf" / name).write_text(json.dumps(told | keys))
    found = lmjax.load(tmp_path / "hf")
    ids = found._generator.ids
    assert (ids.start, ids.vocab_size) == (start_id, KNOWN + SENTINELS)
    assert found.reader.ids(TEXT) == [*tokenizer.encode(TEXT), tokenizer.eos_id]
