"""Text of any script in pictures, with the fonts that are at hand.

matplotlib brings DejaVu Sans, which has no Chinese, Japanese or Korean. A picture of pixels takes
the fonts of this machine for what is missing there. An SVG keeps its text as text, and the viewer's
fonts draw it.
"""

import contextlib
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

FIRST = "DejaVu Sans"
# What an SVG asks its viewer for. A browser finds a font for every character by itself; others go
# by this list.
SVG_FAMILIES = ("system-ui, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', 'Noto Sans', "
                "'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', 'Hiragino Sans', "
                "'Yu Gothic', 'Malgun Gothic', sans-serif")
LAST = re.compile("bold|italic|oblique|black|light|thin|mono|serif", re.IGNORECASE)  # of file names
INVISIBLE = re.compile(r"[\s\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff]")


class Fonts(NamedTuple):
    """The fonts that draw a text."""

    families: tuple[str, ...]  # in the order in which they are asked for a glyph
    missing: frozenset[str]  # characters that none of them has

    def label(self, text: str) -> str:
        """The text with the code points of missing characters in their place."""
        return "".join(f"<U+{ord(c):04X}>" if c in self.missing else c for c in text)


def fonts_for(texts: Iterable[str]) -> Fonts:
    """Finds fonts for all characters of the texts: DejaVu Sans, then fonts of this machine."""
    wanted = set(INVISIBLE.sub("", "".join(texts)))
    first = font_manager.findfont(FIRST)
    missing = {c for c in wanted if ord(c) not in _Font.of(first).points}
    families = [FIRST]
    for path in _system_fonts() if missing else ():
        font = _Font.of(path)
        if found := {c for c in missing if ord(c) in font.points}:
            font_manager.fontManager.addfont(path)
            families.append(font.family)
            missing -= found
        if not missing:
            break
    return Fonts(tuple(families), frozenset(missing))


@contextlib.contextmanager
def any_script(texts: Iterable[str], out: str | os.PathLike) -> Iterator[Callable[[str], str]]:
    """Sets matplotlib up for a picture with these texts; use `save` in the block.

    What no font here has is written as its code point in a picture of pixels, and said once.

    Args:
      texts: all that the picture will show, but for plain ASCII.
      out: the picture's file, which may be an SVG.

    Yields:
      A function that makes a text drawable.
    """
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none"}):
        matplotlib.rcParams["text.parse_math"] = False  # a "$" is a "$"
        if is_svg(out):
            quiet()
            matplotlib.rcParams["font.family"] = [FIRST]
            yield str
            return
        fonts = fonts_for(texts)
        matplotlib.rcParams["font.family"] = list(fonts.families)
        if fonts.missing:
            _tell("".join(sorted(fonts.missing)))
        yield fonts.label


def quiet() -> None:
    """Ignores, within `warnings.catch_warnings`, that the font which measures has no such glyph."""
    warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from (font|current font)")


def is_svg(out: str | os.PathLike) -> bool:
    """Whether a picture's file is an SVG, by its name."""
    return Path(out).suffix.lower() == ".svg"


def save(figure: Figure, out: str | os.PathLike) -> None:
    """Writes a figure; an SVG asks for its viewer's fonts."""
    figure.savefig(out, dpi=150)
    if is_svg(out):
        Path(out).write_text(for_viewers(Path(out).read_text(encoding="utf-8")), encoding="utf-8")


def for_viewers(svg: str) -> str:
    """An SVG of matplotlib whose text is in the fonts of its viewer."""
    return svg.replace(f"'{FIRST}'", SVG_FAMILIES)


class _Font(NamedTuple):
    family: str
    points: frozenset[int]  # code points with a glyph

    @staticmethod
    @functools.cache
    def of(path: str) -> "_Font":
        try:
            font = FT2Font(path)
            return _Font(font.family_name, frozenset(font.get_charmap()))
        except (RuntimeError, OSError):  # bitmaps of emoji, or a damaged file
            return _Font("", frozenset())


@functools.cache
def _system_fonts() -> tuple[str, ...]:
    """The font files of this machine, plain ones first."""
    # matplotlib keeps a list of fonts as well, from its first use on: newer fonts are not in it.
    # A last-resort font draws the same box for every character.
    found = [path for path in font_manager.findSystemFonts() if "lastresort" not in path.lower()]
    return tuple(sorted(found, key=lambda path: (bool(LAST.search(Path(path).stem)), path)))


@functools.cache
def _tell(missing: str) -> None:
    shown = missing[:8] + ("..." if len(missing) > 8 else "")
    print(f"picture: {len(missing)} character(s) are in no font of this machine and written as "
          f"code points ({shown}); install a font that has them, or write .svg, which the viewer's "
          "fonts draw", file=sys.stderr, flush=True)
