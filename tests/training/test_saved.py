"""A run that has saved never begins anew unasked, and nothing that fails loses what it trained."""

import json
import pathlib
import shutil

import pytest
from processes import FINISHED, assert_same_run, finish, lines, one_line, run_here, snapshot

from lmjax.errors import UserError
from lmjax.training import loop
from lmjax.training.checkpoint import checkpoint_steps
from lmjax.training.records import Records
from lmjax.training.saved import read_saved


def forget(workdir: pathlib.Path) -> None:
    """Makes the directory one of a version that wrote no saved.json."""
    (workdir / "saved.json").unlink()


def empty(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


LOST = {
    "moved": lambda run: (run / "checkpoints").rename(run.parent / "elsewhere"),
    "emptied": lambda run: empty(run / "checkpoints"),
    "the newest gone": lambda run: shutil.rmtree(run / "checkpoints/6"),
    "not copied, config gone": lambda run: (shutil.rmtree(run / "checkpoints"),
                                            (run / "config.json").unlink()),
    "an older run": lambda run: (shutil.rmtree(run / "checkpoints"), forget(run)),
}


@pytest.mark.parametrize("name", LOST)
def test_lost_checkpoints_are_refused_and_nothing_changes(name, copied, capsys):
    LOST[name](copied)
    before = snapshot(copied)
    assert run_here(copied, *FINISHED) == 2
    message = one_line(capsys.readouterr().err)
    assert "expected the checkpoint of step 6" in message
    assert "--config.checkpoint.abandon=6" in message
    assert snapshot(copied) == before


def test_another_directory_is_refused_with_the_right_one(finished, copied, tmp_path, capsys):
    place = tmp_path / "other"
    assert run_here(copied, *FINISHED, f"checkpoint.directory={place}") == 2
    message = one_line(capsys.readouterr().err)
    assert f"set config.checkpoint.directory={finished / 'checkpoints'}" in message
    assert not place.exists()


@pytest.mark.long
def test_the_word_names_what_it_gives_up_and_may_be_repeated(finished, copied, capsys):
    records = (copied / "metrics.jsonl").read_bytes()
    shutil.rmtree(copied / "checkpoints/6")
    shutil.rmtree(copied / "checkpoints/4")
    assert run_here(copied, *FINISHED, "checkpoint.abandon=4") == 2
    for _ in range(2):  # as a launcher does
        assert run_here(copied, *FINISHED, "checkpoint.abandon=6") == 0
        assert_same_run(finished, copied, ["metrics.jsonl"])
    assert "resuming at step 2" in capsys.readouterr().err
    assert (copied / "abandoned-6/metrics.jsonl").read_bytes() == records
    assert not (copied / "abandoned-6.1").exists()


@pytest.mark.long
def test_all_may_be_given_up_when_all_are_damaged(finished, copied):
    for step in (2, 4, 6):
        (copied / "checkpoints" / str(step) / "about/metadata").write_text("")
    assert run_here(copied, *FINISHED) == 2
    assert run_here(copied, *FINISHED, "checkpoint.abandon=6") == 0
    assert_same_run(finished, copied, ["metrics.jsonl"])
    assert (copied / "checkpoints/damaged-6").is_dir()


def test_a_save_that_never_became_complete_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints/2").mkdir(parents=True)
    events = [("start", 0), ("checkpoint", 2)]
    (tmp_path / "timing.jsonl").write_text("".join(
        json.dumps({"step": step, "event": name, "seconds": 1}) + "\n" for name, step in events))
    directory = str(tmp_path / "checkpoints")
    assert read_saved(tmp_path, directory).step == 0
    (tmp_path / "checkpoints/2/commit_success.txt").touch()
    assert read_saved(tmp_path, directory).step == 2
    (tmp_path / "saved.json").write_text("{")
    with pytest.raises(UserError, match="saved.json"):
        read_saved(tmp_path, directory)


@pytest.mark.long
def test_a_run_that_never_saved_begins_anew(tmp_path, monkeypatch):
    def stops(self, step, metrics):
        raise UserError("more", "less", "stop")

    with monkeypatch.context() as patch:
        patch.setattr(Records, "log_step", stops)
        assert run_here(tmp_path / "run", *FINISHED) == 2
    assert run_here(tmp_path / "run", *FINISHED) == 0


@pytest.mark.parametrize("overrides", [
    (), pytest.param(("eval.every=2", "train.steps=6"), marks=pytest.mark.long)])
def test_an_evaluation_that_fails_loses_no_step(overrides, tmp_path, monkeypatch):
    def fails(*args):
        raise UserError("a held-out shard", "a damaged one", "mend it")

    run, at = tmp_path / "run", 2 if overrides else 6
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", fails)
        assert run_here(run, *FINISHED, *overrides) == 2
        assert checkpoint_steps(run / "checkpoints")[-1] == at
        assert run_here(run, *FINISHED, *overrides) == 2, "it is tried again"
    assert run_here(run, *FINISHED, *overrides) == 0
    assert run_here(tmp_path / "straight", *FINISHED, *overrides) == 0
    assert_same_run(tmp_path / "straight", run, ["metrics.jsonl"])
    assert "eval/loss" in lines(run)[-1]
    assert checkpoint_steps(run / "checkpoints")[-1] == 6


VANISH = {"checkpoints": "checkpoints", "workdir": "", "records": "metrics.jsonl"}


@pytest.mark.parametrize("name", ["records", *(
    pytest.param(name, marks=pytest.mark.long) for name in ("checkpoints", "workdir"))])
def test_what_vanishes_while_training_is_told(name, tmp_path, monkeypatch, capsys):
    run, log_step = tmp_path / "run", Records.log_step

    def vanishes(self, step, metrics):
        log_step(self, step, metrics)
        if step == 4:
            self.run.checkpointer.wait()
            (run / VANISH[name]).rename(tmp_path / "gone")

    with monkeypatch.context() as patch:
        patch.setattr(Records, "log_step", vanishes)
        assert run_here(run, *FINISHED) == 2
    message = one_line(capsys.readouterr().err)
    assert "expected" in message and "got" in message
    if name == "checkpoints":
        assert checkpoint_steps(tmp_path / "gone")[-1] == 2
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        (tmp_path / "gone").rename(run / "checkpoints")
        assert run_here(run, *FINISHED) == 0


DATA = ("data.memory_limit_mib=0", "data.tokenizer.vocab_size=300", "train.steps=40",
        "data.heldout_fraction=0.2", "eval.every=0", "sample.every=0", "optimizer.warmup_steps=2")


@pytest.mark.slow
def test_a_damaged_shard_ends_real_processes_with_2(tmp_path):
    """The threads of tf.data must be at rest when the interpreter ends."""
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / f"text/{i}.txt").write_text(
            "".join(f"Document {i} tells of {i * j * 7919 % 100003}.\n" for j in range(100)))
    data = (*DATA, f"data.sources.0.uri=text:{tmp_path}/text/*.txt",
            f"data.directory={tmp_path}/data")
    config = "configs/quickstart.py:tiny"
    assert run_here(tmp_path / "good", *data, "train.steps=3", config=config) == 0
    shard, = (tmp_path / "data").glob("*/train/tokens/c/0")
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 200] = bytes(byte ^ 0x55 for byte in content[middle:middle + 200])
    shard.write_bytes(content)
    for i in range(3):
        printed = finish(tmp_path / f"run{i}", *data, config=config, expect=2)
        assert "prepare the data again" in one_line(printed)
