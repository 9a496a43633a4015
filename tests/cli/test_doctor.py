"""What the doctor says of paths: those that are whole, and those with a fault made here."""

import gzip
import json
import os
import pathlib
import re
import shutil
import tarfile

import jax
import jax.numpy as jnp
import pytest
import safetensors.numpy

import lmjax
from lmjax.cli.doctor.diagnosis import BAD, GOOD, NOTE
from lmjax.cli.doctor.kinds import diagnose
from lmjax.cli.main import main

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    """A corpus (docs/), the data prepared from it (data/), and a run at step 5 of 8 (run/)."""
    with tarfile.open(ROOT / "tests/fixtures/version_0.1.0.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    # Its run ended at step 8; of its checkpoints only that of step 5 is kept.
    saved = {"directory": str(tmp_path / "run/checkpoints"), "step": 5, "evaluated": 5}
    (tmp_path / "run/saved.json").write_text(json.dumps(saved))
    return tmp_path


def texts(found, level):
    return [f"{finding.about}: {finding.text}" for finding in found.findings
            if finding.level == level]


def flip(file: pathlib.Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((path for path in folder.rglob("*") if path.is_file()),
               key=lambda path: path.stat().st_size)


def test_a_whole_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = diagnose("run")
    assert found.kind == "a run of lmjax, at step 5 of 8" and not found.is_bad
    assert any("checksums" in line for line in texts(found, GOOD))
    assert any(use.startswith("lmjax generate run") for use in found.uses)


def test_the_example_in_the_docs_has_the_lines_of_a_real_answer(folder, monkeypatch):
    """All but the line on older checkpoints, of which the run here has none."""
    def shape(text):
        """(level, about what, the first words) of each line, with 0 for every number."""
        text = text.replace("runs/quickstart/", "").replace("run/", "")
        text = re.sub(r"\d[\d.,]*[MBk]?", "0", text)
        found = [line.split() for line in text.splitlines() if re.match(r"  (ok|note|bad) ", line)]
        return [words[:5] for words in found if words[1] != "checkpoints"]

    page = (ROOT / "docs/training.md").read_text()
    example = page[page.index("$ lmjax doctor runs/quickstart"):].split("```")[0]
    monkeypatch.chdir(folder)
    assert shape(str(diagnose("run"))) == shape(example)


def test_a_checkpoint_and_their_directory(folder):
    for path in ("run/checkpoints", "run/checkpoints/5"):
        found = diagnose(str(folder / path))
        assert "checkpoint" in found.kind and not found.is_bad and found.uses


@pytest.mark.parametrize("item", ["params", "opt_state", "ema"])
def test_a_flipped_bit_in_any_part_of_a_checkpoint_is_found(folder, item):
    where = folder / "run/checkpoints/5"
    flip(largest(where / item))
    found = diagnose(str(where))
    assert found.is_bad and "use it with" not in str(found)


def test_a_poisoned_checkpoint(folder):
    lm = lmjax.load(folder / "run/checkpoints/5")
    lm.params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), lm.params)
    lm.save(folder / "poisoned")
    [line] = texts(diagnose(str(folder / "poisoned/checkpoints")), BAD)
    assert "NaN or infinity in params/" in line


def test_a_save_that_was_killed_is_a_note(folder):
    where = folder / "run/checkpoints"
    shutil.copytree(where / "5", where / "7")
    (where / "7/commit_success.txt").unlink()
    found = diagnose(str(where))
    assert not found.is_bad and any("7 was not saved to its end" in line
                                    for line in texts(found, NOTE))


def test_prepared_data_whole_and_damaged(folder):
    found = diagnose(str(folder / "data"))
    assert found.kind == "prepared data" and not found.is_bad
    assert len([line for line in texts(found, GOOD) if "sha256" in line]) == 2
    flip(largest(folder / "data/docs/train/tokens"))
    [line] = texts(diagnose(str(folder / "data")), BAD)
    assert line.startswith("docs/train: ") and "expected the array of sha256" in line


