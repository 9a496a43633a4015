"""`lmjax generate` and `lmjax score` refuse a wrong option or file before they load the model."""

import pytest

from lmjax.cli.main import main


@pytest.fixture
def loaded(monkeypatch):
    """The models that a command asked for."""
    found = []

    def load(path):
        found.append(path)
        raise RuntimeError

    monkeypatch.setattr("lmjax.lm.load", load)
    return found


@pytest.mark.parametrize("options, named", [
    (["--temperature", "-1"], "temperature"),
    (["--top-p", "0"], "top_p"),
    (["--max-tokens", "0"], "max_tokens"),
    (["--stop", ""], "stop"),
    (["--num-beams", "2", "--top-k", "3"], "num_beams"),
    (["--num-beams", "2", "--stream"], "num_beams, stream"),
    (["--prompt", "b", "--stream"], "--stream"),
    (["--prompt", "\udcff"], "--prompt"),  # how Python reads a byte that is not UTF-8
])
def test_an_option_is_refused_before_the_model_is_loaded(loaded, capsys, options, named):
    assert main(["generate", "RUN", "--prompt", "a", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and named in lines[0]
    assert loaded == []


@pytest.mark.parametrize("kind", ["missing", "directory", "not UTF-8"])
def test_a_file_is_refused_before_the_model_is_loaded(loaded, capsys, tmp_path, kind):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("a text")
    if kind == "directory":
        bad.mkdir()
    elif kind == "not UTF-8":
        bad.write_bytes(b"caf\xe9")
    assert main(["score", "RUN", str(good), str(bad)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(bad) in lines[0]
    assert loaded == []
    with pytest.raises(RuntimeError):
        main(["score", "RUN", str(good)])
    assert loaded == ["RUN"]
