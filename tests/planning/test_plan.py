"""`lmjax plan`: a step compiled for what is here and for a TPU that is not, and the arithmetic made from it."""

import dataclasses
import importlib.util
import json
import pathlib
import re

import jax
import pytest

from lmjax.cli.main import main
from lmjax.config import load
from lmjax.data.rows import DECODER
from lmjax.errors import UserError
from lmjax.planning import compile as plan_compile
from lmjax.planning import search as plan_search
from lmjax.planning.analytic import guess, remat_costs
from lmjax.planning.costs import CustomCall, step_costs
from lmjax.planning.estimate import estimate_step
from lmjax.planning.hlo import parse
from lmjax.planning.kernels import attention_flops, grouped_flops, visited_tiles
from lmjax.planning.measure import measure, needed_memory
from lmjax.planning.plan import as_json
from lmjax.planning.plots import draw
from lmjax.planning.table import in_short, table
from lmjax.runtime.chips import CHIPS, GIB, parse_topology
from lmjax.training.program import make_program
from lmjax.training.recipe import build_recipe

# By JAX's minor version, each with the libtpu that belongs to it: seconds of cycles and bytes of memory.
PINNED = {"10": {"seconds": 0.0018056, "peak": 19_649_024}, "12": {"seconds": 0.0017340, "peak": 16_507_904}}
ROOT = pathlib.Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def recipe_of(*overrides, config="configs/llama2_7b.py:tiny"):
    return build_recipe(load(config, overrides))


# --- topologies


@pytest.mark.parametrize("text, shape, chips", [
    ("v5e:16x16", (16, 16), 256), ("v5e-256", (16, 16), 256), ("v5litepod-8", (2, 4), 8), ("v6e-32", (4, 8), 32),
    ("v5p-128", (4, 4, 4), 64), ("v5p-8", (2, 2, 1), 4), ("v5p-2048", (8, 8, 16), 1024), ("v4:2x2x4", (2, 2, 4), 16),
    ("2xv5e:4x4", (4, 4), 32), ("v5p:16x16x24", (16, 16, 24), 6144)])
def test_topologies_by_name(text, shape, chips):
    found = parse_topology(text)
    assert (found.shape, found.chips) == (shape, chips)
    assert parse_topology(str(found)) == found


@pytest.mark.parametrize("text", ["v7x-8", "v5e", "v5e:16", "v5e:17x1", "v5p-12", "v5e-512", "0xv5e:2x2", "0xv5e-16",
                                  "v5p-1", "tpu v5e-8"])
def test_topologies_that_do_not_exist(text):
    with pytest.raises(ValueError, match="--topology: expected one such as .*, got .*; correct it"):
        parse_topology(text)


# --- attention kernels, which carry no cycles


@pytest.mark.parametrize("T, S, bq, bk, window", [(64, 64, 16, 16, 0), (64, 64, 16, 32, 0), (64, 64, 16, 8, 20),
                                                  (32, 64, 16, 16, 0), (64, 64, 64, 64, 0), (96, 96, 16, 32, 33)])
