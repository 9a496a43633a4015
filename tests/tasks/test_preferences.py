"""Preferences: losses and gradients against PyTorch, rows of both answers, the stored reference."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import assert_same_run, finish, lines, losses, one_line, run_here, start, wait_for

from lmjax import huggingface
from lmjax.data.reading import Reader
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.tasks.preferences import Preferences, log_likelihoods
from lmjax.tasks.task import Sizes

MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
CONFIG = DecoderConfig(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, vocab_size=64,
                       init_std=0.3)
BETA = 0.3


def pairs_batch(rows=5, length=12, seed=0):
    """Rows of random prompts with two answers of different lengths, padded to `length`."""
    rng = np.random.default_rng(seed)
    names = ("tokens", "targets", "loss_mask", "positions", "segment_ids")
    batch = {f"{side}{name}": np.zeros((rows, length), np.float32 if "mask" in name else np.int32)
             for side in ("", "rejected_") for name in names}
    for row in range(rows):
        prompt = rng.integers(3, 64, rng.integers(1, 5))
        for side in ("", "rejected_"):
            ids = np.concatenate([prompt, rng.integers(3, 64, rng.integers(1, length - 5))])
            n = len(ids) - 1
            batch[f"{side}tokens"][row, :n], batch[f"{side}targets"][row, :n] = ids[:-1], ids[1:]
            batch[f"{side}loss_mask"][row, len(prompt) - 1: n] = 1
            batch[f"{side}positions"][row, :n] = np.arange(n)
            batch[f"{side}segment_ids"][row, :n] = 1
    return batch | {"label_values": rng.normal(-20, 3, (rows, 2)).astype(np.float32)}


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, vocab_size=0, platform="cpu", dtype=jnp.float32)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(1))


def torch_loss(theirs, batch, kind, smoothing):
    """The mean loss by the formulas of the papers, row by row, in PyTorch."""
    import torch
    from torch.nn.functional import logsigmoid

    total = 0.0
    for row in range(len(batch["tokens"])):
        sums, means = [], []
        for side in ("", "rejected_"):
            n = int(batch[f"{side}segment_ids"][row].sum())
            tokens, targets, mask = (torch.tensor(batch[f"{side}{name}"][row, :n])
                                     for name in ("tokens", "targets", "loss_mask"))
            log_p = theirs(input_ids=tokens[None].long()).logits[0].log_softmax(-1)
            sums.append((log_p[torch.arange(n), targets.long()] * mask).sum())
            means.append(sums[-1] / mask.sum())
        chosen, rejected = (s - float(r) for s, r in zip(sums, batch["label_values"][row],
                                                         strict=True))
        lengths = [s / m for s, m in zip(sums, means, strict=True)]
        if kind == "dpo":
            z = BETA * (chosen - rejected)
            loss = -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)
        elif kind == "ipo":
            loss = (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * BETA)) ** 2
        else:
            a, b = means
            odds = torch.log(a.exp() / (1 - a.exp())) - torch.log(b.exp() / (1 - b.exp()))
            loss = -a - BETA * logsigmoid(odds)
        total = total + loss
    return total / len(batch["tokens"])


@pytest.mark.long
@pytest.mark.parametrize("kind, smoothing", [
    pytest.param("dpo", 0.0, marks=pytest.mark.slow), ("dpo", 0.2),
    pytest.param("ipo", 0.0, marks=pytest.mark.slow), ("orpo", 0.0)])
def test_loss_and_gradient_equal_those_of_torch(kind, smoothing, model, params, tmp_path):
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    huggingface.write_directory(tmp_path / "a", model, params, None, log=lambda line: None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    batch = pairs_batch()
    task = Preferences(kind=kind, beta=BETA, label_smoothing=smoothing)
    loss_fn = task.loss(model, {}, chunk=4)

    def mean(params):
        loss = loss_fn(params, batch, None)
        return loss.total / loss.weight

    value, gradient = jax.jit(jax.value_and_grad(mean))(params)
    expected = torch_loss(theirs, batch, kind, smoothing)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5)
    expected.backward()
    with torch.no_grad():  # the weights become the gradient, and are read as weights are
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "b")
    found = huggingface.read_directory(tmp_path / "b")
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    read = huggingface.read_params(found, model, jax.tree.map(lambda _: one, model.shapes))
    for ours, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(read), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-5 * max(1, float(jnp.abs(other).max())))


@pytest.mark.slow
def test_likelihoods_do_not_depend_on_the_chunk_or_on_padding_rows(model, params):
    batch = pairs_batch()
    whole = log_likelihoods(model, params, batch)
    chunked = log_likelihoods(model, params, batch, chunk=3)
    padded = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in batch.items()}
    more = log_likelihoods(model, params, padded)
    for a, b, c in zip(whole[:2], chunked[:2], more[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
        np.testing.assert_allclose(a, c[: len(a)], rtol=1e-5)
    task = Preferences(beta=BETA)
    a, b = (task.loss(model, {})(params, rows, None) for rows in (batch, padded))
    assert float(a.total) == pytest.approx(float(b.total), rel=1e-5)
    assert float(b.weight) == len(batch["tokens"])


def test_records_without_a_reference_are_answered_by_their_likelihoods(model, params):
    batch = pairs_batch()
    del batch["label_values"]
    loss = Preferences(beta=BETA).loss(model, {})(params, batch, None)
    chosen, rejected, _ = log_likelihoods(model, params, batch)
    np.testing.assert_allclose(loss.extra["row_chosen"], BETA * chosen, rtol=1e-5)
    np.testing.assert_allclose(loss.extra["row_rejected"], BETA * rejected, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["orpo", "dpo", "ipo"])
def test_padding_rows_have_neither_loss_nor_gradient(kind, model, params):
    batch = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in pairs_batch().items()}
    task = Preferences(kind=kind, beta=BETA)

    def total(params, batch):
        return task.loss(model, {})(params, batch, None).total

    a, b = (jax.grad(total)(params, rows) for rows in (
        batch, {name: x[: len(x) // 2] for name, x in batch.items()}))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * max(1.0, float(jnp.abs(y).max())))


class Numbers:
    """A tokenizer of numbers: "7 8" has the ids 7 and 8."""

    bos_id, eos_id = 1, 2

    def encode(self, text):
        return [int(word) for word in text.split()]


@pytest.mark.parametrize("chosen, rejected, tokens, cut", [
    ("20", "21 22 23", ([1, 10, 11, 12, 9, 20], [1, 10, 11, 12, 9, 21, 22, 23]), (3, 0)),
    ("21 22 23 24 25 26", "20", ([1, 10, 11, 9, 21, 22, 23, 24], [1, 10, 11, 9, 20]), (4, 2))])
def test_both_answers_follow_the_same_ids_of_a_long_prompt(chosen, rejected, tokens, cut):
    names = Numbers()
    names.tokenizer = names
    record = {"prompt": "10 11 12 13 14 15", "chosen": chosen, "rejected": rejected}
    got = Preferences(separator=" 9 ").encode(
        record, Reader(names, (1,), (), 5, (2,), causal=True), {}, Sizes(8))
    assert tuple(got.columns[f"{side}tokens"].tolist() for side in ("", "rejected_")) == tokens
    assert (got.cut, got.cut_target) == cut


@pytest.mark.parametrize("change, message", [
    ({"kind": "ppo"}, "dpo"), ({"beta": 0.0}, "more than 0"), ({"chosen": "x"}, "braces"),
    ({"label_smoothing": 0.5}, "a share")])
def test_settings_that_cannot_be_meant_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Preferences(**change)


BASE = """
def get_config():
    return dict(
        model=dict(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4, mlp_dim=64),
        data=dict(sources=[dict(name="t", uri="text:{texts}/*.txt")], seq_len=32,
                  tokenizer=dict(vocab_size=288), curate=dict(workers=1)),
        optimizer=dict(warmup_steps=1), train=dict(steps=4, batch_size=8))
