"""The records of a run are exact, valid JSON, safe from a kill, and readable by TensorBoard."""

import io
import json
import math
import re
import struct

import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.monitoring.metrics import MetricsWriter
from lmjax.monitoring.progress import Progress
from lmjax.monitoring.units import human_count, human_seconds

TRAIN = {"loss": 0.1 + 0.2, "learning_rate": 1e-3 / 3, "tokens": 4096}


def write_steps(workdir, resume_step, steps):
    writer = MetricsWriter(workdir, resume_step, tensorboard=False)
    for step in steps:
        writer.train(step, {**TRAIN, "loss": math.sin(step), "tokens": 4096 * step})
        if step % 2 == 0:
            writer.eval(step, {"eval/loss": math.cos(step)})
            writer.sample(step, "a \u00fc\n", f"a \u00fc\n\u2028 {step}")
        writer.timing(step, {"seconds": 1.5 * step})
    writer.close()


def files(workdir):
    return {name: (workdir / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}


def test_floats_survive_and_json_stays_valid(tmp_path):
    import jax.numpy as jnp

    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    float32 = np.float32(1) / np.float32(3)
    values = {
        "a": 0.1 + 0.2,
        "b": float32,
        "c": jnp.asarray(float32),
        "d": np.int64(2**60),
        "e": jnp.asarray(7),
    }
    writer.train(1, {**values, "f": math.nan, "g": np.float32("inf"), "h": -math.inf, "i": 5e-324})
    writer.eval(1, {"loss": 1.0, "eval_ema/loss": 2.0})
    writer.close()

    def forbidden(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    train, evaluation = (json.loads(line, parse_constant=forbidden) for line in lines)
    assert train == {
        **{"step": 1, "a": 0.1 + 0.2, "b": float(float32), "c": float(float32), "d": 2**60, "e": 7},
        **{"f": "nan", "g": "inf", "h": "-inf", "i": 5e-324},
    }
    assert isinstance(train["d"], int) and isinstance(train["e"], int)
    assert evaluation == {"step": 1, "eval/loss": 1.0, "eval_ema/loss": 2.0}


def test_interrupted_equals_straight(tmp_path):
    write_steps(tmp_path / "straight", 0, range(1, 9))
    for k in range(8):
        workdir = tmp_path / f"killed{k}"
        write_steps(workdir, 0, range(1, 8))
        write_steps(workdir, k, range(k + 1, 9))
        assert files(workdir) == files(tmp_path / "straight")
        timed = [line["step"] for line in read_jsonl(workdir / "timing.jsonl")]
        assert timed == [*range(1, 8), *range(k + 1, 9)]  # kept, because that time was spent


def test_replaying_the_step_resumed_at_adds_nothing(tmp_path):
    write_steps(tmp_path / "straight", -1, range(0, 5))
    write_steps(tmp_path / "again", -1, range(0, 3))
    write_steps(tmp_path / "again", 0, range(0, 5))  # no checkpoint yet: step 0 is written again
    assert files(tmp_path / "again") == files(tmp_path / "straight")
    write_steps(tmp_path / "again", -1, range(0, 5))
    assert files(tmp_path / "again") == files(tmp_path / "straight")


def test_torn_at_any_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # for speed: no power cut to survive
    write_steps(tmp_path, 0, range(1, 4))
    whole = files(tmp_path)
    for name, content in whole.items():
        ends = [match.end() for match in re.finditer(b"\n", content)]
        for cut in range(len(content) + 1):
            (tmp_path / name).write_bytes(content[:cut])
            MetricsWriter(tmp_path, 2, tensorboard=False).close()
            kept = content[: max([end for end in ends if end <= cut], default=0)]
            expected = b"".join(line for line in kept.splitlines(True)
                                if json.loads(line)["step"] <= 2)
            assert (tmp_path / name).read_bytes() == expected
    assert not list(tmp_path.glob("*.tmp"))


def test_torn_timing_loses_only_its_last_line(tmp_path):
    write_steps(tmp_path, 0, range(1, 4))
    path = tmp_path / "timing.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 4, "sec')
    writer = MetricsWriter(tmp_path, 1, tensorboard=False)
    assert path.read_bytes() == whole
    assert writer.seconds_before == 4.5
    writer.event(1, "resume", 0.25)
    writer.close()
    assert list(read_jsonl(path))[-1] == {"step": 1, "event": "resume", "seconds": 0.25}
    MetricsWriter(tmp_path, 1, tensorboard=False).close()
    new = MetricsWriter(tmp_path / "new", 0, tensorboard=False)
    assert new.seconds_before == 0.0
    new.close()


@pytest.mark.parametrize("damage", [b"\x00\x00\n", b"[1]\n", b'{"loss": 1.0}\n'])
def test_damage_in_the_middle_is_refused(tmp_path, damage):
    write_steps(tmp_path, 0, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(damage + content)
    message = "line 1: expected a JSON object with a step, got .*; remove that line"
    with pytest.raises(UserError, match=message):
        MetricsWriter(tmp_path, 1, tensorboard=False)
    assert path.read_bytes() == damage + content


def test_lines_are_in_the_file_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.train(1, TRAIN)
    assert next(read_jsonl(tmp_path / "metrics.jsonl")) == {"step": 1, **TRAIN}
    size = sum(path.stat().st_size for path in tmp_path.glob("events.*"))
    writer.sample(1, "", "half a pair: \ud800")
    assert sum(path.stat().st_size for path in tmp_path.glob("events.*")) > size
    assert next(read_jsonl(tmp_path / "samples.jsonl"))["text"] == "half a pair: ?"
    writer.flush()
    writer.close()


def records(path):
    """The payloads of a TFRecord file; the checksums are not checked."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        found.append(data[at + 12 : at + 12 + length])
        at += length + 16
    return found


def test_tensorboard_events(tmp_path):
    """TensorFlow, an independent reader, checks the checksums and parses the messages."""
    tf = pytest.importorskip("tensorflow")
    from tensorflow.core.util import event_pb2

    writer = MetricsWriter(tmp_path, 70)
    writer.train(71, {"loss": 2.5, "tokens": 2**40, "grad_norm": math.nan, "big": 1e300})
    writer.eval(300_000, {"eval/loss": 0.1})
    writer.timing(300_000, {"tokens_per_second": 1e6})
    for prompt in ("def f", "\u00fc" * 300):
        writer.sample(300_000, prompt, prompt + "(x):\n  return \ud800")
    writer.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    raw = [bytes(record.numpy()) for record in tf.data.TFRecordDataset([str(path)])]
    assert raw == records(path)
    version, start, train, evaluation, timing, *samples = map(event_pb2.Event.FromString, raw)
    assert version.file_version == "brain.Event:2"
    assert start.step == 71 and start.session_log.status == event_pb2.SessionLog.START
    values = {value.tag: value.simple_value for value in train.summary.value}
    assert train.step == 71 and train.wall_time > 1e9
    assert math.isnan(values.pop("train/grad_norm"))
    largest = np.finfo(np.float32).max
    assert values == {"train/loss": 2.5, "train/tokens": 2**40, "train/big": largest}
    assert evaluation.step == 300_000
    evaluated = [(value.tag, value.simple_value) for value in evaluation.summary.value]
    assert evaluated == [("eval/loss", np.float32(0.1))]
    assert timing.summary.value[0].tag == "timing/tokens_per_second"
    for index, event in enumerate(samples):
        (value,) = event.summary.value
        assert value.tag == f"samples/{index}/text_summary"
        assert value.metadata.plugin_data.plugin_name == "text"
        (text,) = tf.make_ndarray(value.tensor)
        assert text.decode().endswith("(x):\n      return ?\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_piped_progress():
    stream, clock, times = io.StringIO(), Clock(), []
    with Progress(1000, stream, clock) as progress:
        for step in range(1, 1001):
            clock.now += 0.125
            before = stream.getvalue()
            progress.update(step, 2.0, 1.5, 12_345, 0.0123)
            if stream.getvalue() != before:
                times.append(clock.now - 100)
            if step == 500:
                progress.log("evaluated")
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text
    due = (0, 1, 3, 7, 15, 30, 45, 60, 75, 90, 105, 120)
    assert times == [0.125 + at for at in due] + [125.0]
    lines = text.splitlines()
    assert "evaluated" in lines and len(lines) == len(times) + 1
    assert lines[0] == (
        "step 1/1,000 0% | loss 2.000 | 1.500 bits/byte | 12.3k tokens/s | data wait 1.2% | ETA -"
    )
    assert lines[-1].startswith("step 1,000/1,000 100% |") and lines[-1].endswith("ETA 0ms")
    assert re.search(r"step 241/1,000 +24% .* ETA 1m35s$", text, re.M)


def test_piped_progress_shows_the_last_update_of_a_run_that_stops_early():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1000, stream, clock)
    for step in (1, 2):
        progress.update(step, math.nan, math.nan, 0.0)
    progress.close()
    progress.close()
    assert [line.split(" | ")[0] for line in stream.getvalue().splitlines()] == [
        "step 1/1,000 0%", "step 2/1,000 0%"]
    Progress(10, stream).close()  # without an update nothing is written


def test_live_progress_stays_on_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    progress = Progress(100, stream, clock)
    for step in range(1, 101):
        clock.now += 0.01
        progress.update(step, 2.0, 1.5, 12_345)
        if step == 50:
            progress.log("a message\nof two lines")
    progress.close()
    text = stream.getvalue()
    assert text.count("\n") == 3 and text.endswith("\n")
    frames = re.findall(r"\r(\d[^\r\n\x1b]*)\x1b\[K", text)
    assert 8 <= len(frames) <= 16  # of a hundred updates within a second
    assert max(map(len, frames)) == 49
    assert frames[-1].startswith("100/100 100%  loss 2.000  1.500 bits/byte")
    assert "\r\x1b[Ka message\nof two lines\n\r50/100 50%  " in text


def test_live_progress_fits_eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    progress = Progress(2000, stream, clock)
    progress.update(1, 9.0, 3.5, 100.0)
    clock.now += 300
    progress.update(1201, 3.2, 1.1, 21_000, 0.004)
    progress.close()
    expected = "1,201/2,000 60%  loss 3.200  1.100 bits/byte  21.0k tok/s  wait 0%  ETA 3m20s"
    assert f"\r{expected}\x1b[K" in stream.getvalue()
    clock.now += 1
    progress.update(1202, 3.2, 1.1, 21_000, 0.004, mfu=0.413)
    assert "21.0k tok/s  MFU 41%  ETA" in stream.getvalue()
    progress = Progress(2000, piped := io.StringIO(), clock)
    progress.update(1202, 3.2, 1.1, 21_000, 0.004, mfu=0.413)
    assert "21.0k tokens/s | MFU 41% | data wait 0.4% |" in piped.getvalue()


@pytest.mark.parametrize(
    "value, expected",
    [(0, "0"), (7, "7"), (999, "999"), (999.6, "1.0k"), (1234, "1.2k"), (12_345, "12.3k"),
     (99_960, "100k"), (999_499, "999k"), (999_500, "1.0M"), (1_234_567, "1.2M"), (8.4e9, "8.4B"),
     (3e15, "3000T"), (0.25, "0.2"), (math.nan, "nan"), (-1500, "-1.5k")])
def test_human_count(value, expected):
    assert human_count(value) == expected


@pytest.mark.parametrize(
    "seconds, expected",
    [(0, "0ms"), (0.02, "20ms"), (0.9996, "1.0s"), (5.25, "5.2s"), (9.96, "10s"), (59.4, "59s"),
     (59.6, "1m00s"), (200, "3m20s"), (3599.7, "1h00m"), (3700, "1h01m"), (86399.9, "1d00h"),
     (200_000, "2d07h"), (math.inf, "?")])
def test_human_seconds(seconds, expected):
    assert human_seconds(seconds) == expected
