"""Checkpoints: which are kept, and what a damaged one, a diverged run or a full disk leaves."""

import errno
import pathlib
import shutil
import subprocess
from collections.abc import Callable

import numpy as np
import pytest
import tensorstore
from processes import FINISHED, assert_same_run, one_line, run_here, snapshot

from lmjax.data import store
from lmjax.data.preparation import shards
from lmjax.training import checkpoint
from lmjax.training.checkpoint import checkpoint_steps


@pytest.mark.long
def test_a_diverged_run_keeps_its_good_checkpoints(tmp_path, capsys):
    """Each step multiplies the weights by about -1e5, until their norm overflows float32."""
    workdir = tmp_path / "run"
    assert run_here(workdir, *FINISHED, "checkpoint.every=1", "checkpoint.keep_last=2",
                    "optimizer.warmup_steps=0", "train.steps=12", "optimizer.peak_lr=1.0",
                    "optimizer.weight_decay=1e5") == 1
    message = one_line(capsys.readouterr().err)
    assert "after 3 rewinds to step" in message and "peak_lr" in message
    step = int(message.split("step ")[1].split(":")[0])
    assert step > 3 and checkpoint_steps(workdir / "checkpoints") == [step - 2, step - 1]


@pytest.mark.long
def test_every_so_many_steps_a_checkpoint_is_kept(tmp_path):
    workdir = tmp_path / "run"
    assert run_here(workdir, *FINISHED, "train.steps=7", "checkpoint.every=1",
                    "checkpoint.keep_last=2", "checkpoint.keep_every=3") == 0
    assert checkpoint_steps(workdir / "checkpoints") == [3, 6, 7]


def flip_arrays(item: pathlib.Path) -> None:
    """Flips one bit in the middle of every array, by the store's own means.

    No reader but ours can notice. A bit of a data file would not do: it may belong to a value that
    a later one has replaced, and change nothing.
    """
    base = {"driver": "ocdbt", "base": f"file://{item}/"}
    for key in tensorstore.KvStore.open(base).result().list().result():
        if not key.endswith(b".zarray"):
            continue
        where = {**base, "path": key.removesuffix(b".zarray").decode()}
        array = tensorstore.open({"driver": "zarr", "kvstore": where}).result()
        values = np.array(array.read().result())
        values.reshape(-1).view(np.uint8)[values.nbytes // 2] ^= 1
        array.write(values).result()


def flip(file: pathlib.Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(folder: pathlib.Path) -> None:
    """Cuts the biggest file of `folder` after 99 bytes."""
    biggest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[:99])


DAMAGE: dict[str, Callable[[pathlib.Path], None]] = {
    "a flipped bit in the weights": lambda step: flip_arrays(step / "params"),
    "a truncated array": lambda step: truncate(step / "params"),
    "a flipped bit in about": lambda step: flip(step / "about" / "metadata"),
}
RARER_DAMAGE: dict[str, Callable[[pathlib.Path], None]] = {
    "a flipped bit in the moments": lambda step: flip_arrays(step / "opt_state"),
    "missing weights": lambda step: shutil.rmtree(step / "params"),
    "an empty about": lambda step: (step / "about" / "metadata").write_bytes(b""),
}


# Orbax gives up at the first array that it cannot read; other reads may then find its event loop
# closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [next(iter(DAMAGE.values())), *(
    pytest.param(damage, marks=pytest.mark.slow if damage in RARER_DAMAGE.values() else
                 pytest.mark.long)
    for damage in [*DAMAGE.values()][1:] + [*RARER_DAMAGE.values()])],
    ids=[*DAMAGE, *RARER_DAMAGE])
def test_a_damaged_checkpoint_falls_back_to_the_last_good_one(damage, finished, copied, capsys):
    steps = copied / "checkpoints"
    damage(steps / "6")
    damaged = snapshot(steps / "6")
    assert run_here(copied, *FINISHED) == 0
    printed = capsys.readouterr().err
    assert "6 is damaged and not used" in printed and "resuming at step 4" in printed
    assert snapshot(steps / "damaged-6") == damaged, "set aside, not deleted"
    assert_same_run(finished, copied, ["metrics.jsonl"])


def test_nothing_is_touched_when_every_checkpoint_is_damaged(copied, capsys):
    for step in checkpoint_steps(copied / "checkpoints"):
        flip_arrays(copied / "checkpoints" / str(step) / "params")
    before = snapshot(copied / "checkpoints")
    assert run_here(copied, *FINISHED) == 2
    assert "expected a readable checkpoint" in one_line(capsys.readouterr().err)
    assert snapshot(copied / "checkpoints") == before


@pytest.mark.long
def test_a_disk_without_room_is_found_before_writing(tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    usage = shutil.disk_usage(tmp_path)
    free = iter([usage.free, usage.free, 10])  # at steps 2, 4 and 6
    monkeypatch.setattr(checkpoint.shutil, "disk_usage",
                        lambda path: usage._replace(free=next(free)))
    assert run_here(workdir, *FINISHED) == 2
    assert "MB free" in one_line(capsys.readouterr().err)
    assert checkpoint_steps(workdir / "checkpoints") == [2, 4]
    monkeypatch.undo()
    assert run_here(workdir, *FINISHED) == 0, "with room again, the run goes on"


@pytest.mark.slow  # it upsets the threads of other libraries, so it is not run by default
# Orbax drops the futures of a failed save without looking at them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_disk_that_fills_up_while_saving(small_disk, capsys, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1 << 40)
    # as if the disk filled up only after the check
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    workdir = small_disk / "run"
    assert run_here(workdir, *FINISHED) == 2
    message = one_line(capsys.readouterr().err)
    assert "full" in message and "room" in message
    kept = checkpoint_steps(workdir / "checkpoints")
    (small_disk / "freed").unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert run_here(workdir, *FINISHED) == 0
    assert set(kept) <= set(checkpoint_steps(workdir / "checkpoints"))


WRITERS = {
    "file": lambda path, data: path.write_bytes(data),
    "numpy": lambda path, data: np.save(path, data),
    "arrow": lambda path, data: shards.write(str(path), {"text": [data.tobytes().hex()]}),
    "tensorstore": lambda path, data: store.write_array(str(path), [data], size=len(data),
                                                        dtype=data.dtype),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_known_however_a_library_words_it(name, small_disk):
    data = np.random.default_rng(0).integers(0, 2**16, 1 << 20, np.uint16)
    with pytest.raises(OSError, match="make room and run the same command again") as caught:
        with checkpoint.when_disk_full(small_disk):
            WRITERS[name](small_disk / "data", data)
    assert caught.value.errno == errno.ENOSPC


def test_an_error_without_words_is_an_error():
    def fail():
        raise ValueError("...")

    with pytest.raises(checkpoint.Damaged, match="ValueError"):
        checkpoint._attempt(fail)