def test_a_loss_that_is_not_finite_and_lines_that_are_no_objects(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with (folder / "run/metrics.jsonl").open("a") as file:
        file.write('5\n{"step": 6, "loss": "nan"}\n')
    [line] = texts(diagnose("run"), BAD)
    assert line.startswith("metrics: ") and "1 with a loss that is not finite" in line
    assert "1 that are no JSON objects" in line


def test_links_to_nothing_and_pipes_of_a_directory_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "c.txt")
    assert [line.rpartition("/")[2] for line in texts(diagnose(str(tmp_path)), BAD)] == [
        "b.txt is a link to nothing", "c.txt is no file"]


def test_a_run_without_its_config(folder):
    (folder / "run/config.json").unlink()
    [line] = texts(diagnose(str(folder / "run")), BAD)
    assert "config.json" in line


def test_data_of_another_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    manifest = folder / "data/manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1', 1))
    assert any(line.startswith("data: ") for line in texts(diagnose("run"), BAD))


def test_nothing_there_names_what_is_near(folder, capsys):
    assert main(["doctor", str(folder / "runn"), str(folder / "docs/none/x")]) == 2
    out = capsys.readouterr().out
    assert f"{folder / 'runn'} is not there" in out and "similar names there: run" in out


def test_exit_codes_and_quick(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["doctor", "run", "data"]) == 0
    flip(largest(folder / "run/checkpoints/5/params"))
    assert main(["doctor", "run"]) == 2
    assert main(["doctor", "--quick", "run"]) == 0, "headers alone do not show it"
    assert "expected" in capsys.readouterr().out


def test_checkpoints_that_are_gone_are_missed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    shutil.move(folder / "run/checkpoints", folder / "elsewhere")
    (folder / "run/checkpoints").mkdir()
    [line] = texts(diagnose("run"), BAD)
    assert line.startswith("saved.json: ") and "checkpoint of step 5" in line


def test_a_corpus_and_the_file_that_would_be_lost(tmp_path):
    rows = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(3))
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.txt.data").write_bytes(gzip.compress(rows.encode()))  # told by its content
    found = diagnose(f"jsonl:{tmp_path}/*")
    assert not found.is_bad and any("json, compressed with gzip" in x for x in texts(found, GOOD))
    (tmp_path / "c.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for path in (f"jsonl:{tmp_path}/*", str(tmp_path), str(tmp_path / "c.jsonl")):
        [line] = texts(diagnose(path), BAD)
        assert "c.jsonl" in line


def test_files_of_hugging_face(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    [line] = texts(diagnose(str(tmp_path)), BAD)
    assert "model.safetensors" in line
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    found = diagnose(str(tmp_path / "model.gguf"))
    assert found.kind == "a GGUF file" and "lmjax import-gguf" in texts(found, BAD)[0]


@pytest.mark.long
def test_a_hugging_face_directory_whole_and_poisoned(folder, tmp_path):
    lm = lmjax.load(folder / "run/checkpoints/5")
    lm.export(tmp_path / "good", log=lambda line: None)
    found = diagnose(str(tmp_path / "good"))
    assert not found.is_bad and "model_type" in found.kind and found.uses
    file = tmp_path / "good/model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    next(iter(tensors.values())).flat[0] = float("nan")
    safetensors.numpy.save_file(tensors, file)
    [line] = texts(diagnose(str(tmp_path / "good")), BAD)
    assert line.startswith("weights: ") and "NaN or infinity" in line


def test_recipes_are_not_run_and_addresses_are_told(tmp_path):
    (tmp_path / "x.py").write_text("def get_config():\n    raise RuntimeError\n")
    assert "a recipe" in diagnose(str(tmp_path / "x.py")).kind
    assert "s3://" in texts(diagnose("s3://bucket/run"), BAD)[0]
    (tmp_path / "empty").mkdir()
    assert diagnose(str(tmp_path / "empty")).kind == "an empty directory"
