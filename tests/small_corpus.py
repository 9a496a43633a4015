"""A small made corpus, its config, and the files that preparing it leaves."""

import random

from lmjax.data.config import CurateConfig, DataConfig
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import TokenizerConfig

WORDS = ["alpha", "beta", "gamma", "return self", "    if x:", "print(1)", "\u65e5\u672c", "\u2581",
         "\t"]


def write_texts(path, count=80, seed=0):
    rng = random.Random(seed)
    path.mkdir()
    for i in range(count):
        lines = [" ".join(rng.choices(WORDS, k=5)) for _ in range(rng.randint(3, 30))]
        (path / f"{i:03}.txt").write_text(f"{i}\n" + "\n".join(lines))
    return path


def make_config(texts, **kwargs):
    """A config of few texts; one worker, because starting more takes longer than their work."""
    fields = {"sources": (SourceConfig("texts", f"text:{texts}/*"),), "seq_len": 32,
              "heldout_fraction": 0.1, "tokenizer": TokenizerConfig(vocab_size=320),
              "curate": CurateConfig(workers=1)}
    return DataConfig(**fields | kwargs)


def silent(line):
    pass


def contents(directory):
    """The files of a directory, without receipts and report: these contain times and workers."""
    files = {str(path.relative_to(directory)): path
             for path in sorted(directory.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items()
            if "receipt" not in name and name != "data_report.html"}
