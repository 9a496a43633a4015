"""Pictures show every script: with fonts of the machine, with code points, or in the viewer's."""

import re

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.image import imread

from lmjax.reporting import fonts
from lmjax.reporting.plots import Curve, Panel, draw
from lmjax.reporting.token_pictures import draw_attention, draw_tokens

HAN, OTHER = "\u4e2d", "\u6587"  # the font below has only the first
TEXTS = ["$a", HAN, OTHER, "\u0639"]  # DejaVu Sans has Arabic


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose only font draws one Chinese character, as a full square of one em."""
    pen = TTGlyphPen(None)
    for i, point in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if i else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(HAN): "square"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Square Test", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "square.ttf")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "square.ttf")])
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    for cached in (fonts._system_fonts, fonts._tell):
        cached.cache_clear()
    yield
    fonts._system_fonts.cache_clear()


def test_a_glyph_comes_from_the_machine_or_is_a_code_point(machine, tmp_path, capsys):
    found = fonts.fonts_for(TEXTS)
    assert found.families == ("DejaVu Sans", "Square Test") and found.missing == {OTHER}
    assert found.label(f"{HAN}{OTHER}$") == f"{HAN}<U+6587>$"
    pictures = []
    for text in (HAN, "x"):
        out = tmp_path / "tokens.png"
        draw_tokens([text] * 20, [0.0] * 20, out, title="", legend=("", ""))
        pictures.append(imread(out)[..., :3].mean(-1))
    ink = [float((picture < 0.4).mean()) for picture in pictures]
    assert ink[0] > 5 * ink[1] > 0, "a full square has much more ink than a letter"
    assert capsys.readouterr().err == ""
    draw_attention(np.ones((1, 2, 4, 4)) / 4, TEXTS, tmp_path / "maps.png")
    assert re.fullmatch(r"picture: 1 character\(s\) are in no font of this machine and written as "
                        rf"code points \({OTHER}\); .*\n", capsys.readouterr().err)


def test_an_svg_keeps_text_for_its_viewer(machine, tmp_path, capsys):
    draw_attention(np.ones((1, 2, 4, 4)) / 4, TEXTS, tmp_path / "maps.svg")
    draw_tokens(TEXTS, [0.1, -0.2, 0.3, float("nan")], tmp_path / "tokens.svg", title=OTHER,
                legend=("less", "more"), marked=[1])
    curve = Curve(HAN, np.array([1.0, 2.0]), np.array([1.0, 2.0]), "heldout", "points")
    report = draw(OTHER, [Panel("", [curve, curve], [(OTHER, 1.5)], last_values=True)])
    for svg, texts in (((tmp_path / "maps.svg").read_text(), TEXTS),
                       ((tmp_path / "tokens.svg").read_text(), [*TEXTS, OTHER]),
                       (report, [f"{HAN} 2.00", f"{OTHER} 1.50"])):
        written = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
        assert set(texts) <= set(written), written
        assert "'DejaVu Sans', 'Noto Sans'" in svg and "'Noto Sans CJK SC'" in svg
    assert capsys.readouterr().err == ""
