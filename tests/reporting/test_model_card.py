"""The model card: metadata as the hub reads it, and figures that are those of the run's files."""

import json
import re

import pytest

from lmjax.monitoring.metrics import MetricsWriter
from lmjax.reporting.model_card import FILE, MARK, card, write_card
from lmjax.reporting.report import write_report
from lmjax.reporting.run_files import read_run

CONFIG = {
    "model": {"family": "decoder", "num_layers": 3, "embed_dim": 32, "vocab_size": 777},
    "data": {"seq_len": 64, "sources": [{"name": "news | old", "uri": "text:/n/*.txt"}],
             "curate": {"languages": ["no", "de"]}},
    "train": {"batch_size": 5, "seed": 11, "init_from": "/c/models--org--tiny/snapshots/abc"},
    "optimizer": {"name": "adamw", "peak_lr": 0.00025, "schedule": "cosine"},
    "eval": {"metric": "loss"}}
FACTS = {"parameters": 1234567, "steps": 4, "lmjax": "0.9.9",
         "data": {"fingerprint": "abcdef0123456789"}}
EVALS = {2: 3.25, 4: 3.125}  # the loss by step


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my run"
    writer = MetricsWriter(folder, 0, tensorboard=False)
    for step in range(1, 5):
        writer.train(step, {"loss": 4.0, "tokens": 320 * step})
        if step in EVALS:
            writer.eval(step, {"loss": EVALS[step], "tokens": 99, "best_step": step})
    writer.eval(4, {"test/accuracy": 0.875})
    writer.close()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "run.json").write_text(json.dumps(FACTS))
    return folder


def test_the_hub_reads_the_metadata(run):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed, which reads the metadata")
    text = card(read_run(run), 4)
    found = yaml.safe_load(text.split("---\n")[1])
    assert found["library_name"] == "lmjax" and found["pipeline_tag"] == "text-generation"
    assert found["datasets"] == ["news | old"] and found["base_model"] == "org/tiny"
    assert found["language"] == ["no", "de"], "YAML's bare no would be false"
    assert "license" not in found
    [index] = found["model-index"]
    values = {(result["dataset"]["type"], metric["type"]): metric["value"]
              for result in index["results"] for metric in result["metrics"]}
    assert values == {("held-out", "loss"): 3.125, ("test", "accuracy"): 0.875}
    hub = pytest.importorskip("huggingface_hub", reason="not installed: pip install lmjax[oracle]")
    theirs = hub.ModelCard(text).data
    assert [result.metric_value for result in theirs.eval_results] == [3.125, 0.875]


def test_every_figure_is_of_the_files(run):
    rows = dict(re.findall(r"^\| (.+) \| (.+) \|$", card(read_run(run), 2), re.M))
    rows.pop("---")
    assert rows == {
        "family": "decoder", "parameters": "1,234,567", "num layers": "3", "embed dim": "32",
        "vocab size": "777", "tokens per row": "64", "steps": "2", "tokens seen": "640",
        "data": "text:/n/*.txt", "rows per step": "5", "seed": "11", "started from": "org/tiny",
        "optimizer": "adamw, peak learning rate 0.00025, cosine", "lmjax": "0.9.9",
        "data fingerprint": "abcdef012345", "best step by loss": "4", "loss, held-out": "3.2500"}


def test_a_card_of_the_user_stays(run):
    write_report(run)
    assert MARK in (run / FILE).read_text() and "step=4" in (run / FILE).read_text()
    (run / FILE).write_text("mine\n")
    assert write_card(run, read_run(run)) is None
    assert (run / FILE).read_text() == "mine\n"
