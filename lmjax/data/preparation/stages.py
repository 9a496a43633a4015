"""The stages of `lmjax prepare`, in order, from the sources to tokens.

A stage is skipped if its receipt says that the same inputs, settings and versions made it before.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmjax.data.config import DataConfig
from lmjax.data.preparation import curate, decontaminate, dedup, shards
from lmjax.data.preparation.corpus import Corpus, corpus_of, describe, merge_facts
from lmjax.data.preparation.engine import Engine, Stage
from lmjax.data.preparation.repeats import repeats
from lmjax.data.preparation.tokenise import heldout_bounds, tokenise, training_sample
from lmjax.data.text import sources
from lmjax.data.tokenizers import Tokenizer, TokenizerFactory, tokenizer_from_bytes
from lmjax.errors import UserError

# The stages in order. Folders and receipts are named by number and name: "1-ingest", "2-clean".
STAGE_NAMES = {name: f"{number}-{name}" for number, name in enumerate((
    "ingest",     # reads all sources into shards of documents
    "clean",      # cleans texts; removes documents by language, length and filters
    "exact",      # finds equal documents
    "near",       # finds nearly equal documents
    "cuts",       # finds repeated windows of words and repeated lines
    "evals",      # indexes the evaluation sets
    "finish",     # removes and cuts what the five stages before it found
    "tokenizer",  # trains or reads the tokenizer
    "tokens",     # tokenises the documents and counts what does not come back
), start=1)}
STAGE_NAMES["quality"] = "2-quality"  # finds documents that are unlike examples of good text


@dataclass(frozen=True)
class Prepared:
    """The results of all stages."""

    stages: list[Stage]  # in order
    ingested: Corpus
    cleaned: Corpus
    finished: Corpus
    removed: dict[str, Stage]  # what finds documents to remove, by rule
    evals: Stage | None
    tokenizer: Tokenizer
    tokens: Stage

    @property
    def corpora(self) -> tuple[Corpus, Corpus, Corpus]:
        """The corpus after each stage that writes it."""
        return self.ingested, self.cleaned, self.finished


def run_stages(config: DataConfig, engine: Engine, make_tokenizer: TokenizerFactory) -> Prepared:
    """Runs all stages.

    Args:
      config: the data config.
      engine: runs each stage, unless it was finished before.
      make_tokenizer: makes the tokenizer from its config and the training texts.
    Raises:
      UserError: a source cannot be read or has too little text.
    """
    ingested = _ingest(config, engine)
    cleaned = _clean(config, engine, ingested)
    removed = {}
    if config.curate.quality.good:
        removed["quality"] = _quality(config, engine, cleaned)
    removed["exact_copy"] = _exact(engine, cleaned, removed.get("quality"))
    if config.curate.dedup.threshold:
        removed["near_copy"] = _near(config, engine, cleaned, removed)
    cuts = _cuts(config, engine, cleaned, removed)
    evals = _evals(config, engine) if config.curate.decontaminate.sources else None
    finished = _finish(config, engine, cleaned, _Found(removed, cuts, evals))
    for source in config.sources:
        _check_enough(source, ingested, finished)
    names = [source.name for source in config.sources]
    bounds = heldout_bounds(finished, names, config.heldout_fraction)
    tokenizer, trained = _tokenizer(config, engine, finished, bounds, make_tokenizer)
    tokens = _tokens(engine, finished, bounds, trained)
    stages = [ingested.stage, cleaned.stage, *removed.values(), cuts, evals, finished.stage,
              trained, tokens]
    return Prepared([stage for stage in stages if stage], ingested, cleaned, finished, removed,
                    evals, tokenizer, tokens)


def _ingest(config: DataConfig, engine: Engine) -> Corpus:
    """Reads all sources into shards of documents."""
    def build(folder: str) -> dict[str, Any]:
        facts, names = [], []
        for source in config.sources:
            work = list(enumerate(sources.units(source, shards.SHARD_BYTES)))
            read = functools.partial(curate.ingest, source=source, folder=folder,
                                     budget=config.broken_budget)
            mine = [fact for found in engine.map(read, work) for fact in found]
            broken = sum(fact["removed"].get("broken", [0])[0] for fact in mine)
            samples = [sample for fact in mine for _, sample in fact["samples"].get("broken", [])]
            example = [samples[0]["id"], samples[0]["note"]] if samples else []
            sources.check_budget(source, documents=sum(fact["documents"] for fact in mine),
                                 broken=broken, example=example, budget=config.broken_budget,
                                 size=sum(fact["bytes"] for fact in mine),
                                 lost=sum(fact["lost"] for fact in mine))
            facts += mine
            names += [source.name] * len(mine)
        return merge_facts(facts, names)

    # A source that cannot be listed has no identity; a random one makes it be read again each time.
    inputs = {source.name: sources.identity(source) or os.urandom(8).hex()
              for source in config.sources}
    settings = [config.prepared_by()["sources"], config.broken_budget]
    return corpus_of(engine.stage(STAGE_NAMES["ingest"], settings, inputs, build,
                                  describe=describe))


def _clean(config: DataConfig, engine: Engine, corpus: Corpus) -> Corpus:
    decides = config.curate.decides()
    for later in ("quality", "dedup", "decontaminate"):
        del decides[later]

    def build(folder: str) -> dict[str, Any]:
        work = functools.partial(curate.clean_shard, config=config.curate, rules=config.clean,
                                 min_chars=config.min_chars, folder=folder)
        return merge_facts(engine.map(work, corpus.parts), [part.source for part in corpus.parts])

    return corpus_of(engine.stage(STAGE_NAMES["clean"], [decides, config.clean, config.min_chars],
                                  {"text": corpus.stage.digest}, build, describe=describe))


def _quality(config: DataConfig, engine: Engine, corpus: Corpus) -> Stage:
    settings = config.curate.quality

    def build(folder: str) -> dict[str, Any]:
        from lmjax.data.preparation import quality  # imports SciPy, which takes its time

        return quality.remove(engine, corpus.parts, settings, config.clean, config.broken_budget,
                              folder)

    decides = [config.curate.decides()["quality"], config.clean, config.broken_budget]
    inputs = {source.name: sources.identity(source) for source in settings.good}
    return engine.stage(
        STAGE_NAMES["quality"], decides, inputs | {"text": corpus.stage.digest}, build,
        describe=lambda facts: (f"{facts['removed']:,} documents are unlike the "
                                f"{facts['examples']:,} examples"))


def _exact(engine: Engine, corpus: Corpus, judged: Stage | None) -> Stage:
    def build(folder: str) -> dict[str, int]:
        found = dedup.exact(engine, corpus.parts, folder,
                            judged.path("removed.npy") if judged else "")
        shutil.rmtree(os.path.join(folder, "spill"))
        return {"removed": found.shape[1]}

    inputs = {"text": corpus.stage.digest} | ({"quality": judged.digest} if judged else {})
    return engine.stage(STAGE_NAMES["exact"], None, inputs, build,
                        describe=lambda facts: f"{facts['removed']:,} copies")


def _near(config: DataConfig, engine: Engine, corpus: Corpus, before: Mapping[str, Stage]) -> Stage:
    settings = config.curate.dedup

    def build(folder: str) -> dict[str, int]:
        gone = [np.load(stage.path("removed.npy"))[0] for stage in before.values()]
        removed = os.path.join(folder, "before.npy")
        np.save(removed, np.unique(np.concatenate(gone))[None])
        found, similar = dedup.near(engine, corpus.parts, removed, settings, folder)
        os.remove(removed)
        shutil.rmtree(os.path.join(folder, "spill"))
        rows = np.concatenate([found, similar.view(np.uint64)[None]])
        np.save(os.path.join(folder, "removed.npy"), rows)
        return {"removed": found.shape[1]}

    decides = {key: getattr(settings, key) for key in ("threshold", "shingle", "bands", "rows")}
    inputs = {"text": corpus.stage.digest} | {rule: stage.digest for rule, stage in before.items()}
    return engine.stage(STAGE_NAMES["near"], decides, inputs, build,
                        describe=lambda facts: f"{facts['removed']:,} near copies, each verified")


def _cuts(config: DataConfig, engine: Engine, corpus: Corpus,
          removed: Mapping[str, Stage]) -> Stage | None:
    settings = config.curate.dedup
    enabled = {"windows": settings.window, "lines": settings.line_documents}
    kinds = [kind for kind, on in enabled.items() if on]
    if not kinds:
        return None

    def build(folder: str) -> dict[str, int]:
        gone = [stage.path("removed.npy") for stage in removed.values()]
        files = {kind: repeats(engine, corpus.parts, gone, settings, folder, kind)
                 for kind in kinds}
        shutil.rmtree(os.path.join(folder, "spill"))
        return {kind: np.load(file, mmap_mode="r").shape[1] for kind, file in files.items()}

    decides = {key: getattr(settings, key) for key in ("window", "line_documents", "line_chars")}
    inputs = {"text": corpus.stage.digest} | {rule: stage.digest for rule, stage in removed.items()}
    return engine.stage(
        STAGE_NAMES["cuts"], decides, inputs, build,
        describe=lambda facts: ", ".join(f"{n:,} repeated {kind}" for kind, n in facts.items()))


def _evals(config: DataConfig, engine: Engine) -> Stage:
    settings = config.curate.decontaminate

    def build(folder: str) -> dict[str, int]:
        return decontaminate.index_sources(settings, config.clean, config.broken_budget, folder)

    def describe_evals(facts: dict[str, int]) -> str:
        return (f"{facts['examples']:,} examples to keep out, {facts['too_short']:,} too short to "
                f"look for, {facts['broken']:,} broken")

    decides = [config.curate.decides()["decontaminate"], config.clean, config.broken_budget]
    inputs = {source.name: sources.identity(source) for source in settings.sources}
    return engine.stage(STAGE_NAMES["evals"], decides, inputs, build, describe=describe_evals)


@dataclass(frozen=True)
class _Found:
    """The stages that find what `_finish` removes."""

    removed: Mapping[str, Stage]
    cuts: Stage | None
    evals: Stage | None

    def findings(self) -> curate.Findings:
        cuts = self.cuts
        return curate.Findings(
            removed={rule: stage.path("removed.npy") for rule, stage in self.removed.items()},
            cuts={kind: cuts.path(f"{kind}.npy") for kind in cuts.facts} if cuts else {},
            index=self.evals.folder if self.evals else "")

    def digests(self) -> dict[str, str]:
        stages = {**self.removed, "cuts": self.cuts, "evals": self.evals}
        return {name: stage.digest for name, stage in stages.items() if stage}


def _finish(config: DataConfig, engine: Engine, corpus: Corpus, found: _Found) -> Corpus:
    def build(folder: str) -> dict[str, Any]:
        work = functools.partial(curate.finish_shard, config=config.curate,
                                 min_chars=config.min_chars, findings=found.findings(),
                                 parts=corpus.parts, folder=folder)
        facts = engine.map(work, corpus.parts)
        merged = merge_facts(facts, [part.source for part in corpus.parts])
        return merged | {"keys": [fact["keys"] for fact in facts]}

    inputs = {"text": corpus.stage.digest} | found.digests()
    return corpus_of(engine.stage(STAGE_NAMES["finish"], config.min_chars, inputs, build,
                                  describe=describe))


def _check_enough(source: sources.SourceConfig, ingested: Corpus, finished: Corpus) -> None:
    read, left = (corpus.counts(source.name)["documents"] for corpus in (ingested, finished))
    if left < 2:
        raise UserError("two different documents or more, one to train on and one to hold out",
                        f"{left} of the {read} read",
                        "split the text into more files, or lower data.min_chars, "
                        "data.heldout_fraction or the filters",
                        where=f"source {source.name} ({source.uri})")


def _tokenizer(config: DataConfig, engine: Engine, corpus: Corpus, bounds: dict[str, int],
               make_tokenizer: TokenizerFactory) -> tuple[Tokenizer, Stage]:
    settings = config.tokenizer

    def build(folder: str) -> dict[str, Any]:
        texts = ([] if settings.path else
                 training_sample(corpus.parts, bounds, settings.train_bytes, settings.seed))
        tokenizer = make_tokenizer(settings, texts)
        with open(os.path.join(folder, "tokenizer.model"), "wb") as out:
            out.write(tokenizer.to_bytes())
        return {"vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash, "documents": len(texts)}

    inputs = {"text": corpus.stage.digest, "bounds": json.dumps(bounds)}
    if path := settings.path:
        inputs["path"] = str(os.stat(path).st_mtime_ns if os.path.exists(path) else 0)
    stage = engine.stage(
        STAGE_NAMES["tokenizer"], config.prepared_by()["tokenizer"], inputs, build,
        describe=lambda facts: f"{facts['vocab_size']:,} tokens, {facts['hash'][:12]}")
    with open(stage.path("tokenizer.model"), "rb") as file:
        return tokenizer_from_bytes(file.read()), stage


def _tokens(engine: Engine, corpus: Corpus, bounds: dict[str, int], trained: Stage) -> Stage:
    def build(folder: str) -> dict[str, Any]:
        work = functools.partial(tokenise, model=trained.path("tokenizer.model"), bounds=bounds,
                                 folder=folder)
        facts = engine.map(work, corpus.parts)
        fertility: dict[str, Counter[str]] = {}
        for part, fact in zip(corpus.parts, facts, strict=True):
            for code, counts in fact["languages"].items():
                fertility.setdefault(f"{part.source} {code}", Counter()).update(counts)
        return {"fertility": {key: dict(value) for key, value in sorted(fertility.items())},
                "splits": [fact["splits"] for fact in facts],
                "example": next((fact["example"] for fact in facts if fact["example"]), "")}

    def describe_tokens(facts: dict[str, Any]) -> str:
        total = sum((Counter(counts) for counts in facts["fertility"].values()), Counter[str]())
        ratio = total["bytes"] / max(total["tokens"], 1)
        changed, lost = (sum(split[n] for shard in facts["splits"] for split in shard.values())
                         for n in (2, 3))
        exact = "every document comes back exactly"
        if changed:
            exact = (f"{changed:,} of {total['documents']:,} documents do not come back exactly "
                     f"and lose {lost:,} characters, so bits per byte are of the decoded text "
                     f"({facts['example']})")
        return f"{total['tokens']:,} tokens, {ratio:.3f} bytes per token, {exact}"

    inputs = {"text": corpus.stage.digest, "tokenizer": trained.digest,
              "bounds": json.dumps(bounds)}
    # "decoded": the sizes of texts are those of the decoded text.
    return engine.stage(STAGE_NAMES["tokens"], "decoded", inputs, build, describe=describe_tokens)
