"""The report: it says what the files say, is one valid page, and copes with any state of a run."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.monitoring.metrics import MetricsWriter
from lmjax.reporting import run_files
from lmjax.reporting.plots import smooth, thin
from lmjax.reporting.report import write_report
from lmjax.reporting.run_files import RunRecord, read_run
from lmjax.reporting.task_report import answer_sections

SVG = "{http://www.w3.org/2000/svg}"
BASELINES = {
    "baselines": [
        {"name": "unigram", "loss": 6.5, "bits_per_byte": 2.5},
        {"name": "bigram", "loss": 4.7, "bits_per_byte": 1.8},
        {"name": "5-gram", "loss": 3.5, "bits_per_byte": 1.35},
    ]
}
MANIFEST = {
    "format": "lmjax-tokens",
    "fingerprint": "3f2a9c",
    "sources": {
        "stdlib": {"train": {"documents": 2310, "tokens": 4_000_000, "bytes": 14_000_000}},
    },
    "removed": {"exact_duplicate": 1234},
}
LEDGER = [{"step": 0, "at": 100.0, "start": 4.0},
          {"step": 100, "at": 312.0, "useful": 180.0, "data": 10.0, "eval": 10.0}]
FACTS = {
    "lmjax": "0.1.0",
    "versions": {"jax": "0.10.2"},
    "device": {"platform": "cpu", "kind": "Some CPU", "count": 8},
    "mesh": {"data": 2, "fsdp": 4},
    "attention": {"kernel": "reference", "reason": "no flash kernel for a CPU"},
    "parameters": 8_412_345,
    "embedding_parameters": 2_000_000,
    "tokens_per_step": 4096,
    "flops_per_token": 4.6e7,
    "compute_dtype": "float32",
    "epochs": 1.5,
    "steps": 100,
    "data": {"fingerprint": "3f2a9c", "directory": "data"},
}
NASTY = "</script></pre><b>bold</b> & \"quoted\" 'it' \x00\x1b \ufffe $x_1$ \U0001f600"


def write_lines(writer, steps, loss=lambda step: 3.0 + 6.0 / (1 + step / 5)):
    for step in steps:
        values = {"loss": loss(step), "bits_per_byte": loss(step) / 2.6}
        writer.train(step, {**values, "learning_rate": 1e-3 * step, "grad_norm": 1.0,
                            "param_norm": 90.0, "tokens": 4000 * step, "epoch": 0.01})
        writer.timing(step, {"seconds": 2.0 * step, "step_seconds": 2.0,
                             "tokens_per_second": 20_000.0, "data_wait_share": 0.01,
                             "model_flops_per_second": 9e11})
        if step % 10 == 0:
            writer.eval(step, {"loss": loss(step) + 0.1,
                               "bits_per_byte": loss(step) / 2.6 + 0.04})
            writer.event(step, "eval", 1.0)
            writer.sample(step, "def <f>(", f"def <f>(x{step}): {NASTY}")


def make_run(workdir, steps=range(1, 101), data=True, **loss):
    writer = MetricsWriter(workdir, 0, tensorboard=False)
    write_lines(writer, steps, **loss)
    writer.close()
    config = {"model": {"num_layers": 4, "note": "a < b & c"}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "run.json").write_text(json.dumps(FACTS))
    (workdir / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LEDGER))
    if data:
        (workdir / "data").mkdir()
        (workdir / "data/manifest.json").write_text(json.dumps(MANIFEST))
        (workdir / "data/baselines.json").write_text(json.dumps(BASELINES))


def report(workdir):
    """Writes the report and checks what holds for every one; returns (page, text, pictures)."""
    path = write_report(workdir)
    assert path == workdir / "report.html" and not list(workdir.glob("*.tmp"))
    page = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(page)
    # The page fetches nothing, runs nothing, and refers only to itself.
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", page)
    assert not re.search(r"@import|url\((?!#)", page)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert not tags & {"script", "link", "img", "iframe", "image"}
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", page)) <= set(ids)
    return page, " ".join("".join(root.itertext()).split()), list(root.iter(f"{SVG}svg"))


def test_the_report_says_everything(tmp_path):
    make_run(tmp_path)
    with (tmp_path / "timing.jsonl").open("a") as file:
        for step in range(50, 58):
            slow = {"step": step, "event": "slow_step", "seconds": step / 5, "process": 1,
                    "host": "b", "doing": "waiting for data"}
            file.write(json.dumps(slow) + "\n")
    page, text, pictures = report(tmp_path)
    titles = [picture.get("aria-label").removesuffix(" against tokens") for picture in pictures]
    assert titles == ["Loss", "Bits per byte", "Learning rate", "Gradients and weights",
                      "Throughput"]
    loss = "".join(pictures[0].itertext())
    for label in ("unigram 6.50", "bigram 4.70", "5-gram 3.50", "held-out 3.39", "training",
                  "tokens trained"):
        assert label in loss
    for fact in (
        "A 8.4M-parameter language model (4 layers) trained for 100 steps on 400k tokens "
        "(0.01 epochs).",
        "On held-out text it reaches 1.304 bits per byte, a loss of 3.386 nats per token.",
        "That is 3% less than the 5-gram baseline's 3.50, and below unigram (6.50) and bigram "
        "(4.70)",
        "It took 3m21s on 8 CPU devices (Some CPU).",
        "finished", "20.0k", "900G", "8,412,345", "data=2, fsdp=4", "no flash kernel for a CPU",
        "0.10.2", "3f2a9c", "exact duplicate", "1,234", "2,310", "3.50", '"note": "a < b & c"',
        "training steps that count 3m00s83.3%", "evaluating 10s4.6%",
        "Of 3m36s in all. 8 steps took over 1.5 times the median of those before. "
        "timing.jsonl has them all.",
        "process 1 (b) was waiting for data5711.40 process 1 (b) was waiting for data5611.20",
    ):
        assert fact in text, fact
    assert "diverged" not in text and text.count("process 1 (b)") == 5


def test_slow_steps_of_another_version_are_listed_as_far_as_they_say(tmp_path):
    make_run(tmp_path)
    events = [{"step": 50, "seconds": "7.5", "process": 1},
              {"step": 1051, "seconds": 9, "process": 0, "host": "a"},
              {"step": 52, "process": 2, "doing": "saving"},
              {"step": 53, "seconds": None}]
    with (tmp_path / "timing.jsonl").open("a") as file:
        for event in events:
            file.write(json.dumps({"event": "slow_step"} | event) + "\n")
    text = report(tmp_path)[1]
    assert "process 0 (a)1,0519.00 process 1507.50 process 2 was saving520.00 530.00" in text


def test_samples_are_escaped_and_their_prompt_is_marked(tmp_path):
    make_run(tmp_path)
    page, text, _ = report(tmp_path)
    assert "</script>" not in page and "<b>bold" not in page and "\x1b" not in page
    root = ElementTree.fromstring(page)
    boxes = [box for box in root.iter("pre") if box.find("mark") is not None]
    assert len(boxes) == 6  # of ten steps
    assert {box.find("mark").text for box in boxes} == {"def <f>("}
    visible = NASTY.replace("\x00", "\u2400").replace("\x1b", "\u241b").replace("\ufffe", "\ufffd")
    assert boxes[0].find("mark").tail == f"x100): {visible}"
    assert boxes[-1].find("mark").tail.startswith("x10)")


def test_continuation_without_its_prompt_and_very_long_text(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.train(1, {"loss": 1.0})
    writer.sample(1, "Once", " upon a time")
    writer.sample(1, "", "y" * 100_000)
    writer.close()
    page, text, _ = report(tmp_path)
    assert "<mark>Once</mark> upon a time" in page and "98,500 more characters" in text
    assert len(page) < 60_000


@pytest.mark.parametrize("data", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "steps, loss, expected",
    [
        (range(1, 2), 9.0, "trained for 1 of 100 steps so far"),
        (range(0, 1), 9.0, "trained for 0 of 100 steps so far"),
        (range(1, 31), math.nan, "The training loss is not finite at step 1."),
        (range(1, 31), math.inf, "The training loss is not finite at step 1."),
        (range(1, 31), 0.0, "trained for 30 of 100 steps so far"),
        (range(1, 31), 1e30, "trained for 30 of 100 steps so far"),
    ],
)
def test_odd_runs(tmp_path, steps, loss, expected, data):
    make_run(tmp_path, steps, data, loss=lambda step: loss)
    page, text, pictures = report(tmp_path)
    assert expected in text and len(pictures) == 5


def test_diverging_half_way(tmp_path):
    make_run(tmp_path, loss=lambda step: 3.0 if step < 60 else math.nan)
    _, text, pictures = report(tmp_path)
    assert "not finite at step 60" in text and "diverged" in text
    assert "not finite" in "".join(pictures[0].itertext())


@pytest.mark.parametrize("line", [{"step": 5, "loss": 2.0}, {"step": 5, "eval/loss": 2.0}])
def test_metrics_alone(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n" + '{"step": 6, "lo')
    _, text, pictures = report(tmp_path)
    assert len(pictures) == 1 and "A language model trained for 5 steps" in text


def test_gradients_that_are_all_zero_have_a_picture(tmp_path):
    lines = [json.dumps({"step": i, "loss": 0.0, "grad_norm": 0.0}) + "\n" for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    _, _, pictures = report(tmp_path)  # a warning of Matplotlib is an error here
    assert any("gradient norm" in "".join(picture.itertext()) for picture in pictures)


def test_not_below_the_baselines(tmp_path):
    make_run(tmp_path, loss=lambda step: 4.8)
    text = report(tmp_path)[1]
    assert ("less than the unigram baseline's 6.50, but not yet below bigram (4.70) and 5-gram "
            "(3.50).") in text
    (tmp_path / "other").mkdir()
    make_run(tmp_path / "other", loss=lambda step: 9.0)
    text = report(tmp_path / "other")[1]
    assert "not yet below a baseline of the same data: unigram (6.50), bigram" in text


def test_resumed_run(tmp_path):
    make_run(tmp_path, range(1, 61))
    writer = MetricsWriter(tmp_path, 40, tensorboard=False)
    writer.event(40, "resume", 3.0)
    write_lines(writer, range(41, 101))
    writer.close()
    run = read_run(tmp_path)
    for columns in (run.train, run.timing):
        assert columns["step"].tolist() == list(range(1, 101))
    _, text, _ = report(tmp_path)
    assert "resumed once." in text and "Dotted: the run was resumed." in text


def test_the_average_of_weights_has_a_curve(tmp_path):
    make_run(tmp_path)
    writer = MetricsWriter(tmp_path, 100, tensorboard=False)
    writer.eval(100, {"eval_ema/loss": 3.25, "eval_ema/bits_per_byte": 1.2})
    writer.close()
    _, text, pictures = report(tmp_path)
    assert "EMA 3.25" in "".join(pictures[0].itertext()) and "reaches 1.304 bits" in text


def test_a_long_run_is_thinned(tmp_path, monkeypatch):
    spikes = {777: 31.5, 2348: 40.25, 2349: 12.0, 4444: 9.75}
    make_run(tmp_path, range(1, 5001),
             loss=lambda step: spikes.get(step, 3.0 + 6.0 / (1 + step / 5)))
    size = len(report(tmp_path)[0])
    assert size < 500_000
    whole = read_run(tmp_path)
    monkeypatch.setattr(run_files, "MAX_PARSED_BYTES", 100_000)
    monkeypatch.setattr(run_files, "STRETCHES", 40)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5001, "loss": "nan", "tokens": 20_004_000}) + "\n")
        file.write(json.dumps({"step": 5002, "loss": 3.0, "tokens": 20_008_000}) + "\n")
    run = read_run(tmp_path)
    assert 200 < len(run.train["step"]) < 1000 and len(run.heldout["step"]) == 500
    assert run.step == 5002 and run.diverged_at == 5001
    for step in (777, 2348, 4444):  # each is the greatest of its stretch, about 125 steps
        assert run.train["loss"][run.train["step"] == step] == spikes[step]
    assert 200 < len(run.timing["step"]) < 1000
    assert run.events == whole.events and run.seconds == whole.seconds
    kept = np.isin(whole.train["step"], run.train["step"])  # in order, and unchanged:
    np.testing.assert_array_equal(run.train["loss"][:-2], whole.train["loss"][kept])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5003, "lo')  # torn
    assert read_run(tmp_path).step == 5002


def test_thin_keeps_extremes_and_means():
    rng = np.random.default_rng(0)
    for n, most in ((1, 10), (10, 10), (11, 10), (1003, 10), (1000, 400)):
        x, y = np.arange(n, dtype=float), rng.normal(size=n)
        y[rng.random(n) < 0.2] = np.nan
        thin_x, mean, low, high = thin(x, y, most)
        assert len(thin_x) == min(n, most) and (np.diff(thin_x) > 0).all()
        if np.isfinite(y).any():
            assert np.nanmin(low) == np.nanmin(y) and np.nanmax(high) == np.nanmax(y)
            assert (low <= mean + 1e-12)[np.isfinite(mean)].all()
            assert (mean <= high + 1e-12)[np.isfinite(mean)].all()
    x, mean, low, high = thin(np.arange(4.0), np.array([1.0, 3.0, np.inf, np.nan]), 2)
    assert x.tolist() == [0.5, 2.5] and (mean[0], low[0], high[0]) == (2.0, 1.0, 3.0)
    assert np.isnan([mean[1], low[1], high[1]]).all()


def test_smooth_is_a_centred_mean():
    line = np.arange(20.0)
    np.testing.assert_allclose(smooth(line, 5), line)  # a slope stays, even at its ends
    y = np.array([0.0, 0.0, 3.0, 0.0, np.nan, 5.0])
    np.testing.assert_allclose(smooth(y, 3), [0.0, 1.0, 1.0, 1.5, np.nan, 5.0])


def test_refusals(tmp_path):
    refused = "expected the directory of a run, got .*missing.*; give the --workdir"
    with pytest.raises(UserError, match=refused):
        write_report(tmp_path / "missing")
    refused = "expected metrics in .*metrics.jsonl, got none; train into"
    with pytest.raises(UserError, match=refused):
        write_report(tmp_path)
    make_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json: expected JSON, got .*; move the file away"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("classes", [3, 9])
def test_a_confusion_matrix_has_a_row_per_class_and_its_width_when_they_are_many(classes, tmp_path):
    lines = [{"truth": f"c{i}", "answer": {"label": f"c{i // 2}", "confidence": 0.5},
              "record": {"text": "x"}} for i in range(classes)]
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers/eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = answer_sections(RunRecord(tmp_path, {}, {})).split("</section>")[0]
    assert all(f"<tr><th>c{i}</th>" in card for i in range(classes))
    assert ("card wide" in card) == ("confusion many" in card) == (classes == 9)
