"""How fast one core is at each stage of `lmjax prepare`: python -m lmjax.bench_data

The text is the standard library's. Every figure is the median of interleaved rounds. Where `datatrove` and its word
tokenizer (`spacy`) are installed, its Gopher filters run in the same rounds, on the same documents.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from lmjax.data import clean, dedup, filters, sources
from lmjax.data.sources import Document, SourceConfig
from lmjax.data.tokenizer import Tokenizer, TokenizerConfig, train_model
from lmjax.data.words import batches

RULES = ("newlines", "control", "nfc", "trailing_spaces", "blank_lines", "boilerplate", "mask_email", "mask_ip")
SHORT = 400  # characters: documents of the length of a package's description, for the rate of MinHash


def corpus(limit: int = 8 << 20) -> list[str]:
    """Texts of up to `limit` characters together."""
    source = SourceConfig(name="stdlib", uri="builtin:python-stdlib")
    texts, size = [], 0
    for files in sources.units(source, 1 << 20):
        for item in sources.read(source, files):
            if isinstance(item, Document) and size < limit:
                texts.append(item.data)
                size += len(item.data)
    return texts


def stages(texts: Sequence[str]) -> dict[str, Callable[[], object]]:
    """The work of each stage, without its reading and writing."""
    raw = [text.encode() for text in texts]
    short = [text[i : i + SHORT] for text in texts for i in range(0, len(text), SHORT)]
    gopher = {name: filters.FAMILIES[name]() for name in ("gopher_quality", "gopher_repetition")}
    tokenizer = Tokenizer(train_model(TokenizerConfig(train_bytes=2_000_000), texts))

    def minhash(documents: Sequence[str]) -> None:
        sets, bounds = dedup.shingle_sets(documents, 5)
        dedup.band_keys(sets, bounds, np.flatnonzero(np.diff(bounds)), 0, dedup.DedupConfig())

    work: dict[str, Callable[[], object]] = {
        "clean": lambda: [clean.clean(text, RULES) for text in texts],
        "gopher filters": lambda: [filters.reject(filters.Batch(group), gopher) for _, group in batches(texts)],
        "languages": lambda: [filters.Batch(group).languages for _, group in batches(texts)],
        "exact dedup": lambda: [dedup.digest(text) for text in raw],
        "minhash": lambda: minhash(texts),
        "minhash, short": lambda: minhash(short),
        "tokenise": lambda: tokenizer.encode_batch(texts, num_threads=1),
    }
    try:
        from datatrove.data import Document as Theirs
        from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

        both = (GopherQualityFilter(), GopherRepetitionFilter())
        both[0].filter(Theirs(text="its tokenizer is a package of its own", id=""))
    except ImportError:
        return work
    documents = [Theirs(text=text, id=str(i)) for i, text in enumerate(texts)]
    return work | {"gopher filters, datatrove": lambda: [f.filter(d) for d in documents for f in both]}


def main(rounds: int = 3) -> None:
    """Prints a JSON line a stage: MB/s and documents/s of one core."""
    texts = corpus()
    size = sum(len(text.encode()) for text in texts)
    short = sum(-(-len(text) // SHORT) for text in texts)
    work = stages(texts)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        middle = statistics.median(times)
        count = short if name.endswith("short") else len(texts)
        print(json.dumps({"stage": name, "mb_per_s": round(size / 1e6 / middle, 1),
                          "documents_per_s": round(count / middle)}), flush=True)


if __name__ == "__main__":
    main()
