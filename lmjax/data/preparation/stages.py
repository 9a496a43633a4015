"""The stages of `lmjax prepare`, one after the other; each is skipped where it has been done from the same things."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.data import store
from lmjax.data.config import DataConfig
from lmjax.data.hashing import key_of, permute
from lmjax.data.preparation import curate, decontaminate, dedup, shards
from lmjax.data.preparation.engine import Engine, Stage
from lmjax.data.preparation.shards import SHARD_BYTES, Samples, Shard
from lmjax.data.text import clean, sources
from lmjax.data.text.words import batches
from lmjax.data.tokenizers import Tokenizer, TokenizerFactory, tokenizer_from_bytes

BATCH_CHARS = 1 << 20  # tokenised at once


class Text(NamedTuple):
    """A stage whose result is shards of documents."""

    stage: Stage
    parts: list[Shard]

    @property
    def digest(self) -> str:
        return self.stage.receipt["output"]


class Prepared(NamedTuple):
    """All that the stages have made."""

    stages: list[Stage]  # in order
    texts: list[Text]  # ingest, clean, finish
    removed: dict[str, Stage]  # of exact and near
    evals: Stage | None
    tokenizer: Tokenizer
    tokens: Stage


def run_stages(config: DataConfig, engine: Engine, make_tokenizer: TokenizerFactory) -> Prepared:
    """From the sources to tokens.

    Raises:
      ValueError: bad sources, too little text, a tokenizer that loses text.
    """
    read = ingest(config, engine)
    cleaned = _clean(config, engine, read)
    removed = {"exact_copy": _exact(engine, cleaned)}
    if config.curate.dedup.threshold:
        removed["near_copy"] = _near(config, engine, cleaned, removed["exact_copy"])
    cuts = _cuts(config, engine, cleaned, removed)
    evals = _evals(config, engine) if config.curate.decontaminate.sources else None
    finished = _finish(config, engine, cleaned, removed, cuts, evals)
    for source in config.sources:
        _check_enough(source, read, finished)
    bounds = _bounds(config, finished)
    tokenizer, trained = _tokenizer(config, engine, finished, bounds, make_tokenizer)
    tokens = _tokens(engine, finished, bounds, trained)
    stages = [read.stage, cleaned.stage, *removed.values(), cuts, evals, finished.stage, trained, tokens]
    return Prepared([stage for stage in stages if stage], [read, cleaned, finished], removed, evals, tokenizer, tokens)


def ingest(config: DataConfig, engine: Engine) -> Text:
    """Reads all sources."""
    def build(folder: str) -> dict[str, Any]:
        facts = []
        for source in config.sources:
            work = list(enumerate(sources.units(source, SHARD_BYTES)))
            mine = [fact | {"source": source.name}
                    for found in engine.map(functools.partial(curate.ingest, source=source, folder=folder), work)
                    for fact in found]
            broken = sum(fact["removed"].get("broken", [0])[0] for fact in mine)
            samples = [sample for fact in mine for _, sample in fact["samples"].get("broken", [])]
            example = [samples[0]["id"], samples[0]["note"]] if samples else []
            sources.check_budget(source, documents=sum(fact["documents"] for fact in mine), broken=broken,
                                 example=example, budget=config.broken_budget)
            facts += mine
        return _merge(facts)

    # A source that cannot be listed is read again each time.
    inputs = {source.name: sources.identity(source) or os.urandom(8).hex() for source in config.sources}
    described = config.prepared_by()
    return _text(engine.stage("1-ingest", [described["sources"], config.broken_budget], inputs, build,
                              describe=_describe))


def _clean(config: DataConfig, engine: Engine, text: Text) -> Text:
    decides = config.curate.decides()
    for later in ("dedup", "decontaminate"):
        del decides[later]

    def build(folder: str) -> dict[str, Any]:
        work = functools.partial(curate.clean_shard, config=config.curate, rules=config.clean,
                                 min_chars=config.min_chars, folder=folder)
        return _merge(_with_sources(engine.map(work, text.parts), text))

    return _text(engine.stage("2-clean", [decides, config.clean, config.min_chars], {"text": text.digest}, build,
                              describe=_describe))


def _exact(engine: Engine, text: Text) -> Stage:
    def build(folder: str) -> dict[str, int]:
        found = dedup.exact(engine, text.parts, folder)
        shutil.rmtree(os.path.join(folder, "spill"))
        return {"removed": found.shape[1]}

    return engine.stage("3-exact", None, {"text": text.digest}, build, describe=lambda f: f"{f['removed']:,} copies")


def _near(config: DataConfig, engine: Engine, text: Text, exact: Stage) -> Stage:
    def build(folder: str) -> dict[str, int]:
        found, similar = dedup.near(engine, text.parts, exact.path("removed.npy"), config.curate.dedup, folder)
        shutil.rmtree(os.path.join(folder, "spill"))
        np.save(os.path.join(folder, "removed.npy"), np.concatenate([found, similar.view(np.uint64)[None]]))
        return {"removed": found.shape[1]}

    inputs = {"text": text.digest, "exact": exact.receipt["output"]}
    return engine.stage("4-near", dedup.facts_of(config.curate.dedup, "near"), inputs, build,
                        describe=lambda facts: f"{facts['removed']:,} near copies, each verified")


def _cuts(config: DataConfig, engine: Engine, text: Text, removed: dict[str, Stage]) -> Stage | None:
    settings = config.curate.dedup
    kinds = [kind for kind, on in (("windows", settings.window), ("lines", settings.line_documents)) if on]
    if not kinds:
        return None

    def build(folder: str) -> dict[str, int]:
        gone = [stage.path("removed.npy") for stage in removed.values()]
        found = {kind: np.load(dedup.repeats(engine, text.parts, gone, settings, folder, kind), mmap_mode="r").shape[1]
                 for kind in kinds}
        shutil.rmtree(os.path.join(folder, "spill"))
        return found

    inputs = {"text": text.digest} | {rule: stage.receipt["output"] for rule, stage in removed.items()}
    return engine.stage("5-cuts", dedup.facts_of(settings, "cuts"), inputs, build,
                        describe=lambda facts: ", ".join(f"{n:,} repeated {kind}" for kind, n in facts.items()))


def _evals(config: DataConfig, engine: Engine) -> Stage:
    settings = config.curate.decontaminate

    def build(folder: str) -> dict[str, Any]:
        examples, broken = [], 0
        for source in settings.sources:
            found = list(sources.read(source, [f for unit in sources.units(source, 1 << 60) for f in unit]))
            bad = [item for item in found if isinstance(item, sources.Broken)]
            sources.check_budget(source, documents=len(found) - len(bad), broken=len(bad),
                                 example=bad[0] if bad else (), budget=config.broken_budget)
            examples += [(source.name, item) for item in found if not isinstance(item, sources.Broken)]
            broken += len(bad)
        rules = [rule for rule in ("newlines", "control", "nfc") if rule in config.clean]
        texts = [clean.clean(document.data, rules)[0] for _, document in examples]
        counts = decontaminate.build_index(texts, settings, folder)
        shards.write(os.path.join(folder, "examples.arrow"), {
            "set": [name for name, _ in examples], "id": [document.id for _, document in examples], "text": texts,
            **counts})
        return {"examples": len(examples), "broken": broken,
                "too_short": sum(not any(n) for n in zip(*counts.values(), strict=True))}

    def describe(facts: dict[str, Any]) -> str:
        return (f"{facts['examples']:,} examples to keep out, {facts['too_short']:,} too short to look for, "
                f"{facts['broken']:,} broken")

    inputs = {source.name: sources.identity(source) for source in settings.sources}
    return engine.stage("6-evals", [config.curate.decides()["decontaminate"], config.clean, config.broken_budget],
                        inputs, build, describe=describe)


def _finish(config: DataConfig, engine: Engine, text: Text, removed: dict[str, Stage], cuts: Stage | None,
            evals: Stage | None) -> Text:
    def build(folder: str) -> dict[str, Any]:
        work = functools.partial(
            curate.finish_shard, config=config.curate, min_chars=config.min_chars, parts=text.parts, folder=folder,
            removed={rule: stage.path("removed.npy") for rule, stage in removed.items()},
            cuts={kind: cuts.path(f"{kind}.npy") if cuts and kind in cuts.facts else _nothing(folder)
                  for kind in ("windows", "lines")},
            index=evals.folder if evals else "")
        facts = engine.map(work, text.parts)
        os.remove(_nothing(folder))
        return _merge(_with_sources(facts, text)) | {"keys": [fact["keys"] for fact in facts]}

    stages = {**removed, **({"cuts": cuts} if cuts else {}), **({"evals": evals} if evals else {})}
    inputs = {"text": text.digest} | {name: stage.receipt["output"] for name, stage in stages.items()}
    return _text(engine.stage("7-finish", config.min_chars, inputs, build, describe=_describe))


def _nothing(folder: str) -> str:
    path = os.path.join(folder, "nothing.npy")
    if not os.path.exists(path):
        np.save(path, np.zeros((1, 0), np.uint64))
    return path


def _bounds(config: DataConfig, text: Text) -> dict[str, int]:
    """Under which split key the documents of each source are held out: never none of them, and never all."""
    bounds = {}
    for source in config.sources:
        keys = [key for key, part in zip(text.stage.facts["keys"], text.parts, strict=True)
                if part.source == source.name]
        lowest, highest = min(low for low, _ in keys), max(high for _, high in keys)
        bounds[source.name] = min(max(int(config.heldout_fraction * 2.0**64), lowest + 1), highest)
    return bounds


def _check_enough(source: sources.SourceConfig, read: Text, finished: Text) -> None:
    counts = [sum(part.documents for part in text.parts if part.source == source.name) for text in (read, finished)]
    if counts[1] < 2:
        raise ValueError(f"source {source.name} ({source.uri}): expected two different documents or more, one to "
                         f"train on and one to hold out, got {counts[1]} of the {counts[0]} read; split the text into "
                         "more files, or lower data.min_chars, data.heldout_fraction or the filters")


def _tokenizer(config: DataConfig, engine: Engine, text: Text, bounds: dict[str, int],
               make_tokenizer: TokenizerFactory) -> tuple[Tokenizer, Stage]:
    def build(folder: str) -> dict[str, Any]:
        texts = [] if config.tokenizer.path else sample(text.parts, bounds, config.tokenizer.train_bytes,
                                                        config.tokenizer.seed)
        tokenizer = make_tokenizer(config.tokenizer, texts)
        with open(os.path.join(folder, "tokenizer.model"), "wb") as out:
            out.write(tokenizer.to_bytes())
        return {"vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash, "documents": len(texts)}

    inputs = {"text": text.digest, "bounds": json.dumps(bounds)}
    if config.tokenizer.path:
        inputs["path"] = str(os.stat(config.tokenizer.path).st_mtime_ns if os.path.exists(config.tokenizer.path) else 0)
    stage = engine.stage("8-tokenizer", config.prepared_by()["tokenizer"], inputs, build,
                         describe=lambda facts: f"{facts['vocab_size']:,} tokens, {facts['hash'][:12]}")
    with open(stage.path("tokenizer.model"), "rb") as file:
        return tokenizer_from_bytes(file.read()), stage


def sample(parts: Sequence[Shard], bounds: dict[str, int], budget: int, seed: int) -> list[str]:
    """Training documents in a keyed random order, as many as `budget` bytes take; only those are in memory."""
    key, size, where = [], [], []
    for p, part in enumerate(parts):
        split = shards.read(part.path, ["key"]).column(0).to_numpy()
        train = np.flatnonzero(split >= np.uint64(min(bounds[part.source], 2**64 - 1)))
        key.append(split[train])
        size.append(np.array([len(raw) for raw in shards.raw_texts(part)], np.int64)[train])
        where.append(np.stack([np.full(len(train), p), train]))
    sizes, places = np.concatenate(size), np.concatenate(where, axis=1)
    order = np.argsort(permute(np.arange(len(sizes)), len(sizes), key_of("sample", seed))) if len(sizes) else sizes
    order = order[: int(np.searchsorted(np.cumsum(sizes[order]), budget)) + 1]
    chosen = {}
    for p in np.unique(places[0, order]):
        column = shards.read(parts[p].path, ["text"]).column(0)
        chosen.update({int(i): column[int(places[1, i])].as_py() for i in order[places[0, order] == p]})
    return [chosen[int(i)] for i in order]


def _tokens(engine: Engine, text: Text, bounds: dict[str, int], trained: Stage) -> Stage:
    def build(folder: str) -> dict[str, Any]:
        work = functools.partial(tokenise, model=trained.path("tokenizer.model"), bounds=bounds, folder=folder)
        facts = engine.map(work, text.parts)
        fertility: dict[str, Counter[str]] = {}
        for part, fact in zip(text.parts, facts, strict=True):
            for code, counts in fact["languages"].items():
                fertility.setdefault(f"{part.source} {code}", Counter()).update(counts)
        return {"fertility": {key: dict(value) for key, value in sorted(fertility.items())},
                "splits": [fact["splits"] for fact in facts]}

    def describe(facts: dict[str, Any]) -> str:
        total = sum((Counter(counts) for counts in facts["fertility"].values()), Counter())
        return (f"{total['tokens']:,} tokens, {total['bytes'] / max(total['tokens'], 1):.3f} bytes a token, "
                "every document comes back exactly")

    inputs = {"text": text.digest, "tokenizer": trained.receipt["output"], "bounds": json.dumps(bounds)}
    return engine.stage("9-tokens", None, inputs, build, describe=describe)


@functools.lru_cache(maxsize=1)
def _load_tokenizer(path: str, hash: str) -> Tokenizer:
    with open(path, "rb") as file:
        return tokenizer_from_bytes(file.read())


def tokenise(part: Shard, model: str, bounds: dict[str, int], folder: str) -> dict[str, Any]:
    """BOS + tokens + EOS of each document of a shard, checked to give back its exact text.

    Writes SHARD.tokens.npy, SHARD.lengths.npy and SHARD.heldout.npy.

    Raises:
      ValueError: a document does not come back, which only an existing tokenizer can cause.
    """
    tokenizer = _load_tokenizer(model, curate.hash_of(str(os.stat(model).st_mtime_ns)))
    batch = shards.read(part.path)
    texts, names = batch.column("text").to_pylist(), batch.column("id").to_pylist()
    dtype = store.token_dtype(tokenizer.vocab_size)
    bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
    out: list[np.ndarray] = []
    for base, group in batches(texts, BATCH_CHARS):
        ids = tokenizer.encode_batch(group, num_threads=1)
        bad = tokenizer.lossy(group, ids)
        if bad is not None:
            raise ValueError(f"document {names[base + bad]} of source {part.source}: expected a tokenizer that gives "
                             "back its text, got another text; use one that loses nothing, or train one by "
                             "leaving data.tokenizer.path empty")
        out += [np.concatenate([bos, i.astype(dtype), eos]) for i in ids]
    held = batch.column("key").to_numpy() < np.uint64(min(bounds[part.source], 2**64 - 1))
    lengths = np.array([len(ids) for ids in out], np.int64)
    sizes = np.array([len(text.encode()) for text in texts], np.int64)
    for name, values in (("tokens", np.concatenate([np.zeros(0, dtype), *out])), ("lengths", lengths),
                         ("heldout", held)):
        np.save(os.path.join(folder, f"{part.name}.{name}.npy"), values)
    columns = {"documents": np.ones(len(texts), np.int64), "bytes": sizes, "tokens": np.maximum(lengths - 1, 0),
               "words": batch.column("words").to_numpy(zero_copy_only=False).astype(np.int64)}
    codes = np.array(batch.column("language").to_pylist(), dtype=object)
    languages = {code: {key: int(values[codes == code].sum()) for key, values in columns.items()}
                 for code in sorted(set(codes.tolist()))}
    return {"languages": languages, "splits": {
        split: [int(mine.sum()), int(sizes[mine].sum())] for split, mine in (("train", ~held), ("heldout", held))}}


def _with_sources(facts: Iterable[dict[str, Any]], text: Text) -> list[dict[str, Any]]:
    return [fact | {"source": part.source} for fact, part in zip(facts, text.parts, strict=True)]


def _merge(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of all shards as those of a stage: by shard where it lies, by source what was counted."""
    by_source: dict[str, dict[str, Any]] = {}
    samples = Samples()
    for fact in facts:
        total = by_source.setdefault(fact["source"], {"documents": 0, "bytes": 0, "removed": {}, "changed": Counter()})
        for key in ("documents", "bytes"):
            total[key] += fact[key]
        for rule, (documents, size) in fact["removed"].items():
            before = total["removed"].get(rule, [0, 0])
            total["removed"][rule] = [before[0] + documents, before[1] + size]
        total["changed"].update(fact["changed"])
        samples.merge(Samples(fact["samples"]))
    return {"shards": [[fact["file"], fact["source"], fact["documents"]] for fact in facts], "sources": by_source,
            "samples": samples.plain()}


def _text(stage: Stage) -> Text:
    parts, first = [], 0
    for file, source, documents in stage.facts["shards"]:
        parts.append(Shard(stage.path(file), source, first, documents))
        first += documents
    return Text(stage, parts)


def _describe(facts: dict[str, Any]) -> str:
    totals = facts["sources"].values()
    removed, changed = Counter[str](), Counter[str]()
    for total in totals:
        removed.update({rule: n for rule, (n, _) in total["removed"].items()})
        changed.update(total["changed"])
    parts = [f"{sum(total['documents'] for total in totals):,} documents, "
             f"{sum(total['bytes'] for total in totals) / 1e6:.1f} MB"]
    for what, counts in (("changed", changed), ("removed", removed)):
        if counts:
            parts.append(f"{what}: " + ", ".join(f"{n:,} {rule}" for rule, n in counts.most_common(8)))
    return "; ".join(parts)

