"""FLOPs of Pallas kernels in a compiled step, from the shapes that they are called with.

XLA knows neither the cycles nor the FLOPs of a Pallas kernel. An attention kernel is charged for
the matmuls of every tile that it visits, a grouped matmul for all of its rows.
"""

import math
from typing import Any

from lmjax.planning.costs import REMAT, CustomCall

StepFacts = dict[str, Any]  # what `measure.measure` returns

ATTENTION_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4, "dq, dkv": 5}  # per visited tile, by pass
# Share of the peak rate that each kind of kernel is assumed to reach.
PEAK_SHARES = {"attention": 0.5, "grouped": 0.7}
ATTENTION_RULE = ("window", "causal", "spread")  # the `StepFacts` that say which tiles are visited
DEFAULT_TILE = 512  # queries and keys per tile, where the call has no table of tiles
FLOATS = ("bf16", "f32", "f16")


def is_kernel(call: CustomCall) -> bool:
    """Whether a call is a Pallas kernel that computes, not one that prepares group sizes."""
    return call.target == "tpu_custom_call" and call.op_name != "ragged-dot-metadata"


def kernel_flops(call: CustomCall, facts: StepFacts) -> tuple[str, float]:
    """The kind of a kernel, a key of `PEAK_SHARES`, and its FLOPs per execution on one device.

    0 FLOPs: the kernel is unknown.
    """
    if attention_pass(call):
        return "attention", attention_flops(call, *(facts[key] for key in ATTENTION_RULE))
    if "gmm" in call.op_name.lower() or "ragged-dot" in call.op_name:
        # A device skips the rows of experts that lie on other devices.
        return "grouped", grouped_flops(call) / facts["expert_ways"]
    return "attention", 0.0


def is_recomputed(call: CustomCall) -> bool:
    """Whether `jax.checkpoint` made the backward pass run the kernel again.

    Either its name says so, or it is attention's forward kernel in the backward pass.
    """
    return REMAT in call.op_name or (
        "transpose(" in call.op_name and attention_pass(call) == "fwd")


def attention_pass(call: CustomCall) -> str:
    """The pass of an attention kernel, a key of `ATTENTION_MATMULS`; "" for other calls.

    A dkv kernel with three results computes dq as well, from the same scores.
    """
    name = call.op_name.lower()
    if not any(word in name for word in ("attention", "splash", "flash", "mha")):
        return ""
    if "dkv" in name:
        return "dq, dkv" if len(call.results) == 3 else "dkv"
    return "dq" if "dq" in name else "fwd"


def attention_flops(call: CustomCall, window: int, causal: bool = True,
                    spread: bool = False) -> float:
    """FLOPs of an attention kernel over the tiles that it visits, on the device that visits most.

    That is the device with the last queries, or every device if the queries are spread over all of
    them (`sequence.balance_sequence`). The operands give the sizes: q is the first array of floats
    [..., H, T, K] and k the next one with the same K; a mask table of small integers
    [1 or H, tiles of T, tiles of S] gives the number of tiles.
    """
    floats = [dims for dtype, dims in call.operands if dtype in FLOATS and len(dims) >= 3]
    if len(floats) < 2:
        return 0.0
    q, k = floats[:2]
    T, K, S = q[-2], q[-1], k[-2]
    tables = [dims for dtype, dims in call.operands if dtype in ("s8", "s16", "s32")
              and len(dims) == 3 and dims[1] != T and dims[2] != S]  # others are segment ids
    tiles_T, tiles_S = ((max(table[i] for table in tables) for i in (1, 2)) if tables
                        else (-(-T // DEFAULT_TILE), -(-S // DEFAULT_TILE)))
    bq, bk = -(-T // tiles_T), -(-S // tiles_S)
    visited = visited_tiles(T // 2 if spread else T, S, bq, bk, window, causal)
    if spread:  # with a window this counts a little too much for the first half of the queries
        visited += visited_tiles(T // 2, S if window else T // 2, bq, bk, window)
    matmuls = ATTENTION_MATMULS[attention_pass(call)]
    return matmuls * 2.0 * math.prod(q[:-2]) * visited * bq * bk * K


def visited_tiles(T: int, S: int, bq: int, bk: int, window: int = 0, causal: bool = True) -> int:
    """The number of tiles of bq queries and bk keys in which some query sees some key.

    The T queries end where the S keys end. A query sees keys that are at most `window` - 1 away
    (0: any distance), and no later ones if attention is causal.
    """
    count = 0
    for i in range(-(-T // bq)):
        first, last = i * bq + S - T, min((i + 1) * bq, T) - 1 + S - T
        low = max(first - window + 1, 0) // bk if window else 0
        if not causal:
            last = last + window - 1 if window else S - 1
        count += max(min(last, S - 1) // bk - low + 1, 0)
    return count


def grouped_flops(call: CustomCall) -> float:
    """FLOPs of a grouped matmul: rows [M, K], each times one matrix of [E, K, N] or [E, N, K].

    Its transpose multiplies [K, M] or [M, K] by [M, N]. Each variant multiplies M rows.
    """
    floats = [dims for dtype, dims in call.operands
              if dtype in (*FLOATS, "s8") and len(dims) >= 2]
    if len(floats) < 2:
        return 0.0
    a, b = floats[:2]
    shared = max(set(a) & set(b), default=1) if len(b) == 2 else a[-1]
    return 2.0 * math.prod(a) * math.prod(b[-2:]) / shared
