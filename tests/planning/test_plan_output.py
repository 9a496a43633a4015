"""What `lmjax plan` refuses before it compiles, and how it says what it found."""

import dataclasses

import jax
import pytest
from jax.experimental import topologies

from lmjax.cli.main import main
from lmjax.config import load
from lmjax.monitoring.units import human_bytes, time_unit
from lmjax.planning import plan
from lmjax.planning import search as plan_search
from lmjax.planning.estimate import LEAST, estimate_step
from lmjax.planning.measure import measure
from lmjax.planning.plan import as_json
from lmjax.planning.plots import draw
from lmjax.planning.table import in_short, table
from lmjax.runtime.chips import CHIPS, GIB, parse_topology
from lmjax.training.recipe import build_recipe


def recipe_of(*overrides, config="configs/llama2_7b.py:tiny"):
    return build_recipe(load(config, overrides))


@pytest.fixture(scope="module")
def here():
    recipe = recipe_of("mesh.data=2", "mesh.fsdp=4")
    result, text = measure(recipe, "cpu")
    return recipe, result, estimate_step(result, text)


def on_chip(made, **changes):
    """The same as if for TPU, where other compute takes time, too."""
    return dataclasses.replace(made, limit=CHIPS["v5e"].hbm, hidden=0.0004, exposed=0.0012, basis="cycles", **changes)


# --- refused before the compilation


@pytest.mark.parametrize("arguments, message", [
    (["--out", "{}/file"], "--out: expected a directory, got a file: "),
    (["--out", "{}/file/below"], "--out: expected a directory, got not a directory: "),
    (["--tokens=-5"], "--tokens: expected 0 or more, got -5; "), (["--tokens=nan"], "expected 0 or more, got nan; ")])
def test_bad_arguments_are_refused_before_the_step_is_compiled(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(plan, "compiled", lambda *_: pytest.fail("it was compiled"))
    arguments = [text.format(tmp_path) for text in arguments]
    assert main(["plan", "--config", "configs/llama2_7b.py:tiny", "--topology", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text, meant", [("v5e-16x16", "v5e:16x16"), ("2xv5litepod-4x4", "2xv5litepod:4x4")])
def test_a_shape_behind_a_hyphen_is_told_from_a_product(text, meant):
    with pytest.raises(ValueError, match=rf"got '{text}'; did you mean {meant}\?"):
        parse_topology(text)
    assert parse_topology(meant)


def test_shapes_that_libtpu_does_not_know_name_those_that_there_are(monkeypatch):
    def unknown(**_):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such thing")

    monkeypatch.setattr(topologies, "get_topology_desc", unknown)
    with pytest.raises(ValueError, match="of v5e 1x1, 2x2, .* to 16x16, got v5e:3x5; choose one$"):
        measure(recipe_of(), parse_topology("v5e:3x5"))
    with pytest.raises(ValueError, match="got INVALID_ARGUMENT: no such thing; "):  # it should have
        measure(recipe_of(), parse_topology("v5e:4x4"))


# --- search


def test_another_batch_takes_steps_for_as_many_tokens():
    recipe, topology = recipe_of(config="configs/llama2_7b.py"), parse_topology("v5e-256")
    batch, steps = recipe.train.batch_size, recipe.train.steps
    found = list(plan_search.candidates(recipe, topology))
    assert {c.recipe.train.batch_size for c in found} > {batch}
    for c in found:
        train = c.recipe.train
        assert abs(train.steps * train.batch_size - steps * batch) <= train.batch_size / 2
        assert (f"--config.train.steps={train.steps}" in c.overrides) == (train.batch_size != batch)
        assert bool(plan_search.same_tokens(recipe, c.recipe)) == (train.batch_size != batch)
    double = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch_size=2 * batch, steps=7))
    assert plan_search.same_tokens(recipe, double) == [f"  batch {batch} -> {2 * batch}: 7 steps for the same tokens"]


def test_search_leaves_out_batches_whose_steps_are_fewer_than_the_warm_up():
    recipe = recipe_of("train.steps=100", "optimizer.warmup_steps=60", config="configs/llama2_7b.py")
    batches = {c.recipe.train.batch_size for c in plan_search.candidates(recipe, parse_topology("v5e-256"))}
    assert batches <= {recipe.train.batch_size // 2, recipe.train.batch_size}


def test_search_prints_what_fits_in_order():
    rows = [{"overrides": [name], "peak_bytes": peak, "mfu": [0.4, 0.5], "tokens_per_second_per_chip": [speed, speed]}
            for name, peak, speed in (("slow", 2 * GIB, 10), ("fast", GIB // 2, 20))]
    fast, slow = plan_search.ranked([*rows, {"overrides": ["large"], "needs_bytes": 1}])
    assert "512.0 MiB, 20 tokens/s per chip, MFU 40.0% .. 50.0%: fast" in fast and "2.0 GiB, 10 tokens/s" in slow


# --- figures


def test_the_report_says_of_what_it_is(here):
    recipe, result, made = here
    report, memory = as_json(recipe, result, made, 0), made.memory
    assert report["versions"]["jax"] == jax.__version__ and report["config"]["mesh"]["fsdp"] == 4
    assert memory["padding"] == memory["arguments"] - sum(memory[k] for k in ("parameters", "optimizer", "average",
                                                                             "batch"))
    result = result | {"versions": {"jax": "1.2", "libtpu": "3.4"}}
    assert table(recipe, result, on_chip(made), 0).splitlines()[0].endswith("; jax 1.2, libtpu 3.4")
    assert table(recipe, result, made, 0).splitlines()[0].endswith("; jax 1.2")  # which libtpu is not asked


def test_without_cycles_a_time_is_called_a_lower_bound(here):
    recipe, result, made = here
    unit, scale = time_unit(made.exposed)
    said = f"at least {made.hidden / scale:.4g} {unit} ({LEAST})"
    assert said in table(recipe, result, made, 0) and "hidden" not in table(recipe, result, made, 0)
    assert LEAST in draw(made) and "nothing hidden" not in draw(made)
    assert LEAST not in table(recipe, result, on_chip(made), 0) and "nothing hidden" in draw(on_chip(made))


def test_small_plans_are_in_small_units(here):
    recipe, result, made = here
    small = on_chip(made)
    rows = [dataclasses.replace(made.collectives[0], bytes=3 * 2**20, seconds=5e-5)]
    said = table(recipe, result, dataclasses.replace(small, collectives=rows), 0)
    assert "MiB sent  us at bandwidth" in said and "3.000          50.0000" in said
    assert "0.4 .. 1.2   communication" in said and "1.200 ms with nothing hidden" in draw(small)
    assert f"{human_bytes(made.memory['peak'])} of 15.8 GiB at its peak" in draw(small)
    assert in_short(small).startswith("0.000400 .. 0.00120 s per step, ")
    assert in_short(small).endswith("15.75 GiB per chip")
    large = dataclasses.replace(small, hidden=2.0, exposed=3.0, memory=made.memory | {"peak": 4 * GIB})
    assert "  2 .. 3   communication" in table(recipe, result, large, 0) and "GiB per chip" in draw(large)


def test_the_table_leaves_out_what_kernels_do_with_a_cache(here):
    recipe, result, made = here
    result = result | {"attention": {"kernel": "splash", "reason": "auto: on tpu, fast; with a key/value cache xla"}}
    assert "attention splash (auto: on tpu, fast)\n" in table(recipe, result, made, 0)
