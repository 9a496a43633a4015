"""Draws docs/images/architecture.svg: the rooms of lmjax/, and the way of a token through them.

    python docs/draw_architecture.py

tests/test_architecture.py fails when the picture is older than this file.
"""

import pathlib
from typing import NamedTuple

OUT = pathlib.Path(__file__).parent / "images" / "architecture.svg"


class Room(NamedTuple):
    name: str
    holds: str
    width: int  # of 12 columns
    steps: tuple[int, ...] = ()  # of the token's way


# From the roof to the ground: imports point only downwards.
FLOORS: tuple[tuple[str, str, tuple[Room, ...]], ...] = (
    ("commands", "#c9d8f0", (
        Room("cli", "a table of commands", 3),
        Room("serving", "an API, a page", 2),
        Room("scaling", "many runs", 2),
        Room("benchmarks", "lmjax bench", 3),
        Room("lm_eval", "its tasks", 2))),
    ("wholes", "#c9e4ee", (
        Room("lm", "a trained model as an object", 4, (12,)),
        Room("compression", "smaller models from a model", 4),
        Room("planning", "the time of a run on a TPU", 4))),
    ("training", "#cdebdd", (
        Room("training", "recipe, step, checkpoint, loop", 5, (7, 10, 11)),
        Room("training/optim", "optimizers and schedules", 4, (10,)),
        Room("tasks", "losses, heads, metrics", 3))),
    ("use", "#e2efc4", (
        Room("decoding", "text out of a model", 6, (12,)),
        Room("huggingface", "weights and tokenizers in and out", 6))),
    ("parts", "#f6efc0", (
        Room("models", "one file per architecture", 4, (8,)),
        Room("data/preparation", "clean, deduplicate, store", 4, (2, 3)),
        Room("data", "order, packing, batches", 4, (1, 4, 5, 6)))),
    ("blocks", "#fadfc0", (
        Room("nn", "layers, stack, experts, kernels", 7, (9,)),
        Room("reporting", "pages and pictures", 5))),
    ("records", "#f7d3cb", (
        Room("monitoring", "metrics, goodput, progress, watchdog", 12),)),
    ("ground", "#e6dccf", (
        Room("sharding", "meshes, rules", 3),
        Room("runtime", "processes, files", 3),
        Room("config", "strict", 2),
        Room("tree", "named paths", 2),
        Room("errors", "one line", 2))),
)
WAY = (
    "data/text reads a document from a file",
    "data/preparation cleans and deduplicates it",
    "data/tokenizers make tokens; data/store keeps them",
    "data/order says which tokens row g of the run holds",
    "data/packing and data/objectives make the row",
    "data/batches puts rows on the devices of the mesh",
    "training/loop hands the batch to the jitted step",
    "models embeds the tokens and calls the stack",
    "nn runs the layers and one attention kernel",
    "training/step takes the loss, the gradient, the update",
    "training/checkpoint saves the state and its position",
    "lm and decoding load it and write text",
)
LEFT, TOP, COLUMN, FLOOR, GAP = 96, 64, 47, 72, 8
WIDTH, HEIGHT = 1060, TOP + len(FLOORS) * FLOOR + 28
LEGEND = LEFT + 12 * COLUMN + 36


def text(x: float, y: float, words: str, size: int, **style: str) -> str:
    attributes = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{attributes}>{words}</text>'


def number(x: float, y: float, step: int) -> str:
    return (f'<circle cx="{x:g}" cy="{y:g}" r="10" fill="#b3402a"/>'
            + text(x, y + 4, str(step), 12, fill="#fff", text_anchor="middle", font_weight="bold"))


def draw() -> str:
    """The picture as SVG."""
    house = LEFT + 12 * COLUMN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<path d="M{LEFT - 14} {TOP - 6} L{(LEFT + house) / 2:g} 8 '
        f'L{house + 14 - GAP} {TOP - 6} Z" '
        'fill="#eef1f5" stroke="#9aa4b2"/>',
        text((LEFT + house) / 2, 48, "lmjax", 20, text_anchor="middle", font_weight="bold"),
    ]
    for row, (floor, color, rooms) in enumerate(FLOORS):
        y, x = TOP + row * FLOOR, float(LEFT)
        parts.append(text(LEFT - 14, y + 36, floor, 13, text_anchor="end", fill="#667"))
        for room in rooms:
            width = room.width * COLUMN - GAP
            parts.append(f'<rect x="{x:g}" y="{y}" width="{width}" height="{FLOOR - GAP}" rx="6" '
                         f'fill="{color}" stroke="#9aa4b2"/>')
            parts.append(text(x + 10, y + 26, room.name, 15, font_weight="bold"))
            parts.append(text(x + 10, y + 46, room.holds, 12, fill="#444"))
            for i, step in enumerate(reversed(room.steps)):
                parts.append(number(x + width - 16 - 24 * i, y + 16, step))
            x += room.width * COLUMN
    parts.append(text(LEGEND, TOP + 14, "The way of a token", 15, font_weight="bold"))
    for i, words in enumerate(WAY, 1):
        y = TOP + 14 + i * 36
        parts += [number(LEGEND + 10, y - 4, i), text(LEGEND + 30, y, words, 13)]
    y = TOP + 14 + (len(WAY) + 1) * 36 + 10
    parts.append(text(LEGEND, y, "A room imports only rooms below it.", 13, fill="#667"))
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    OUT.write_text(draw())
    print(OUT)
