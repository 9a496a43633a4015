"""`lmjax bench data`: how fast one core is at each stage of `lmjax prepare`, and this machine at training rows.

The text is the standard library's. All that is compared runs in turn, round after round, and a figure is the median of
its rounds. Other libraries (the extra `compare`) do the same work in the same rounds, the slow ones on a part of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.benchmarks.pipeline import Work, pipelines
from lmjax.data.config import DedupConfig
from lmjax.data.preparation import dedup, shards
from lmjax.data.preparation.engine import Engine
from lmjax.data.preparation.shards import Shard
from lmjax.data.text import clean, filters, sources
from lmjax.data.text.features import TextBatch
from lmjax.data.text.sources import Document, SourceConfig
from lmjax.data.text.words import batches
from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer

RULES = ("newlines", "control", "nfc", "trailing_spaces", "blank_lines", "boilerplate", "mask_email", "mask_ip")
CHARS = 4 << 20  # of the corpus
WHOLE = 8 * CHARS  # where a pass over CHARS takes milliseconds, of which files and folders take half
LENGTHS = (400, 3000)  # characters: documents as long as a package's description, and as a web page
PART = 16  # of as many documents, one for those who need seconds for a megabyte


def bench_data(*, seconds: float = 60.0, out: str = "") -> dict[str, Any]:
    """Measures for about `seconds` (three rounds at least), prints a table and returns its figures.

    out: a file for the figures as JSON.
    """
    texts = corpus(CHARS)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        print("bench: making the data that is read", file=sys.stderr)
        work = stages(texts, folder, stack) | pipelines(folder, stack)
        times = _in_turn(work, seconds)
    rows = {}
    for name, one in work.items():
        middle = statistics.median(times[name])
        rows[name] = {"mb_per_s": one.bytes / 1e6 / middle, "tokens_per_s": one.tokens / middle,
                      "documents_per_s": one.documents / middle}
    report = {"cores": os.cpu_count(), "rounds": len(times["tokenise"]), "rows": rows}
    print(f"{'':34}{'MB/s':>9}{'tokens/s':>13}{'documents/s':>13}")
    for name, row in rows.items():
        print(f"{name:34}{row['mb_per_s']:9.1f}{row['tokens_per_s']:13,.0f}{row['documents_per_s']:13,.0f}")
    if out:
        Path(out).write_text(json.dumps(report, indent=2) + "\n")
    return report


def _in_turn(work: dict[str, Work], seconds: float) -> dict[str, list[float]]:
    began = time.monotonic()
    times: dict[str, list[float]] = {name: [] for name in work}
    while time.monotonic() - began < seconds or len(times["tokenise"]) < 3:
        for name, one in work.items():
            at = time.perf_counter()
            one.run()
            times[name].append(time.perf_counter() - at)
            print(f"\rbench: {name}: {times[name][-1]:.2f} s        ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def corpus(limit: int) -> list[str]:
    """Texts of about `limit` characters together."""
    source = SourceConfig(name="stdlib", uri="builtin:python-stdlib")
    texts, size = [], 0
    for files in sources.units(source, 1 << 20):
        for item in sources.read(source, files):
            if isinstance(item, Document) and size < limit:
                texts.append(item.data)
                size += len(item.data)
    return texts


def stages(texts: Sequence[str], folder: str, stack: contextlib.ExitStack) -> dict[str, Work]:
    """The work of each stage; dedup with the reading of its shards, the others without."""
    tokenizer = train_tokenizer(TokenizerConfig(train_bytes=2_000_000), texts)
    gopher = {name: filters.FILTERS[name]() for name in ("gopher_quality", "gopher_repetition")}
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    engine = stack.enter_context(Engine(folder, workers=1))

    def clean_and_filter() -> None:
        cleaned = [clean.clean(text, RULES)[0] for text in texts]
        for _, group in batches(cleaned):
            batch = TextBatch(group)
            filters.reject(batch, gopher)
            batch.languages  # noqa: B018 - worked out when it is asked for

    more = corpus(WHOLE)

    def of(run: Any, documents: Sequence[str] = texts) -> Work:
        size = sum(len(text.encode()) for text in documents)
        share = sum(map(len, documents)) / sum(map(len, texts))
        return Work(run, round(tokens * share), size, len(documents))

    found = {"clean and filter": of(clean_and_filter),
             "gopher filters": of(lambda: [filters.reject(TextBatch(g), gopher) for _, g in batches(texts)]),
             "exact dedup": of(_dedup(engine, more, folder, near=False), more)}
    for length in LENGTHS:
        cut = [text[i : i + length] for text in texts for i in range(0, len(text), length)]
        found[f"MinHash dedup, {length} characters"] = of(_dedup(engine, cut, folder, near=True), cut)
    found["tokenise"] = of(lambda: [tokenizer.encode_batch(group, num_threads=1) for _, group in batches(texts)])
    part = [text[: LENGTHS[1]] for text in texts[::PART]]
    others = _others(_datatrove, part) | _others(_datasketch, part)
    return found | {name: of(run, part) for name, run in others.items()}


def _dedup(engine: Engine, texts: Sequence[str], folder: str, *, near: bool) -> Any:
    where = tempfile.mkdtemp(dir=folder)
    part = Shard(f"{where}/shard", "", 0, len(texts))
    shards.write(part.path, {"id": [str(i) for i in range(len(texts))], "text": texts})
    nothing = f"{where}/nothing.npy"
    np.save(nothing, np.zeros((2, 0), np.uint64))

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=where) as at:
            if near:
                dedup.near(engine, [part], nothing, DedupConfig(threshold=0.8), at)
            else:
                dedup.exact(engine, [part], at)

    return run


def _others(add: Any, texts: Sequence[str]) -> dict[str, Any]:
    try:
        return add(texts)
    except ImportError as error:
        print(f"bench: no comparison with {add.__name__[1:]}: {error}; pip install lmjax[compare]", file=sys.stderr)
        return {}


def _datatrove(texts: Sequence[str]) -> dict[str, Any]:
    from datatrove.data import Document as Theirs
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

    both = GopherQualityFilter(), GopherRepetitionFilter()
    both[0].filter(Theirs(text="its tokenizer is a package of its own", id=""))
    documents = [Theirs(text=text, id=str(i)) for i, text in enumerate(texts)]
    minhash = MinhashDedupSignature("unused", config=MinhashConfig(n_grams=5))
    return {"gopher filters, datatrove": lambda: [f.filter(d) for d in documents for f in both],
            "MinHash signatures, datatrove": lambda: [
                minhash.get_signature(found) for text in texts if (found := minhash.get_shingles(text)).size]}


def _datasketch(texts: Sequence[str]) -> dict[str, Any]:
    import datasketch

    def run() -> None:
        index = datasketch.MinHashLSH(params=(20, 6), num_perm=120)
        for i, text in enumerate(texts):
            words = text.lower().split()
            sketch = datasketch.MinHash(120)
            sketch.update_batch([" ".join(words[k : k + 5]).encode() for k in range(max(len(words) - 4, 1))])
            index.query(sketch)
            index.insert(str(i), sketch)

    return {"MinHash dedup, datasketch": run}