"""
TASK = """
def get_config():
    return dict(
        task=dict(name="preferences"),
        data=dict(sources=[dict(name="s", uri="jsonl:{examples}")], seq_len=32,
                  heldout_fraction=0.2),
        optimizer=dict(peak_lr=3e-3, warmup_steps=2),
        train=dict(steps=16, batch_size=8, init_from="{source}"),
        eval=dict(every=8), checkpoint=dict(every=4, keep_last=9))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, rng = tmp_path_factory.mktemp("preferences"), random.Random(0)
    words = "red blue green one two three".split()
    (made / "texts").mkdir()
    for i in range(30):
        (made / f"texts/{i}.txt").write_text(" ".join(rng.choices(words, k=60)))
    rows = [{"prompt": rng.choice(words), "chosen": f"good {rng.choice(words)}",
             "rejected": f"bad {rng.choice(words)}"} for _ in range(160)]
    (made / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "base.py").write_text(BASE.format(texts=made / "texts"))
    assert run_here(made / "base", config=str(made / "base.py")) == 0
    (made / "task.py").write_text(TASK.format(examples=made / "examples.jsonl",
                                              source=made / "base"))
    return made


@pytest.fixture(scope="module")
def straight(folder):
    printed = finish(folder / "straight", config=str(folder / "task.py"))
    return folder / "straight", printed


