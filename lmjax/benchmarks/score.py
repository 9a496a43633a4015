"""`lmjax bench score`: compares scoring with computing the logits of the same tokens.

Scoring needs one number per token, so it should cost about as much as the logits do, or less.
"""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.benchmarks.models import random_decoder
from lmjax.benchmarks.rounds import Report, Turn, in_turn, write_report
from lmjax.lm import LM
from lmjax.training.recipe import Recipe
from lmjax.tree import num_elements

LENGTH = 300  # tokens scored per text
BATCHES = (1, 16)  # texts that are scored together
END = 3  # tokens of a short answer after a long context
TURN = 0.1  # seconds per turn: a small model's work is too short to be measured by itself


def bench_score(recipe: Recipe, *, seconds: float = 60.0, out: str = "") -> Report:
    """Measures scoring with a recipe's decoder on one device and prints a table.

    Args:
      recipe: names the model; its weights are random.
      seconds: how long to measure, about.
      out: a file for the figures as JSON; "" writes none.
    Returns:
      the figures: seconds per call, and per score the median over the rounds of its seconds beside
      those of the logits of the same rows. On a CPU they are user and system time of this process.
    Raises:
      UserError: the model is no decoder.
    """
    lm = random_decoder(recipe, wanted="a decoder, which has likelihoods of texts",
                        example="configs/bench.py")
    platform = jax.devices()[0].platform
    clock, unit = ((time.process_time, "CPU s") if platform == "cpu" else (time.perf_counter, "s"))
    work = _work(lm)
    times = in_turn([_turn(name, run, clock) for name, run in work.items()], seconds, clock)
    beside = {_score(n): _logits(n) for n in BATCHES} | {_end(): _logits(1)}
    report: Report = {
        "device": jax.devices()[0].device_kind, "dtype": str(lm.model.dtype), "unit": unit,
        "parameters": num_elements(lm.model.shapes), "vocabulary": lm.model.config.vocab_size,
        "rounds": len(times[_end()]),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "beside_logits": {
            name: statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
            for name, other in beside.items()}}
    _print(report)
    write_report(report, out)
    return report


def _score(texts: int) -> str:
    return f"score {LENGTH} tokens x {texts}"


def _logits(texts: int) -> str:
    return f"logits {LENGTH} tokens x {texts}"


def _end() -> str:
    return f"score the last {END} of {LENGTH} x 1"


def _work(lm: LM) -> dict[str, Callable[[], object]]:
    rows = np.random.default_rng(0).integers(
        2, lm.model.config.vocab_size, (max(BATCHES), LENGTH + 1))

    def score(texts: int, tokens: int) -> object:
        return lm.continuations([(row, tokens) for row in rows[:texts]])

    def logits(tokens_BT: jax.Array) -> object:
        return jax.block_until_ready(lm.logits(tokens_BT))

    work: dict[str, Callable[[], object]] = {}
    for n in BATCHES:
        work[_score(n)] = functools.partial(score, n, LENGTH)
        work[_logits(n)] = functools.partial(logits, jnp.asarray(rows[:n, :-1]))
    return work | {_end(): functools.partial(score, 1, END)}


def _turn(name: str, run: Callable[[], object], clock: Callable[[], float]) -> Turn:
    """Compiles, and repeats what is too short to be measured by itself."""
    run()
    began = clock()
    run()
    times = max(1, int(TURN / max(clock() - began, 1e-4)))

    def repeated() -> None:
        for _ in range(times):
            run()

    return Turn(name, repeated, times, "call")


def _print(report: Report) -> None:
    print(f"{report['device']}, {report['dtype']}, {report['parameters'] / 1e6:.1f}M parameters, "
          f"vocabulary of {report['vocabulary']:,}, {report['rounds']} rounds")
    print(f"{'':30}{report['unit']:>12}{'beside logits':>16}")
    for name, value in report["seconds"].items():
        ratio = report["beside_logits"].get(name)
        print(f"{name:30}{value:12.4f}" + (f"{ratio:16.2f}" if ratio else ""))
