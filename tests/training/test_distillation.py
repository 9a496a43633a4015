"""A student taught by a teacher: the step, the stored predictions, resumption and refusals."""

import json
import math
import re

import jax
import numpy as np
import pytest
from processes import (
    FINISHED,
    assert_same_run,
    finish,
    finish_after_a_kill,
    lines,
    one_line,
    run_here,
)

import lmjax
from lmjax.config import load
from lmjax.data.pipeline import open_splits
from lmjax.decoding.generate import jit_on
from lmjax.errors import UserError
from lmjax.models.decoder import DecoderConfig
from lmjax.sharding import MeshConfig, make_layout
from lmjax.tasks.distillation import IDS, LOG_P, DistillConfig, predictions
from lmjax.training.checkpoint import read_about
from lmjax.training.program import make_program
from lmjax.training.recipe import build_recipe
from lmjax.training.shrink import evenly
from lmjax.training.teacher import find_teacher, with_predictions
from lmjax.tree import named_leaves

SYNTHETIC = "configs/synthetic.py:tiny"
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
SMALL = ("model.num_layers=1", "model.embed_dim=16", "model.num_heads=2", "model.num_kv_heads=2",
         "model.mlp_dim=32", "optimizer.schedule=constant")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A trained model of two layers."""
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    assert run_here(workdir, *FINISHED) == 0
    return workdir


def of(teacher, *overrides):
    return (*FINISHED, *SMALL, f"distill.teacher={teacher}", *overrides)


def program_of(teacher, devices=1, **settings):
    """(program, batch, the teacher's parameters) of a student, on some devices."""
    overrides = [*of(teacher)[len(FINISHED):], *(f"{k}={v}" for k, v in settings.items())]
    recipe = build_recipe(load(SYNTHETIC, overrides))
    split, found = open_splits(recipe.data)[0], lmjax.load(teacher)
    program = make_program(recipe, jax.devices()[:devices], vocab_size=split.vocab_size,
                           fields=split.fields, teacher=found.model.config)
    rows = split.rows(np.arange(recipe.train.batch_size))
    batch = {name: jax.device_put(rows[name], x.sharding) for name, x in program.batch.items()}
    return program, batch, jax.device_get(found.params)


def stepped(teacher, devices=1, **settings):
    """(the state after, the metrics) of one step, on the host."""
    program, batch, params = program_of(teacher, devices, **settings)
    placed = jax.device_put(params, jax.tree.map(lambda s: s.sharding,
                                                 program.spec.shapes.teacher))
    state = program.spec.with_teacher(program.spec.init(3), placed)
    return jax.device_get(program.traced.lower().compile()(state, batch))


@pytest.mark.long
def test_a_step_learns_from_the_teachers_distribution(teacher):
    """The loss of the step is that of the two models' logits, by a formula; the teacher stays."""
    state, metrics = stepped(teacher, **{"distill.hard": 0.25, "distill.temperature": 2.0})
    program, batch, params = program_of(teacher)
    student, batch = jax.device_get((program.spec.init(3).params, batch))
    log_q, log_p = (jax.nn.log_softmax(jax.jit(model.logits)(weights, batch) / 2.0) for
                    model, weights in ((program.model, student),
                                       (lmjax.load(teacher).model, params)))
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    mask = np.asarray(batch["loss_mask"])
    assert metrics["teacher_kl"] == pytest.approx(float((kl * mask).sum() / mask.sum()), rel=1e-4)
    for (path, kept), (_, leaf) in zip(named_leaves(state.teacher), named_leaves(params),
                                       strict=True):
        np.testing.assert_array_equal(kept, leaf, err_msg=path)


@pytest.mark.long
@pytest.mark.parametrize("microbatches", (pytest.param(1, marks=pytest.mark.slow), 2))
def test_a_mesh_gives_the_losses_of_one_device(teacher, microbatches):
    settings = {"train.microbatches": microbatches, "distill.temperature": 1.5}
    one, metrics = stepped(teacher, **settings)
    many, on_mesh = stepped(teacher, math.prod(MESH.values()), **settings, **MESH)
    for name in ("loss", "teacher_kl", "grad_norm"):
        assert on_mesh[name] == pytest.approx(metrics[name], rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                 many.params, one.params)


@pytest.mark.slow
def test_stored_predictions_train_as_the_teacher_in_the_step(teacher, tmp_path, capsys):
    """With half of 64 tokens, what is left to draw is little: the losses differ by little."""
    assert run_here(tmp_path / "online", *of(teacher)) == 0
    data = f"data.directory={tmp_path}/data"
    assert run_here(tmp_path / "stored", *of(teacher, "distill.stored_tokens=32", data)) == 0
    online, stored = (np.array([[line["loss"], line["teacher_kl"]] for line in lines(tmp_path / w)
                                if "teacher_kl" in line]) for w in ("online", "stored"))
    np.testing.assert_allclose(stored[:, 0], online[:, 0], rtol=2e-3)
    np.testing.assert_allclose(stored[:, 1], online[:, 1], rtol=0.1)
    assert len(online) == 6 and not np.array_equal(stored, online)
    # A longer run adds the rows that it takes; the teacher reads no row twice.
    capsys.readouterr()
    more = (*of(teacher, "distill.stored_tokens=32", data), "train.steps=8")
    assert run_here(tmp_path / "stored", *more) == 0
    printed = capsys.readouterr().err
    assert "stored of 96 rows" in printed and "all 32 rows are done" in printed
    folder, = (tmp_path / "data" / "teachers").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stops"] == [96, 128]
    assert run_here(tmp_path / "straight", *more) == 0
    assert "stored of 128 rows" in capsys.readouterr().err
    assert_same_run(tmp_path / "straight", tmp_path / "stored", [])


@pytest.mark.long
def test_stored_rows_are_those_that_the_run_takes(teacher, tmp_path):
    """Also in a second epoch, whose order is another one."""
    rows = 'data.sources=[{"name": "chain", "uri": "synthetic:40"}]'
    assert run_here(tmp_path / "run", *of(teacher, "distill.stored_tokens=4", rows)) == 0
    folder, = (tmp_path / "run" / "data" / "teachers").iterdir()
    assert json.loads((folder / "manifest.json").read_text())["stops"] == [40]
    recipe = build_recipe(load(SYNTHETIC, of(teacher, "distill.stored_tokens=4", rows)))
    split = open_splits(recipe.data)[0]
    taught = with_predictions(recipe, str(tmp_path / "run" / "data"), split, find_teacher(recipe))
    taught.cover(96)
    batch, found = taught.rows(np.arange(96)), lmjax.load(teacher)
    plain = {name: batch[name] for name in split.fields}
    for name, values in split.rows(np.arange(96)).items():
        np.testing.assert_array_equal(plain[name], values)
    logits = jax.jit(found.model.logits)(jax.device_get(found.params), plain)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    ids, stored = (batch[name].reshape(96, 32, 4) for name in (IDS, LOG_P))
    np.testing.assert_allclose(stored, np.take_along_axis(log_p, ids, -1), rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(stored[..., :2], -np.sort(-log_p, axis=-1)[..., :2], rtol=2e-3,
                               atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stored", (0, 8))
def test_killed_and_resumed_ends_as_one_that_never_was(teacher, tmp_path, stored):
    options = ["train.steps=24", "optimizer.warmup_steps=1", "checkpoint.every=4", "eval.every=24",
               "optimizer.ema_decay=0.9", *SMALL, f"distill.teacher={teacher}",
               f"distill.stored_tokens={stored}"]
    finish(tmp_path / "straight", *options)
    finish_after_a_kill(tmp_path / "run", *options)
    assert_same_run(tmp_path / "straight", tmp_path / "run", ["metrics.jsonl"])


@pytest.mark.slow
def test_a_resumed_run_keeps_its_teacher(teacher, tmp_path, capsys):
    assert run_here(tmp_path / "run", *of(teacher, "watch.statistics_every=100")) == 0
    assert "statistics: none of activations" in capsys.readouterr().err
    about = read_about(tmp_path / "run" / "checkpoints" / "6")
    assert about["teacher"]["path"].startswith(str(teacher))
    assert "teacher" not in about["checksums"], "a checkpoint names its teacher"
    assert lmjax.load(tmp_path / "run").model.config.num_layers == 1
    other = tmp_path / "other"
    assert run_here(other, *FINISHED, "train.seed=5") == 0
    capsys.readouterr()
    assert run_here(tmp_path / "run", *of(other, "train.steps=8")) == 2
    assert re.search("expected the teacher that this run began with, .* has other weights",
                     one_line(capsys.readouterr().err))


@pytest.mark.parametrize("overrides, message", [
    (("distill.hard=1.5",), r"config.distill.hard: expected a share in \[0, 1\], got 1.5"),
    (("distill.stored_tokens=1",), "config.distill.stored_tokens: expected 0, or at least 2"),
    (("distill.states=1.0", "model.num_layers=3"),
     "config.model.num_layers: expected at most the teacher's 2 layers"),
    (("distill.attention=1.0", "distill.relation_heads=3"),
     "config.distill.relation_heads: expected a divisor of 16, 32"),
    (("distill.temperature=0.0",), "config.distill.temperature: expected more than 0"),
    (("distill.teacher=/nowhere",), "/nowhere"),
    (("data.tokenizer.vocab_size=32",), "expected a model of the 32 ids of the data"),
    (("distill.stored_tokens=33",), "config.distill.stored_tokens: expected at most half"),
    (("data.objective.name=prefix_lm",),
     "config.distill.teacher: expected a teacher that was trained on prefix_lm"),
])
def test_what_cannot_be_learned_is_refused_before_anything_is_compiled(
        teacher, overrides, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lmjax.training.loop._compile", lambda *args: pytest.fail("compiled"))
    assert run_here(tmp_path / "run", *of(teacher, *overrides)) == 2
    assert re.search(message, one_line(capsys.readouterr().err))


@pytest.mark.long
def test_a_smaller_model_begins_with_parts_of_a_larger_one(teacher, tmp_path, capsys):
    still = ("train.steps=2", "optimizer.peak_lr=0.0", "optimizer.weight_decay=0.0",
             "optimizer.warmup_steps=1")
    small = ("model.num_layers=1", "model.embed_dim=16", "model.num_heads=2",
             "model.num_kv_heads=2", "model.mlp_dim=24")
    start_at = (*FINISHED, *small, f"train.init_from={teacher}")
    assert run_here(tmp_path / "no", *start_at) == 2
    assert "num_layers: expected 2 as train.init_from" in one_line(capsys.readouterr().err)
    assert run_here(tmp_path / "run", *start_at, *still, "train.shrink=true") == 0
    large, cut = (dict(named_leaves(lmjax.load(w).params)) for w in (teacher, tmp_path / "run"))
    for path, leaf in cut.items():
        taken = large[path][:1] if "layers" in path else large[path]
        taken = taken[tuple(slice(n) for n in leaf.shape)]
        np.testing.assert_allclose(leaf, taken, atol=1e-7, err_msg=path)
    assert run_here(tmp_path / "wide", *FINISHED, "train.shrink=true", "model.mlp_dim=128",
                    f"train.init_from={teacher}") == 2
    assert "config.model.mlp_dim: expected at most 64" in one_line(capsys.readouterr().err)
    assert run_here(tmp_path / "heads", *FINISHED, "train.shrink=true", "model.num_heads=2",
                    "model.num_kv_heads=2", f"train.init_from={teacher}") == 2
    assert "heads of 8 dimensions" in one_line(capsys.readouterr().err)


def test_layers_are_taken_evenly_and_of_their_own_kind():
    plain = DecoderConfig(num_layers=12)
    assert evenly(6, 12, plain, plain) == [0, 2, 4, 7, 9, 11]
    assert evenly(12, 12, plain, plain) == list(range(12))
    mixed = DecoderConfig(num_layers=6, sliding_window=4, layer_pattern=("local", "global"))
    assert evenly(4, 6, mixed, mixed) == [0, 1, 4, 5]


LAYERS = {"distill.states": 1.0, "distill.attention": 50.0, "distill.relation_heads": 2}


@pytest.mark.slow
def test_layers_are_compared_on_a_mesh_as_on_one_device(teacher):
    one, metrics = stepped(teacher, **LAYERS)
    many, on_mesh = stepped(teacher, math.prod(MESH.values()), **LAYERS, **MESH)
    for name in ("loss", "teacher_kl", "teacher_states", "teacher_attention", "grad_norm"):
        assert on_mesh[name] == pytest.approx(metrics[name], rel=2e-4), name
    assert one.params["projection"].shape == (16, 32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                 many.params, one.params)


@pytest.mark.long
def test_a_student_comes_nearer_and_its_checkpoint_loads_without_the_projection(teacher, tmp_path):
    options = of(teacher, *(f"{key}={value}" for key, value in LAYERS.items()), "train.steps=12",
                 "optimizer.ema_decay=0.5")
    assert run_here(tmp_path / "run", *options) == 0
    steps = [line for line in lines(tmp_path / "run") if "teacher_states" in line]
    for name in ("teacher_states", "teacher_attention"):
        assert steps[-1][name] < steps[0][name], name
    found = lmjax.load(tmp_path / "run")
    assert "projection" not in found.params and found.logits([[1, 2]]).shape == (1, 2, 64)
    # It resumes with the projection: straight and in two parts are the same.
    first = [*options, "train.steps=12", "checkpoint.every=4"]
    assert run_here(tmp_path / "parts", *first, "train.steps=8") == 0
    assert run_here(tmp_path / "parts", *first) == 0
    assert_same_run(tmp_path / "run", tmp_path / "parts", [])


@pytest.mark.parametrize("of", (6, 18, 26, 34))
def test_layers_rise_and_have_their_own_kind_for_every_depth(of):
    pattern = ("local",) * 5 + ("global",)
    deep = DecoderConfig(num_layers=of, sliding_window=4, layer_pattern=pattern)
    for count in range(1, of + 1):
        taken = evenly(count, of, deep, deep)
        assert taken == sorted(set(taken)) and len(taken) == count
        assert [pattern[i % 6] for i in taken] == [pattern[i % 6] for i in range(count)]


def test_two_runs_do_not_store_into_one_folder_at_once(teacher, tmp_path):
    recipe = build_recipe(load(SYNTHETIC, of(teacher, "distill.stored_tokens=4")))
    split, found = open_splits(recipe.data)[0], find_teacher(recipe)
    first, second = (with_predictions(recipe, str(tmp_path), split, found) for _ in range(2))
    pairs = np.zeros((2, 128), np.int32), np.zeros((2, 128), np.float32)
    for rows in (first, second):
        rows.cover(4)
    first.write([pairs], 0, {})
    with pytest.raises(UserError, match="expected 0 stored rows, as there were, got 2: another"):
        second.write([pairs], 0, {})
    assert second.stored == 2


def test_rows_that_are_stored_later_are_read(teacher, tmp_path):
    """As after a rewind that leaves rows out: the run then takes rows that it did not need."""
    recipe = build_recipe(load(SYNTHETIC, of(teacher, "distill.stored_tokens=4")))
    rows = with_predictions(recipe, str(tmp_path), open_splits(recipe.data)[0],
                            find_teacher(recipe))
    for begin, end in ((0, 2), (2, 4)):
        rows.cover(end)
        rows.write([(np.full((2, 128), end, np.int32), np.zeros((2, 128), np.float32))], begin, {})
        assert set(rows.rows(np.arange(begin, end))[IDS].flat) == {end}


@pytest.mark.long
def test_no_device_gathers_the_logits_of_the_whole_batch(teacher):
    """The largest array that is gathered is far from the batch's logits."""
    found, layout = lmjax.load(teacher), make_layout(MeshConfig(data=2, fsdp=4))
    model = found.model
    shapes = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
                          model.shapes, layout.tree(model.axes, model.shapes))
    rows = layout.sharding(("batch", "seq"))
    batch = {name: jax.ShapeDtypeStruct((16, 32), np.int32, sharding=rows)
             for name in ("tokens", "targets", "positions", "segment_ids")}
    predict = jit_on(layout, predictions(model, DistillConfig(stored_tokens=4), 64, 0),
                     out_shardings=layout.replicated)
    text = predict.lower(shapes, batch, jax.ShapeDtypeStruct((16,), np.int32)).compile().as_text()
    gathered = [math.prod(map(int, found.split(","))) for found in
                re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", text)]
    assert gathered and max(gathered) < 16 * 32 * 64
