"""What cannot run ends in one line: expected, got and fix; exit code 2; nothing compiled."""

import errno
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import FINISHED, finish, lines, one_line, run_here, snapshot, start

from lmjax.cli import errors
from lmjax.cli import main as cli
from lmjax.data.pipeline import Split
from lmjax.errors import UserError
from lmjax.monitoring.goodput import Ledger
from lmjax.monitoring.metrics import MetricsWriter
from lmjax.monitoring.progress import Progress
from lmjax.runtime.files import Busy
from lmjax.training import loop, workdir
from lmjax.training.checkpoint import checkpoint_steps
from lmjax.training.recipe import TrainConfig
from lmjax.training.records import Records

CONFIG = "configs/synthetic.py:tiny"
TEXT = "configs/quickstart.py:tiny"


@pytest.fixture
def never_compiles(monkeypatch):
    def compiles(*args):
        raise AssertionError("the step was compiled before the mistake was found")
    monkeypatch.setattr(loop, "_compile", compiles)


@pytest.fixture
def error(capsys):
    """Returns the one line of the error, whatever progress was printed before it."""
    return lambda: one_line(capsys.readouterr().err)


REFUSED = {
    "unknown key": (["optimizer.peak_rl=1e-3"], ["optimizer.peak_rl", "did you mean 'peak_lr'"]),
    "nan": (["optimizer.peak_lr=nan"], ["optimizer.peak_lr", "finite"]),
    "string for a number": (["train.steps=many"], ["train.steps", "integer", "many"]),
    "1e4 for an integer": (["train.steps=1e4"], ["train.steps", "integer", "write 10000"]),
    "experts without any": (["mesh.expert=2"], ["mesh.expert", "without experts", "use fsdp"]),
    "mesh and devices": (["mesh.data=3"], ["mesh", "8 devices", "data=3"]),
    "mesh and heads": (["mesh.tensor=8"], ["tensor=8", "heads=4"]),
    "mesh and kv_heads": (["mesh.tensor=4", "model.num_kv_heads=2"], ["tensor=4", "kv_heads=2"]),
    "mesh and mlp": (["mesh.tensor=4", "model.mlp_dim=66"], ["tensor=4", "mlp=66"]),
    "mesh and vocabulary": (["mesh.tensor=4", "data.tokenizer.vocab_size=66"],
                            ["tensor=4", "vocab=66"]),
    "mesh and sequence": (["mesh.context=8", "data.seq_len=36"], ["context=8", "seq=36"]),
    "mesh and activations": (["mesh.tensor=4", "model.num_kv_heads=2",
                              'mesh.rules={"kv_heads": [], "act_kv_heads": ["tensor"]}'],
                             ["act_kv_heads=2"]),
    "mesh and logits": (["mesh.tensor=4", "data.tokenizer.vocab_size=66",
                         'mesh.rules={"vocab": [], "act_vocab": ["tensor"]}'], ["act_vocab=66"]),
    "mesh and chunks": (["mesh.context=4", "train.loss_chunk=2"], ["context=4", "seq=2"]),
    "mesh used twice": (["mesh.data=8", 'mesh.rules={"act_embed": ["data"]}'],
                        ["act_embed", "at most one"]),
    "mesh and batch": (["train.batch_size=6"], ["batch_size", "batch=6"]),
    "microbatches": (["train.microbatches=3"], ["microbatches", "divisor"]),
    "warm-up": (["optimizer.warmup_steps=60"], ["config.optimizer.warmup_steps", "shorten"]),
    "attention": (["model.attention=splash"], ["attention", "splash", "platform cpu (only tpu)"]),
    "loss chunk": (["train.loss_chunk=7"], ["loss_chunk", "divisor", "7"]),
    "weights and memory": (["model.mlp_dim=1000000000000"],
                           ["optimizer state within", "GiB", "mesh.fsdp"]),
    "fewer steps than the warm-up, before data": (
        ["train.steps=5", "data.sources.0.uri=text:/nowhere/*.txt"],
        ["config.optimizer.warmup_steps", "shorten"]),
    "missing corpus": (["data.sources.0.uri=text:/nowhere/*.txt"], ["/nowhere/*.txt", "got"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_before_compiling(name, tmp_path, error, never_compiles):
    overrides, words = REFUSED[name]
    assert run_here(tmp_path / "run", *overrides) == 2
    message = error()
    assert all(word in message for word in [*words, "expected", "got"]), message
    assert not list((tmp_path / "run").glob("*.json*"))


def fails(monkeypatch, run) -> None:
    """Lets `run` stand in for `lmjax train`."""
    monkeypatch.setitem(cli.COMMANDS, "train", cli.COMMANDS["train"]._replace(run=run))


def test_a_device_without_room_is_told_with_what_helps(monkeypatch, error):
    with pytest.raises(RuntimeError) as found:
        jax.jit(lambda: jnp.zeros(1 << 44))().block_until_ready()  # 64 TiB
    fails(monkeypatch, lambda *args: (_ for _ in ()).throw(found.value))
    assert run_here(pathlib.Path("x")) == 2
    line = error()
    assert all(word in line for word in ("Out of memory", "train.microbatches",
                                         "model.remat=full"))


def test_a_fault_is_not_taken_for_a_mistake_of_the_user(monkeypatch):
    fails(monkeypatch, lambda *args: np.zeros((2,)) @ np.zeros((3,)))
    with pytest.raises(ValueError, match="mismatch"):
        run_here(pathlib.Path("x"))


def test_an_unknown_option_is_refused(error):
    assert cli.main(["train", "--config", CONFIG, "--workdir", "x", "--steps=3"]) == 2
    assert "--steps=3" in error()


def corpus(folder: pathlib.Path, broken: int) -> list[str]:
    """Overrides for a corpus of 100 files, of which the first `broken` are not UTF-8."""
    folder.mkdir()
    for i in range(100):
        text = f"Document {i} tells of the number {i * i}.\n".encode() * 20
        (folder / f"{i:03}.txt").write_bytes(b"caf\xe9 \xff\xfe" * 40 if i < broken else text)
    return [f"data.sources.0.uri=text:{folder}/*.txt", "data.heldout_fraction=0.2",
            "data.tokenizer.vocab_size=300"]


def test_invalid_utf8_is_counted_and_skipped_within_the_budget(tmp_path, capsys):
    def prepare(name: str, broken: int) -> int:
        return cli.main(["prepare", "--config", TEXT, "--out", str(tmp_path / name), *(
            f"--config.{item}" for item in corpus(tmp_path / f"text-{name}", broken))])

    assert prepare("few", broken=1) == 0
    printed = capsys.readouterr().err.splitlines()
    assert any("99 documents" in line and "1 broken" in line for line in printed)
    assert prepare("many", broken=9) == 2
    assert "UTF-8" in one_line(capsys.readouterr().err)


def test_an_empty_corpus_is_refused(tmp_path, error, never_compiles):
    (tmp_path / "empty.txt").touch()
    assert run_here(tmp_path / "run", f"data.sources.0.uri=text:{tmp_path}/*.txt", config=TEXT) == 2
    assert "expected" in error()


@pytest.mark.parametrize("change", ["optimizer.peak_lr=0.5", "model.embed_dim=64",
                                    "data.tokenizer.vocab_size=96", "data.seed=7", "train.steps=9"])
def test_the_directory_of_another_run_is_refused_and_left_alone(change, finished, error,
                                                                never_compiles):
    before = snapshot(finished)
    assert run_here(finished, *FINISHED, change) == 2
    message = error()
    key, value = change.split("=")
    assert key in message and value in message and "--workdir" in message
    assert snapshot(finished) == before


def test_a_checkpoint_of_another_run_is_refused_by_its_record_alone(copied, error, never_compiles):
    """No array is read: there is none."""
    (copied / "config.json").unlink()
    for step in checkpoint_steps(copied / "checkpoints"):
        shutil.rmtree(copied / "checkpoints" / str(step) / "params")
    before = snapshot(copied)
    assert run_here(copied, *FINISHED, "optimizer.peak_lr=0.5") == 2
    assert "optimizer.peak_lr: 0.01 -> 0.5" in error()
    assert snapshot(copied) == before


def test_a_checkpoint_of_other_arrays_is_not_taken_for_damage(copied, error, monkeypatch,
                                                              never_compiles):
    """As if another version of the code, with the same config, had written it."""
    monkeypatch.setattr(workdir, "blocking_changes", lambda before, now: ([], []))
    assert run_here(copied, *FINISHED, "optimizer.ema_decay=0.9") == 2
    assert "expected the arrays of this run in ema" in error()
    assert checkpoint_steps(copied / "checkpoints") == [2, 4, 6]


@pytest.mark.long
def test_a_run_goes_on_for_longer_as_if_it_had_been_meant_to(tmp_path, error):
    longer = (*FINISHED, "optimizer.schedule=constant", "train.steps=8",
              f"checkpoint.directory={tmp_path / 'elsewhere'}")
    assert run_here(tmp_path / "run", *longer, "train.steps=4") == 0
    assert run_here(tmp_path / "run", *longer) == 0
    assert run_here(tmp_path / "straight", *longer, "checkpoint.directory=") == 0
    both = [[r["loss"] for r in lines(tmp_path / name) if "loss" in r]
            for name in ("run", "straight")]
    assert len(both[0]) == 8 and both[0] == both[1]
    assert checkpoint_steps(tmp_path / "elsewhere") == [2, 4, 6, 8]
    assert run_here(tmp_path / "run", *longer, "optimizer.schedule=linear") == 2
    assert "the first 8 steps had, got optimizer.schedule" in error()


def test_other_data_than_the_checkpoint_was_trained_on_is_refused(copied, error, monkeypatch,
                                                                  never_compiles):
    """The config is the same; the files that it names are not."""
    other = property(lambda self: "e" * 64, lambda self, value: None)
    monkeypatch.setattr(Split, "fingerprint", other, raising=False)
    assert run_here(copied, *FINISHED) == 2
    message = error()
    assert "eeeeeeeeeeee" in message and "data" in message


@pytest.mark.long
def test_a_run_goes_on_in_the_dtype_that_it_began_in(copied, capsys, monkeypatch, never_compiles):
    assert run_here(copied, *FINISHED) == 0
    assert "computing in float32 (auto: on cpu)" in capsys.readouterr().err
    before, dtype = snapshot(copied), TrainConfig.dtype
    # as if resumed on a GPU
    monkeypatch.setattr(TrainConfig, "dtype", lambda self, platform: dtype(self, "gpu"))
    for overrides in ((), ("train.compute_dtype=bfloat16",)):
        assert run_here(copied, *FINISHED, *overrides) == 2
        message = one_line(capsys.readouterr().err)
        assert "expected to compute in float32, as when this run began, got bfloat16" in message
        assert "set config.train.compute_dtype=float32" in message
        assert snapshot(copied) == before
    assert run_here(copied, *FINISHED, "train.compute_dtype=float32") == 0
    assert "computing in float32 (asked for)" in capsys.readouterr().err


def test_a_run_goes_on_that_began_before_a_key_was_there(copied, capsys):
    file = copied / "config.json"
    older = json.loads(file.read_text())
    del older["watch"], older["model"]["qk_norm"], older["checkpoint"]["directory"]
    file.write_text(json.dumps(older))
    assert run_here(copied, *FINISHED) == 0
    assert "changed since" not in capsys.readouterr().err
    file.write_text(json.dumps(older | {"model": older["model"] | {"gone": 1}}))
    assert run_here(copied, *FINISHED) == 2
    assert "model.gone: 1 -> null" in one_line(capsys.readouterr().err)


def test_a_finished_run_started_again_changes_nothing(copied, capsys):
    def content() -> dict[str, bytes]:  # but for what tells of each start
        return {name: data for name, data in snapshot(copied).items()
                if name not in ("run.json", "report.html", "saved.json")}  # its place differs

    before = content()
    assert run_here(copied, *FINISHED) == 0
    assert "finished: all 6 steps are done" in capsys.readouterr().err
    assert content() == before
    assert run_here(copied, *FINISHED[1:], "train.steps=4") == 2
    assert "at least the 6 steps" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("error, code, line", [
    (UserError("8", "\n9", "lower it", where="seq_len"), 2, "seq_len: expected 8, got 9; lower it"),
    (ValueError("expected 8, got 9; lower it"), 1, "ValueError: expected 8, got 9; lower it"),
    (ValueError("an unexpected word was gotten"), 1, "ValueError: an unexpected word was gotten"),
    (UnicodeDecodeError("utf-8", b"\xe4", 0, 1, "unexpected end of data"), 1,
     "UnicodeDecodeError: 'utf-8' codec .*"),
    (FileNotFoundError(2, "nothing there", "a/b"), 2,
     "expected to read and write files, got .*nothing there.*"),
    (OSError(28, "expected room, got none; make some"), 2,
     r"\[Errno 28\] expected room, got none; make some")])
def test_only_a_user_error_or_one_of_files_is_the_users(error, code, line):
    found = errors.explain(error)
    assert found[0] == code and re.fullmatch(line, found[1]), found


@pytest.mark.long
def test_two_runs_in_one_directory_are_refused(tmp_path, error, monkeypatch):
    folder, held, log_step = tmp_path / "run", [], Records.log_step

    def claims_as_well(self, step, metrics):
        with pytest.raises(Busy, match="got one that another process trains in"):
            with workdir.claimed(folder):
                raise AssertionError("claimed while a run was training")
        held.append(step)
        log_step(self, step, metrics)

    monkeypatch.setattr(Records, "log_step", claims_as_well)
    assert run_here(folder, *FINISHED) == 0 and held == [1, 2, 3, 4, 5, 6]
    with workdir.claimed(folder):
        assert run_here(folder, *FINISHED) == 1  # the next time the other one may have ended
    assert "another process" in error()


@pytest.mark.long
def test_a_broken_terminal_does_not_keep_the_files_from_closing(tmp_path, monkeypatch):
    closed = []

    def broken(self):
        raise OSError(errno.EIO, "the terminal is gone")

    monkeypatch.setattr(Progress, "close", broken)
    for part in (Ledger, MetricsWriter):
        monkeypatch.setattr(part, "close", lambda self, end=part.close: closed.append(end(self)))
    # Synthetic data has no tokenizer, so there is nothing to sample.
    assert run_here(tmp_path / "run", *FINISHED, "sample.every=1") != 0
    assert len(closed) == 2
    events = {row.get("event") for row in lines(tmp_path / "run", "timing.jsonl")}
    assert "checkpoint" in events and "sample" not in events


@pytest.mark.slow
def test_two_processes_in_one_directory_are_refused(tmp_path):
    folder, endless = tmp_path / "run", (*FINISHED, "train.steps=100000")
    first = start(folder, *endless)
    try:
        while not (folder / "metrics.jsonl").exists():
            assert first.poll() is None
        assert "another process" in finish(folder, *endless, expect=1)
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
