"""Questions: windows over long texts, spans of tokens and characters, the best of all windows."""

import itertools
import random
import re
import unicodedata

import hub_tokenizers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bert_twins import MISSING, Twins

from lmjax import huggingface
from lmjax.config import build
from lmjax.data.config import DataConfig
from lmjax.data.reading import make_reader
from lmjax.data.tokenizers import TokenizerConfig, sentencepiece_tokenizer
from lmjax.errors import UserError
from lmjax.models.decoder import DecoderConfig
from lmjax.models.encoder import EncoderConfig
from lmjax.models.heads import HeadConfig
from lmjax.models.model import build_model
from lmjax.tasks import squad
from lmjax.tasks.questions import Questions
from lmjax.tasks.task import Predicted, Sizes

CONTEXT = "The cat 7 sat on the mat.\nA dog ran,  and the \u00e9t\u00e9 was hot in \u6771\u4eac ."
RECORD = {"question": "Who sat ?", "context": CONTEXT,
          "answers": {"text": ["The cat 7", "cat"], "answer_start": [0, 4]}}
FACTS = {"unanswerable": False}
LONG = {"question": "Where ?", "answers": ["here it is"],
        "context": " ".join(f"word{i}" for i in range(40)) + " and here it is " + "x y " * 20}


def reader_of(tokenizer):
    return make_reader(tokenizer, "encoder", DataConfig(), {})


@pytest.fixture(scope="module")
def own():
    texts = [f"The cat {i} sat on the mat.\nA dog ran, and it was hot ." for i in range(40)]
    return reader_of(sentencepiece_tokenizer(TokenizerConfig(vocab_size=300), texts))


@pytest.fixture(scope="module", params=["own", "word_piece", "byte_level", "unigram"])
def reader(request, own, tmp_path_factory):
    if request.param == "own":
        return own
    folder = getattr(hub_tokenizers, request.param)(tmp_path_factory.mktemp(request.param))
    return reader_of(huggingface.read_tokenizer(folder))


def windows_of(encoded):
    return [encoded.columns, *encoded.more]


def arrays_of(window, start, end):
    """What the model gives for a window if it is sure of a first and a last token."""
    n = len(window["tokens"])
    sure = {name: np.full(n, -9.0, np.float32) for name in ("start", "end")}
    sure["start"][start], sure["end"][end] = -0.1, -0.2
    return {**sure, "begins": window["begins"], "ends": window["ends"]}


def test_every_token_has_its_characters(reader):
    texts = [CONTEXT, " a", "\u6771\u4eac", "a", "e\u0301x  y "]
    for text in texts:
        ids, spans = reader.names.tokenizer.spans(text)
        assert ids == reader.names.tokenizer.encode(text)
        assert spans.shape == (len(ids), 2) and (spans[:, 0] <= spans[:, 1]).all()
        covered = {at for begin, end in spans for at in range(begin, end)}
        assert covered >= {at for at, c in enumerate(text)
                           if not (c.isspace() or unicodedata.combining(c))}


def test_a_tokenizer_that_changes_the_text_has_no_places(own):
    class Lossy(type(own.names.tokenizer)):
        def encode(self, text):
            return super().encode(text.lower())

    with pytest.raises(UserError, match="tokens make up the text"):
        Lossy(own.names.tokenizer.to_bytes()).spans("The cat")


@pytest.mark.parametrize("answer", ["The cat 7", "7", "mat", "A dog ran", "\u00e9t\u00e9",
                                    "dog ran,  and", "ran,", "\u6771\u4eac"])