@pytest.mark.long
def test_dpo_begins_at_the_reference_and_learns_the_better_answers(straight):
    workdir, printed = straight
    assert printed.count("reference: the log-likelihoods") == 1
    first = lines(workdir)[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)  # equal to the reference
    last = [line for line in lines(workdir) if "eval/accuracy" in line][-1]
    assert last["eval/accuracy"] > 0.9 and last["eval/margin"] > 0.05


@pytest.mark.slow
def test_on_a_mesh_and_killed_it_ends_the_same(folder, straight):
    process = start(folder / "killed", config=str(folder / "task.py"))
    wait_for(process, lambda: len(losses(folder / "killed")) > 5)
    process.kill()
    process.wait()
    assert "reference: the" not in finish(folder / "killed", config=str(folder / "task.py"))
    assert_same_run(folder / "killed", straight[0], ["metrics.jsonl", "answers/eval.jsonl"])
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    finish(folder / "meshed", *mesh, config=str(folder / "task.py"), devices=8)
    np.testing.assert_allclose(losses(folder / "meshed"), losses(straight[0]), rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["orpo", "reward"])
def test_orpo_and_a_reward_model_learn_without_a_reference(kind, folder, capsys):
    assert run_here(folder / kind, f"task.kind={kind}", config=str(folder / "task.py")) == 0
    assert "reference: the" not in capsys.readouterr().err
    last = [line for line in lines(folder / kind) if "eval/accuracy" in line][-1]
    assert last["eval/accuracy"] > 0.9


@pytest.mark.slow
def test_adapters_learn_preferences_on_their_reference(folder):
    options = ("adapter.kind=lora", "adapter.rank=4", "optimizer.peak_lr=1e-2")
    assert run_here(folder / "lora", *options, config=str(folder / "task.py")) == 0
    found = lines(folder / "lora")
    assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert [line for line in found if "eval/accuracy" in line][-1]["eval/accuracy"] > 0.8


@pytest.mark.long
def test_dpo_without_a_model_to_start_from_is_one_line(folder, capsys):
    assert run_here(folder / "none", "train.init_from=", "data.tokenizer.vocab_size=288",
                    config=str(folder / "task.py")) == 2
    assert "which is the reference of dpo" in one_line(capsys.readouterr().err)
