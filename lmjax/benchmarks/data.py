"""`lmjax bench data`: measures one core preparing text, and this machine making training rows.

The text is that of the standard library. All contestants run in turn, round after round, and a
figure is the median of its rounds. Other libraries (the extra `compare`) do the same work in the
same rounds, the slow ones on a part of the text.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence

import numpy as np

from lmjax.benchmarks.pipeline import Work, pipelines
from lmjax.benchmarks.rounds import Report, Turn, in_turn, write_report
from lmjax.data.config import DedupConfig
from lmjax.data.preparation import dedup, shards
from lmjax.data.preparation.engine import Engine
from lmjax.data.preparation.shards import Shard
from lmjax.data.text import clean, filters, sources
from lmjax.data.text.features import TextBatch
from lmjax.data.text.sources import Document, SourceConfig
from lmjax.data.text.words import batches
from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer

CLEANING = ("newlines", "control", "nfc", "trailing_spaces", "blank_lines", "boilerplate",
            "mask_email", "mask_ip")
CHARS = 4 << 20  # of the corpus
MORE_CHARS = 8 * CHARS  # for exact dedup, which would spend half of a shorter time on files
LENGTHS = (400, 3000)  # characters: of a package's description, and of a web page
PART = 16  # libraries that need seconds per megabyte get one of 16 documents
Run = Callable[[], object]


def bench_data(*, seconds: float = 60.0, out: str = "") -> Report:
    """Measures the preparation of data and prints a table.

    Args:
      seconds: how long to measure, about; at least three rounds are run.
      out: a file for the figures as JSON; "" writes none.
    Returns:
      the figures.
    """
    texts = corpus(CHARS)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        print("bench: making the data that is read", file=sys.stderr)
        work = preparation(texts, folder, stack) | pipelines(folder, stack)
        times = in_turn([Turn(name, one.run) for name, one in work.items()], seconds)
    rows = {}
    for name, one in work.items():
        middle = statistics.median(times[name])
        rows[name] = {"mb_per_s": one.bytes / 1e6 / middle, "tokens_per_s": one.tokens / middle,
                      "documents_per_s": one.documents / middle}
    report = {"cores": os.cpu_count(), "rounds": len(times["tokenise"]), "rows": rows}
    print(f"{'':34}{'MB/s':>9}{'tokens/s':>13}{'documents/s':>13}")
    for name, row in rows.items():
        print(f"{name:34}{row['mb_per_s']:9.1f}{row['tokens_per_s']:13,.0f}"
              f"{row['documents_per_s']:13,.0f}")
    write_report(report, out)
    return report


def corpus(limit: int) -> list[str]:
    """Returns texts of the standard library with about `limit` characters in total."""
    source = SourceConfig(name="stdlib", uri="builtin:python-stdlib")
    texts, size = [], 0
    for files in sources.units(source, 1 << 20):
        for item in sources.read(source, files):
            if isinstance(item, Document) and size < limit:
                texts.append(item.data)
                size += len(item.data)
    return texts


def preparation(texts: Sequence[str], folder: str, stack: contextlib.ExitStack) -> dict[str, Work]:
    """Returns the work of each stage of preparation, and the same work by other libraries.

    Deduplication reads its documents from shards; the other stages get them in memory.

    Args:
      texts: the corpus.
      folder: for shards and spilled records.
      stack: closes the engine.
    """
    tokenizer = train_tokenizer(TokenizerConfig(train_bytes=2_000_000), texts)
    gopher = {name: filters.FILTERS[name]() for name in ("gopher_quality", "gopher_repetition")}
    tokens_per_char = sum(map(len, tokenizer.encode_batch(texts))) / sum(map(len, texts))
    engine = stack.enter_context(Engine(folder, workers=1))

    def clean_and_filter() -> None:
        cleaned = [clean.clean(text, CLEANING)[0] for text in texts]
        for _, group in batches(cleaned):
            batch = TextBatch(group)
            filters.reject(batch, gopher)
            batch.languages  # noqa: B018 - computed when it is first read

    def gopher_filters() -> None:
        for _, group in batches(texts):
            filters.reject(TextBatch(group), gopher)

    def tokenise() -> None:
        for _, group in batches(texts):
            tokenizer.encode_batch(group, num_threads=1)

    def of(run: Run, documents: Sequence[str] = texts) -> Work:
        size = sum(len(text.encode()) for text in documents)
        tokens = round(tokens_per_char * sum(map(len, documents)))
        return Work(run, tokens, size, len(documents))

    more = corpus(MORE_CHARS)
    found = {"clean and filter": of(clean_and_filter), "gopher filters": of(gopher_filters),
             "exact dedup": of(_dedup(engine, more, folder, near=False), more)}
    for length in LENGTHS:
        cut = [text[i : i + length] for text in texts for i in range(0, len(text), length)]
        near = _dedup(engine, cut, folder, near=True)
        found[f"MinHash dedup, {length} characters"] = of(near, cut)
    found["tokenise"] = of(tokenise)
    part = [text[: LENGTHS[1]] for text in texts[::PART]]
    others = _others(_datatrove, part) | _others(_datasketch, part)
    return found | {name: of(run, part) for name, run in others.items()}


def _dedup(engine: Engine, texts: Sequence[str], folder: str, *, near: bool) -> Run:
    """Writes the texts to a shard; returns the work of finding near or exact copies in it."""
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


def _others(library: Callable[[Sequence[str]], dict[str, Run]],
            texts: Sequence[str]) -> dict[str, Run]:
    """Returns the work of another library; says so and returns none if it is not installed."""
    try:
        return library(texts)
    except ImportError as error:
        print(f"bench: no comparison with {library.__name__[1:]}: {error}; "
              "pip install lmjax[compare]", file=sys.stderr)
        return {}


def _datatrove(texts: Sequence[str]) -> dict[str, Run]:
    from datatrove.data import Document as Theirs
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

    both = GopherQualityFilter(), GopherRepetitionFilter()
    both[0].filter(Theirs(text="raises here if its tokenizer is not installed", id=""))
    documents = [Theirs(text=text, id=str(i)) for i, text in enumerate(texts)]
    minhash = MinhashDedupSignature("unused", config=MinhashConfig(n_grams=5))

    def signatures() -> None:
        for text in texts:
            if (shingles := minhash.get_shingles(text)).size:
                minhash.get_signature(shingles)

    return {"gopher filters, datatrove": lambda: [f.filter(d) for d in documents for f in both],
            "MinHash signatures, datatrove": signatures}


def _datasketch(texts: Sequence[str]) -> dict[str, Run]:
    import datasketch

    def run() -> None:
        index = datasketch.MinHashLSH(params=(20, 6), num_perm=120)
        for i, text in enumerate(texts):
            words = text.lower().split()
            sketch = datasketch.MinHash(120)
            sketch.update_batch([" ".join(words[k : k + 5]).encode()
                                 for k in range(max(len(words) - 4, 1))])
            index.query(sketch)
            index.insert(str(i), sketch)

    return {"MinHash dedup, datasketch": run}
