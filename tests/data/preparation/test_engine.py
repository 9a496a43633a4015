"""What the engine promises about memory, measured on its worker processes."""

import errno
import re
from pathlib import Path

import numpy as np
import pytest

from lmjax.data.preparation import workers
from lmjax.data.preparation.engine import Engine

ITEMS, RECORDS = 60, 1 << 17  # 2 MiB of records per item
MEMORY = 16  # MiB


def emit(seed):
    return np.random.default_rng(seed).integers(0, 2**64, (2, RECORDS), np.uint64)


def reduce(rows):
    return rows[:, rows[0] % np.uint64(2) == 0]


def peaks(engine):
    """The most memory that each worker has ever held, in MiB."""
    status = [Path(f"/proc/{process.pid}/status").read_text() for process in engine.workers.started]
    return [int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) / 1024 for text in status]


@pytest.mark.long
def test_records_several_times_as_large_as_the_memory_are_grouped_within_it(tmp_path):
    with Engine(str(tmp_path), workers=2, memory_mib=MEMORY) as engine:
        engine.map(len, [(), ()])
        engine.map(emit, [0, 1])  # the engine does not bound what one item takes
        before = peaks(engine)
        files = engine.group(emit, range(ITEMS), reduce, str(tmp_path / "group"))
        after = peaks(engine)
    assert len(after) == len(before) == 2
    assert ITEMS * RECORDS * 16 > 7 * (MEMORY << 20)
    assert sum(after) - sum(before) < MEMORY, f"{before} MiB before, {after} MiB after"
    keys = np.concatenate([np.load(file)[0] for file in files])
    assert len(files) > 7 and (np.diff(keys.astype(np.float64)) >= 0).all()
    assert len(keys) == sum(int((emit(i)[0] % np.uint64(2) == 0).sum()) for i in range(ITEMS))


def hold(size):
    return np.ones(size, np.uint8).nbytes


def test_a_receipt_counts_what_a_worker_holds(tmp_path, monkeypatch):
    # Without this process, which holds more because of other tests.
    held = workers.held_kib
    monkeypatch.setattr(workers, "held_kib", lambda pid: 0 if pid == "self" else held(pid))
    with Engine(str(tmp_path), workers=2) as engine:
        stage = engine.stage("held", None, {}, lambda folder: engine.map(hold, [1, 256 << 20]))
        assert 256 < stage.receipt["peak_mib"] == int(max(peaks(engine)))


def test_sorted_records_are_one_file_and_a_full_disk_is_an_error(tmp_path, small_disk):
    """With a memory map, the process would be killed by a signal."""
    files = [str(tmp_path / f"{i}.npy") for i in range(3)]
    for i, file in enumerate(files):
        np.save(file, emit(i // 2)[:, : 1 << 16])  # 1 MiB; the first two are the same
    with Engine(str(tmp_path), workers=1) as engine:
        count = engine.sort(files, str(tmp_path / "spill"), str(tmp_path / "out.npy"))
        with pytest.raises(OSError) as caught:
            engine.sort(files, str(tmp_path / "again"), str(small_disk / "out.npy"))
    assert caught.value.errno == errno.ENOSPC
    expected = np.unique(np.concatenate([np.load(file) for file in files], axis=1), axis=1)
    assert count == expected.shape[1] == 2 << 16
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)
