"""Directories that one process at a time works in."""

import os

import pytest

from lmjax.runtime.files import Busy, claim


def test_a_directory_that_was_finished_while_it_was_claimed_leaves_no_file(tmp_path, monkeypatch):
    """Another process renames the directory between making and opening, or opening and locking."""
    part, out = tmp_path / ".out.part", tmp_path / "out"

    def then_renamed(call):
        def patched(*args, **kwargs):
            result = call(*args, **kwargs)
            part.rename(out)
            return result
        return patched

    for name in ("makedirs", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, then_renamed(getattr(os, name)))
            with pytest.raises(Busy, match="/out: expected nobody else at work there"):
                claim(part, out)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        out.rmdir()
    os.close(claim(part, out))
