"""`lmjax bench generate`: compares generation with `transformers`, on the same random weights.

It also measures how long a new process takes to its first tokens. That process is
`python -m lmjax.benchmarks.generate DIR`, which loads the model in DIR and generates them.
"""

import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from lmjax import huggingface
from lmjax.benchmarks.models import model_of
from lmjax.benchmarks.rounds import Report, Turn, in_turn, write_report
from lmjax.decoding.generate import CHUNK, Generator
from lmjax.decoding.sampling import Sampling
from lmjax.lm import load
from lmjax.runtime.devices import use_compilation_cache
from lmjax.training.recipe import Recipe
from lmjax.tree import num_elements

PROMPT, NEW = 64, 128  # tokens read and tokens generated, per row
BATCHES = (1, 8)  # batch sizes
GREEDY = Sampling(temperature=0.0)

Contestant = Callable[[list[list[int]]], list[list[int]]]  # prompts to NEW tokens each


def bench_generate(recipe: Recipe, *, seconds: float = 60.0, out: str = "") -> Report:
    """Measures greedy decoding of a recipe's model and prints a table.

    Args:
      recipe: names the model; its weights are random.
      seconds: how long to measure per batch size, about.
      out: a file for the figures as JSON; "" writes none.
    Returns:
      the figures. Tokens per second include the time to read the prompts.
    """
    model = model_of(recipe)
    report = {"device": jax.devices()[0].device_kind, "dtype": str(model.dtype), "prompt": PROMPT,
              "new": NEW, "parameters": num_elements(model.shapes)}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        huggingface.write_directory(
            path, model, jax.jit(model.init)(jax.random.key(0)), None, max_positions=PROMPT + NEW,
            log=lambda line: print(line, file=sys.stderr))
        contestants = {"lmjax": _ours(path)} | _theirs(path, model.config.family)
        report["batches"] = {batch: _measure(contestants, batch, model.config.vocab_size, seconds)
                             for batch in BATCHES}
        report["ready_seconds"] = [_ready(path) for _ in range(3)]
    _print(report)
    write_report(report, out)
    return report


def _ours(path: Path) -> Contestant:
    lm = load(path)
    generator = Generator(lm.model, lm.layout)
    return lambda prompts: generator(lm.params, prompts, max_tokens=NEW, sampling=GREEDY)


def _theirs(path: Path, family: str) -> dict[str, Contestant]:
    try:
        import torch
        import transformers
    except ImportError:
        print("transformers is not installed: no comparison with it", file=sys.stderr)
        return {}
    auto = (transformers.AutoModelForSeq2SeqLM if family == "encdec" else
            transformers.AutoModelForCausalLM)
    model = auto.from_pretrained(path, dtype=torch.float32).eval()

    def run(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            answers = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                     max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
        return answers[:, -NEW:].tolist()

    return {"transformers": run}


def _measure(contestants: dict[str, Contestant], batch: int, vocab_size: int,
             seconds: float) -> Report:
    """Compares the contestants at one batch size; the first call of each is not timed."""
    prompts = np.random.default_rng(0).integers(2, vocab_size, (batch, PROMPT)).tolist()
    answers = {name: generate(prompts) for name, generate in contestants.items()}
    times = in_turn([Turn(name, functools.partial(generate, prompts))
                     for name, generate in contestants.items()], seconds)
    found: Report = {"rounds": len(times["lmjax"]), "tokens_per_second": {
        name: batch * NEW / statistics.median(values) for name, values in times.items()}}
    if len(contestants) > 1:
        found["speed_beside_transformers"] = statistics.median(
            b / a for a, b in zip(times["lmjax"], times["transformers"], strict=True))
        found["same_tokens"] = float(np.mean(
            np.array(answers["lmjax"]) == np.array(answers["transformers"])))
    return found


def _ready(path: Path) -> float:
    """Measures the seconds from the start of a process to its first tokens."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "lmjax.benchmarks.generate", str(path)], check=True)
    return time.monotonic() - began


def _print(report: Report) -> None:
    print(f"{report['device']}, {report['dtype']}, {report['parameters'] / 1e6:.1f}M parameters, "
          f"greedy, tokens per row: {PROMPT} read and {NEW} generated")
    print(f"{'batch':>6}{'lmjax':>14}{'transformers':>14}{'ratio':>8}"
          f"{'same tokens':>13}{'rounds':>8}")
    for batch, row in report["batches"].items():
        rates = row["tokens_per_second"]
        theirs = f"{'-':>14}{'-':>8}{'-':>13}"
        if "transformers" in rates:
            theirs = (f"{rates['transformers']:14,.1f}{row['speed_beside_transformers']:8.2f}"
                      f"{row['same_tokens']:13.0%}")
        print(f"{batch:6}{rates['lmjax']:10,.1f} t/s{theirs}{row['rounds']:8}")
    seconds = ", ".join(f"{s:.1f} s" for s in report["ready_seconds"])
    print(f"process start to the first {CHUNK} tokens: {seconds} (the first may compile)")


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the model in a directory and generates its first `CHUNK` tokens."""
    use_compilation_cache()
    lm = load((sys.argv[1:] if argv is None else argv)[0])
    Generator(lm.model, lm.layout)(lm.params, [[1] * PROMPT], max_tokens=NEW, sampling=GREEDY,
                                   watch=lambda answers: [True])


if __name__ == "__main__":
    main()
