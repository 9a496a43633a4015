"""How `lmjax plan` shows its figures: the table, the JSON and the picture."""

import dataclasses
import json

import jax
import pytest

from lmjax.monitoring.units import human_bytes, time_unit
from lmjax.planning.estimate import LEAST, estimate_step
from lmjax.planning.plan import as_json
from lmjax.planning.plots import draw
from lmjax.planning.table import in_short, table
from lmjax.runtime.chips import CHIPS, GIB


@pytest.fixture(scope="module")
def plan(here):
    """A recipe, the facts of its step, and the estimate."""
    recipe, facts, text = here
    return recipe, facts, estimate_step(facts, text)


def on_chip(made, **changes):
    """The same estimate as if for a TPU, where other compute takes time too."""
    return dataclasses.replace(made, limit=CHIPS["v5e"].hbm, hidden=0.0004, exposed=0.0012,
                               basis="cycles", **changes)


def test_the_figures_agree(plan):
    recipe, facts, made = plan
    report = json.loads(json.dumps(as_json(recipe, facts, made, 1e9)))
    assert report["step_seconds"]["hidden"] <= report["step_seconds"]["exposed"]
    rate = report["tokens_per_second_per_device"]["exposed"] * made.devices
    assert report["budgets"]["budget"]["days"][1] == pytest.approx(1e9 / rate / 86400)
    mfu = made.model_flops / made.peak_flops / made.hidden
    assert report["mfu"]["hidden"] == pytest.approx(mfu)
    assert "lower bound" in table(recipe, facts, made, 1e9) and draw(made).startswith("<?xml")


def test_the_report_names_its_versions_and_its_config(plan):
    recipe, facts, made = plan
    report, memory = as_json(recipe, facts, made, 0), made.memory
    assert report["versions"]["jax"] == jax.__version__ and report["config"]["mesh"]["fsdp"] == 4
    ours = sum(memory[kind] for kind in ("parameters", "optimizer", "average", "batch"))
    assert memory["padding"] == memory["arguments"] - ours
    facts = facts | {"versions": {"jax": "1.2", "libtpu": "3.4"}}
    head = table(recipe, facts, on_chip(made), 0).splitlines()[0]
    assert head.endswith("; jax 1.2, libtpu 3.4")
    head = table(recipe, facts, made, 0).splitlines()[0]
    assert head.endswith("; jax 1.2")  # without a TPU libtpu has no part in it


def test_without_cycles_a_time_is_called_a_lower_bound(plan):
    recipe, facts, made = plan
    unit, scale = time_unit(made.exposed)
    said = table(recipe, facts, made, 0)
    assert f"at least {made.hidden / scale:.4g} {unit} ({LEAST})" in said and "hidden" not in said
    assert LEAST in draw(made) and "nothing hidden" not in draw(made)
    assert LEAST not in table(recipe, facts, on_chip(made), 0)
    assert "nothing hidden" in draw(on_chip(made))


def test_small_plans_are_in_small_units(plan):
    recipe, facts, made = plan
    small = on_chip(made)
    rows = [dataclasses.replace(made.collectives[0], bytes=3 * 2**20, seconds=5e-5)]
    said = table(recipe, facts, dataclasses.replace(small, collectives=rows), 0)
    assert "MiB sent  us at bandwidth" in said and "3.000          50.0000" in said
    assert "0.4 .. 1.2   communication" in said
    picture, last = draw(small), in_short(small)
    assert "1.200 ms with nothing hidden" in picture
    assert f"{human_bytes(made.memory['peak'])} of 15.8 GiB at its peak" in picture
    assert last.startswith("0.000400 .. 0.00120 s per step, ")
    assert last.endswith("15.75 GiB per device")
    large = dataclasses.replace(small, hidden=2.0, exposed=3.0,
                                memory=made.memory | {"peak": 4 * GIB})
    assert "  2 .. 3   communication" in table(recipe, facts, large, 0)
    assert "GiB per device" in draw(large)


def test_the_table_leaves_out_the_kernel_that_reads_a_cache(plan):
    recipe, facts, made = plan
    reason = "auto: on tpu, fast; with a key/value cache xla"
    facts = facts | {"attention": {"kernel": "splash", "reason": reason}}
    assert "attention splash (auto: on tpu, fast)\n" in table(recipe, facts, made, 0)
