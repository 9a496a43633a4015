"""The commands that use a model refuse a wrong option or file before they load the model."""

import importlib.util
import sys
import types

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
    (["--num-beams", "2", "--draft", "SMALL"], "num_beams, draft"),
    (["--draft", "SMALL", "--stream"], "draft, stream"),
    (["--draft", "/nowhere/small"], "/nowhere/small"),
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


@pytest.mark.parametrize("options, named", [
    (["--tasks", "nothing"], "--tasks"), (["--tasks", "arc_easy,,"], "--tasks"),
    (["--tasks", "arc_easy", "--task-dir", "/nowhere"], "--task-dir"),
    (["--tasks", "arc_easy", "--limit", "0"], "--limit"),
    (["--tasks", "arc_easy", "--num-fewshot", "-1"], "--num-fewshot")])
def test_tasks_are_looked_up_before_the_model_is_loaded(loaded, capsys, monkeypatch, options,
                                                        named):
    """As far as lm-eval is installed, or what stands in for it here."""
    if importlib.util.find_spec("lm_eval") is None:
        class Manager:
            all_tasks = ("arc_easy",)

            def __init__(self, include_path):
                pass

        for name, things in {"": {}, ".api": {}, ".api.instance": {"Instance": object},
                             ".api.model": {"TemplateLM": object},
                             ".tasks": {"TaskManager": Manager},
                             ".utils": {"get_rolling_token_windows": None,
                                        "make_disjoint_window": None}}.items():
            module = types.ModuleType(f"lm_eval{name}")
            vars(module).update(things)
            monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
        monkeypatch.delitem(sys.modules, "lmjax.lm_eval", raising=False)
    try:
        assert main(["eval", "RUN", *options]) == 2
    finally:
        sys.modules.pop("lmjax.lm_eval", None)
    line = capsys.readouterr().err.splitlines()[-1]
    assert named in line and loaded == []


@pytest.mark.parametrize("options, named", [
    (["--dtype", "float8"], "dtype"), (["--model-type", "lama"], "model_type"),
    (["--max-shard-gb", "0"], "max_shard_bytes")])
def test_an_export_is_refused_before_the_model_is_loaded(loaded, capsys, tmp_path, options, named):
    assert main(["export-hf", "RUN", "--out", str(tmp_path / "out"), *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert named in line and loaded == []
