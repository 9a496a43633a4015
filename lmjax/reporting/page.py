"""The HTML of a report: escaping, building blocks and the style sheet. A page is valid XML too."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

# Half surrogate pairs and two code points that are no characters, which XML and UTF-8 forbid.
_IMPOSSIBLE = re.compile("[\ud800-\udfff\ufffe\uffff]")
# Control characters, which a model of bytes may produce, become their pictures (U+2400...).
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: "\u2421"}


def escape(text: object) -> str:
    """Any text, safe inside an element or an attribute, with every character visible."""
    return html.escape(_IMPOSSIBLE.sub("\ufffd", str(text)).translate(_PICTURES))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers_from: int = 1) -> str:
    """A table; the columns from `numbers_from` on are aligned to the right."""

    def cells(tag: str, values: Sequence[Any]) -> str:
        sides = (' class="number"' if i >= numbers_from else "" for i in range(len(values)))
        return "".join(f"<{tag}{side}>{escape(value)}</{tag}>"
                       for side, value in zip(sides, values, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if head else ""
    kind = "" if head else ' class="facts"'
    return f'<div class="scroll"><table{kind}>{top}<tbody>\n{body}</tbody></table></div>'


def card(title: str, body: str, note: str = "", wide: bool = False) -> str:
    """A titled box; `body` is HTML, `note` a plain sentence below the title."""
    sentence = f'<p class="note">{escape(note)}</p>' if note else ""
    return (f'<section class="card{" wide" if wide else ""}"><h2>{escape(title)}</h2>'
            f"{sentence}{body}</section>\n")


def tile(value: str, label: str, color: str = "") -> str:
    """A large figure with its label."""
    style = f' style="color: var(--{color})"' if color else ""
    return (f'<div class="tile"><div class="value"{style}>{escape(value)}</div>'
            f'<div class="label">{escape(label)}</div></div>')


def bars(parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar per part: (name, share of 0..1, text)."""
    return "".join(
        f'<div class="bar"><div><b>{escape(name)}</b> <span class="muted">{escape(text)}</span>'
        f'<b>{share:.1%}</b></div><div><i style="width: {share:.2%}"></i></div></div>'
        for name, share, text in parts)


def sample(prompt: str, text: str, limit: int = 1500) -> str:
    """Generated text with its prompt marked, cut after `limit` characters."""
    text = text.removeprefix(prompt)
    hidden = len(text) - limit
    rest = f'<span class="muted">\u2026 {hidden:,} more characters</span>' if hidden > 0 else ""
    return f"<pre><mark>{escape(prompt)}</mark>{escape(text[:limit])}{rest}</pre>"


def page(title: str, body: str) -> str:
    """A whole page; `body` is HTML."""
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8" />'
            f'<meta name="viewport" content="width=device-width, initial-scale=1" />'
            f"<title>{escape(title)}</title><style>{CSS}</style></head>\n"
            f"<body><main>\n{body}</main></body></html>\n")


CSS = """
:root { color-scheme: light dark; --ink: #26323f; --muted: #67737f; --grid: #e4e9ee;
  --train: #0072b2; --heldout: #d55e00; --second: #009e73; --ema: #aa4499;
  --page: #f3f5f8; --card: #ffffff; --mark: #dcecf7; --bad: #fbe3d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --muted: #98a4b0; --grid: #303a45;
  --train: #56b4e9; --heldout: #f0853d;
  --second: #2fc79a; --ema: #d98ac6; --page: #12171d; --card: #1b222a; --mark: #1f3d52;
  --bad: #4a2a18; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 40px; display: grid; gap: 18px;
  grid-template-columns: repeat(12, minmax(0, 1fr)); grid-auto-flow: dense; }
header, .tiles, .card.wide, .alert, footer { grid-column: 1 / -1; }
h1 { margin: 0 10px 0 0; font-size: 28px; line-height: 1.2; letter-spacing: -0.02em;
  display: inline; overflow-wrap: anywhere; }
h2 { margin: 0 0 2px; font-size: 15px; font-weight: 650; letter-spacing: -0.005em; }
h3 { margin: 20px 0 8px; font-size: 13px; font-weight: 600; color: var(--muted); }
h3 b { color: var(--ink); }
.status { display: inline-block; vertical-align: 5px; padding: 1px 10px; border-radius: 99px;
  font-size: 12.5px; font-weight: 600; color: var(--card); background: var(--second); }
.status.unfinished { background: var(--train); }
.status.bad { background: var(--heldout); }
.summary { margin: 12px 0 0; max-width: 96ch; font-size: 16.5px; line-height: 1.6; }
.alert { background: var(--bad); border-left: 4px solid var(--heldout); border-radius: 8px;
  padding: 10px 16px; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); }
.tile, .card { background: var(--card); border: 1px solid var(--grid); border-radius: 12px; }
.tile { padding: 12px 16px 11px; }
.value { font-size: 25px; font-weight: 650; line-height: 1.25; letter-spacing: -0.02em;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.label, .note, .muted { color: var(--muted); }
.label { font-size: 13px; }
.note { margin: 0 0 8px; font-size: 13px; }
.card { grid-column: span 6; padding: 16px 20px; min-width: 0; }
svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: 12.5px; font-weight: 600; color: var(--muted); }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top;
  overflow-wrap: anywhere; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
.facts td:first-child { white-space: nowrap; color: var(--muted); }
.facts .number { white-space: normal; }
.confusion td, .confusion th { text-align: center; padding: 6px 8px; }
.confusion th { overflow-wrap: normal; vertical-align: bottom; }
.confusion tbody th { text-align: right; white-space: nowrap; }
.confusion.many thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left;
  vertical-align: middle; padding: 8px 0; }
.confusion.many td { min-width: 34px; }
.bar { margin-top: 17px; font-size: 14px; }
.bar > div:first-child { display: flex; gap: 8px; align-items: baseline; }
.bar span { flex: 1; font-size: 13px; }
.bar > div:last-child { height: 9px; margin-top: 4px; border-radius: 5px; overflow: hidden;
  background: var(--page); }
.bar i { display: block; height: 100%; min-width: 2px; border-radius: 5px;
  background: var(--train); }
.samples { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
pre { margin: 0; padding: 11px 14px; background: var(--page); border-radius: 8px; overflow: auto;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  max-height: 300px; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
mark { background: var(--mark); color: inherit; border-radius: 3px; font-weight: 600; }
summary { cursor: pointer; font-weight: 650; }
details pre { margin-top: 10px; max-height: 560px; }
footer { color: var(--muted); font-size: 13px; }
@media (max-width: 900px) { main { padding: 20px 12px; gap: 12px; }
  .card { grid-column: 1 / -1; padding: 14px; } }
"""
