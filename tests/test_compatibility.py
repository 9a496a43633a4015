"""What version 0.1.0 wrote still loads, resumes, and is taken as it is.

`fixtures/version_0.1.0.tar.gz` holds a corpus (docs/), the tokens prepared from it (data/), and a
run that it stopped at step 5 of 8 (run/). `expected.json` has what version 0.1.0 computed.
"""

import json
import os
import pathlib
import subprocess
import sys
import tarfile
from collections.abc import Sequence

import numpy as np
import pytest

import lmjax
from lmjax.monitoring.jsonl import read_jsonl

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ['data.sources=[{"name":"docs","uri":"text:docs/*.md"}]', "data.tokenizer.vocab_size=352",
        "data.seq_len=32", "data.heldout_fraction=0.3", "data.curate.dedup.threshold=0.8"]
TRAIN = ["data.directory=data", "train.steps=8", "train.batch_size=4", "model.embed_dim=16",
         "model.mlp_dim=32", "optimizer.ema_decay=0.9", "sample.every=0", "checkpoint.keep_last=5"]

# What configs/quickstart.py has changed since.
THEN = ["model.tie_embeddings=true", "optimizer.peak_lr=0.01", "optimizer.muon_momentum=0.95",
        "optimizer.groups=[]"]


@pytest.fixture
def written(tmp_path):
    """The folder with what version 0.1.0 wrote, and what it computed."""
    with tarfile.open(ROOT / "tests/fixtures/version_0.1.0.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path, json.loads((tmp_path / "expected.json").read_text())


def command(folder: pathlib.Path, *words: str, overrides: Sequence[str] = ()) -> str:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "lmjax.cli", *words, *(f"--config.{item}" for item in overrides)]
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_checkpoint_loads_and_computes_the_same(written):
    folder, expected = written
    lm = lmjax.load(folder / "run/checkpoints/5")
    logits = lm.logits([[1, 40, 41, 7]])[0, -1, :8]
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    found = lm.score(["import os\n"])[0].log_likelihood
    assert found == pytest.approx(expected["log_likelihood"], abs=1e-3)


@pytest.mark.long
def test_a_run_goes_on_where_the_version_before_stopped(written):
    """The optimizer's state, the average of the weights and the order of rows are all read."""
    folder, expected = written
    config = ["--config", f"{ROOT}/configs/quickstart.py:tiny"]
    # The run went on to step 8 once, so its records know a checkpoint that the archive leaves out.
    command(folder, "train", *config, "--workdir", "run",
            overrides=[*DATA, *TRAIN, *THEN, "checkpoint.abandon=8"])
    found = [line for line in read_jsonl(folder / "run/metrics.jsonl") if line["step"] > 5]
    assert [set(line) for line in found] == [set(line) for line in expected["metrics"]]
    for line, wanted in zip(found, expected["metrics"], strict=True):
        for key, value in wanted.items():
            assert line[key] == pytest.approx(value, rel=1e-4), (line["step"], key)
    order = command(folder, "data", "order", "--workdir", "run").splitlines()
    assert order[1:9] == expected["order"]


@pytest.mark.long
def test_prepared_data_is_taken_as_it_is(written):
    folder, expected = written
    before = {path: path.stat().st_mtime_ns for path in (folder / "data").rglob("*")}
    config = ["--config", f"{ROOT}/configs/quickstart.py:tiny"]
    printed = command(folder, "prepare", *config, "--out", "data", overrides=DATA)
    assert f"using the data prepared in data, fingerprint {expected['fingerprint'][:12]}" in printed
    assert {path: path.stat().st_mtime_ns for path in (folder / "data").rglob("*")} == before