def test_the_answer_comes_back_out_of_its_tokens(reader, answer):
    record = {**RECORD, "answers": answer}
    window, = windows_of(Questions(stride=4).encode(record, reader, FACTS, Sizes(128)))
    first, = np.flatnonzero(window["targets"] & 1)
    last, = np.flatnonzero(window["targets"] & 2)
    found = CONTEXT[window["begins"][first] : window["ends"][last]]
    assert answer in found and len(found) <= len(answer) + 2  # a piece may be longer
    assert window["loss_mask"].sum() == window["loss_mask"][0] == 1
    given = Questions().answer(Predicted("1", record, arrays_of(window, first, last)), FACTS)
    assert given["text"] == found and CONTEXT[given["start"] : given["end"]] == found
    assert given["confidence"] == pytest.approx(np.exp(-0.3), abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("room, stride", [(64, 10), (40, 0), (52, 31)])
def test_windows_are_those_of_transformers(room, stride, tmp_path):
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    folder = hub_tokenizers.word_piece(tmp_path)
    import tokenizers
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", made.token_to_id("[SEP]")), ("[CLS]", made.token_to_id("[CLS]")))
    made.save(str(folder / "tokenizer.json"))
    reader = make_reader(huggingface.read_tokenizer(folder), "encoder", DataConfig(), {
        "huggingface": {"settings": {}, "generation": {}}})
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    wanted = theirs(LONG["question"], LONG["context"], truncation="only_second", max_length=room,
                    stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True,
                    return_token_type_ids=True)
    windows = windows_of(Questions(stride=stride).encode(LONG, reader, FACTS, Sizes(room)))
    assert [[*w["tokens"]] for w in windows] == wanted["input_ids"] and len(windows) > 1
    assert [[*w["token_types"]] for w in windows] == wanted["token_type_ids"]
    at = LONG["context"].index("here it is")
    for n, window in enumerate(windows):
        inside = [i == 1 for i in wanted.sequence_ids(n)]
        for (begin, end), yes, a, b in zip(wanted["offset_mapping"][n], inside, window["begins"],
                                           window["ends"], strict=True):
            assert (a, b) == ((begin, end) if yes else (0, 0))
        whole = [i for i in np.flatnonzero(inside)
                 if at <= window["begins"][i] and window["ends"][i] <= at + 10]
        covered = whole and window["begins"][whole[0]] == at and window["ends"][
            whole[-1]] == at + 10
        first, last = np.flatnonzero(window["targets"] & 1), np.flatnonzero(window["targets"] & 2)
        assert (first, last) == ((whole[0], whole[-1]) if covered else (0, 0))


def test_the_best_span_of_all_windows_is_that_of_brute_force(own):
    task, rng = Questions(stride=5, max_answer=4, best=5), np.random.default_rng(0)
    windows = windows_of(task.encode(LONG, own, FACTS, Sizes(48)))
    arrays = []
    for window in windows:
        n = len(window["tokens"])
        start, end = (jax.nn.log_softmax(rng.normal(size=n) * 3) for _ in range(2))
        arrays.append({"start": np.asarray(start), "end": np.asarray(end),
                       "begins": window["begins"], "ends": window["ends"]})
    every: dict[tuple[int, int], float] = {}
    for its in arrays:
        inside = np.flatnonzero(its["ends"])
        for i, j in itertools.product(inside, inside):
            if i <= j < i + 4:
                span = int(its["begins"][i]), int(its["ends"][j])
                every[span] = max(every.get(span, -np.inf), float(its["start"][i] + its["end"][j]))
    wanted = sorted(every.items(), key=lambda item: -item[1])[:5]
    predicted = Predicted("1", LONG, arrays[0], tuple(arrays[1:]))
    answer = task.answer(predicted, FACTS)
    assert [(b["start"], b["end"]) for b in answer["best"]] == [span for span, _ in wanted]
    np.testing.assert_allclose([b["confidence"] for b in answer["best"]],
                               np.exp([p for _, p in wanted]), atol=1e-6)
    assert answer["text"] == LONG["context"][slice(*wanted[0][0])] and "no_answer" not in answer
    # With a threshold: no answer exactly where it is likelier by more than that.
    none = min(float(its["start"][0] + its["end"][0]) for its in arrays)
    for threshold, given in ((none - wanted[0][1] + 0.01, True), (none - wanted[0][1] - 0.01,
                                                                  False)):
        task = Questions(stride=5, max_answer=4, no_answer_threshold=threshold)
        answer = task.answer(predicted, {"unanswerable": True})
        assert bool(answer["text"]) == given
        assert answer["no_answer"] == pytest.approx(np.exp(none), abs=1e-6)


def test_forms_of_answers_and_questions_without_one():
    task = Questions()
    assert task.truth(RECORD) == ["The cat 7", "cat"]
    assert task.truth({**RECORD, "answers": ["mat", "dog"]}) == ["mat", "dog"]
    assert task.truth({**RECORD, "answers": "mat"}) == ["mat"]
    for empty in ("", [], {"text": [], "answer_start": []}):
        assert task.truth({**RECORD, "answers": empty}) == []
    at = CONTEXT.rindex("the")
    told = Questions(answers="a", start="s")
    for start in (at, str(at)):
        assert told.truth({**RECORD, "a": "the", "s": start}) == ["the"]
    assert task.facts([RECORD]) == {"unanswerable": False}
    assert task.facts([RECORD, {**RECORD, "answers": ""}]) == {"unanswerable": True}


@pytest.mark.parametrize("task, changed, said", [
    (Questions(), {"answers": "the bird"}, "'the bird' in the context"),
    (Questions(), {"answers": {"text": ["cat"], "answer_start": [5]}}, "'cat' at character 5"),
    (Questions(), {"answers": {"text": ["cat"], "answer_start": [500]}}, "at character 500"),
    (Questions(), {"answers": {"text": ["cat"], "answer_start": [4, 5]}}, "answers under"),
    (Questions(), {"answers": {"text": ["cat"], "answer_start": ["x"]}}, "first character"),
    (Questions(), {"answers": 7}, "answers under"),
    (Questions(), {"question": "  "}, "a text under 'question'"),
    (Questions(), {"context": ""}, "a text under 'context'"),
    (Questions(answers="a", start="s"), {"a": "cat", "s": -4}, "first character"),
    (Questions(stride=200), {}, "room for more than task.stride=200"),
])
def test_a_record_that_is_no_example_is_one_line(task, changed, said, own):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        task.encode({**RECORD, **changed}, own, FACTS, Sizes(128))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UserError, match="a training example with an answer, got 1 without"):
        Questions().facts([{**RECORD, "answers": ""}])
    with pytest.raises(UserError, match="expected an encoder"):
        Questions().check(DecoderConfig())
    for wrong in (dict(stride=-1), dict(best=0), dict(max_answer=0), dict(head_kind="x")):
        with pytest.raises(UserError):
            build(Questions, wrong)


