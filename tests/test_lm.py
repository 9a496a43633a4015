"""`lmjax.load`: what it loads, and its scores against a float64 softmax of the model's own logits.

The model's vocabulary is larger than the tokenizer's, as it is when a table is padded to divide
over a mesh.
"""

import dataclasses
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest

import lmjax
from lmjax.cli import main as cli
from lmjax.data.pipeline import open_splits
from lmjax.decoding import scoring
from lmjax.decoding.generate import Generator, Sampling, size
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.models.model import Model
from lmjax.sharding import MeshConfig, make_layout

KNOWN, PADDED = 300, 384  # ids of the tokenizer, rows of the table
LENGTH = 32  # of a training row
# The last text is longer than a row.
TEXTS = ["", "Document 7 tells", "of the number \u00e9\u4e16\U0001f600\n" * 5]
SMALL = ("model.num_layers=1", "model.embed_dim=16", "model.mlp_dim=32", f"data.seq_len={LENGTH}",
         "optimizer.name=adamw")


def train(config: str, workdir: pathlib.Path, *overrides: str) -> pathlib.Path:
    options = ["train.steps=4", "optimizer.warmup_steps=1", "checkpoint.every=2", "eval.every=0",
               "sample.every=0", *SMALL, *overrides]
    assert cli.main(["train", "--config", config, "--workdir", str(workdir),
                     *(f"--config.{item}" for item in options)]) == 0
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps on text, with checkpoints at 2 and 4 and averaged weights."""
    folder = tmp_path_factory.mktemp("lm")
    (folder / "text").mkdir()
    for i in range(40):
        text = f"Document {i} tells of the number {i * i}.\n" * 20
        (folder / "text" / f"{i:03}.txt").write_text(text)
    return train("configs/quickstart.py:tiny", folder / "run",
                 f"data.sources.0.uri=text:{folder}/text/*.txt", "data.heldout_fraction=0.2",
                 f"data.tokenizer.vocab_size={KNOWN}", f"model.vocab_size={PADDED}",
                 "optimizer.ema_decay=0.5",
                 # Tables that learn fast would give tokens that rounding cannot rank.
                 "model.tie_embeddings=true", "optimizer.groups=[]", "optimizer.peak_lr=1e-2")


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """A run without tokenizer and averaged weights."""
    return train("configs/synthetic.py:tiny", tmp_path_factory.mktemp("synthetic") / "run")


@pytest.fixture(scope="module")
def lm(run):
    return lmjax.load(run)


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a.params), jax.tree.leaves(b.params)))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def logits(lm, rows):
    """float32 [rows, LENGTH, PADDED]. Padding on the right changes nothing on its left."""
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return np.asarray(lm.logits(tokens))


# What is loaded


@pytest.mark.long
def test_a_run_its_checkpoints_and_one_of_them(run, lm):
    assert lm.about["step"] == 4
    assert lm.params["embedding"]["table"].shape[0] == PADDED > lm.tokenizer.vocab_size
    for path in (str(run), run / "checkpoints", run / "checkpoints" / "4"):
        assert same(lmjax.load(path), lm)
    older = lmjax.load(run, step=2)
    assert older.about["step"] == 2 and not same(older, lm)
    assert same(lmjax.load(run / "checkpoints" / "2"), older)


@pytest.mark.long
def test_averaged_weights_are_taken_where_there_are_any(run, synthetic, lm):
    assert same(lmjax.load(run, ema=True), lm) and not same(lmjax.load(run, ema=False), lm)
    assert same(lmjax.load(synthetic), lmjax.load(synthetic, ema=False))
    message = "expected averaged weights, got a run with optimizer.ema_decay=0; leave ema"
    with pytest.raises(ValueError, match=message):
        lmjax.load(synthetic, ema=True)


def test_a_run_with_another_platforms_kernel_is_loaded(lm, tmp_path):
    about = json.loads(json.dumps(lm.about))
    about["recipe"]["model"]["attention"] = "splash"  # runs only on a TPU
    LM(lm.model, lm.params, lm.layout, lm.tokenizer, lm.recipe, about).save(tmp_path / "run")
    found = lmjax.load(tmp_path / "run")
    assert found.recipe.model.attention == "splash"
    assert found.model.kernel == lm.model.kernel and same(found, lm)


@pytest.mark.parametrize("text", ["null", "[]", '{"a": 1}', "{"])
def test_a_damaged_about_is_one_line(text, tmp_path):
    (tmp_path / "about").mkdir()
    (tmp_path / "about" / "metadata").write_text(text)
    message = "metadata: expected a JSON object with its sha256, got .*; the file is"
    with pytest.raises(ValueError, match=message):
        lmjax.load(tmp_path)


def test_a_file_that_is_not_utf8_is_one_line(run, tmp_path, capsys):
    (tmp_path / "latin").write_bytes("na\u00efve".encode("latin-1"))
    assert cli.main(["score", str(run), str(tmp_path / "latin")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    message = f"{tmp_path}/latin: expected UTF-8 text, got .* 0xef in position 2.*; convert it"
    assert re.search(message, line)


def test_a_missing_checkpoint_is_refused(run, tmp_path, capsys):
    for path, step, words in (
            (tmp_path / "nowhere", None, "expected a checkpoint, got none; pass"),
            (tmp_path, None, "expected a checkpoint, got none; pass"),
            (run, 3, r"expected checkpoint 3, got \[2, 4\]; pass")):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {words}"):
            lmjax.load(path, step=step)
    (tmp_path / "text").write_text("text")
    assert cli.main(["score", str(tmp_path), str(tmp_path / "text")]) == 2
    assert "expected a checkpoint, got none" in capsys.readouterr().err


def test_a_model_of_synthetic_data_has_only_logits(synthetic):
    lm = lmjax.load(synthetic)
    assert lm.logits(np.zeros((1, 8), np.int32)).shape == (1, 8, lm.model.config.vocab_size)
    for use in (lm.score, lm.generate):
        message = "expected a model with a tokenizer, got .*; use lm.logits"
        with pytest.raises(UserError, match=message):
            use(["text"])


# What the model says


def test_input_that_would_be_read_wrongly_is_refused(lm):
    with pytest.raises(UserError, match="texts: expected a list of texts, got one text"):
        lm.score("import os")
    for ids in ([[1, lm.model.config.vocab_size]], [[-1, 3]]):
        message = r"tokens\[0\]: expected ids of 0 to .*, got .*; encode"
        with pytest.raises(UserError, match=message):
            lm.logits(ids)


def test_score_is_the_log_softmax_of_the_logits(lm):
    scores, with_tokens = lm.score(TEXTS), lm.score(TEXTS, tokens=True)
    for text, score, each in zip(TEXTS, scores, with_tokens, strict=True):
        ids = [lm.tokenizer.bos_id, *lm.tokenizer.encode(text)]
        pieces = [ids[at : at + LENGTH + 1] for at in range(0, len(ids) - 1, LENGTH)]
        log_p = log_softmax(logits(lm, [piece[:-1] for piece in pieces])) if pieces else []
        nats = sum(p[t, target] for p, piece in zip(log_p, pieces, strict=True)
                   for t, target in enumerate(piece[1:]))
        assert (score.tokens, score.bytes) == (len(ids) - 1, len(text.encode()))
        assert score.log_likelihood == pytest.approx(nats, rel=1e-5)
        assert score.by_token == () and score == dataclasses.replace(each, by_token=())
        assert "".join(token.text for token in each.by_token) == text
        found = [(p[t, target], 1 + (p[t] > p[t, target]).sum())
                 for p, piece in zip(log_p, pieces, strict=True)
                 for t, target in enumerate(piece[1:])]
        assert [token.rank for token in each.by_token] == [rank for _, rank in found]
        np.testing.assert_allclose([token.log_likelihood for token in each.by_token],
                                   [value for value, _ in found], rtol=1e-4)
        if text:
            bits = -nats / math.log(2)
            assert score.bits_per_byte == pytest.approx(bits / len(text.encode()), rel=1e-5)
            assert score.perplexity == pytest.approx(math.exp(-nats / (len(ids) - 1)), rel=1e-4)
    assert scores[2].tokens > 2 * LENGTH and scores[0].log_likelihood == 0
    assert lm.score(TEXTS[1:2]) == scores[1:2]  # the other texts make no difference


@pytest.mark.slow
def test_rows_and_logits_are_computed_only_where_asked(lm, monkeypatch):
    """One row runs one pass and one chunk of its scored positions; the bits stay the same."""
    rows = [([1, *range(4, 4 + n)], min(n, 5)) for n in (3, 9, 30, 31, 17, 60, 70)] * 3
    together = lm.continuations(rows)
    assert lm.continuations(rows[::-1])[::-1] == together
    assert [lm.continuations([row])[0] for row in rows[:7]] == together[:7]
    found, hidden, unembed = [], Model.hidden, Model.unembed

    def counted(run, name):
        def wrapped(self, params, x, *rest):
            shape = (x["tokens"] if name == "rows" else x).shape
            jax.debug.callback(lambda: found.append((name, shape[:2])))
            return run(self, params, x, *rest)
        return wrapped

    monkeypatch.setattr(Model, "hidden", counted(hidden, "rows"))
    monkeypatch.setattr(Model, "unembed", counted(unembed, "positions"))
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    fresh = LM(lm.model, jax.device_get(lm.params), make_layout(MeshConfig(), jax.devices()[:1]),
               lm.tokenizer, lm.recipe, lm.about)
    for count in (1, 3):
        found.clear()
        fresh.continuations([([1] * 71, 3)] * count)
        jax.effects_barrier()
        assert found == [("rows", (1, 80))] * count + [("positions", (1, 64))]
    found.clear()
    fresh.continuations([([1] * 301, 300)] * 2)  # many logits come in larger pieces
    jax.effects_barrier()
    assert found == [("rows", (1, 304))] * 2 + [("positions", (1, 128))] * 5
    monkeypatch.setattr(scoring, "PASS_TOKENS", {})  # as on other chips
    jax.clear_caches()
    found.clear()
    fresh.continuations([([1] * 301, 3)])
    jax.effects_barrier()
    assert found == [("rows", (3, 304)), ("positions", (1, 1024))], "not 16 rows for one text"


def test_the_sizes_of_rows_are_few_and_close():
    """A bounded number of programs; the padding of long rows costs a CPU less than a tenth."""
    for parts, most in ((scoring.LENGTHS["cpu"], 0.07), (scoring.MOST_LENGTHS, 0.25)):
        sizes = [size(n, scoring.LENGTH, parts) for n in range(1, 4097)]
        padding = max(1 - n / size for n, size in enumerate(sizes, 1) if n > 256)
        assert padding < most and len(set(sizes)) <= 9 * parts / 2
        assert all(n <= size for n, size in enumerate(sizes, 1))
    rows = [size(n, 1) for n in range(1, 65)]
    assert rows[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 10] and rows[-1] == 64
    assert all(1 - n / size < 0.25 for n, size in enumerate(rows, 1))


def test_greedy_generation_takes_the_likeliest_known_token(lm):
    prompts = ["Document 7 tells", "of"]
    answers = lm.generate(prompts, temperature=0, max_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [lm.tokenizer.bos_id, *lm.tokenizer.encode(prompt)]
        begin = len(ids)
        while len(ids) < begin + 6:
            ids.append(int(logits(lm, [ids])[0, len(ids) - 1, :KNOWN].argmax()))
        ends = [*ids[begin:], lm.tokenizer.eos_id].index(lm.tokenizer.eos_id)
        assert answer == lm.tokenizer.decode(ids[begin : begin + ends])


@pytest.mark.parametrize("options, message", [
    (dict(num_beams=2, stream=print),
     "num_beams, stream: expected one of them, got 2; leave all but one out"),
    (dict(draft="itself", stream=print), "draft, stream: expected one of them"),
    (dict(num_beams=2, top_k=3), "num_beams: expected no top_k, .* got one; leave it out"),
    (dict(num_beams=0), "num_beams: expected at least 1, got 0; raise it"),
    (dict(max_tokens=-5), "max_tokens: expected at least 1, got -5; raise it"),
    (dict(max_tokens=0, num_beams=2), "max_tokens: expected at least 1, got 0; raise it")])
def test_options_of_decoding_that_are_refused(lm, options, message):
    options = options | ({"draft": lm} if "draft" in options else {})
    with pytest.raises(ValueError, match=message):
        lm.generate(["of"], **options)


@pytest.mark.long
def test_padding_of_the_vocabulary_is_never_drawn(lm):
    prompts = [[lm.tokenizer.bos_id, i] for i in range(16)]
    hot = Sampling(temperature=20.0)  # nearly uniform

    def drawn(vocab_size):
        generator = Generator(lm.model, lm.layout, vocab_size=vocab_size)
        return np.concatenate(generator(lm.params, prompts, max_tokens=32, sampling=hot))

    assert (drawn(PADDED) >= KNOWN).mean() > 0.1  # with the padding in the vocabulary
    ids = drawn(KNOWN)
    assert ids.max() < KNOWN and len(np.unique(ids)) > KNOWN / 2
    assert lm._generator.ids.vocab_size == lm.tokenizer.vocab_size == KNOWN


def test_the_loss_of_a_run_is_that_of_its_logits(run):
    """The run's last evaluation covers held-out rows, each packed with several documents."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, ema in (("eval/loss", False), ("eval_ema/loss", True)):
        lm = lmjax.load(run, ema=ema)
        _, heldout = open_splits(lm.recipe.data, str(run / "data"))
        rows = heldout.rows(np.arange(heldout.num_rows()))
        log_p = log_softmax(jax.jit(lm.model.logits)(lm.params, rows))
        nats = -np.take_along_axis(log_p, rows["targets"][..., None], -1)[..., 0]
        nats = nats * rows["loss_mask"]
        assert rows["segment_ids"].max() > 1 and rows["targets"].max() < KNOWN
        [found] = [record[name] for record in metrics if name in record]
        assert found == pytest.approx(nats.sum() / rows["loss_mask"].sum(), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 3])
