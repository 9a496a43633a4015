"""data_report.html: what went into prepared data, and what was removed and why.

One page without scripts or links to other files.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.data.config import DataConfig
from lmjax.data.preparation import corpus, shards
from lmjax.data.preparation.decontaminate import RUN_KINDS
from lmjax.data.preparation.shards import Shard, shard_of
from lmjax.data.preparation.stages import Prepared
from lmjax.monitoring.units import human_count
from lmjax.reporting.page import bars, card, escape, page, table, tile

EXAMPLES = 4  # shown per rule
CLUSTERS = 10  # the largest clusters of copies that are shown
CONTAMINATED = 40  # evaluation examples that are shown
SPLITS = ("train", "heldout")
STEPS = ("read", "cleaned and filtered", "deduplicated and decontaminated")  # of `Prepared.corpora`


def write_data_report(config: DataConfig, made: Prepared, entries: dict[str, Any],
                      found: Sequence[dict[str, Any]], folder: str) -> str:
    """Writes `data_report.html`.

    Args:
      config: the data config.
      made: the results of the stages.
      entries: the manifest's entries, by source.
      found: what `writer.contamination` returned.
      folder: the prepared directory.
    Returns:
      the path of the page.
    """
    cards = (_head(config, made, entries), _funnel(made), _lengths(made), _rules(made),
             _quality(made), _languages(made), _stages(made), _sources(entries), _fertility(made),
             _clusters(made), _contamination(made, found), _examples(made))
    path = os.path.join(folder, "data_report.html")
    with open(path, "w", encoding="utf-8") as out:
        out.write(page("Data report", "".join(cards)))
    return path


def _totals(made: Prepared) -> list[tuple[int, int]]:
    """(documents, bytes) of the corpus after each step."""
    return [corpus.totals(c.stage.facts) for c in made.corpora]


def _head(config: DataConfig, made: Prepared, entries: dict[str, Any]) -> str:
    (documents_read, bytes_read), _, (documents, size) = _totals(made)
    tokens = sum(entry[split]["tokens"] for entry in entries.values() for split in SPLITS)
    broken = sum(n for n, _ in corpus.removed(made.ingested.stage.facts).values())
    tiles = [tile(f"{documents_read + broken:,}", "records read"),
             tile(f"{documents:,}", "documents kept"),
             tile(_bytes(size), "text kept"),
             tile(f"{size / max(bytes_read, 1):.1%}", "of the bytes"),
             tile(human_count(tokens), "tokens"),
             tile(f"{size / max(tokens, 1):.2f}", "bytes per token")]
    names = ", ".join(f"{source.name} ({source.uri})" for source in config.sources)
    return (f'<header><h1>Data report</h1><p class="summary">{escape(names)}</p></header>'
            f'<div class="tiles">{"".join(tiles)}</div>')


def _funnel(made: Prepared) -> str:
    totals = _totals(made)
    rows = [(name, size / max(totals[0][1], 1), f"{documents:,} documents, {_bytes(size)}")
            for name, (documents, size) in zip(STEPS, totals, strict=True)]
    return card("What is left after each step", bars(rows),
                "The share of the bytes that were read.")


def _rules(made: Prepared) -> str:
    rows: list[Sequence[Any]] = []
    changed: Counter[str] = Counter()
    for c in made.corpora:
        removed = sorted(corpus.removed(c.stage.facts).items(), key=lambda item: -item[1][0])
        rows += [(rule, c.stage.name, f"{documents:,}", _bytes(size))
                 for rule, (documents, size) in removed]
        changed += corpus.changed(c.stage.facts)
    body = "<p>Nothing was removed.</p>"
    if rows:
        body = table(["rule", "stage", "documents", "bytes"], rows, 2)
    if changed:
        counts = [(rule, f"{n:,}") for rule, n in changed.most_common()]
        body += "<h3>Changed, and kept</h3>" + table(["rule", "documents"], counts)
    return card("Removed, by rule", body, "A document counts for the first rule that it broke.",
                wide=True)


def _quality(made: Prepared) -> str:
    """Documents by their score, all and kept."""
    if "quality" not in made.removed:
        return ""
    facts = made.removed["quality"].facts
    count, edge = map(np.array, facts["scores"])
    # The threshold lies within a bar: what the bars above it do not hold was removed from this one.
    kept, left = count.copy(), facts["removed"]
    for i in range(len(kept)):
        kept[i] -= (taken := min(left, int(kept[i])))
        left -= taken
    note = (f"Documents by score, all (grey) and kept (blue). Below {facts['threshold']:.2f} lie "
            f"{facts['removed']:,}, which are unlike the {facts['examples']:,} examples.")
    labels = [f"{x:.1f}" for x in edge[:-1]]
    return card("Likeness to the examples", _histogram(labels, count, kept), note)


def _lengths(made: Prepared) -> str:
    """Documents by the power of two of their bytes, before and after."""
    def histogram(parts: Sequence[Shard]) -> np.ndarray:
        count = np.zeros(40, np.int64)
        for part in parts:
            sizes = np.array([len(raw) for raw in shards.raw_texts(part)], np.int64)
            count += np.bincount(np.int64(np.log2(np.maximum(sizes, 1))), minlength=40)
        return count

    before, after = histogram(made.ingested.parts), histogram(made.finished.parts)
    used = np.flatnonzero(before + after)
    low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    labels = [_bytes(2.0**i) for i in range(low, high)]
    note = "Documents with this many bytes, or up to twice as many: read (grey) and kept (blue)."
    return card("Lengths", _histogram(labels, before[low:high], after[low:high]), note)


def _histogram(labels: Sequence[str], before: np.ndarray, after: np.ndarray) -> str:
    top, width, height = max(int(before.max(initial=1)), int(after.max(initial=1))), 560, 200
    step = width / len(labels)
    marks = []
    for i, label in enumerate(labels):
        for values, color, inset in ((before, "grid", 0.06), (after, "train", 0.2)):
            tall = float(values[i]) / top * (height - 36)
            marks.append(f'<rect x="{i * step + inset * step:.1f}" y="{height - 24 - tall:.1f}" '
                         f'width="{step * (1 - 2 * inset):.1f}" height="{tall:.1f}" '
                         f'style="fill: var(--{color})"><title>{escape(label)}: '
                         f"{int(before[i]):,} read, {int(after[i]):,} kept</title></rect>")
        if len(labels) <= 9 or i % 2 == 0:
            marks.append(f'<text x="{(i + 0.5) * step:.1f}" y="{height - 8}" text-anchor="middle" '
                         f'font-size="11" style="fill: var(--muted)">{escape(label)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(marks)}</svg>'


def _languages(made: Prepared) -> str:
    total: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    for key, counts in made.tokens.facts["fertility"].items():
        _, code = key.split()
        total[code] += counts["bytes"]
        documents[code] += counts["documents"]
    size = max(sum(total.values()), 1)
    rows = [(code, n / size, f"{documents[code]:,} documents, {_bytes(n)}")
            for code, n in total.most_common(12)]
    return card("Languages", bars(rows),
                "The share of the bytes that were kept. und: neither function words nor script "
                "tell the language, as in code and tables.")


def _sources(entries: dict[str, Any]) -> str:
    rows = [(name, f"{entry['read']['documents']:,}", _bytes(entry["read"]["bytes"]),
             *(f"{entry[split]['documents']:,}" for split in SPLITS),
             *(human_count(entry[split]["tokens"]) for split in SPLITS))
            for name, entry in entries.items()]
    head = ["source", "read", "bytes", "training", "held out", "tokens", "held out"]
    return card("Sources", table(head, rows),
                "Documents read, documents kept by split, and their tokens.")


def _fertility(made: Prepared) -> str:
    facts = sorted(made.tokens.facts["fertility"].items(), key=lambda item: -item[1]["tokens"])
    rows = [(*key.split(), f"{counts['tokens']:,}",
             f"{counts['bytes'] / max(counts['tokens'], 1):.2f}",
             f"{counts['tokens'] / max(counts['words'], 1):.2f}") for key, counts in facts[:24]]
    head = ["source", "language", "tokens", "bytes per token", "tokens per word"]
    return card("Fertility of the tokenizer", table(head, rows, 2),
                "A word is a run of letters and digits; in Chinese and Japanese, a character. "
                "Tokens without letters count as well.")


def _stages(made: Prepared) -> str:
    read = max(_totals(made)[0][1], 1)
    rows = [(stage.name, f"{stage.receipt['seconds']:.1f}",
             f"{read / 1e6 / max(stage.receipt['seconds'], 1e-3):.1f}",
             _bytes(stage.receipt["bytes"]), f"{stage.receipt['peak_mib']:,}", stage.digest[:12])
            for stage in made.stages]
    head = ["stage", "seconds", "MB/s", "written", "peak MiB", "sha256"]
    workers = made.stages[0].receipt["workers"]
    return card("Stages", table(head, rows),
                f"MB/s of the text that was read, with {workers} workers. Peak: the most memory "
                "that any one process has held up to the end of the stage.")


def _document(parts: Sequence[Shard], number: int) -> tuple[str, str]:
    """The id and the text of a document."""
    part = parts[shard_of(parts, number)]
    ids, texts = shards.read(part.path, ["id", "text"]).columns
    return ids[number - part.first].as_py(), texts[number - part.first].as_py()


def _clusters(made: Prepared) -> str:
    parts, body = made.cleaned.parts, ""
    for rule, stage in made.removed.items():
        if rule == "quality":
            continue
        rows = np.load(stage.path("removed.npy"), mmap_mode="r")
        kept, sizes = np.unique(rows[1], return_counts=True)
        top = np.lexsort((kept, -sizes))[:CLUSTERS]
        some = []
        for i in top:
            name, text = _document(parts, int(kept[i]))
            mine = np.flatnonzero(rows[1] == kept[i])
            others = [_document(parts, int(number))[0] for number in rows[0][mine[:3]]]
            least = f"{rows[2][mine].view(np.float64).min():.3f}" if len(rows) > 2 else "1"
            some.append((name, ", ".join(others) + (" \u2026" if len(mine) > 3 else ""),
                         " ".join(text.split())[:90], f"{len(mine):,}", least))
        if some:
            title = f"{rows.shape[1]:,} copies of {len(kept):,} documents"
            head = ["the one that stays", "removed for it", "text", "removed", "least Jaccard"]
            body += f"<h3><b>{escape(rule)}</b>: {title}</h3>{table(head, some, 3)}"
    note = "The largest. Every near copy was compared in full with the document that stays."
    return card("Clusters of copies", body or "<p>None.</p>", note, wide=True)


def _contamination(made: Prepared, found: Sequence[dict[str, Any]]) -> str:
    if not made.evals:
        return ""
    hits = sorted((example for example in found if example["documents"]),
                  key=lambda example: -len(example["documents"]))
    rows = [(example["set"], example["id"], ", ".join(example["documents"][:4]),
             f"{len(example['documents']):,}",
             *(f"{example[kind][0]:,} of {example[kind][1]:,}" for kind in RUN_KINDS))
            for example in hits[:CONTAMINATED]]
    head = ["set", "example", "found in", "documents", "runs of words", "runs of letters"]
    body = table(head, rows, 3) if rows else ""
    note = (f"{len(hits):,} of {len(found):,} evaluation examples share a run of words or letters "
            "with the corpus; the documents were removed. "
            f"{made.evals.facts['too_short']:,} examples are too short to look for.")
    return card("Evaluation examples in the corpus", body, note, wide=True)


def _examples(made: Prepared) -> str:
    body = ""
    for c in made.corpora:
        for rule, samples in c.stage.facts["samples"].items():
            shown = "".join(_example(sample) for sample in samples[:EXAMPLES])
            body += f'<h3><b>{escape(rule)}</b></h3><div class="samples">{shown}</div>'
    return card("Examples of what each rule removed or changed", body or "<p>None.</p>",
                "Chosen by hash.", wide=True)


def _example(sample: dict[str, Any]) -> str:
    """The excerpt of a removed document, or of a changed one with the changed part marked."""
    note = f" \u2014 {sample['note']}" if sample.get("note") else ""
    title = f'<p class="note">{escape(sample["id"] + note)}</p>'
    if "before" not in sample:
        return f"<div>{title}<pre>{escape(sample['text'])}</pre></div>"
    before, after = sample["before"], sample["text"]
    start = len(os.path.commonprefix([before, after]))
    end = len(os.path.commonprefix([before[start:][::-1], after[start:][::-1]]))
    pieces = before[:start], before[start : len(before) - end], before[len(before) - end :]
    first, changed, last = map(escape, pieces)
    return f"<div>{title}<pre>{first}<mark>{changed}</mark>{last}</pre></div>"


def _bytes(size: float) -> str:
    power = min(int(math.log(max(size, 1), 1000)), 4)
    value = size / 1000**power
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    return f"{value:.{0 if value >= 100 or not power else 1}f} {unit}"
