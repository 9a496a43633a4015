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


def name_of_word(number):
    """A word of three syllables, different for every number below 274,625."""
    return "".join("bcdfgklmnprst"[part % 13] + "aeiou"[part // 13]
                   for part in (number % 65, number // 65 % 65, number // 65**2))


def sentences(count, seed, words=400):
    """Texts in which each word has its own few followers, always the same ones; 30 to 90 words."""
    grammar, rng = random.Random(f"grammar {words}"), random.Random(seed)
    followers = [[grammar.randrange(words) for _ in range(4)] for _ in range(words)]
    texts = []
    for _ in range(count):
        word, text = rng.randrange(words), []
        for _ in range(rng.randint(30, 90)):
            text.append(name_of_word(word))
            word = rng.choice(followers[word])
        texts.append(" ".join(text))
    return texts


def shuffled(texts):
    """The same texts with the words of each in another order."""
    rng = random.Random(0)
    return [" ".join(rng.sample(words := text.split(), len(words))) for text in texts]
