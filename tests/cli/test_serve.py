"""`lmjax serve` refuses what cannot work before it loads a model."""

import socket

import pytest

from lmjax.cli import main as cli
from lmjax.cli.serve import names_of


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("LMJAX_API_KEY", raising=False)


def refusal(capsys, *words):
    assert cli.main(["serve", *words]) == 2
    return capsys.readouterr().err


def test_a_stranger_needs_a_key(capsys):
    for host in ("0.0.0.0", "::", "192.0.2.7"):
        line = refusal(capsys, "runs/a", "--host", host)
        assert line.startswith(f"lmjax: error: --host: expected an API key in LMJAX_API_KEY to "
                               f"listen at {host}, got none; set one")


def test_settings_that_cannot_work(capsys):
    for words, said in ((("--port", "70000"), "port"), (("--slots", "0"), "slots"),
                        (("--timeout", "0"), "--timeout"), (("--timeout", "nan"), "--timeout"),
                        (("--queue", "-1"), "queue"), (("runs/b", "--draft", "x"), "--draft"),
                        (("--max-body", "-1"), "--max-body")):
        assert said in refusal(capsys, "runs/a", *words)


def test_a_port_that_is_taken(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        line = refusal(capsys, "runs/a", "--port", str(other.getsockname()[1]))
    assert "expected an address where nobody listens yet" in line and "choose another" in line


def test_models_are_called_like_their_directories(tmp_path, monkeypatch):
    assert names_of(["runs/a/", "b/checkpoints", "c/checkpoints/100", "/x/d", "gs://e/f"], []) == [
        "a", "b", "c", "d", "f"]
    monkeypatch.chdir(tmp_path)
    assert names_of(["."], []) == [tmp_path.name]
    assert names_of(["runs/a", "other/a"], ["new", "old"]) == ["new", "old"]


def test_names_that_clash(capsys):
    assert "got a twice; give --name NAME once per" in refusal(capsys, "runs/a", "other/a")
    assert "expected 2 names" in refusal(capsys, "runs/a", "runs/b", "--name", "a")
    assert "names without /" in refusal(capsys, "runs/a", "--name", "b/c")


def test_without_the_extra_its_name_is_told(capsys, monkeypatch):
    for name in ("lmjax.serving.server", "uvicorn"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    assert "pip install 'lmjax[serve]'" in refusal(capsys, "runs/a")


def test_no_model(capsys, tmp_path):
    assert "lmjax: error: " in refusal(capsys, str(tmp_path / "nothing"), "--port", "0")
