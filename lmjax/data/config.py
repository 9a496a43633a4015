"""The configs of data: sources, cleaning, deduplication, decontamination, mixture."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmjax.config import PathText, at_least, build, choice, expand_paths, plain
from lmjax.data import packing
from lmjax.data.objectives import ObjectiveConfig
from lmjax.data.store import canonical
from lmjax.data.text import language
from lmjax.data.text.clean import CLEANING_RULES
from lmjax.data.text.filters import C4, FILTERS, FineWeb, GopherQuality, GopherRepetition
from lmjax.data.text.sources import SourceConfig, is_synthetic
from lmjax.data.tokenizers import TokenizerConfig
from lmjax.errors import UserError


@dataclass(frozen=True)
class DecontaminateConfig:
    """The evaluation sets with which no training document may share a long passage."""

    sources: tuple[SourceConfig, ...] = ()  # the evaluation texts; () switches the step off
    words: int = 13                         # length of a shared passage, in words
    letters: int = 50                       # and in letters

    def __post_init__(self) -> None:
        at_least(2, words=self.words, letters=self.letters)


@dataclass(frozen=True)
class DedupConfig:
    """Which repeated text is removed. Exact copies always are; 0 switches any other step off."""

    threshold: float = 0.0   # Jaccard similarity of shingles that removes the later document
    shingle: int = 5         # words in a shingle
    # MinHash signature: a pair of similarity s is compared with probability
    # 1 - (1 - s**rows)**bands, which is 0.998 at s = 0.8 with these defaults.
    bands: int = 20
    rows: int = 6
    window: int = 0          # a run of so many words that occurred before, anywhere, is cut
    line_documents: int = 0  # a line in more documents than this stays in the first one only
    line_chars: int = 20     # shorter lines are left alone

    def __post_init__(self) -> None:
        at_least(1, shingle=self.shingle, bands=self.bands, rows=self.rows,
                 line_chars=self.line_chars)
        at_least(0, window=self.window, line_documents=self.line_documents)
        if not 0 <= self.threshold <= 1:
            raise UserError("a similarity in [0, 1]", self.threshold, "0.8 is usual",
                            where="threshold")


@dataclass(frozen=True)
class QualityConfig:
    """A filter that is learnt from examples of good text; what is unlike them is removed."""

    good: tuple[SourceConfig, ...] = ()  # the examples, 100 or more; () switches the step off
    only: tuple[str, ...] = ()           # names of the sources that are judged; () judges all
    lost: float = 0.01                   # share of the examples that scores below the threshold

    def __post_init__(self) -> None:
        if not 0 < self.lost < 1:
            raise UserError("a share in (0, 1)", self.lost, "use e.g. 0.01", where="lost")


@dataclass(frozen=True)
class CurateConfig:
    """Which documents of a corpus stay, beyond `data.clean` and `data.min_chars`.

    A filter is None (off) or its thresholds; `{}` gives the published ones.
    """

    max_chars: int = 4_000_000       # longer documents are dropped: they would take much memory
    languages: tuple[str, ...] = ()  # ISO 639-1 codes, and `und` (code, tables); () keeps all
    gopher_quality: GopherQuality | None = None
    gopher_repetition: GopherRepetition | None = None
    c4: C4 | None = None
    fineweb: FineWeb | None = None
    quality: QualityConfig = field(default_factory=QualityConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    workers: int = 0                 # processes; 0: one per core
    memory_mib: int = 2048           # memory that they may hold together
    beam: tuple[str, ...] = ()       # options of an Apache Beam pipeline to use instead

    def __post_init__(self) -> None:
        at_least(0, workers=self.workers)
        at_least(256, memory_mib=self.memory_mib)
        at_least(1, max_chars=self.max_chars)
        known = [*language.FUNCTION_WORDS, "zh", "ja", "ko", "el", "he", "ar", "hi", "th",
                 language.UNDETERMINED]
        if unknown := set(self.languages) - set(known):
            raise UserError(f"some of {', '.join(known)}", sorted(unknown), "correct them",
                            where="languages")

    def decides(self) -> dict[str, Any]:
        """The settings that decide the result, as plain JSON values."""
        return {key: value for key, value in plain(self).items()
                if key not in ("workers", "memory_mib", "beam")}

    def filters(self) -> dict[str, Any]:
        """The thresholds of each filter that is on, by name."""
        return {name: getattr(self, name) for name in FILTERS if getattr(self, name) is not None}


SYNTHETIC_ROWS = 4096  # rows in an epoch of `synthetic`; `synthetic:N` has N


@dataclass(frozen=True)
class MixtureStage:
    """Other proportions of the sources, from some row of the run on."""

    row: int                   # the first row of the run that these weights hold for
    weights: dict[str, float]  # share of the rows by name of the source; others get none

    def __post_init__(self) -> None:
        at_least(0, row=self.row,
                 **{f"weights.{name}": weight for name, weight in self.weights.items()})
        if not any(self.weights.values()):
            raise UserError("one above 0", self.weights, "raise one", where="weights")


@dataclass(frozen=True)
class DataConfig:
    """What a model is trained on, how it is cut into rows, and in which order they come."""

    # What is read, in which proportions.
    sources: tuple[SourceConfig, ...] = (
        SourceConfig(name="python-stdlib", uri="builtin:python-stdlib"),)
    stages: tuple[MixtureStage, ...] = ()  # other proportions, each from some row of the run on
    # By name of a source: the most epochs that a run may take of it; no limit for the others.
    max_epochs: dict[str, float] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    directory: PathText = ""         # prepared data, local or remote; "": `data` in the workdir
    seq_len: int = 256               # tokens in a row, of the encoder if there is one
    packing: str = "best_fit"        # best_fit (cuts only overlong documents), concat or none
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    seed: int = 0                    # of the order of training rows, and of synthetic data
    heldout_fraction: float = 0.02   # share of documents, chosen by hash, kept for evaluation
    # Share of records that may be broken: not UTF-8, not JSON, without text.
    broken_budget: float = 0.02
    min_chars: int = 32              # after cleaning, shorter documents are dropped
    # Rules of lmjax/data/text/clean.py, in this order.
    clean: tuple[str, ...] = ("newlines", "control", "nfc")
    curate: CurateConfig = field(default_factory=CurateConfig)
    memory_limit_mib: int = 1024     # a split's tokens are held in memory up to this size

    def __post_init__(self) -> None:
        choice("packing", self.packing, packing.METHODS)
        at_least(2, seq_len=self.seq_len)
        at_least(0, min_chars=self.min_chars, memory_limit_mib=self.memory_limit_mib,
                 seed=self.seed)
        for rule in self.clean:
            choice("clean", rule, CLEANING_RULES)
        names = [source.name for source in self.sources]
        for name in self.curate.quality.only:
            choice("curate.quality.only", name, names)
        if not 0 < self.heldout_fraction < 1:
            raise UserError("a share in (0, 1)", self.heldout_fraction, "use e.g. 0.02",
                            where="heldout_fraction")
        if not 0 <= self.broken_budget <= 1:
            raise UserError("a share in [0, 1]", self.broken_budget, "use e.g. 0.02",
                            where="broken_budget")
        if self.packing == "concat" and not self.objective.joins:
            raise UserError(f"best_fit or none for {self.objective.name}, whose rows cannot be cut "
                            "from a stream of text", "concat", "use best_fit", where="packing")
        names = [source.name for source in self.sources]
        self._check_sources(names)
        self._check_stages(names)

    def _check_sources(self, names: Sequence[str]) -> None:
        if not names or len(set(names)) < len(names):
            raise UserError("one or more with different names", names,
                            "rename them" if names else "name one", where="sources")
        if 0 < sum(map(is_synthetic, self.sources)) < len(self.sources):
            raise UserError("all or none to be synthetic", "a mixture", "train on them separately",
                            where="sources")
        if self.objective.whole_word and self.synthetic:
            raise UserError("false for synthetic data, which has no words", "true",
                            "set it to false", where="objective.whole_word")

    def _check_stages(self, names: Sequence[str]) -> None:
        unknown = [n for stage in self.stages for n in stage.weights if n not in names]
        unknown += [n for n in self.max_epochs if n not in names]
        if unknown:
            raise UserError(f"names of sources ({', '.join(names)})", repr(unknown[0]),
                            "correct it", where="stages, max_epochs")
        rows = [stage.row for stage in self.stages]
        if sorted(set(rows)) != rows:
            raise UserError("rising rows", rows, "sort them", where="stages")
        at_least(0, **{f"max_epochs.{name}": most for name, most in self.max_epochs.items()})

    @property
    def mixture(self) -> list[tuple[int, list[float]]]:
        """(first row, weight of each source) of every stretch of the run with one mixture."""
        stages = [(s.row, [s.weights.get(source.name, 0.0) for source in self.sources])
                  for s in self.stages]
        if stages and stages[0][0] == 0:
            return stages
        return [(0, [source.weight for source in self.sources]), *stages]

    @property
    def synthetic(self) -> bool:
        """Whether the data is generated on the fly: nothing to prepare, no tokenizer."""
        return is_synthetic(self.sources[0])

    def prepared_by(self) -> dict[str, Any]:
        """The part of the config that decides what `prepare` writes, as plain JSON values."""
        keys = ("tokenizer", "heldout_fraction", "broken_budget", "min_chars", "clean")
        sources = [plain(source) for source in self.sources]
        for source in sources:
            # The first two may change from run to run, the third is of tasks.
            del source["weight"], source["data_dir"], source["where"]
        decided = {key: plain(getattr(self, key)) for key in keys}
        return {"sources": sources} | decided | {"curate": self.curate.decides()}


def check_prepared_by(config: DataConfig, manifest: dict[str, Any], directory: str) -> None:
    """Raises a UserError for the first key in which the data was prepared with another setting.

    Where a tokenizer is does not count: `prepare` compares the tokenizers themselves.
    """
    got, expected = manifest["config"], config.prepared_by()
    with contextlib.suppress(UserError):  # a key that no longer exists is told below
        prepared = build(DataConfig, got)
        got = prepared.prepared_by()
        got = expand_paths(prepared).prepared_by()  # if they can be expanded here
    paths = [settings["tokenizer"].get("path") for settings in (got, expected)]
    if all(paths):
        expected["tokenizer"] = {**expected["tokenizer"], "path": paths[0]}
    for key in expected:
        if got.get(key) != expected[key]:
            raise UserError(f"data prepared with {key} = {canonical(expected[key])}",
                            canonical(got.get(key)),
                            "repeat the config.data settings that it was prepared with, or use "
                            "another directory", where=directory)
