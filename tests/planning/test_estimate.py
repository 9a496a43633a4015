"""The estimate of a step that is compiled for the devices here."""

import jax
import pytest

from lmjax.config import load
from lmjax.data.rows import DECODER
from lmjax.planning.costs import step_costs
from lmjax.planning.estimate import estimate_step
from lmjax.planning.hlo import parse
from lmjax.planning.measure import measure
from lmjax.planning.table import in_short, table
from lmjax.training.program import make_program
from lmjax.training.recipe import build_recipe


def recipe_of(*overrides):
    return build_recipe(load("configs/llama2_7b.py:tiny", overrides))


@pytest.mark.long
def test_memory_is_what_the_arrays_take(here):
    recipe, facts, text = here
    memory, made = facts["memory"], estimate_step(facts, text)
    program = make_program(recipe, jax.devices(), vocab_size=256, fields=dict.fromkeys(DECODER, 32))
    state = program.spec.init(0)
    for kind, tree in (("parameters", state.params), ("optimizer", state.opt_state)):
        assert memory[kind] == sum(leaf.addressable_shards[0].data.nbytes
                                   for leaf in jax.tree.leaves(tree))
    assert memory["arguments"] >= sum(memory[k] for k in ("parameters", "optimizer", "batch"))
    assert memory["peak"] >= memory["arguments"] + memory["temporaries"] and made.fits


def test_flops_are_those_of_the_model_and_the_recomputed(here):
    made = estimate_step(*here[1:])
    layers = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # weights of the layers' matmuls
    tokens = made.tokens / made.devices
    attention = 12 * 2 * 64 * tokens * 32
    assert made.model_flops == pytest.approx(6 * tokens * (layers + 256 * 64) + attention)
    # remat=full computes the layers' forward matmuls again, or only those whose results the
    # backward pass needs.
    most = 2 * tokens * (layers + 2 * 2 * 64 * 64) * 1.01
    assert 2 * tokens * layers * 0.6 < made.recomputed < most
    assert made.flops > made.model_flops


@pytest.mark.long
def test_loops_of_unknown_length_make_a_lower_bound(here):
    """Chunked attention visits the blocks that are visible; their number is known only at run time.

    With remat=none nothing is computed again.
    """
    recipe = recipe_of("mesh.fsdp=8", "model.attention=chunked", "data.seq_len=512",
                       "model.remat=none")
    facts, text = measure(recipe, "cpu")
    made = estimate_step(facts, text)
    unknown, = made.unknown
    assert unknown == ("all rounds but one of 2 loops whose length is not known before they run, "
                       "such as those of attention=chunked and ring")
    assert f"not counted: {unknown}" in table(recipe, facts, made, 0)
    assert in_short(made).startswith("at least")
    assert made.recomputed == 0
    known = estimate_step(*here[1:])
    assert not known.unknown and not in_short(known).startswith("at least")


def test_collectives_are_those_of_the_mesh(here):
    made = estimate_step(*here[1:])
    sent = {row.kind: row.bytes for row in made.collectives}
    assert sent["all-gather"] > 0 and {row.link for row in made.collectives} == {"ici"}
    # They move weights and gradients, not logits or scores.
    assert sum(sent.values()) < 40 * made.memory["parameters"] * 4


@pytest.mark.long
@pytest.mark.parametrize("mesh, most", [("data=8", 4 * 115_008 + 64),
                                        ("data=2 tensor=4", 8 * 64 * 256 * 4 - 1)])
def test_replicas_sum_gradients_and_tensor_parallelism_sums_activations(mesh, most):
    """No collective reshards anything.

    data: each gradient is summed once. tensor: no sum is as large as the logits of a device's rows.
    The gathers are those of the residual stream: twice per layer in the forward pass, twice when it
    is recomputed, and twice for its gradient; once before the head, and once for the gradient of
    the embedding.
    """
    axes = [f"mesh.{axis}" for axis in mesh.split()]
    _, text = measure(recipe_of("mesh.data=1", "mesh.fsdp=1", *axes), "cpu")
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
    """fsdp splits the weights and scatters their sums; data then sums a quarter of the weights."""
    found = [c for c in step_costs(parse(here[2]), 8).collectives if "shard_map" in c.op_name]
    sent = {kind: sum(c.times * c.bytes for c in found if c.kind == kind)
            for kind in ("reduce-scatter", "all-reduce")}
    weights = 2 * 4 * (4 * 64 * 64 + 3 * 64 * 128)  # bytes of both layers
    assert sent == {"reduce-scatter": weights, "all-reduce": weights // 4}
