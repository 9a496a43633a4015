"""Statistics by module change a run by rounding at most, add up to its norms, and repeat."""

import jax
import numpy as np
import pytest
from processes import assert_same_run, lines, run_here

from lmjax.monitoring.statistics import read_statistics
from lmjax.nn.kernels.xla import largest_score
from lmjax.nn.masking import AttentionMask
from lmjax.training.checkpoint import restore_params
from lmjax.training.replay import repeat

pytestmark = pytest.mark.long

# Eight devices, dropout, microbatches, experts.
RUN = ("train.steps=8", "optimizer.warmup_steps=2", "checkpoint.every=4", "eval.every=0",
       "model.dropout=0.1", "train.microbatches=2", "model.moe.experts=4", "mesh.data=4",
       "mesh.fsdp=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("statistics") / "run"
    assert run_here(workdir, *RUN, "watch.statistics_every=2") == 0
    return workdir


def test_a_run_with_them_differs_by_rounding_at_most(run, tmp_path):
    assert run_here(tmp_path / "without", *RUN, "watch.statistics_every=0") == 0
    ours, theirs = ([[line["loss"], line["grad_norm"], line["param_norm"]]
                     for line in lines(folder) if "loss" in line]
                    for folder in (run, tmp_path / "without"))
    assert ours[0] == theirs[0]  # the first step has none
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert not (tmp_path / "without/statistics").exists()


@pytest.mark.slow
def test_a_resumed_run_has_the_same_records(run, tmp_path):
    first = (*RUN, "optimizer.schedule=constant")
    for name, starts in (("straight", [8]), ("resumed", [6, 8])):
        for steps in starts:
            assert run_here(tmp_path / name, *first, "watch.statistics_every=2",
                            f"train.steps={steps}") == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "straight",
                    ("statistics/000000002.bin",))


def test_they_add_up_to_the_norms_of_the_step(run):
    steps, found = read_statistics(run)
    assert steps.tolist() == [2, 4, 6, 8]
    params = repeat(run, 8, lambda line: None).run.state.params
    sizes = {jax.tree_util.keystr(path, simple=True, separator="/"): x.size
             for path, x in jax.tree_util.tree_leaves_with_path(params)}
    for kind, recorded in (("gradient", "grad_norm"), ("weight", "param_norm")):
        squares = sum(size * np.mean(np.square(found[f"{kind}/{name}"]), axis=1)
                      for name, size in sizes.items())
        norms = [line[recorded] for line in lines(run) if line["step"] in steps
                 and "loss" in line]
        np.testing.assert_allclose(np.sqrt(squares), norms, rtol=1e-5)
    load = found["experts/most"]
    assert load.shape == (4, 2) and (load >= 1).all() and (load <= 4).all()
    for name in ("state", "attention", "mlp", "logit"):
        assert found[f"activation/{name}"].shape == (4, 2)
        assert np.isfinite(found[f"activation/{name}"]).all()


def test_weights_are_those_of_the_checkpoint(run):
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = repeat(run, 1, lambda line: None).run.spec
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole),
                          spec.shapes.params)
    up = restore_params(run / "checkpoints/8", shapes)["layers"]["block"]["mlp"]["up"]["kernel"]
    rms = np.sqrt(np.mean(np.square(np.asarray(up)), axis=(1, 2, 3)))
    np.testing.assert_allclose(read_statistics(run)[1][
        "weight/layers/block/mlp/up/kernel"][-1], rms, rtol=1e-5)


def test_a_step_with_statistics_repeats_to_the_bit(run):
    for step in (2, 5, 8):
        assert repeat(run, step, lambda line: None).is_equal


def test_the_report_draws_them(run):
    page = (run / "report.html").read_text()
    for words in ("Updates relative to weights", "residual stream", "largest load", "every 2 steps",
                  "attention/query"):
        assert words in page


def test_the_largest_score_is_that_of_visible_keys():
    random = np.random.default_rng(0)
    q, k = (random.normal(size=shape).astype(np.float32) for shape in ((2, 5, 4, 3), (2, 2, 5, 3)))
    segments = np.array([[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]], np.int32)
    mask = AttentionMask(positions, positions, segments, segments, causal=True)
    seen = np.asarray(mask.to_dense())
    scores = [q[b, t, h] @ k[b, h // 2, s] / 2 for b in range(2) for h in range(4)
              for t in range(5) for s in range(5) if seen[b, t, s]]
    np.testing.assert_allclose(largest_score(q, k, mask, 0.5), max(scores), rtol=1e-6)
