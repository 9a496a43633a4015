"""Pairs of texts: rows, steps as transformers takes them, answers and their figures."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import huggingface
from lmjax.data.reading import Reader
from lmjax.errors import UserError
from lmjax.tasks.pairs import Pairs
from lmjax.tasks.task import Predicted, Sizes
from lmjax.training.program import make_program
from lmjax.training.recipe import build_recipe
from lmjax.training.task_data import open_data, prepare_task

MODELS = {
    "encdec": dict(preset="t5-v1.1-base", num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4,
                   head_dim=8, mlp_dim=48, vocab_size=0),
    "decoder": dict(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48),
}
WORDS = "a b c d e f g h".split()


def rows(count=80, seed=0):
    rng = random.Random(seed)
    words = [rng.choices(WORDS, k=rng.randint(1, 6)) for _ in range(count)]
    return [{"n": i, "a": " ".join(w), "b": " ".join(reversed(w))} for i, w in enumerate(words)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"jsonl:{path}"


def recipe_of(uri, family, *, task=(), data=(), optimizer=(), model=()):
    return build_recipe(dict(
        model={**MODELS[family], **dict(model)},
        task={"name": "pairs", "input": "turn {a}", "target": "{b}", "max_tokens": 24,
              **dict(task)},
        data={"sources": [dict(name="s", uri=uri)], "tokenizer": dict(vocab_size=278),
              "seq_len": 32, "heldout_fraction": 0.2, **dict(data)},
        optimizer={"warmup_steps": 1, **dict(optimizer)}, train=dict(steps=4, batch_size=4)))


def opened(recipe, folder, log=lambda line: None):
    prepare_task(recipe, str(folder), None, log)
    return open_data(recipe, str(folder))


class Words:
    """A tokenizer of numbers: "7 8" has the ids 7 and 8."""

    bos_id, eos_id, tokenizer = 1, 2, None

    def encode(self, text):
        return [int(word) for word in text.split()]


def reader_of(family):
    names = Words()
    names.tokenizer = names
    if family == "encdec":
        return Reader(names, (), (2,), 5, (2,))
    return Reader(names, (1,), (), 5, (2,), causal=True)


def encoded(family, a, b, sizes, **task):
    made = Pairs(input="{a}", target="{b}", separator=" 9 ", **task)
    return made.encode({"a": a, "b": b}, reader_of(family), {}, sizes)


def test_an_encoder_decoder_reads_the_input_and_writes_the_target():
    got = encoded("encdec", "10 11 12", "20 21", Sizes(8, 8))
    assert {name: x.tolist() for name, x in got.columns.items()} == {
        "encoder_tokens": [10, 11, 12, 2], "tokens": [5, 20, 21], "targets": [20, 21, 2],
        "loss_mask": [1, 1, 1]}
    short = encoded("encdec", "10 11 12 13", "20 21 22", Sizes(8, 3), target_len=2)
    assert short.columns["encoder_tokens"].tolist() == [10, 11, 2]
    assert short.columns["targets"].tolist() == [20, 2] and (short.cut, short.cut_target) == (2, 2)


def test_a_decoder_learns_the_target_alone():
    got = encoded("decoder", "10 11", "20 21", Sizes(8))
    assert {name: x.tolist() for name, x in got.columns.items()} == {
        "tokens": [1, 10, 11, 9, 20, 21], "targets": [10, 11, 9, 20, 21, 2],
        "loss_mask": [0, 0, 0, 1, 1, 1]}
    prefix = encoded("decoder", "10 11", "20 21", Sizes(8, prefix=True))
    assert prefix.columns["bidirectional"].tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("a, b, tokens, cut", [
    ("10 11 12 13 14 15", "20 21", [1, 10, 11, 12, 13, 9, 20, 21], (2, 0)),
    ("10 11 12 13 14 15", "20", [1, 10, 11, 12, 13, 9, 20], (2, 0)),
    ("10", "20 21 22 23 24 25", [1, 10, 9, 20, 21, 22, 23, 24], (0, 1)),
    ("10 11 12 13 14", "20 21 22", [1, 10, 11, 12, 13, 9, 20, 21], (1, 1)),
])
def test_a_decoder_reads_the_same_prompt_whatever_the_target(a, b, tokens, cut):
    """A prompt leaves room for task.max_tokens; in evaluation it is that of training."""
    got = encoded("decoder", a, b, Sizes(8), max_tokens=2)
    assert got.columns["tokens"].tolist() == tokens and (got.cut, got.cut_target) == cut
    assert got.columns["targets"][-1] == 2
    asked = Pairs(input="{a}", target="{b}", separator=" 9 ", max_tokens=2).prompt(
        {"a": a}, reader_of("decoder"), Sizes(8))
    assert asked == tokens[: int(np.argmax(got.columns["loss_mask"])) + 1]


def test_what_was_cut_is_counted_for_inputs_and_targets(tmp_path):
    records = rows() + [{"n": -1, "a": "a " * 90, "b": "b"}] * 3 + [
        {"n": -2, "a": "a", "b": "b " * 90}] * 2
    lines = []
    opened(recipe_of(write(tmp_path / "a.jsonl", records), "encdec", task={"target_len": 24}),
           tmp_path / "out", lines.append)
    parts = json.loads((tmp_path / "out/manifest.json").read_text())["splits"].values()
    assert sum(part["cut_examples"] for part in parts) == 3
    assert sum(part["cut_targets"] for part in parts) == 2
    [head] = [line for line in lines if "inputs too long" in line]
    assert "targets too long" in head


@pytest.mark.long
@pytest.mark.parametrize("family", ["decoder", "encdec"])
def test_packed_rows_have_the_loss_of_single_ones(family, tmp_path):
    uri, losses = write(tmp_path / "a.jsonl", rows()), []
    # Rows of a decoder may be cut from a stream of text; those of examples never are.
    for packing in ("best_fit", "none", "concat" if family == "decoder" else "best_fit"):
        recipe = recipe_of(uri, family, task={"target_len": 16}, data={"packing": packing})
        _, heldout, _, facts = opened(recipe, tmp_path / str(len(losses)))
        program = make_program(recipe, jax.devices()[:1], vocab_size=heldout.vocab_size,
                               fields=heldout.fields, facts=facts)
        batch = jax.tree.map(jnp.asarray, heldout.rows(np.arange(heldout.num_rows())))
        sums = program.eval_fn(program.model.init(jax.random.key(0)), batch)
        losses.append((float(sums.nats), float(sums.weight), heldout.num_rows()))
    packed, single, again = losses
    assert packed[2] < single[2] and again == packed
    np.testing.assert_allclose(packed[:2], single[:2], rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("family", [
    pytest.param(name, marks=() if name == "encdec" else pytest.mark.slow) for name in MODELS])
def test_a_step_is_that_of_transformers(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    records = rows()
    recipe = recipe_of(write(tmp_path / "a.jsonl", records), family, optimizer=dict(
        peak_lr=1e-2, warmup_steps=0, schedule="constant", weight_decay=0, clip_norm=0, b2=0.99,
        eps=1e-4))
    train, _, _, facts = opened(recipe, tmp_path / "data")
    program = make_program(recipe, jax.devices()[:1], vocab_size=train.vocab_size,
                           fields=train.fields, facts=facts)
    batch = jax.tree.map(jnp.asarray, train.rows(np.arange(4)))
    state, model = program.spec.init(0), program.model

    def export(name, params):
        huggingface.write_directory(tmp_path / name, model, params, None, log=lambda line: None)
        theirs = transformers.AutoModelForSeq2SeqLM if family == "encdec" else (
            transformers.AutoModelForCausalLM)
        return theirs.from_pretrained(tmp_path / name)

    loss_fn = recipe.task.loss(model, facts)

    def mean(params):
        loss = loss_fn(params, batch, None)
        return loss.total / loss.weight

    theirs = export("start", state.params)
    gradients = export("gradients", jax.grad(mean)(state.params)).state_dict()
    state, metrics = program.traced.lower().compile()(state, batch)
    after = export("after", state.params).state_dict()

    theirs.config.decoder_start_token_id = theirs.config.pad_token_id = 0
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-4,
                                  weight_decay=0)
    loss = theirs(**_inputs(torch, family, train, records, tmp_path / "data")).loss
    loss.backward()
    optimizer.step()
    assert float(metrics["loss"]) == pytest.approx(loss.item(), abs=1e-4)
    for name, p in theirs.named_parameters():
        np.testing.assert_allclose(gradients[name], p.grad, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(after[name], p.detach(), atol=1e-4, err_msg=name)


def _inputs(torch, family, train, records, folder):
    """The examples of the first four rows, each in a row of its own, as transformers takes them."""
    from lmjax.data.tokenizers import prepared_tokenizer

    tokenizer, inputs, labels = prepared_tokenizer(str(folder)), [], []
    _, _, packed = train.locate(np.arange(4))
    ids = [train.sources[0].ids[place.example] for row in packed
           for place in train.sources[0].places(int(row))]
    for name in ids:
        record = records[int(name.rpartition(":")[2]) - 1]
        source, target = (tokenizer.encode(text) for text in (f"turn {record['a']}", record["b"]))
        if family == "encdec":
            inputs.append([*source, tokenizer.eos_id])
            labels.append([*target, tokenizer.eos_id])
        else:
            before = [tokenizer.bos_id, *source, *tokenizer.encode("\n")]
            inputs.append([*before, *target, tokenizer.eos_id])
            labels.append([-100] * len(before) + [*target, tokenizer.eos_id])

    def padded(sequences, value):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences],
                                               batch_first=True, padding_value=value)

    return {"input_ids": padded(inputs, 0), "labels": padded(labels, -100),
            "attention_mask": padded([[1] * len(s) for s in inputs], 0)}


ANSWERS = ["the cat sat on the mat", "no", "", "yes it is"]
TRUTHS = ["the cat lay on a mat", "no", "something", "it is, yes"]


def figures(metric):
    predicted = [Predicted("", {"a": "", "b": truth}, {}, text=answer)
                 for answer, truth in zip(ANSWERS, TRUTHS, strict=True)]
    task = Pairs(input="{a}", target="{b}", metric=metric)
    found = task.metrics(predicted, {})
    assert tuple(found) == task.measures
    return found


def test_figures_are_those_of_the_libraries():
    sacrebleu = pytest.importorskip("sacrebleu")
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    found = figures("bleu")
    assert found["bleu"] == sacrebleu.metrics.BLEU().corpus_score(ANSWERS, [TRUTHS]).score > 0
    assert found["chrf"] == sacrebleu.metrics.CHRF().corpus_score(ANSWERS, [TRUTHS]).score > 0
    rouge = [scorer.score(t, a)["rougeL"].fmeasure for a, t in zip(ANSWERS, TRUTHS, strict=True)]
    assert figures("rouge")["rougeL"] == pytest.approx(np.mean(rouge), abs=1e-15)
    assert figures("exact_match")["exact_match"] == figures("accuracy")["accuracy"] == 0.25


def test_the_same_examples_are_answered_each_time():
    task = Pairs(input="{a}", target="{b}", eval_examples=5)
    examples = [Predicted(str(i), {}, {}) for i in range(40)]
    chosen = [p.id for p in task.asked(examples)]
    assert len(set(chosen)) == 5 and chosen == [p.id for p in task.asked(examples)]
    assert chosen != [str(i) for i in range(5)] and len(task.asked(examples[:3])) == 3


REFUSED = {
    "no target": (dict(target=""), {}, "config.task.target: expected a text with columns"),
    "a target without a column": (dict(target="b"), {}, "config.task.target"),
    "an unknown column": (dict(target="{c}"), {}, "the column 'c' of config.task.target"),
    "empty targets": ({}, {"b": " "}, "expected a target in '{b}', got an empty one"),
    "another metric": (dict(metric="blue"), {}, "bleu"),
    "answers beyond the learned positions": (dict(max_tokens=60), {}, "config.task.max_tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(name, tmp_path):
    task, change, message = REFUSED[name]
    uri = write(tmp_path / "a.jsonl", [{**row, **change} for row in rows()])
    with pytest.raises(UserError) as caught:
        recipe = recipe_of(uri, "decoder", task=task, model=dict(positions="learned",
                                                                 max_positions=64))
        opened(recipe, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_refused():
    with pytest.raises(UserError, match="a decoder or an encdec"):
        build_recipe(dict(model=dict(family="encoder"), task=dict(
            name="pairs", input="{a}", target="{b}")))


