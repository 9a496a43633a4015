"""Runs with adapters: what is trained, what is saved, what they need of their base."""

import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import (
    assert_same_run,
    finish,
    finish_after_a_kill,
    one_line,
    run_here,
)

import lmjax
from lmjax.config import load
from lmjax.data.pipeline import open_splits
from lmjax.nn.adapters import KINDS, is_adapter
from lmjax.training.checkpoint import checkpoint_steps, read_about
from lmjax.training.program import make_program
from lmjax.training.recipe import build_recipe
from lmjax.tree import named_leaves, num_bytes

SYNTHETIC = "configs/synthetic.py:tiny"
ADAPTED = {"adapter.rank": 4, "adapter.targets": ".", "adapter.dropout": 0.1}
MESHES = {
    "data, fsdp, tensor": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
    "stages": {"mesh.stage": 2, "mesh.fsdp": 2, "mesh.data": 2},
}
SHORT = ("train.steps=24", "optimizer.warmup_steps=1", "checkpoint.every=4", "eval.every=24",
         "optimizer.ema_decay=0.9")


def overrides(settings):
    return [f"{key}={value}" for key, value in settings.items()]


def stepped(devices=1, steps=2, **settings):
    """(program, the state, the metrics) after some steps from random weights, on the host."""
    recipe = build_recipe(load(SYNTHETIC, overrides(ADAPTED | settings)))
    split = open_splits(recipe.data)[0]
    program = make_program(recipe, jax.devices()[:devices], vocab_size=split.vocab_size,
                           fields=split.fields)
    rows = split.rows(np.arange(recipe.train.batch_size))
    batch = {name: jax.device_put(rows[name], x.sharding) for name, x in program.batch.items()}
    step = program.traced.lower().compile()
    state = program.spec.start(jax.jit(program.model.plain.init)(jax.random.key(1)), seed=3)
    metrics = None
    for _ in range(steps):
        state, metrics = step(state, batch)
    return program, *jax.device_get((state, metrics))


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=() if kind == "lora" else pytest.mark.slow) for kind in KINDS])
@pytest.mark.long
def test_only_adapters_have_gradients_and_optimizer_state(kind):
    settings = {"adapter.kind": kind, "train.compute_dtype": "bfloat16"}
    program, state, _ = stepped(**settings)
    paths = [path for path, _ in named_leaves(program.model.shapes)]
    assert [path for path, _ in named_leaves(state.params)] == list(filter(is_adapter, paths))
    assert len(jax.tree.leaves(state.frozen)) == len(paths) - len(jax.tree.leaves(state.params))
    # Two moments and, in the chain, two counts.
    assert num_bytes(state.opt_state) == 2 * num_bytes(state.params) + 8
    base = jax.jit(program.model.plain.init)(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, state.frozen,
                 jax.device_get(program.model.plain.cast(base)))
    # The base is kept as the model computes with it: in half the memory.
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert jax.tree.leaves(state.frozen)[0].dtype == jnp.bfloat16
    _, before, _ = stepped(steps=0, **settings)
    for path, leaf in named_leaves(state.params):
        assert np.any(leaf != dict(named_leaves(before.params))[path]), f"{path} did not move"


@pytest.mark.parametrize("kind, mesh", [
    pytest.param("dora", "data, fsdp, tensor", marks=pytest.mark.slow),
    pytest.param("rslora", "data, fsdp, tensor", marks=pytest.mark.slow),
    pytest.param("lora", "stages", marks=pytest.mark.long)])
def test_a_mesh_gives_the_losses_of_one_device(kind, mesh):
    settings = {"adapter.kind": kind}
    if mesh == "stages":  # a pipeline has other noise than one device
        settings |= {"train.microbatches": 2, "adapter.dropout": 0}
    _, one, metrics = stepped(**settings)
    _, many, on_mesh = stepped(math.prod(MESHES[mesh].values()), **settings, **MESHES[mesh])
    for name in ("loss", "grad_norm", "param_norm"):
        assert on_mesh[name] == pytest.approx(metrics[name], rel=2e-5), name
    for (path, a), b in zip(named_leaves(many.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, err_msg=path)  # a step is some 1e-2 long


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a run on synthetic data, to which adapters are added."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    assert run_here(workdir, "train.steps=4", "optimizer.warmup_steps=1", "eval.every=0",
                    "mesh.data=1", "mesh.fsdp=8") == 0
    return workdir


def adapter_run(workdir, base, kind="lora", *more, steps=4):
    settings = ADAPTED | {"adapter.kind": kind, "train.init_from": base, "train.steps": steps,
                          "optimizer.warmup_steps": 1, "eval.every": 0, "checkpoint.every": 2}
    return run_here(workdir, *overrides(settings), *more)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A run with adapters on `base`."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    assert adapter_run(workdir, base, "dora", "optimizer.ema_decay=0.5") == 0
    return workdir


def logits(lm):
    return np.asarray(lm.logits(np.arange(24, dtype=np.int32).reshape(2, 12)))


