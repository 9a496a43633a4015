"""The configs of data: sources, cleaning, deduplication, decontamination, stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmjax.config import at_least, choice, plain
from lmjax.data import packing
from lmjax.data.objectives import ObjectiveConfig
from lmjax.data.store import canonical
from lmjax.data.text import clean, language
from lmjax.data.text.filters import C4, FAMILIES, FineWeb, GopherQuality, GopherRepetition
from lmjax.data.text.sources import SourceConfig, is_synthetic
from lmjax.data.tokenizers import TokenizerConfig


@dataclass(frozen=True)
class DecontaminateConfig:
    """Which evaluation sets no training document may share a long passage with.

    sources: their texts; none switches the step off. words: in a run that counts. letters: in a run that counts.
    """

    sources: tuple[SourceConfig, ...] = ()
    words: int = 13
    letters: int = 50

    def __post_init__(self) -> None:
        at_least(2, words=self.words, letters=self.letters)


@dataclass(frozen=True)
class DedupConfig:
    """What is removed because it is there already. 0 switches a step off, but for exact copies.

    threshold: Jaccard similarity of two documents' sets of shingles from which the later one is removed.
    shingle: words in a shingle. bands, rows: of the MinHash signature: a pair of similarity s is compared with
      probability 1 - (1 - s**rows)**bands, for the defaults 0.998 at s = 0.8.
    window: words; a run of this many that has come before, anywhere, is cut.
    line_documents: a line that is in more documents than this stays in the first only. line_chars: shorter lines
      are left alone.
    """

    threshold: float = 0.0
    shingle: int = 5
    bands: int = 20
    rows: int = 6
    window: int = 0
    line_documents: int = 0
    line_chars: int = 20

    def __post_init__(self) -> None:
        at_least(1, shingle=self.shingle, bands=self.bands, rows=self.rows, line_chars=self.line_chars)
        at_least(0, window=self.window, line_documents=self.line_documents)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: expected a similarity in [0, 1], got {self.threshold}; 0.8 is usual")


@dataclass(frozen=True)
class CurateConfig:
    """Which documents of a corpus stay, beyond `data.clean` and `data.min_chars`.

    max_chars: longer documents are dropped; it bounds what one may need in memory.
    languages: ISO 639-1 codes, and `und` for what has none (code, tables); empty keeps all.
    gopher_quality, gopher_repetition, c4, fineweb: published filters, `{}` for their own thresholds; None is off.
    dedup, decontaminate: see there.
    workers: processes; 0 is one for each core. memory_mib: what they may hold together.
    beam: options of an Apache Beam pipeline that runs the stages instead, such as `--runner=FlinkRunner`.
    """

    max_chars: int = 4_000_000
    languages: tuple[str, ...] = ()
    gopher_quality: GopherQuality | None = None
    gopher_repetition: GopherRepetition | None = None
    c4: C4 | None = None
    fineweb: FineWeb | None = None
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    workers: int = 0
    memory_mib: int = 2048
    beam: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(0, workers=self.workers)
        at_least(256, memory_mib=self.memory_mib)
        at_least(1, max_chars=self.max_chars)
        known = [*language.WORDS, "zh", "ja", "ko", "el", "he", "ar", "hi", "th", language.UNDETERMINED]
        if unknown := set(self.languages) - set(known):
            raise ValueError(f"languages: expected some of {', '.join(known)}, got {sorted(unknown)}; correct them")

    def decides(self) -> dict[str, Any]:
        """The part that decides the result: not what runs it, in how many processes and in what memory."""
        return {key: value for key, value in plain(self).items() if key not in ("workers", "memory_mib", "beam")}

    def families(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FAMILIES if getattr(self, name) is not None}


SYNTHETIC_ROWS = 4096  # an epoch of `synthetic`; `synthetic:N` has N


@dataclass(frozen=True)
class StageConfig:
    """Another mixture from some row of the run on.

    row: of the run, from which on it holds. weights: share of the rows by name of the source; a source that is not
    named stays out.
    """

    row: int
    weights: dict[str, float]

    def __post_init__(self) -> None:
        at_least(0, row=self.row, **{f"weights.{name}": weight for name, weight in self.weights.items()})
        if not any(self.weights.values()):
            raise ValueError(f"weights: expected one above 0, got {self.weights}; raise one")


@dataclass(frozen=True)
class DataConfig:
    """What a model is trained on, how it is cut into rows, and in which order they come.

    sources: what is read, in which proportion.
    stages: other proportions, each from some row of the run on.
    max_epochs: by source, how often a run may go through it; a run that would go on is refused. Others have no limit.
    tokenizer: how it is tokenised.
    directory: the prepared data, local or gs:// or s3://; "" for `data` in the run's own directory.
    seq_len: tokens in a row, of the encoder where there is one.
    packing: best_fit (cuts no document unless it is longer than a row), concat, or none.
    objective: what is predicted of a row.
    seed: of the order of training rows, and of synthetic data.
    heldout_fraction: share of documents, chosen by hash, that is only evaluated on.
    broken_budget: share of records that may be skipped because they are broken: not UTF-8, not JSON, without text.
    min_chars: documents that are shorter once cleaned are dropped.
    clean: rules of lmjax/data/clean.py, applied in this order.
    curate: filters, redundancy removal, decontamination, and what preparing may use.
    memory_limit_mib: a split's tokens that fit are held in memory, others are read as they are needed.
    """

    sources: tuple[SourceConfig, ...] = (SourceConfig(name="python-stdlib", uri="builtin:python-stdlib"),)
    stages: tuple[StageConfig, ...] = ()
    max_epochs: dict[str, float] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    directory: str = ""
    seq_len: int = 256
    packing: str = "best_fit"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    seed: int = 0
    heldout_fraction: float = 0.02
    broken_budget: float = 0.02
    min_chars: int = 32
    clean: tuple[str, ...] = ("newlines", "control", "nfc")
    curate: CurateConfig = field(default_factory=CurateConfig)
    memory_limit_mib: int = 1024

    def __post_init__(self) -> None:
        choice("packing", self.packing, packing.METHODS)
        at_least(2, seq_len=self.seq_len)
        at_least(0, min_chars=self.min_chars, memory_limit_mib=self.memory_limit_mib, seed=self.seed)
        for rule in self.clean:
            choice("clean", rule, clean.RULES)
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction: expected a share in (0, 1), got {self.heldout_fraction}; "
                             "use e.g. 0.02")
        if not 0 <= self.broken_budget <= 1:
            raise ValueError("broken_budget: expected a share in [0, 1], got "
                             f"{self.broken_budget}; use e.g. 0.02")
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sources: expected one or more with different names, got {names}; "
                             f"{'rename them' if names else 'name one'}")
        if 0 < sum(map(is_synthetic, self.sources)) < len(self.sources):
            raise ValueError("sources: expected all or none to be synthetic, got a mixture; "
                             "train on them separately")
        if self.packing == "concat" and not self.objective.joins:
            raise ValueError(f"packing: expected best_fit or none for {self.objective.name}, whose rows cannot be cut "
                             "from a stream of text, got concat; use best_fit")
        if self.objective.whole_word and self.synthetic:
            raise ValueError("objective.whole_word: expected false for synthetic data, which has no words, got true; "
                             "set it to false")
        self._check_stages(names)

    def _check_stages(self, names: Sequence[str]) -> None:
        unknown = [n for stage in self.stages for n in stage.weights if n not in names]
        unknown += [n for n in self.max_epochs if n not in names]
        if unknown:
            raise ValueError(f"stages, max_epochs: expected names of sources ({', '.join(names)}), got {unknown[0]!r}; "
                             "correct it")
        rows = [stage.row for stage in self.stages]
        if sorted(set(rows)) != rows:
            raise ValueError(f"stages: expected rising rows, got {rows}; sort them")
        at_least(0, **{f"max_epochs.{name}": most for name, most in self.max_epochs.items()})

    @property
    def mixture(self) -> list[tuple[int, list[float]]]:
        """(first row, weight of each source) of every stretch of the run with one mixture."""
        stages = [(s.row, [s.weights.get(source.name, 0.0) for source in self.sources]) for s in self.stages]
        if stages and stages[0][0] == 0:
            return stages
        return [(0, [source.weight for source in self.sources]), *stages]

    @property
    def synthetic(self) -> bool:
        """Whether the data is made up on the fly: nothing to prepare, no tokenizer."""
        return is_synthetic(self.sources[0])

    def prepared_by(self) -> dict[str, Any]:
        """The part of the config that decides what `prepare` writes, as plain JSON values."""
        keys = ("tokenizer", "heldout_fraction", "broken_budget", "min_chars", "clean")
        sources = [plain(source) for source in self.sources]
        for source in sources:
            del source["weight"]  # may change from run to run
        decided = {key: plain(getattr(self, key)) for key in keys}
        return {"sources": sources} | decided | {"curate": self.curate.decides()}


def check_prepared_by(config: DataConfig, manifest: dict[str, Any], directory: str) -> None:
    """Raises a ValueError that names the first key in which the data was prepared otherwise."""
    got, expected = manifest["config"], config.prepared_by()
    for key in expected:
        if got.get(key) != expected[key]:
            raise ValueError(f"{directory}: expected data prepared with {key} = {canonical(expected[key])}, "
                             f"got {canonical(got.get(key))}; repeat the config.data settings that it was "
                             "prepared with, or use another directory")