def test_the_number_of_devices_changes_nothing(run, lm, monkeypatch, count):
    """8 devices have an eighth of the table each. 3 do not divide it, so each has the whole."""
    assert {len(p.sharding.device_set) for p in jax.tree.leaves(lm.params)} == {8}
    assert not lm.params["embedding"]["table"].sharding.is_fully_replicated
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:count])
    other = lmjax.load(run)
    assert {len(p.sharding.device_set) for p in jax.tree.leaves(other.params)} == {count}
    assert same(lm, other)
    for a, b in zip(lm.score(TEXTS), other.score(TEXTS), strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-5)
    options = dict(temperature=0, max_tokens=8)
    assert other.generate(TEXTS, **options) == lm.generate(TEXTS, **options)


@pytest.mark.long
def test_an_export_of_a_run_has_a_model_card(run, tmp_path, capsys):
    """Its figures are those of the averaged weights, which are exported."""
    out = tmp_path / "hf"
    assert cli.main(["export-hf", str(run), "--out", str(out)]) == 0
    text = (out / "README.md").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [loss] = [row["eval_ema/loss"] for row in rows if "eval_ema/loss" in row]
    assert f"| loss, held-out | {loss:.4f} |" in text and f"value: {loss}\n" in text
    assert "| steps | 4 |" in text and 'lmjax.load("hf")' in text
    kind = json.loads((out / "config.json").read_text())["architectures"][0]
    assert f"import AutoTokenizer, {kind}" in text and 'library_name: "transformers"' in text
    assert "a model card" in capsys.readouterr().out