@pytest.mark.long
def test_a_checkpoint_holds_adapters_and_names_its_base(base, tuned):
    path = tuned / "checkpoints" / "4"
    about = read_about(path)
    for item in ("params", "ema"):
        assert all(map(is_adapter, about["checksums"][item]))
    assert about["base"]["path"] == str(base / "checkpoints" / "4")
    assert about["base"]["checksums"] == read_about(about["base"]["path"])["checksums"]["params"]
    lm = lmjax.load(tuned)
    whole = dict(named_leaves(lm.params))
    for name, leaf in named_leaves(lmjax.load(base).params):
        np.testing.assert_array_equal(leaf, whole[name])
    assert np.abs(logits(lm) - logits(lmjax.load(base))).max() > 1e-2


@pytest.mark.long
def test_a_merged_model_is_a_plain_one(base, tuned, tmp_path):
    lm = lmjax.load(tuned)
    merged = lm.merge()
    np.testing.assert_allclose(logits(merged), logits(lm), rtol=1e-5, atol=1e-5)
    merged.save(tmp_path / "merged")
    lm.save(tmp_path / "apart")
    lm.export(tmp_path / "hf", log=lambda line: None)
    assert jax.tree.structure(merged.params) == jax.tree.structure(lmjax.load(base).params)
    for name in ("merged", "apart", "hf"):
        np.testing.assert_allclose(logits(lmjax.load(tmp_path / name)), logits(lm), rtol=1e-5,
                                   atol=1e-5)
    assert all(map(is_adapter, read_about(tmp_path / "apart/checkpoints/4")["checksums"]["params"]))
    with pytest.raises(ValueError, match="merge: expected a model with adapters, got one without"):
        merged.merge()
    # A run without adapters starts from the merged weights.
    assert run_here(tmp_path / "run", f"train.init_from={tuned}", "train.steps=2",
                    "optimizer.warmup_steps=1", "eval.every=0") == 0
    first = read_about(tmp_path / "run/checkpoints/2")["init_from"]["checksums"]
    assert first.keys() == read_about(base / "checkpoints/4")["checksums"]["params"].keys()


@pytest.mark.slow
def test_a_base_that_is_not_there_or_is_another_is_told_in_one_line(base, tmp_path, capsys):
    moved = tmp_path / "base"
    shutil.copytree(base, moved)
    assert adapter_run(tmp_path / "run", moved, "lora", "checkpoint.every=2", steps=2) == 0
    moved.rename(tmp_path / "elsewhere")
    expected = logits(lmjax.load(tmp_path / "run", base=tmp_path / "elsewhere"))
    missing = r"run\S*: expected the weights that its adapters were trained for at \S+base\S+, " \
        r"got none \(.*\); bring them back, or say where they are with lmjax.load"
    with pytest.raises(ValueError, match=missing):
        lmjax.load(tmp_path / "run")
    capsys.readouterr()
    assert adapter_run(tmp_path / "run", moved, steps=2) == 2
    assert one_line(capsys.readouterr().err).endswith("set train.init_from to where they are")
    assert adapter_run(tmp_path / "run", tmp_path / "elsewhere", steps=2) == 0
    assert run_here(moved, "train.steps=4", "optimizer.warmup_steps=1", "eval.every=0",
                    "train.seed=1") == 0  # trained anew at the same place
    (tmp_path / "elsewhere").rename(tmp_path / "first")
    with pytest.raises(ValueError, match=r"trained for at \S+base\S+, got others; bring"):
        lmjax.load(tmp_path / "run")
    np.testing.assert_array_equal(
        logits(lmjax.load(tmp_path / "run", base=tmp_path / "first")), expected)


@pytest.mark.long
def test_what_adapters_cannot_start_from_is_refused(base, tuned, tmp_path, capsys):
    cases = [
        (["train.init_from="], "config.train.init_from: expected the model that the adapters are "
         "for, got none; name a run"),
        ([f"train.init_from={tuned}"], r"train.init_from: expected a model whose weights are its "
         r"own, got \S+, which has adapters; merge them"),
        (["adapter.targets=q_proj"], "config.adapter.targets: expected a regular expression for"),
        (["train.frozen=mlp"], "train.frozen: expected an empty one with adapters"),
    ]
    for more, message in cases:
        capsys.readouterr()
        assert adapter_run(tmp_path / "run", base, "lora", *more) == 2
        assert re.search(message, one_line(capsys.readouterr().err))
        assert not checkpoint_steps(tmp_path / "run" / "checkpoints")


@pytest.mark.long
@pytest.mark.slow
def test_killed_and_resumed_ends_as_one_that_never_was(base, tmp_path):
    options = [*SHORT, *overrides(ADAPTED | {"adapter.kind": "lora", "train.init_from": base})]
    finish(tmp_path / "straight", *options)
    finish_after_a_kill(tmp_path / "run", *options)
    assert_same_run(tmp_path / "straight", tmp_path / "run", ["metrics.jsonl"])
