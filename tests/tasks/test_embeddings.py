"""Sentence embeddings: the loss by its formula, padding rows, and a run on pairs of texts."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import finish, lines, losses, one_line, run_here

import lmjax
from lmjax.models.encoder import EncoderConfig
from lmjax.models.model import build_model
from lmjax.tasks.embeddings import Embeddings
from lmjax.tasks.task import Predicted

CONFIG = EncoderConfig(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, mlp="gelu",
                       vocab_size=64, init_std=0.3)


def batch_of(rows=6, length=10, seed=0, sides=("", "second_")):
    rng, batch = np.random.default_rng(seed), {}
    for side in sides:
        lengths = rng.integers(2, length + 1, rows)
        real = np.arange(length) < lengths[:, None]
        batch |= {f"{side}tokens": np.where(real, rng.integers(3, 64, (rows, length)), 0),
                  f"{side}positions": np.where(real, np.arange(length), 0),
                  f"{side}segment_ids": real.astype(np.int32)}
    return {name: values.astype(np.int32) for name, values in batch.items()}


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, vocab_size=0, platform="cpu", dtype=jnp.float32)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(1))


def by_hand(model, params, batch, temperature):
    """The mean of -log softmax(cosine / temperature) of each pair, in float64."""
    sides = []
    for side in ("", "second_", "negative_"):
        if f"{side}tokens" not in batch:
            continue
        rows = {name: batch[side + name] for name in ("tokens", "positions", "segment_ids")}
        states = np.asarray(model.encode(params, rows)[0], np.float64)
        means = [x[: int(n)].mean(0) for x, n in zip(states, rows["segment_ids"].sum(1),
                                                    strict=True)]
        sides.append(np.stack([mean / np.linalg.norm(mean) for mean in means]))
    scores = sides[0] @ np.concatenate(sides[1:]).T / temperature
    own = np.diagonal(scores)
    return float(np.mean(np.log(np.exp(scores - own[:, None]).sum(1)))), sides


@pytest.mark.long
@pytest.mark.parametrize("sides", [
    pytest.param(("", "second_"), marks=pytest.mark.slow), ("", "second_", "negative_")])
def test_the_loss_is_that_of_the_formula_and_padding_rows_do_not_count(sides, model, params):
    batch, task = batch_of(sides=sides), Embeddings(temperature=0.1)
    loss = task.loss(model, {})(params, batch, None)
    expected, sides = by_hand(model, params, batch, 0.1)
    assert float(loss.total / loss.weight) == pytest.approx(expected, rel=1e-5)
    for name, side in zip(("row_first", "row_second"), sides[:2], strict=True):
        np.testing.assert_allclose(loss.extra[name], side, atol=1e-5)
    padded = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in batch.items()}
    more = task.loss(model, {})(params, padded, None)
    assert float(more.total) == pytest.approx(float(loss.total), rel=1e-5)
    gradient = jax.grad(lambda p: task.loss(model, {})(p, padded, jax.random.key(0)).total)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_ranks_are_those_of_a_sort():
    rng = np.random.default_rng(0)
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True)
                     for x in rng.normal(size=(2, 50, 8)))
    ranks = [1 + list(np.argsort(-(second @ a))).index(i) for i, a in enumerate(first)]
    found = Embeddings().metrics([Predicted("", {}, {"row_first": a, "row_second": b})
                                  for a, b in zip(first, second, strict=True)], {})
    assert found["accuracy"] == np.mean(np.array(ranks) == 1)
    assert found["mrr"] == pytest.approx(np.mean(1 / np.array(ranks)))


RECIPE = """
def get_config():
    return dict(
        model=dict(family="encoder", num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64,
                   mlp="gelu"),
        task=dict(name="embeddings", first="{{a}}", second="{{b}}"),
        data=dict(sources=[dict(name="s", uri="jsonl:{examples}")], seq_len=32,
                  heldout_fraction=0.2, tokenizer=dict(vocab_size=290)),
        optimizer=dict(peak_lr=1e-2, warmup_steps=4),
        train=dict(steps=40, batch_size=16), eval=dict(every=20), checkpoint=dict(every=40))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The recipe of a run on pairs of texts."""
    made = tmp_path_factory.mktemp("embeddings")
    rng, words = random.Random(0), "red blue green one two three four five six".split()
    rows = [{"a": " ".join(pair), "b": " ".join(reversed(pair)), "c": pair[0]}
            for pair in (rng.sample(words, 3) for _ in range(200))]
    (made / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = made / "task.py"
    config.write_text(RECIPE.format(examples=made / "a.jsonl"))
    return str(config)


@pytest.mark.slow
def test_a_run_learns_which_texts_belong_together_and_lm_embed_gives_its_vectors(
        config, tmp_path, capsys):
    assert run_here(tmp_path / "run", config=config) == 0
    found = [line for line in lines(tmp_path / "run") if "eval/mrr" in line]
    assert found[-1]["eval/mrr"] > 2 * found[0]["eval/mrr"] or found[-1]["eval/mrr"] > 0.5
    assert np.isfinite(losses(tmp_path / "run")).all()
    lm, answers = lmjax.load(tmp_path / "run"), lines(tmp_path / "run", "answers/eval.jsonl")[:5]
    first, second = (lm.embed([line["record"][key] for line in answers]) for key in "ab")
    np.testing.assert_allclose(np.sum(first * second, axis=1),
                               [line["answer"]["similarity"] for line in answers], atol=1e-4)
    assert run_here(tmp_path / "parts", "train.microbatches=2", config=config) == 2
    assert "compares all rows" in one_line(capsys.readouterr().err)


@pytest.mark.slow
def test_texts_that_do_not_belong_together_are_read_from_a_column(config, tmp_path, capsys):
    steps = ("train.steps=2", "optimizer.warmup_steps=1", "eval.every=2")
    assert run_here(tmp_path / "run", "task.negative={c}", *steps, config=config) == 0
    splits = json.loads((tmp_path / "run/data/manifest.json").read_text())["splits"].values()
    assert all("negative_tokens" in split["columns"] for split in splits)
    assert np.isfinite(losses(tmp_path / "run")).all()
    lm = lmjax.load(tmp_path / "run")
    assert lm.predict([{"a": "one", "b": "one"}])[0]["similarity"] == pytest.approx(1)
    assert run_here(tmp_path / "bad", "task.negative={d}", *steps, config=config) == 2
    assert "the column 'd' of config.task.negative" in one_line(capsys.readouterr().err)


@pytest.mark.slow
def test_a_mesh_of_eight_devices_has_the_losses_of_one(config, tmp_path):
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert run_here(tmp_path / "meshed", *mesh, config=config) == 0
    finish(tmp_path / "alone", config=config)
    np.testing.assert_allclose(losses(tmp_path / "meshed"), losses(tmp_path / "alone"), rtol=1e-3)
