"""`lmjax plan --search`: the candidates, the analytic model that ranks them, and the choice."""

import dataclasses
import re

import pytest

from lmjax.config import load
from lmjax.errors import UserError
from lmjax.planning import search as plan_search
from lmjax.planning.analytic import guess, remat_costs
from lmjax.planning.search import candidates, ranked, same_tokens, what_would_fit
from lmjax.runtime.chips import CHIPS, GIB, parse_topology
from lmjax.training.recipe import build_recipe

V5E = parse_topology("v5e-64")


def recipe_of(*overrides, config="configs/llama2_7b.py"):
    return build_recipe(load(config, overrides))


@pytest.fixture(scope="module")
def found():
    """A recipe and all its candidates."""
    recipe = recipe_of()
    return recipe, list(candidates(recipe, V5E))


def test_candidates_divide_and_leave_the_rest_alone(found):
    _, found = found
    assert len({c.overrides for c in found}) == len(found) > 100
    for c in found[:: len(found) // 50]:
        mesh = c.recipe.mesh
        assert mesh.data * mesh.fsdp * mesh.context * mesh.tensor == V5E.devices
        assert recipe_of(*(text.removeprefix("--config.") for text in c.overrides)) == c.recipe


def test_another_batch_takes_steps_for_as_many_tokens(found):
    recipe, found = found
    batch, steps = recipe.train.batch_size, recipe.train.steps
    assert {c.recipe.train.batch_size for c in found} > {batch}
    for c in found:
        train = c.recipe.train
        changed = train.batch_size != batch
        assert abs(train.steps * train.batch_size - steps * batch) <= train.batch_size / 2
        assert (f"--config.train.steps={train.steps}" in c.overrides) == changed
        assert bool(same_tokens(recipe, c.recipe)) == changed
    train = dataclasses.replace(recipe.train, batch_size=2 * batch, steps=7)
    assert same_tokens(recipe, dataclasses.replace(recipe, train=train)) == [
        f"  batch {batch} -> {2 * batch}: 7 steps for the same tokens"]


def test_batches_whose_steps_are_fewer_than_the_warm_up_are_left_out():
    recipe = recipe_of("train.steps=100", "optimizer.warmup_steps=60")
    batches = {c.recipe.train.batch_size for c in candidates(recipe, V5E)}
    assert batches <= {recipe.train.batch_size // 2, recipe.train.batch_size}


def test_what_remat_keeps_and_computes_again():
    """A layer of Llama-2 7B: as many heads as groups, and three matrices of 4096 x 11008."""
    D, F = 4096, 11008
    layer, c = 4 * D * D + 3 * D * F, recipe_of().model
    for remat, kept, again, kernel in (
            ("full", D, 4 * D * D + 2 * D * F, 1),
            ("attention", 6 * D, 2 * D * F, 0),
            ("dots", 5 * D + 2 * F, 0, 1),
            ("query+key+value+kernel+out+gate+up", 6 * D + 2 * F, 0, 0),
            ("kernel+host:up", 2 * D, 4 * D * D + D * F, 0)):
        costs = remat_costs(dataclasses.replace(c, remat=remat), layer, 1)
        assert costs == pytest.approx((2 * kept, again / layer, kernel)), remat
    halves = remat_costs(dataclasses.replace(c, remat="attention"), layer, 2)
    assert halves[0] == 2 * 6 * D / 2


def test_the_guess_knows_what_costs():
    v5p = parse_topology("v5p-128")
    full = guess(recipe_of("mesh.fsdp=64"), v5p)
    dots = guess(recipe_of("mesh.fsdp=64", "model.remat=dots"), v5p)
    micro = guess(recipe_of("mesh.fsdp=64", "train.microbatches=4"), v5p)
    assert dots.memory > full.memory and dots.seconds_per_token < full.seconds_per_token
    assert micro.memory < full.memory and micro.seconds_per_token >= full.seconds_per_token
    state = 16 * 6.7e9 / 64
    assert state < full.memory < CHIPS["v5p"].hbm and full.memory < state + 40 * GIB


def test_replicas_sum_the_gradients_of_every_microbatch():
    """Four microbatches cost four times as much as one, for as many tokens."""
    def seconds(data, microbatches):
        recipe = recipe_of(f"mesh.data={data}", "mesh.fsdp=8", f"train.batch_size={64 * data}",
                           f"train.microbatches={microbatches}")
        return guess(recipe, parse_topology("v5p-128")).seconds_per_token

    one, four = (seconds(8, count) - seconds(1, count) for count in (1, 4))
    assert four == pytest.approx(4 * one)


def test_search_compiles_the_best_and_takes_the_fastest_that_fits(monkeypatch, found):
    recipe, found = found
    asked = []

    def compiled(changed, topology, log):
        asked.append(changed)
        peak = 20 * GIB if len(asked) == 1 else 8 * GIB  # the first turns out too large
        seconds = 5.0 if len(asked) != 3 else 1.0
        return {"peak": peak, "seconds": seconds}, "text"

    class Made:
        def __init__(self, facts):
            self.memory, self.fits = {"peak": facts["peak"]}, facts["peak"] < V5E.chip.hbm
            self.hidden = self.exposed = facts["seconds"]
            self.tokens_per_second = self.mfu = (1 / facts["seconds"],) * 2

    monkeypatch.setattr(plan_search, "candidates", lambda *_: found)
    monkeypatch.setattr(plan_search, "compiled", compiled)
    monkeypatch.setattr(plan_search, "estimate_step", lambda facts, text: Made(facts))
    best, rows = plan_search.search(recipe, V5E, log=lambda line: None)
    assert best.recipe == asked[2] and len(rows) == plan_search.COMPILED + 1
    assert "needs_bytes" in rows[0]


def test_search_leaves_out_what_the_compiler_refuses(monkeypatch, found):
    recipe, found = found
    asked, said = [], []

    def refuses_the_first(changed, topology, log):
        asked.append(changed)
        if len(asked) == 1:
            raise UserError("the step to compile", "INTERNAL", "change it")
        return {"needs": 20 * GIB}, ""

    monkeypatch.setattr(plan_search, "candidates", lambda *_: found)
    monkeypatch.setattr(plan_search, "compiled", refuses_the_first)
    with pytest.raises(UserError, match="expected a combination that fits"):
        plan_search.search(recipe, V5E, log=said.append)
    assert len(asked) == 2 * plan_search.COMPILED
    assert any("left out: expected the step to compile" in line for line in said)

    def refuses_all(*_):
        raise UserError("the step to compile", "INTERNAL", "change it")

    monkeypatch.setattr(plan_search, "compiled", refuses_all)
    with pytest.raises(UserError, match="got INTERNAL"):  # the message is not that nothing fits
        plan_search.search(recipe, V5E, log=said.append)


def test_search_prints_what_fits_in_order():
    rows = [{"overrides": [name], "peak_bytes": peak, "mfu": [0.4, 0.5],
             "tokens_per_second_per_device": [speed, speed]}
            for name, peak, speed in (("slow", 2 * GIB, 10), ("fast", GIB // 2, 20))]
    fast, slow = ranked([*rows, {"overrides": ["large"], "needs_bytes": 1}])
    assert "512.0 MiB, 20 tokens/s per device, MFU 40.0% .. 50.0%: fast" in fast
    assert "2.0 GiB, 10 tokens/s" in slow


@pytest.mark.parametrize("config", ["llama2_70b", "llama3_405b"])
def test_what_would_fit_exists(config):
    named = re.findall(r"(?:(\d+) slices of )?(\d+) ((?:v|tpu)\w+)",
                       what_would_fit(recipe_of(config=f"configs/{config}.py")))
    assert [name for *_, name in named] == list(CHIPS)
    for slices, chips, name in named:
        where = parse_topology(f"{slices or 1}x{name}-{int(chips) * CHIPS[name].cores}")
        assert where.chips == int(slices or 1) * int(chips)


def test_search_says_what_would_fit():
    message = r"--search: expected a combination that fits .* got none of \d+; .* \d+ v5p"
    with pytest.raises(UserError, match=message):
        plan_search.search(recipe_of(), parse_topology("v5e-4"), log=lambda line: None)