@pytest.mark.parametrize("answer, truth, exact, f1", [
    ("The  Cat.", ["cat"], 1, 1), ("cat", [], 0, 0), ("", [], 1, 1), ("", ["cat"], 0, 0),
    ("a b c d", ["b c"], 0, 0.8), ("b b c", ["b d", "x"], 0, 0.4), ("an", ["the"], 1, 1),
    ("state-of-art", ["stateofart"], 1, 1), ("\u00c9t\u00e9", ["\u00e9t\u00e9"], 1, 1)])
def test_scores_of_answers(answer, truth, exact, f1):
    assert squad.exact_match(answer, truth) == exact
    assert squad.f1(answer, truth) == pytest.approx(f1)


@pytest.mark.long
def test_scores_are_those_of_transformers():
    theirs = pytest.importorskip("transformers.data.metrics.squad_metrics",
                                 reason=f"transformers {MISSING}")
    rng = random.Random(0)
    words = "The cat, a AN the. dog- 7 (x) \u00e9 ' b".split()
    for _ in range(3000):
        answer, *truth = (" ".join(rng.choices(words, k=rng.randint(0, 4)))
                          for _ in range(rng.randint(1, 4)))
        wanted = [text for text in truth if theirs.normalize_answer(text)] or [""]
        assert squad.exact_match(answer, truth) == max(
            theirs.compute_exact(text, answer) for text in wanted)
        assert squad.f1(answer, truth) == pytest.approx(max(
            theirs.compute_f1(text, answer) for text in wanted))


