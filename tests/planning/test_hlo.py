"""Parsing the text of optimized HLO."""

import pytest

from lmjax.planning.hlo import arrays, num_bytes, parse


def test_shapes():
    shape = ("(bf16[4,128]{1,0:T(8,128)(2,1)S(1)}, f32[]{:T(128)}, "
             "/*index=2*/f8e4m3fn[3,<=5]{1,0}, pred[2]{0}, token[])")
    assert arrays(shape)[:3] == [("bf16", (4, 128)), ("f32", ()), ("f8e4m3fn", (3, 5))]
    assert num_bytes(shape) == 4 * 128 * 2 + 4 + 15 + 2


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation, so it is not an HLO module"):
        parse("hello")
