"""FLOPs of Pallas kernels, which carry no cycles."""

import pytest

from lmjax.planning.costs import CustomCall
from lmjax.planning.estimate import estimate_step
from lmjax.planning.kernels import attention_flops, grouped_flops, visited_tiles
from lmjax.runtime.chips import CHIPS


def pallas(name, *operands, results=()):
    return CustomCall("tpu_custom_call", name, operands, 1, results)


@pytest.mark.parametrize("T, S, bq, bk, window", [
    (64, 64, 16, 16, 0), (64, 64, 16, 32, 0), (64, 64, 16, 8, 20), (32, 64, 16, 16, 0),
    (64, 64, 64, 64, 0), (96, 96, 16, 32, 33)])
@pytest.mark.parametrize("causal", [True, False])
def test_visited_tiles_are_those_with_a_visible_pair(T, S, bq, bk, window, causal):
    seen = {(t // bq, s // bk) for t in range(T) for s in range(S)
            if (s <= t + S - T or not causal) and (not window or abs(t + S - T - s) < window)}
    assert visited_tiles(T, S, bq, bk, window, causal) == len(seen)


def test_flops_of_attention():
    array = ("bf16", (3, 8, 64, 16))
    operands = ("s8", (1, 4, 2)), ("s32", (3, 64, 128)), ("s32", (3, 8, 64)), array, array
    tile = 2 * 3 * 8 * 16 * 32 * 16  # heads, a tile of 16 by 32, head_dim
    for name, matmuls in (("splash_mha_fwd", 2), ("splash_mha_dq", 3), ("splash_mha_dkv", 4)):
        assert attention_flops(pallas(name, *operands), 0) == matmuls * tile * 6
    with_dq = pallas("splash_mha_dkv", *operands, results=(array,) * 3)
    assert attention_flops(with_dq, 0) == 5 * tile * 6


def test_flops_of_grouped_matmuls():
    sizes, weights = ("s32", (4,)), ("bf16", (4, 8, 16))
    forward = pallas("gmm", sizes, ("bf16", (96, 8)), weights)
    backward = pallas("ragged-dot-none", sizes, ("bf16", (96, 16)), weights)
    of_weights = pallas("tgmm", ("bf16", (8, 96)), ("bf16", (96, 16)))
    for call in (forward, backward, of_weights):
        assert grouped_flops(call) == 2 * 96 * 8 * 16


@pytest.mark.parametrize("device, window", [(0, 0), (3, 0), (2, 40)])
def test_spread_queries_visit_as_many_tiles_on_every_device(device, window):
    """256 tokens on 4 devices: each has two pieces of 32 queries, one from either half."""
    call = pallas("splash_mha_fwd", ("s8", (1, 4, 8)), ("bf16", (8, 64, 16)),
                  ("bf16", (8, 256, 16)))
    first, last = 32 * device, 32 * (7 - device)
    queries = [*range(first, first + 32), *range(last, last + 32)]
    seen = {(t // 16, s // 32) for t in queries for s in range(t + 1)
            if not window or t - s < window}
    flops, expected = attention_flops(call, window, spread=True), 4 * 8 * 16 * 32 * 16 * len(seen)
    assert flops >= expected and (flops == expected or window)


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
FACTS = {"topology": "v5p:2x2x1", "devices": 4, "slices": [0] * 4, "mesh": {"expert": 4},
         "memory": {}, "tokens": 96, "flops_per_token": 1.0, "window": 0, "causal": True,
         "spread": False}


@pytest.mark.parametrize("ways", [1, 4])
def test_kernels_count_as_compiled_and_as_recomputed(ways):
    """Of `ways` devices that share the experts, each multiplies the rows of its own experts."""
    made = estimate_step(FACTS | {"expert_ways": ways}, KERNELS)
    attention, grouped = 2 * 2 * 8 * 64 * 64 * 16, 2 * 96 * 8 * 16 / ways
    assert made.flops == 2 * attention + 2 * grouped and made.recomputed == attention + grouped
    assert made.seconds["grouped"] == pytest.approx(2 * grouped / 0.7 / CHIPS["v5p"].flops)