@pytest.mark.parametrize("causal", [True, False])
def test_visited_tiles_are_those_with_a_visible_pair(T, S, bq, bk, window, causal):
    seen = {(t // bq, s // bk) for t in range(T) for s in range(S)
            if (s <= t + S - T or not causal) and (not window or abs(t + S - T - s) < window)}
    assert visited_tiles(T, S, bq, bk, window, causal) == len(seen)


def test_flops_of_kernels():
    arrays = ("bf16", (3, 8, 64, 16))
    operands = (("s8", (1, 4, 2)), ("s32", (3, 64, 128)), ("s32", (3, 8, 64)), arrays, arrays)
    tile = 2 * 3 * 8 * 16 * 32 * 16  # heads, a tile of 16 by 32, head_dim
    for name, matmuls in (("splash_mha_fwd", 2), ("splash_mha_dq", 3), ("splash_mha_dkv", 4)):
        assert attention_flops(CustomCall("tpu_custom_call", name, operands, 1), 0) == matmuls * tile * 6
    both = CustomCall("tpu_custom_call", "splash_mha_dkv", operands, 1, (arrays,) * 3)  # makes dq, too
    assert attention_flops(both, 0) == 5 * tile * 6
    gmm = CustomCall("tpu_custom_call", "gmm", (("s32", (4,)), ("bf16", (96, 8)), ("bf16", (4, 8, 16))), 1)
    back = CustomCall("tpu_custom_call", "ragged-dot-none",
                      (("s32", (4,)), ("bf16", (96, 16)), ("bf16", (4, 8, 16))), 1)
    tgmm = CustomCall("tpu_custom_call", "tgmm", (("bf16", (8, 96)), ("bf16", (96, 16))), 1)
    assert grouped_flops(gmm) == grouped_flops(back) == grouped_flops(tgmm) == 2 * 96 * 8 * 16


KERNELS = """ENTRY %main (q: bf16[8,64,16], x: bf16[96,8], w: bf16[4,8,16]) -> bf16[96,16] {
  %q = bf16[8,64,16]{2,1,0} parameter(0)
  %x = bf16[96,8]{1,0} parameter(1)
  %w = bf16[4,8,16]{2,1,0} parameter(2)
  %f = bf16[8,64,16]{2,1,0} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/jvp()/splash_mha_fwd"}
  %g = bf16[8,64,16]{2,1,0} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/transpose(jvp())/splash_mha_fwd"}
  %m = bf16[96,16]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/jvp()/ragged-dot-none"}
  ROOT %n = bf16[96,16]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/transpose(jvp())/checkpoint/rematted_computation/ragged-dot-none"}
}"""
RESULT = {"topology": "v5p:2x2x1", "devices": 4, "slices": [0] * 4, "mesh": {"expert": 4}, "memory": {}, "tokens": 96,
          "flops_per_token": 1.0, "window": 0, "causal": True, "spread": False}


@pytest.mark.parametrize("ways", [1, 4])
def test_kernels_count_as_compiled_and_as_computed_again(ways):
    """Of the experts' rows each of the devices that share them multiplies those of its own."""
    made = estimate_step(RESULT | {"expert_ways": ways}, KERNELS)
    attention, grouped = 2 * 2 * 8 * 64 * 64 * 16, 2 * 96 * 8 * 16 / ways
    assert made.flops == 2 * attention + 2 * grouped and made.recomputed == attention + grouped
    assert made.seconds["grouped"] == pytest.approx(2 * grouped / 0.7 / CHIPS["v5p"].flops)


@pytest.mark.parametrize("device, window", [(0, 0), (3, 0), (2, 40)])
def test_spread_queries_visit_as_many_tiles_on_every_device(device, window):
    """256 tokens on 4 devices: each has pieces of 32 queries, one from either half."""
    shapes = (("s8", (1, 4, 8)), ("bf16", (8, 64, 16)), ("bf16", (8, 256, 16)))
    queries = [*range(32 * device, 32 * (device + 1)), *range(32 * (7 - device), 32 * (8 - device))]
    seen = {(t // 16, s // 32) for t in queries for s in range(t + 1) if not window or t - s < window}
    flops = attention_flops(CustomCall("tpu_custom_call", "splash_mha_fwd", shapes, 1), window, spread=True)
    assert flops >= 2 * 2 * 8 * 16 * 32 * 16 * len(seen) and (flops == 2 * 2 * 8 * 16 * 32 * 16 * len(seen) or window)


# --- the devices that are here


@pytest.fixture(scope="module")
def here():
    recipe = recipe_of("mesh.data=2", "mesh.fsdp=4")
    return recipe, *measure(recipe, "cpu")


def test_memory_is_what_the_arrays_take(here):
    recipe, result, text = here
    memory, made = result["memory"], estimate_step(result, text)
    state = make_program(recipe, jax.devices(), vocab_size=256, fields=dict.fromkeys(DECODER, 32)).spec.init(0)
    for kind, tree in (("parameters", state.params), ("optimizer", state.opt_state)):
        assert memory[kind] == sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
    assert memory["arguments"] >= sum(memory[k] for k in ("parameters", "optimizer", "batch"))
    assert memory["peak"] >= memory["arguments"] + memory["temporaries"] and made.fits


def test_flops_are_the_models_and_the_recomputed(here):
    recipe, result, text = here
    made = estimate_step(result, text)
    layers = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # weights of the layers' matmuls
    tokens = made.tokens / made.chips
    assert made.model_flops == pytest.approx(6 * tokens * (layers + 256 * 64) + 12 * 2 * 64 * tokens * 32)
    # remat=full: the layers' forward matmuls again, or all but those whose results nothing of the backward pass needs.
    assert 2 * tokens * layers * 0.6 < made.recomputed < 2 * tokens * (layers + 2 * 2 * 64 * 64) * 1.01
    assert made.flops > made.model_flops
    assert estimate_step(*measure(recipe_of("mesh.data=2", "mesh.fsdp=4", "model.remat=none"), "cpu")).recomputed == 0


def test_loops_of_unknown_length_make_a_lower_bound(here):
    """Attention in blocks visits those that can be seen: how many is known only where it runs."""
    recipe = recipe_of("mesh.fsdp=8", "model.attention=chunked", "data.seq_len=2048")
    result, text = measure(recipe, "cpu")
    made = estimate_step(result, text)
    assert made.unknown == ["all rounds but one of 3 loops whose length is not known before they run, such as those of "
                            "attention=chunked and ring"]
    assert f"not counted: {made.unknown[0]}" in table(recipe, result, made, 0) and in_short(made).startswith("at least")
    assert not estimate_step(*here[1:]).unknown and not in_short(estimate_step(*here[1:])).startswith("at least")


def test_collectives_are_those_of_the_mesh(here):
    made = estimate_step(*here[1:])
    sent = {row.kind: row.bytes for row in made.collectives}
    assert sent["all-gather"] > 0 and {row.link for row in made.collectives} == {"ici"}
    assert sum(sent.values()) < 40 * made.memory["parameters"] * 4  # weights and gradients, not logits or scores


@pytest.mark.parametrize("mesh, most", [("data=8", 4 * 115_008 + 64), ("data=2 tensor=4", 8 * 64 * 256 * 4 - 1)])
def test_replicas_sum_gradients_and_tensor_parallelism_sums_activations(mesh, most):
    """Nothing is exchanged or resharded. data: each gradient is summed once; tensor: nothing that is summed is as large
    as the logits of a device's rows, and what is gathered is the residual stream: twice a layer in the forward pass, as
    often recomputed, and twice its gradient; before the head, and the gradient behind the table."""
    _, text = measure(recipe_of("mesh.data=1", "mesh.fsdp=1", *(f"mesh.{axis}" for axis in mesh.split())), "cpu")
    found = step_costs(parse(text), 8).collectives
    gathered = [c for c in found if c.kind == "all-gather"]
    assert {c.kind for c in found} - {"all-gather"} == {"all-reduce"}
    assert {c.bytes for c in gathered} <= {8 * 64 * 64 * 4}
    assert sum(c.times for c in gathered) == (0 if mesh == "data=8" else 2 * (2 + 2 + 2) + 2)
    total = sum(c.times * c.bytes for c in found)
    assert max(c.bytes for c in found) <= most and total > 4 * 115_008
    if mesh == "data=8":
        assert total <= most


def test_gradients_of_layers_are_reduce_scattered(here):
    """Over fsdp, which splits the weights; what is then summed over data is a quarter of them."""
    found = [c for c in step_costs(parse(here[2]), 8).collectives if "shard_map" in c.op_name]
    sent = {kind: sum(c.times * c.bytes for c in found if c.kind == kind) for kind in ("reduce-scatter", "all-reduce")}
    weights = 2 * 4 * (4 * 64 * 64 + 3 * 64 * 128)  # bytes of both layers
    assert sent == {"reduce-scatter": weights, "all-reduce": weights // 4}


def test_the_report_holds_together(here, tmp_path):
    recipe, result, text = here
    made = estimate_step(result, text)
    report = json.loads(json.dumps(as_json(recipe, result, made, 1e9)))
    assert report["step_seconds"]["hidden"] <= report["step_seconds"]["exposed"]
    rate = report["tokens_per_second_per_chip"]["exposed"] * made.chips
    assert report["budgets"]["budget"]["days"][1] == pytest.approx(1e9 / rate / 86400)
    assert report["mfu"]["hidden"] == pytest.approx(made.model_flops / made.peak_flops / made.hidden)
    assert "lower bound" in table(recipe, result, made, 1e9) and draw(made).startswith("<?xml")


def test_only_plans_for_what_is_not_here_are_kept(monkeypatch, tmp_path):
    """The devices at hand may be others the next time, as `JAX_NUM_CPU_DEVICES` makes them here."""
    monkeypatch.setenv("LMJAX_PLAN_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    made = []

    def child(work, topology, flags, log):
        made.append(str(topology))
        (pathlib.Path(work) / "result.json").write_text(json.dumps(made))

    monkeypatch.setattr(plan_compile, "_run_child", child)
    for topology, count in (("cpu", 1), ("cpu", 2), (parse_topology("v5e-4"), 3), (parse_topology("v5e-4"), 3)):
        result, text = plan_compile.compiled(recipe_of(), topology, log=print)
        assert (len(result), text) == (count, "")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("arguments, message", [
    (["--topology", "v9:2x2"], "--topology: expected one such as"),
    (["--topology", "cpu", "--search"], "--search: expected a TPU topology"),
    (["--topology", "cpu", "--config.mesh.fsdp=3"], "config.mesh: expected axes whose product is the 8 devices")])
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LMJAX_PLAN_CACHE", str(tmp_path))
    assert main(["plan", "--config", "configs/llama2_7b.py:tiny", *arguments]) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("lmjax: error: ") and message in error
    assert all(line.startswith("compiling for") for line in progress)  # on a slow machine


# --- search


def test_candidates_divide_and_leave_the_rest_alone():
    recipe, topology = recipe_of(config="configs/llama2_7b.py"), parse_topology("v5e-256")
    found = list(plan_search.candidates(recipe, topology))
    assert len({c.overrides for c in found}) == len(found) > 100
    for c in found[:: len(found) // 50]:
        mesh = c.recipe.mesh
        assert mesh.data * mesh.fsdp * mesh.context * mesh.tensor == 256
        again = build_recipe(load("configs/llama2_7b.py", [o.removeprefix("--config.") for o in c.overrides]))
        assert again == c.recipe


def test_what_is_kept_and_what_is_computed_again():
    """A layer of Llama-2 7B: as many heads as it has groups, and three matrices of 4096 x 11008 in the MLP."""
    D, F = 4096, 11008
    layer, c = 4 * D * D + 3 * D * F, recipe_of(config="configs/llama2_7b.py").model
    for remat, kept, again, kernel in (
            ("full", D, 4 * D * D + 2 * D * F, 1), ("attention", 6 * D, 2 * D * F, 0),
            ("dots", 5 * D + 2 * F, 0, 1), ("query+key+value+kernel+out+gate+up", 6 * D + 2 * F, 0, 0),
            ("kernel+host:up", 2 * D, 4 * D * D + D * F, 0)):
        found = remat_costs(dataclasses.replace(c, remat=remat), layer, 1)
        assert found == pytest.approx((2 * kept, again / layer, kernel)), remat
    halves = remat_costs(dataclasses.replace(c, remat="attention"), layer, 2)
    assert halves[0] == 2 * 6 * D / 2


def test_the_guess_knows_what_costs():
    recipe, topology = recipe_of("mesh.fsdp=64", config="configs/llama2_7b.py"), parse_topology("v5p-128")
    guessed = guess(recipe, topology)
    dots, micro = (guess(recipe_of("mesh.fsdp=64", change, config="configs/llama2_7b.py"), topology)
                   for change in ("model.remat=dots", "train.microbatches=4"))
    assert dots.memory > guessed.memory and dots.seconds_per_token < guessed.seconds_per_token
    assert micro.memory < guessed.memory and micro.seconds_per_token >= guessed.seconds_per_token
    # Replicas sum the gradients of every microbatch: four cost four times what one does, for as many tokens.
    cost = {}
    for count in (1, 4):
        alone, many = (guess(recipe_of(f"mesh.data={data}", "mesh.fsdp=8", f"train.batch_size={64 * data}",
                                                   f"train.microbatches={count}", config="configs/llama2_7b.py"),
                                         topology).seconds_per_token for data in (1, 8))
        cost[count] = many - alone
    assert cost[4] == pytest.approx(4 * cost[1])
    state = 16 * 6.7e9 / 64
    assert state < guessed.memory < CHIPS["v5p"].hbm and guessed.memory < state + 40 * GIB


def test_search_compiles_the_best_and_takes_the_fastest_that_fits(monkeypatch):
    recipe, topology = recipe_of(config="configs/llama2_7b.py"), parse_topology("v5e-256")
    asked = []

    def compiled(changed, topology, log):
        asked.append(changed)
        peak = 20 * GIB if len(asked) == 1 else 8 * GIB  # the first turns out too large
        seconds = 5.0 if len(asked) != 3 else 1.0
        return {"peak": peak, "seconds": seconds}, "text"

    class Made:
        def __init__(self, result):
            self.memory, self.fits = {"peak": result["peak"]}, result["peak"] < topology.chip.hbm
            self.hidden = self.exposed = result["seconds"]
            self.tokens_per_second = self.mfu = (1 / result["seconds"],) * 2

    monkeypatch.setattr(plan_search, "compiled", compiled)
    monkeypatch.setattr(plan_search, "estimate_step", lambda result, text: Made(result))
    best, rows = plan_search.search(recipe, topology, log=lambda line: None)
    assert best.recipe == asked[2] and len(rows) == plan_search.COMPILED + 1 and "needs_bytes" in rows[0]


def test_search_leaves_out_what_the_compiler_refuses(monkeypatch):
    recipe, topology = recipe_of(config="configs/llama2_7b.py"), parse_topology("v5e-256")
    asked, said = [], []

    def compiled(changed, topology, log):
        asked.append(changed)
        if len(asked) == 1:
            raise UserError("the step to compile", "INTERNAL", "change it")
        return {"needs": 20 * GIB}, ""

    monkeypatch.setattr(plan_search, "compiled", compiled)
    with pytest.raises(ValueError, match="expected a combination that fits"):
        plan_search.search(recipe, topology, log=said.append)
    assert len(asked) == 2 * plan_search.COMPILED and any("left out: expected the step to compile" in s for s in said)
    monkeypatch.setattr(plan_search, "compiled", lambda *_: compiled(asked.clear(), topology, None))
    with pytest.raises(ValueError, match="got INTERNAL"):  # not that nothing fits
        plan_search.search(recipe, topology, log=said.append)


@pytest.mark.parametrize("config", ["llama2_70b", "llama3_405b"])
def test_what_would_fit_exists(config):
    named = re.findall(r"(?:(\d+) slices of )?(\d+) (v\w+)",
                       plan_search.what_would_fit(recipe_of(config=f"configs/{config}.py")))
    assert [name for *_, name in named] == list(CHIPS)
    for slices, chips, name in named:
        where = parse_topology(f"{slices or 1}x{name}-{int(chips) * CHIPS[name].cores}")
        assert where.chips == int(slices or 1) * int(chips)


def test_search_says_what_would_fit():
    recipe, topology = recipe_of(config="configs/llama2_7b.py"), parse_topology("v5e-4")
    with pytest.raises(ValueError, match=r"--search: expected a combination that fits .* got none of \d+; .* \d+ v5p"):
        plan_search.search(recipe, topology, log=lambda line: None)


# --- a TPU that is not here


@needs_libtpu
def test_a_step_for_tpu_costs_what_it_did(tmp_path, monkeypatch, capsys):
    """A performance test without noise: the compiler's cycles and memory of a small step are the same every time."""
    monkeypatch.setenv("LMJAX_PLAN_CACHE", str(tmp_path))
    out = tmp_path / "out"
    overrides = ["model.embed_dim=256", "model.mlp_dim=512", "model.num_heads=4", "data.seq_len=512",
                 "train.batch_size=32", "mesh.fsdp=16"]
    assert main(["plan", "--config", "configs/llama2_7b.py:tiny", "--topology", "v5e:4x4", "--out", str(out),
                 *(f"--config.{item}" for item in overrides)]) == 0
    report = json.loads((out / "plan.json").read_text())
    assert report["basis"] == "the compiler's cycles" and report["fits"] and report["limit"] == CHIPS["v5e"].hbm
    expected = PINNED[jax.__version__.split(".")[1]]
    assert report["seconds"]["matmul"] + report["seconds"]["other"] == pytest.approx(expected["seconds"], rel=0.02)
    assert report["memory"]["peak"] == pytest.approx(expected["peak"], rel=0.02)
    assert "whole step" in capsys.readouterr().out


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("embed, kinds", [("fsdp", {"all-reduce"}), ("data,fsdp", {"all-gather", "reduce-scatter"})])
def test_slices_sum_gradients_and_gather_only_weights_that_are_split_over_them(embed, kinds, tmp_path, monkeypatch,
                                                                               capsys):
    """Each of n = 2 chips with the same shard sends it once (2 (n-1)/n of it), in bfloat16."""
    monkeypatch.setenv("LMJAX_PLAN_CACHE", str(tmp_path))
    overrides = ("model.embed_dim=512 model.mlp_dim=1024 model.num_heads=4 data.seq_len=256 train.batch_size=32 "
                 f"mesh.data=2 mesh.fsdp=4 mesh.rules.embed={embed}").split()
    assert main(["plan", "--config", "configs/llama2_7b.py:tiny", "--topology", "2xv5e:2x2", "--out",
                 str(tmp_path / "out"), *(f"--config.{item}" for item in overrides)]) == 0
    report = json.loads((tmp_path / "out/plan.json").read_text())
    sent = {row["kind"]: row for row in report["collectives"] if row["link"] == "dcn" and row["bytes"] > 2**20}
    assert set(sent) == kinds and all(row["asynchronous"] for row in sent.values())
    assert sum(row["seconds"] for row in sent.values()) == pytest.approx(
        sum(row["bytes"] for row in sent.values()) / CHIPS["v5e"].dcn)
    if embed == "fsdp":
        assert 1 <= sent["all-reduce"]["bytes"] / (2 * report["parameters"] / 4) < 1.5
    assert ("gathered over dcn" in capsys.readouterr().out) == (embed != "fsdp")


@pytest.mark.parametrize("message, gib", [
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
     "15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5),
    ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
     "temporaries (32.17G) exceeds available HBM (15.75G). HLO module: jit_step", 32.17),
    ("RESOURCE_EXHAUSTED: scoped vmem limit exceeded: 20.50M of 16.00M", None)])
def test_the_memory_that_the_compiler_says_was_missing(message, gib):
    assert needed_memory(message) == (gib and pytest.approx(gib * GIB, rel=1e-6))
