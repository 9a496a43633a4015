"""A model in several formats: what each loses in quality, and gains in size and speed."""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.compression.quantize import quantize
from lmjax.decoding.generate import Generator
from lmjax.decoding.inputs import check_positions
from lmjax.decoding.sampling import Sampling
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.models.packing import TABLES
from lmjax.nn.packed import Quantization
from lmjax.tree import named_leaves, num_bytes, num_elements

PROMPT, ANSWER = 16, 128  # tokens
ROUNDS = 5  # of timing: in each, all formats take their turn


class Rung(NamedTuple):
    """One format of a model."""

    name: str
    megabytes: float  # of its parameters
    bits_per_weight: float  # with scales, over the matrices of layers
    perplexity: float  # per token of the texts that it was measured on
    tokens_per_second: float  # of one answer, on this machine
    speed: float  # the median over rounds of its speed over that of the first format


def ladder(lm: LM, texts: Sequence[str], *, calibration: Sequence[str] = (), group: int = 128,
           log: Callable[[str], None] = print) -> list[Rung]:
    """Measures a decoder in float32, bfloat16, int8 and int4.

    Args:
      lm: a model with float32 weights.
      texts: what quality is measured on.
      calibration: other texts, for GPTQ; none: every weight goes to the nearest integer.
      group: inputs that share a scale in int4.
      log: prints a line for the user.

    Raises:
      UserError: it is no decoder, or see `quantize`.
    """
    if lm.model.config.family != "decoder":
        raise UserError("a decoder, whose speed is that of its answers", lm.model.config.family,
                        "leave --ladder out", where="--ladder")
    check_positions(lm.model.config, PROMPT, "--ladder", answer=ANSWER)
    made = {"float32": lm, "bfloat16": _in_bfloat16(lm)}
    for weights, seen in (("int8", ()), ("int4", calibration)):
        log(f"{weights}: packing")
        made[weights] = quantize(lm, Quantization(weights, group), texts=seen, log=log)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    generators = {name: Generator(each.model, each.layout) for name, each in made.items()}
    for name, each in made.items():
        log(f"{name}: compiling")
        _seconds(generators[name], each)
    for n in range(ROUNDS):
        log(f"timing: round {n + 1} of {ROUNDS}")
        for name, each in made.items():
            seconds[name].append(_seconds(generators[name], each))
    rungs = []
    for name, each in made.items():
        log(f"{name}: scoring")
        scores = each.score(texts)
        nats = -sum(score.log_likelihood for score in scores)
        ratios = [a / b for a, b in zip(seconds["float32"], seconds[name], strict=True)]
        rungs.append(Rung(name, num_bytes(each.params) / 1e6, _bits(each, lm),
                          math.exp(nats / max(sum(score.tokens for score in scores), 1)),
                          ANSWER / statistics.median(seconds[name]),
                          statistics.median(ratios)))
    return rungs


def table(rungs: Sequence[Rung]) -> list[str]:
    """The ladder as lines of Markdown."""
    first = rungs[0]
    lines = ["| format | MB | bits per weight | perplexity | change | tokens/s | speed |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for rung in rungs:
        worse = rung.perplexity / first.perplexity - 1
        lines.append(f"| {rung.name} | {rung.megabytes:,.1f} | {rung.bits_per_weight:.2f} | "
                     f"{rung.perplexity:.3f} | {worse:+.2%} | {rung.tokens_per_second:,.0f} | "
                     f"{rung.speed:.2f} |")
    return lines


def draw(rungs: Sequence[Rung], out: str | os.PathLike) -> None:
    """Draws quality and speed against size; `out`: .png or .svg."""
    import matplotlib  # it takes half a second
    from matplotlib.figure import Figure

    from lmjax.reporting.plots import COLORS, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        panels = figure.subplots(1, 2)
        sizes = [rung.megabytes for rung in rungs]
        worse = [100 * (rung.perplexity / rungs[0].perplexity - 1) for rung in rungs]
        for axes, values, title in zip(
                panels, (worse, [rung.tokens_per_second for rung in rungs]),
                ("perplexity, % above float32", "tokens per second of one answer"), strict=True):
            axes.plot(sizes, values, color=COLORS["grid"], zorder=1)
            axes.scatter(sizes, values, color=COLORS["train"], s=40, zorder=2)
            for rung, size, value in zip(rungs, sizes, values, strict=True):
                axes.annotate(rung.name, (size, value), xytext=(6, 6),
                              textcoords="offset points")
            axes.set_title(title, loc="left")
            axes.set_xlabel("megabytes of parameters")
            axes.set_xlim(0, max(sizes) * 1.2)
        panels[0].set_ylim(min(-0.2, *worse), 1.2 * max(1.0, *worse))  # tiny changes look tiny
        panels[1].set_ylim(0, None)
        panels[1].margins(y=0.2)
        figure.savefig(out, dpi=150)


def _in_bfloat16(lm: LM) -> LM:
    model = dataclasses.replace(lm.model, dtype=jnp.dtype(jnp.bfloat16))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), lm.params)
    return LM(model, params, lm.layout, lm.tokenizer, lm.recipe, lm.about, lm.source)


def _bits(lm: LM, dense: LM) -> float:
    """Stored bits per weight of the matrices of layers."""
    def layers(params: object) -> dict[str, jax.Array]:
        return {name: leaf for name, leaf in named_leaves(params)
                if "layers/block/" in name and "/kernel" in name
                and not name.startswith(TABLES)}

    weights = num_elements(list(layers(dense.params).values()))
    return 8 * num_bytes(list(layers(lm.params).values())) / max(weights, 1)


def _seconds(generate: Generator, lm: LM) -> float:
    """The time of one answer, which no token ends."""
    began = time.perf_counter()
    generate(lm.params, [[1] * PROMPT], max_tokens=ANSWER, sampling=Sampling(0.0))
    return time.perf_counter() - began
