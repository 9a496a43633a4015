"""The file of statistics by layer: it survives kills, and is cut where a run resumes."""

import numpy as np
import pytest

from lmjax.monitoring.statistics import StatisticsWriter, read_statistics


def arrays(step):
    return {"weight/a": np.arange(3, dtype=np.float32) + step, "weight/b": np.float32([step])}


def write(folder, steps, resume=0, make=arrays):
    folder.mkdir(exist_ok=True)
    writer = StatisticsWriter(folder, resume)
    for step in steps:
        writer.append(step, make(step))
    writer.sync()
    writer.close()


def test_what_was_written_is_read(tmp_path):
    write(tmp_path, [5, 10, 15])
    steps, found = read_statistics(tmp_path)
    assert steps.tolist() == [5, 10, 15]
    np.testing.assert_array_equal(found["weight/a"], np.arange(3) + steps[:, None])
    np.testing.assert_array_equal(found["weight/b"], steps[:, None])


@pytest.mark.parametrize("kept", range(0, 60, 7))
def test_a_kill_and_a_resume_leave_the_bytes_of_an_undisturbed_run(tmp_path, kept):
    """The last record is cut off at any byte; the run resumes at step 10."""
    write(tmp_path / "straight", [5, 10, 15, 20])
    write(tmp_path / "run", [5, 10, 15, 20])
    file, = (tmp_path / "run/statistics").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - kept])
    write(tmp_path / "run", [15, 20], resume=10)
    assert file.read_bytes() == content
    assert [path.name for path in file.parent.iterdir()] == ["000000005.bin"]


def test_only_a_damaged_record_is_left_out(tmp_path):
    write(tmp_path, [5, 10, 15])
    file, = (tmp_path / "statistics").iterdir()
    content = bytearray(file.read_bytes())
    content[-40] ^= 1  # in the second record, each of which has 28 bytes
    file.write_bytes(content)
    assert read_statistics(tmp_path)[0].tolist() == [5, 15]
    write(tmp_path, [20], resume=15)
    assert read_statistics(tmp_path)[0].tolist() == [5, 15, 20]


@pytest.mark.parametrize("change", [
    lambda content: content[:20],  # half a header
    lambda content: content.replace(b'"weight/a": 3', b'"weight/a": 4'),
])
def test_a_file_with_a_damaged_header_is_set_aside(tmp_path, change):
    write(tmp_path, [5, 10])
    file, = (tmp_path / "statistics").iterdir()
    damaged = change(file.read_bytes())
    file.write_bytes(damaged)
    write(tmp_path, [5, 10, 15], resume=0)
    assert read_statistics(tmp_path)[0].tolist() == [5, 10, 15]
    assert file.with_name(f"{file.name}.damaged").read_bytes() == damaged


def test_other_arrays_begin_another_file(tmp_path):
    write(tmp_path, [5, 10])
    write(tmp_path, [15], resume=10, make=lambda step: {"weight/b": np.float32([step])})
    steps, found = read_statistics(tmp_path)
    assert steps.tolist() == [5, 10, 15] and len(list((tmp_path / "statistics").iterdir())) == 2
    assert found["weight/b"].ravel().tolist() == [5, 10, 15]
    assert np.isnan(found["weight/a"][2]).all() and np.isfinite(found["weight/a"][:2]).all()


def test_nothing_of_a_fresh_start_is_left(tmp_path):
    write(tmp_path, [5, 10])
    write(tmp_path, [], resume=0)
    assert not list((tmp_path / "statistics").iterdir()) and not len(read_statistics(tmp_path)[0])
