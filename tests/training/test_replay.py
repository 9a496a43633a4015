"""A step that is repeated has the recorded bits, and what is wrong in it is found."""

import dataclasses
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import lines, run_here, snapshot

from lmjax.cli import main as cli
from lmjax.data.pipeline import Mixture
from lmjax.errors import UserError
from lmjax.training.forensics import modules_of, rows_of, without
from lmjax.training.replay import repeat

pytestmark = pytest.mark.long

BAD_ROW, STEPS = 91, 14  # the row is one of step 6


def silent(line):
    pass


@pytest.fixture(scope="module")
def poisoned():
    """One row of the data has a NaN, whenever it is read."""
    rows = Mixture.rows

    def with_a_nan(self: Mixture, g: np.ndarray) -> dict[str, np.ndarray]:
        made = rows(self, g)
        made["loss_mask"] = np.where((g == BAD_ROW)[:, None], np.float32("nan"), made["loss_mask"])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mixture, "rows", with_a_nan)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, poisoned):
    """Dropout, microbatches, a mixture that changes at row 112, eight devices, a skipped step."""
    workdir = tmp_path_factory.mktemp("replay") / "run"
    sources = '[{"name": "a", "uri": "synthetic"}, {"name": "b", "uri": "synthetic"}]'
    stages = '[{"row": 112, "weights": {"a": 1, "b": 3}}]'
    assert run_here(workdir, f"train.steps={STEPS}", "train.microbatches=2", "model.dropout=0.2",
                    f"data.sources={sources}", f"data.stages={stages}", "checkpoint.every=5",
                    "watch.spikes=skip", "eval.every=0", "optimizer.warmup_steps=2") == 0
    return workdir


@pytest.fixture(scope="module")
def repeated(run):
    return repeat(run, 7, silent)


def test_random_steps_have_the_recorded_bits(run):
    recorded = {line["step"]: line for line in lines(run) if "loss" in line}
    for step in [6, *random.Random(0).sample(range(1, STEPS + 1), 4)]:
        found = repeat(run, step, silent)
        assert found.recorded and not found.differences and found.compared == step - found.start
        assert str(found.metrics["loss"]) == str(float(recorded[step]["loss"]))
        assert found.start == max(s for s in (0, 10) if s < step)  # the two newest are kept: 10, 14


def test_a_recorded_figure_that_differs_is_found(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    text = (copy / "metrics.jsonl").read_text().splitlines(True)
    text[11] = text[11].replace('"loss": ', '"loss": 1')
    (copy / "metrics.jsonl").write_text("".join(text))
    out = tmp_path / "page.html"
    argv = ["replay", "--workdir", str(copy), "--step", "13", "--rows", "0", "--out", str(out)]
    before = snapshot(copy)
    assert cli.main(argv) == 1
    assert "The first figure that differs is loss of step 12" in capsys.readouterr().out
    assert snapshot(copy) == before and "an earlier step differs" in out.read_text()


def test_the_row_with_a_nan_is_named_with_its_text(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["replay", "--workdir", str(run), "--step", "6", "--rows", "1",
                     "--out", str(out)]) == 0
    said, page = capsys.readouterr().out, out.read_text()
    assert "loss nan, gradient norm nan, as recorded, to the bit" in said
    assert f"Of the 16 rows, alone in the batch, {BAD_ROW} is not finite." in said
    assert f"the loss itself is not, from its logits, targets or mask, in row {BAD_ROW}." in said
    assert f"row {BAD_ROW}:" in said and "The run said of it: skipped: loss nan" in page
    whole = f"row {BAD_ROW}: loss nan, gradient nan; without it loss "
    assert float(said.split(whole)[1].split(",")[0]) > 0


def test_the_rows_add_up_to_the_step(repeated):
    found = rows_of(repeated, 2)
    assert len(found.rows) == 16 and not found.note
    tokens, loss = (np.array([getattr(row, name) for row in found.rows])
                    for name in ("tokens", "loss"))
    np.testing.assert_allclose(tokens @ loss / tokens.sum(), found.step["loss"], rtol=1e-5)
    worst = found.rows[0]
    assert worst.loss == loss.max() and worst.without is not None
    rest = (tokens[1:] @ loss[1:]) / tokens[1:].sum()
    np.testing.assert_allclose(worst.without["loss"], rest, rtol=1e-5)
    assert worst.without == without(repeated, worst.index) != found.step
    with pytest.raises(UserError, match="expected a row from 96 to 111"):
        rows_of(repeated, 0, also=[112])


def spoilt(found, changes):
    """The step with other parameters before it: (path, layer or None) -> value."""
    params = jax.tree.map(lambda x: x, found.before.params)
    for (path, layer), value in changes.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node[parent]
        x = node[name]
        whole = value if layer is None else x.at[layer].set(value)
        node[name] = jax.device_put(jnp.broadcast_to(jnp.asarray(whole, x.dtype), x.shape),
                                    x.sharding)
    return dataclasses.replace(found, before=found.before._replace(params=params))


@pytest.mark.parametrize("path, layer, first", [
    ("layers/block/mlp/up/kernel", 1, "layers[1]/mlp/up"),
    ("layers/block/attention/value/kernel", 0, "layers[0]/attention/value"),
    ("norm/scale", None, "norm"),
])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_first_bad_module_is_named(repeated, path, layer, first, value):
    found = modules_of(spoilt(repeated, {(path, layer): value}))
    assert found.forward == first
    at = "" if layer is None else f"layers[{layer}]/"
    assert found.parameters == [path.replace("layers/block/", at)]
    assert len(found.rows) == 8  # of the first microbatch, all rows


def test_the_first_bad_gradient_is_named(repeated):
    """The gate's huge output meets the huge gradient of the product where `up` gives zeros."""
    block = "layers/block/mlp"
    found = modules_of(spoilt(repeated, {(f"{block}/up/kernel", 1): 0.0,
                                         (f"{block}/gate/kernel", 1): 1e20,
                                         (f"{block}/down/kernel", 1): 1e30}))
    assert not found.forward and found.backward == "layers[1]/mlp/up" and not found.parameters
    assert np.isfinite(found.loss) and "layers[1]/mlp/up/kernel" in found.gradients


def test_a_microbatch_without_tokens_that_count_is_not_the_culprit(repeated):
    mask = repeated.batch["loss_mask"]
    batch = repeated.batch | {"loss_mask": mask.at[::2].set(0)}  # the rows of the first microbatch
    found = modules_of(dataclasses.replace(repeated, batch=batch))
    assert np.isfinite(found.loss) and found.loss > 0


@pytest.mark.parametrize("step", [0, STEPS + 1])
def test_a_step_that_was_not_run_is_refused(run, step):
    with pytest.raises(UserError, match=f"expected a step from 1 to {STEPS}"):
        repeat(run, step, silent)
