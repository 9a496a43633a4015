"""`lmjax bench serve`: many clients at once, beside one client and beside offline batches.

The three answer the same requests, in turn. The clients talk to the engine of `lmjax serve` in this
process, without HTTP.
"""

import functools
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lmjax.benchmarks.models import random_decoder
from lmjax.benchmarks.rounds import Report, Turn, in_turn, write_report
from lmjax.decoding.generate import Generator
from lmjax.decoding.sampling import Sampling
from lmjax.lm import LM
from lmjax.serving.engine import Engine
from lmjax.serving.requests import Finished, Piece, Request
from lmjax.training.recipe import Recipe
from lmjax.tree import num_elements

CLIENTS = 64
ALONE = 8  # requests of the client that is alone
GREEDY = Sampling(temperature=0.0)


class Workload(NamedTuple):
    """What the clients ask."""

    prompt: tuple[int, int]  # the fewest and the most tokens of a prompt
    answer: tuple[int, int]  # of an answer
    each: int  # requests per client, on average


WORKLOADS = {"equal, all at once": Workload((64, 64), (64, 64), 1),
             "mixed, again and again": Workload((16, 128), (16, 128), 4)}


def bench_serve(recipe: Recipe, *, seconds: float = 60.0, out: str = "") -> Report:
    """Measures the engine with a recipe's decoder on one device and prints a table.

    Args:
      recipe: names the model; its weights are random.
      seconds: how long to measure per workload, about.
      out: a file for the figures as JSON; "" writes none.
    Returns:
      the figures. Tokens per second include the time to read the prompts. Where other processes
      use the machine, the ratios by CPU time tell more.
    Raises:
      UserError: the model is no decoder.
    """
    lm = random_decoder(recipe, wanted="a decoder to serve", example="configs/quickstart.py")
    report: Report = {"device": jax.devices()[0].device_kind, "dtype": str(lm.model.dtype),
                      "parameters": num_elements(lm.model.shapes), "clients": CLIENTS}
    report["workloads"] = {name: _measure(lm, work, seconds) for name, work in WORKLOADS.items()}
    _print(report)
    write_report(report, out)
    return report


def _measure(lm: LM, work: Workload, seconds: float) -> Report:
    requests = _requests(work, lm.model.config.vocab_size)
    length = work.prompt[1] + work.answer[1]
    # No request begins as another one does, so the prefix cache would only cost time.
    many, one = (Engine(lm, slots=slots, queue=CLIENTS, max_length=length, prefix_tokens=0)
                 for slots in (CLIENTS, 1))
    waits: list[float] = []
    alone = requests[:ALONE]
    generator = Generator(lm.model, lm.layout)
    cpu: dict[str, list[float]] = {"served": [], "offline": [], "alone": []}
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "served": (functools.partial(_serve, many, requests, CLIENTS, waits), _tokens(requests)),
        "offline": (functools.partial(_offline, generator, lm, requests), _tokens(requests)),
        "alone": (functools.partial(_serve, one, alone, 1, []), _tokens(alone))}
    runs = {name: (functools.partial(_spending, run, tokens, cpu[name]), tokens)
            for name, (run, tokens) in runs.items()}
    for engine in (many, one):
        engine.start()
    for run, _ in runs.values():
        run()
    for values in (waits, *cpu.values()):
        values.clear()
    times = in_turn([Turn(name, run, tokens, "token") for name, (run, tokens) in runs.items()],
                    seconds)
    for engine in (many, one):
        engine.close()
    rates = {name: statistics.median(1 / t for t in values) for name, values in times.items()}
    steps = many.stats()
    return {
        "prompt": work.prompt, "answer": work.answer, "requests": len(requests),
        "rounds": len(times["served"]), "tokens_per_second": rates,
        "beside": _beside(times), "beside_in_cpu_time": _beside(cpu),
        "first_token_seconds": {p: float(np.percentile(waits, p)) for p in (50, 99)},
        "rows_per_step": steps["row_steps"] / steps["steps"]}


def _beside(times: dict[str, list[float]]) -> dict[str, float]:
    """How many times more tokens are served, per second, than offline and to one client."""
    return {name: statistics.median(b / a for a, b in zip(times["served"], times[name],
                                                          strict=True))
            for name in ("offline", "alone")}


def _spending(run: Callable[[], object], tokens: int, spent: list[float]) -> None:
    """Runs, and notes the CPU seconds of this process per token."""
    began = time.process_time()
    run()
    spent.append((time.process_time() - began) / tokens)


def _requests(work: Workload, vocab_size: int) -> list[Request]:
    rng = np.random.default_rng(0)
    sizes = [rng.integers(low, high + 1, CLIENTS * work.each)
             for low, high in (work.prompt, work.answer)]
    return [Request(tuple(rng.integers(2, vocab_size, prompt).tolist()), int(answer), GREEDY)
            for prompt, answer in zip(*sizes, strict=True)]


def _tokens(requests: Sequence[Request]) -> int:
    return sum(request.max_tokens for request in requests)


def _serve(engine: Engine, requests: Sequence[Request], clients: int, waits: list[float]) -> None:
    """Clients that begin together, each with one request after another of what is left to ask."""
    left, ended, done = iter(requests), itertools.count(1), threading.Event()

    def ask(request: Request) -> None:
        began, is_first = time.perf_counter(), [True]

        def sink(item: Piece | Finished) -> None:
            if is_first[0]:
                is_first[0] = False
                waits.append(time.perf_counter() - began)
            if isinstance(item, Finished):
                if (following := next(left, None)) is not None:
                    ask(following)
                if next(ended) == len(requests):
                    done.set()

        engine.submit(request, sink)

    for request in itertools.islice(left, clients):
        ask(request)
    done.wait()


def _offline(generator: Generator, lm: LM, requests: Sequence[Request]) -> None:
    """`lm.generate_ids` without text: batches of as many requests as there are clients."""
    for at in range(0, len(requests), CLIENTS):
        batch = requests[at : at + CLIENTS]
        generator(lm.params, [request.prompt for request in batch], sampling=GREEDY,
                  max_tokens=max(request.max_tokens for request in batch))


def _print(report: Report) -> None:
    print(f"{report['device']}, {report['dtype']}, {report['parameters'] / 1e6:.1f}M parameters, "
          f"greedy, {report['clients']} clients")
    for name, row in report["workloads"].items():
        rates, beside = row["tokens_per_second"], row["beside"]
        first = row["first_token_seconds"]
        print(f"{name}: {row['requests']} requests, prompts of {row['prompt'][0]} to "
              f"{row['prompt'][1]} tokens, answers of {row['answer'][0]} to {row['answer'][1]}")
        print(f"  served {rates['served']:,.0f} tokens/s, {beside['offline']:.2f} times an offline "
              f"batch ({rates['offline']:,.0f}), {beside['alone']:.1f} times one client "
              f"({rates['alone']:,.0f})")
        cpu = row["beside_in_cpu_time"]
        print(f"  by CPU time {cpu['offline']:.2f} times an offline batch, "
              f"{cpu['alone']:.1f} times one client")
        print(f"  first token after {first[50] * 1e3:.0f} ms (median), {first[99] * 1e3:.0f} ms "
              f"(99%); {row['rows_per_step']:.1f} rows per step; {row['rounds']} rounds")