def small_model():
    config = EncoderConfig(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, vocab_size=300,
                           mlp="gelu", init_std=0.3, head=HeadConfig(2))
    model = build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32)
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.mark.long
def test_packed_windows_have_the_losses_of_single_ones_and_padding_none(own):
    model, params = small_model()
    windows = windows_of(Questions(stride=5).encode(LONG, own, FACTS, Sizes(48)))[:3]
    windows.append(windows_of(Questions().encode(RECORD, own, FACTS, Sizes(128)))[0])

    def row(several, length=256):
        names = ("tokens", "targets", "loss_mask", "begins", "ends")
        lengths = [len(w["tokens"]) for w in several]
        out = {name: np.concatenate([w[name] for w in several]) for name in names}
        out["segment_ids"] = np.repeat(np.arange(1, len(several) + 1), lengths)
        out["positions"] = np.concatenate([np.arange(n) for n in lengths])
        return {name: np.pad(x, (0, length - len(x)))[None].astype(
            np.float32 if name == "loss_mask" else np.int32) for name, x in out.items()}

    loss_fn = jax.jit(lambda batch: Questions().loss(model, FACTS)(params, batch, None))
    packed = loss_fn(row(windows))
    single = [loss_fn(row([window])) for window in windows]
    assert float(packed.weight) == len(windows) and float(single[0].weight) == 1
    np.testing.assert_allclose(packed.total, sum(s.total for s in single), rtol=1e-5)
    at = 0
    for window, alone in zip(windows, single, strict=True):
        n = len(window["tokens"])
        for name in ("start", "end"):
            its = np.asarray(alone.extra[name][0, :n])
            assert np.exp(its).sum() == pytest.approx(1, abs=1e-5)
            np.testing.assert_allclose(packed.extra[name][0, at : at + n], its, atol=1e-4)
        first, last = (int(np.flatnonzero(window["targets"] & bit)[0]) for bit in (1, 2))
        wanted = -0.5 * (alone.extra["start"][0, first] + alone.extra["end"][0, last])
        np.testing.assert_allclose(alone.total, wanted, rtol=1e-5)
        at += n
    nothing = loss_fn({name: np.zeros_like(x) for name, x in row(windows).items()})
    assert float(nothing.total) == float(nothing.weight) == 0


@pytest.mark.long
def test_a_step_is_that_of_transformers(tmp_path):
    twins = Twins(tmp_path, "BertForQuestionAnswering", "qa_outputs", 2)
    import torch
    rng = np.random.default_rng(0)
    spans = np.sort(rng.integers(0, 20, (4, 2)), axis=1)
    spans[1] = 0  # no answer
    targets = np.zeros((4, 20), np.int32)
    for row, (first, last) in enumerate(spans):
        targets[row, first] += 1
        targets[row, last] += 2
    batch = {"tokens": rng.integers(1, 64, (4, 20), np.int32), "targets": targets,
             "token_types": rng.integers(0, 2, (4, 20), np.int32),
             "positions": np.tile(np.arange(20, dtype=np.int32), (4, 1)),
             "loss_mask": np.tile(np.arange(20) == 0, (4, 1)).astype(np.float32),
             "segment_ids": np.ones((4, 20), np.int32)}

    def theirs(model):
        first, last = torch.tensor(spans).long().T
        return model(input_ids=torch.tensor(batch["tokens"]).long(),
                     token_type_ids=torch.tensor(batch["token_types"]).long(),
                     start_positions=first, end_positions=last).loss

    twins.check_step(Questions().loss(twins.model, FACTS), batch, theirs=theirs)
