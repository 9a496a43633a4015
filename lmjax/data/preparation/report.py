"""data_report.html: what went into prepared data, what was taken out and why, in one page without scripts or links."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.data.config import DataConfig
from lmjax.data.preparation import shards
from lmjax.data.preparation.shards import Shard
from lmjax.data.preparation.stages import Prepared
from lmjax.reporting.page import bars, card, escape, page, table, tile

SHOWN = 4  # examples of a rule
CLUSTERS = 10  # largest clusters of copies
HITS = 40  # evaluation examples
NAMES = ("read", "cleaned and filtered", "deduplicated and decontaminated")


def write_data_report(config: DataConfig, made: Prepared, entries: dict[str, Any], found: Sequence[dict[str, Any]],
                      folder: str) -> str:
    """Writes `data_report.html` into a prepared directory; returns its path.

    entries: the manifest's sources. found: what `prepare_store.contamination` gave.
    """
    body = _head(config, made, entries) + _funnel(made) + _lengths(made) + _rules(made) + _languages(made)
    body += _stages(made) + _sources(entries) + _fertility(made) + _clusters(made) + _contamination(made, found)
    body += _examples(made)
    path = os.path.join(folder, "data_report.html")
    with open(path, "w", encoding="utf-8") as out:
        out.write(page("Data report", body))
    return path


def _totals(made: Prepared) -> list[tuple[int, int]]:
    """(documents, bytes) after each stage that writes text."""
    return [(sum(s["documents"] for s in text.stage.facts["sources"].values()),
             sum(s["bytes"] for s in text.stage.facts["sources"].values())) for text in made.texts]


def _head(config: DataConfig, made: Prepared, entries: dict[str, Any]) -> str:
    totals = _totals(made)
    tokens = sum(entry[split]["tokens"] for entry in entries.values() for split in ("train", "heldout"))
    broken = sum(n for n, _ in _removed(made, 0).values())
    tiles = [tile(f"{totals[0][0] + broken:,}", "records read"), tile(f"{totals[-1][0]:,}", "documents kept"),
             tile(_bytes(totals[-1][1]), "text kept"),
             tile(f"{totals[-1][1] / max(totals[0][1], 1):.1%}", "of the bytes"),
             tile(_count(tokens), "tokens"), tile(f"{totals[-1][1] / max(tokens, 1):.2f}", "bytes a token")]
    names = ", ".join(f"{source.name} ({source.uri})" for source in config.sources)
    return (f'<header><h1>Data report</h1><p class="summary">{escape(names)}</p></header>'
            f'<div class="tiles">{"".join(tiles)}</div>')


def _removed(made: Prepared, number: int) -> dict[str, list[int]]:
    """rule -> [documents, bytes] that a text stage removed, of all sources."""
    total: dict[str, list[int]] = {}
    for source in made.texts[number].stage.facts["sources"].values():
        for rule, (documents, size) in source["removed"].items():
            before = total.get(rule, [0, 0])
            total[rule] = [before[0] + documents, before[1] + size]
    return total


def _funnel(made: Prepared) -> str:
    totals = _totals(made)
    rows = [(name, size / max(totals[0][1], 1), f"{documents:,} documents, {_bytes(size)}")
            for name, (documents, size) in zip(NAMES, totals, strict=True)]
    return card("What is left after each stage", bars(rows), "The share of the bytes that were read.")


def _rules(made: Prepared) -> str:
    rows: list[Sequence[Any]] = []
    for number, text in enumerate(made.texts):
        removed = sorted(_removed(made, number).items(), key=lambda item: -item[1][0])
        rows += [(rule, text.stage.receipt["stage"], f"{documents:,}", _bytes(size))
                 for rule, (documents, size) in removed]
    changed: Counter[str] = Counter()
    for text in made.texts:
        for source in text.stage.facts["sources"].values():
            changed.update(source["changed"])
    body = table(["rule", "stage", "documents", "bytes"], rows, 2) if rows else "<p>Nothing was removed.</p>"
    if changed:
        body += "<h3>Changed, and kept</h3>" + table(["rule", "documents"],
                                                     [(rule, f"{n:,}") for rule, n in changed.most_common()])
    return card("Removed, by rule", body, "A document counts for the first rule that it broke.", wide=True)


def _lengths(made: Prepared) -> str:
    """Documents by the power of two of their bytes, before and after."""
    def histogram(parts: Sequence[Shard]) -> np.ndarray:
        count = np.zeros(40, np.int64)
        for part in parts:
            sizes = np.array([len(raw) for raw in shards.raw_texts(part)], np.int64)
            count += np.bincount(np.int64(np.log2(np.maximum(sizes, 1))), minlength=40)
        return count

    before, after = histogram(made.texts[0].parts), histogram(made.texts[-1].parts)
    used = np.flatnonzero(before + after)
    low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    labels = [_bytes(2.0**i) for i in range(low, high)]
    return card("Lengths", _histogram(labels, before[low:high], after[low:high]),
                "Documents of this many bytes or up to twice as many: read (grey) and kept (blue).")


def _histogram(labels: Sequence[str], before: np.ndarray, after: np.ndarray) -> str:
    top, width, height = max(int(before.max(initial=1)), int(after.max(initial=1))), 560, 200
    step = width / len(labels)
    marks = []
    for i, label in enumerate(labels):
        for values, color, inset in ((before, "grid", 0.06), (after, "train", 0.2)):
            tall = float(values[i]) / top * (height - 36)
            marks.append(f'<rect x="{i * step + inset * step:.1f}" y="{height - 24 - tall:.1f}" '
                         f'width="{step * (1 - 2 * inset):.1f}" height="{tall:.1f}" style="fill: var(--{color})">'
                         f"<title>{escape(label)}: {int(before[i]):,} read, {int(after[i]):,} kept</title></rect>")
        if len(labels) <= 9 or i % 2 == 0:
            marks.append(f'<text x="{(i + 0.5) * step:.1f}" y="{height - 8}" text-anchor="middle" font-size="11" '
                         f'style="fill: var(--muted)">{escape(label)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(marks)}</svg>'


def _languages(made: Prepared) -> str:
    total: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    for key, counts in made.tokens.facts["fertility"].items():
        total[key.split()[1]] += counts["bytes"]
        documents[key.split()[1]] += counts["documents"]
    size = max(sum(total.values()), 1)
    rows = [(code, n / size, f"{documents[code]:,} documents, {_bytes(n)}") for code, n in total.most_common(12)]
    return card("Languages", bars(rows), "Of the text that was kept, by bytes. und: none that its function words or "
                                         "its script tell, as of code and tables.")


def _sources(entries: dict[str, Any]) -> str:
    rows = [(name, f"{entry['read']['documents']:,}", _bytes(entry["read"]["bytes"]),
             *(f"{entry[split]['documents']:,}" for split in ("train", "heldout")),
             *(_count(entry[split]["tokens"]) for split in ("train", "heldout"))) for name, entry in entries.items()]
    head = ["source", "read", "bytes", "training", "held out", "tokens", "held out"]
    return card("Sources", table(head, rows), "Documents read, documents kept by split, and their tokens.")


def _fertility(made: Prepared) -> str:
    rows = [(*key.split(), f"{counts['tokens']:,}", f"{counts['bytes'] / max(counts['tokens'], 1):.2f}",
             f"{counts['tokens'] / max(counts['words'], 1):.2f}")
            for key, counts in sorted(made.tokens.facts["fertility"].items(), key=lambda item: -item[1]["tokens"])]
    return card("Fertility of the tokenizer", table(["source", "language", "tokens", "bytes a token", "tokens a word"],
                                                    rows[:24], 2),
                "A word is a run of letters and digits, in Chinese and Japanese a character; tokens without letters "
                "count as well.")


def _stages(made: Prepared) -> str:
    read = max(_totals(made)[0][1], 1)
    rows = [(stage.receipt["stage"], f"{stage.receipt['seconds']:.1f}",
             f"{read / 1e6 / max(stage.receipt['seconds'], 1e-3):.1f}", _bytes(stage.receipt["bytes"]),
             f"{stage.receipt['peak_mib']:,}", stage.receipt["output"][:12]) for stage in made.stages]
    return card("Stages", table(["stage", "seconds", "MB/s", "written", "peak MiB", "sha256"], rows),
                f"MB/s of the text that was read, with {made.stages[0].receipt['workers']} workers. Peak: the most "
                "that one process has held until then.")


def _document(parts: Sequence[Shard], number: int) -> tuple[str, str]:
    part = parts[int(np.searchsorted([part.first for part in parts], number, side="right")) - 1]
    batch = shards.read(part.path, ["id", "text"])
    return batch.column("id")[number - part.first].as_py(), batch.column("text")[number - part.first].as_py()


def _clusters(made: Prepared) -> str:
    parts, body = made.texts[1].parts, ""
    for rule, stage in made.removed.items():
        rows = np.load(stage.path("removed.npy"), mmap_mode="r")
        kept, sizes = np.unique(rows[1], return_counts=True)
        top = np.lexsort((kept, -sizes))[:CLUSTERS]
        some = []
        for i in top:
            name, text = _document(parts, int(kept[i]))
            mine = np.flatnonzero(rows[1] == kept[i])
            others = [_document(parts, int(number))[0] for number in rows[0][mine[:3]]]
            least = f"{rows[2][mine].view(np.float64).min():.3f}" if len(rows) > 2 else "1"
            some.append((name, ", ".join(others) + (" \u2026" if len(mine) > 3 else ""), " ".join(text.split())[:90],
                         f"{len(mine):,}", least))
        if some:
            body += f"<h3><b>{escape(rule)}</b>: {rows.shape[1]:,} copies of {len(kept):,} documents</h3>" + table(
                ["the one that stays", "removed for it", "text", "removed", "least Jaccard"], some, 3)
    return card("Clusters of copies", body or "<p>None.</p>", "The largest. Every near copy was compared in full with "
                "the document that stays.", wide=True)


def _contamination(made: Prepared, found: Sequence[dict[str, Any]]) -> str:
    if not made.evals:
        return ""
    hits = [example for example in found if example["documents"]]
    rows = [(example["set"], example["id"], ", ".join(example["documents"][:4]), f"{len(example['documents']):,}",
             *(f"{example[kind][0]:,} of {example[kind][1]:,}" for kind in ("words", "letters")))
            for example in sorted(hits, key=lambda example: -len(example["documents"]))[:HITS]]
    head = ["set", "example", "found in", "documents", "runs of words", "runs of letters"]
    body = table(head, rows, 3) if rows else ""
    note = (f"{len(hits):,} of {len(found):,} evaluation examples share a run of words or letters with the corpus; the "
            f"documents were removed. {made.evals.facts['too_short']:,} examples are too short to look for.")
    return card("Evaluation examples in the corpus", body, note, wide=True)


def _examples(made: Prepared) -> str:
    body = ""
    for text in made.texts:
        for rule, samples in text.stage.facts["samples"].items():
            shown = "".join(_example(sample) for sample in samples[:SHOWN])
            body += f'<h3><b>{escape(rule)}</b></h3><div class="samples">{shown}</div>'
    return card("Examples of what each rule removed or changed", body or "<p>None.</p>", "Chosen by hash.", wide=True)


def _example(sample: dict[str, Any]) -> str:
    """Before and after with what differs marked, or an excerpt."""
    note = f" \u2014 {sample['note']}" if sample.get("note") else ""
    title = f'<p class="note">{escape(sample["id"] + note)}</p>'
    if "before" not in sample:
        return f"<div>{title}<pre>{escape(sample['text'])}</pre></div>"
    before, after = sample["before"], sample["text"]
    start = len(os.path.commonprefix([before, after]))
    end = len(os.path.commonprefix([before[start:][::-1], after[start:][::-1]]))
    pieces = [escape(before[:start]), escape(before[start : len(before) - end]), escape(before[len(before) - end :])]
    return f"<div>{title}<pre>{pieces[0]}<mark>{pieces[1]}</mark>{pieces[2]}</pre></div>"


def _bytes(size: float) -> str:
    power = min(int(math.log(max(size, 1), 1000)), 4)
    value = size / 1000**power
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    return f"{value:.{0 if value >= 100 or not power else 1}f} {unit}"


def _count(number: float) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,.0f}"
