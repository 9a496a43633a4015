"""The table of what pretraining is worth: the runs, what is run once only, and the baselines."""

import json
from pathlib import Path

import pytest

from lmjax.benchmarks.baselines import baselines
from lmjax.benchmarks.finetuning import table
from lmjax.cli.main import main
from lmjax.tasks.classification import Classification
from lmjax.tasks.embeddings import Embeddings
from lmjax.tasks.pairs import Pairs
from lmjax.tasks.preferences import Preferences
from lmjax.tasks.questions import Questions
from lmjax.tasks.tagging import Tagging

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install lmjax[tasks]")
ROOT = Path(__file__).resolve().parents[2]
# In these, a word decides: the baselines of words are right, those without an input are not.
COLOURS = ["red", "blue"] * 12


def tagged(at: int) -> dict[str, list[str]]:
    return {"words": ["see", COLOURS[at], f"n{at}"], "tags": [
        "O", "B-RED" if COLOURS[at] == "red" else "B-BLUE", "O"]}


EXAMPLES = {
    "accuracy": (Classification(input="{x}", label="y"),
                 lambda i: {"x": f"a {COLOURS[i]}_{i} thing", "y": f"is {COLOURS[i]}"}),
    "exact_match": (Pairs(input="{x}", target="{y}", metric="exact_match"),
                    lambda i: {"x": f"a {COLOURS[i]} thing {i}", "y": f"is {COLOURS[i]}"}),
    "f1": (Tagging(), tagged),
    "margin": (Preferences(), lambda i: {"prompt": "p", "chosen": f"good {i}",
                                         "rejected": f"evil {i}"}),
    "mrr": (Embeddings(), lambda i: {"first": f"number {i}x", "second": f"{i}x is here"}),
    # The same example is among the known ones.
    "f1_of_spans": (Questions(), lambda i: {"question": f"what {i % 8}?", "answers": f"n{i % 8}",
                                            "context": f"it is n{i % 8}"}),
}


@pytest.mark.parametrize("metric", EXAMPLES)
def test_words_are_told_apart_by_the_baseline_of_words_alone(metric):
    task, record = EXAMPLES[metric]
    records = [record(i) for i in range(24)]
    found = baselines(task, metric.removesuffix("_of_spans"), records[:16], records[16:20],
                      records[20:])
    assert found["words"].value > (0.99 if metric != "margin" else 0)
    assert found["majority"].value < (0.9 if metric != "margin" else 1e-9)
    assert found["words"].name != found["majority"].name


def test_the_table_has_means_spreads_and_the_gain():
    def line(start, value, seed=0, **more):
        return {"task": "a", "start": start, "seed": seed, "metric": "f1", "value": value,
                "examples": 1234, **more}

    lines = table([line("majority", 0.0, by="x"), line("words", 0.5, by="y"),
                   line("random", 0.25), line("pretrained", 0.5), line("pretrained", 0.75, 1)])
    assert lines[2] == "| a | f1 | 1,234 | 0.000 | 0.500 | 0.250 | 0.625 ± 0.177 | +0.125 |"
    assert lines[4:] == ["a, majority: x", "a, bag of words: y"]


def test_an_unknown_name_is_refused_before_anything_runs(capsys):
    assert main(["bench", "tasks", "--tasks", "sorting"]) == 2
    assert "--tasks: expected some of classification" in capsys.readouterr().err
    assert main(["bench", "tasks", "--tasks", "grpo", "--set", "bert.train.steps=1"]) == 2
    assert "--set: expected one of grpo, sums, a dot, and KEY=VALUE" in capsys.readouterr().err
    assert main(["bench", "tasks", "--config.train.steps=1"]) == 2
    assert "write --set NAME.KEY=VALUE" in capsys.readouterr().err


@pytest.mark.slow
def test_every_start_is_run_once(monkeypatch, tmp_path, capsys):
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    command = ["bench", "tasks", "--tasks", "grpo:tiny", "--seeds", "1", "--out", "figures.json",
               "--set", "grpo.train.steps=2", "sums-tiny.train.steps=4"]
    assert main(command) == 0
    rows = json.loads(Path("figures.json").read_text())["rows"]
    assert [row["start"] for row in rows] == ["random", "pretrained", "majority", "words"]
    assert {row["examples"] for row in rows} == {rows[0]["examples"]} and rows[1]["step"] == 2
    assert "| grpo:tiny | exact_match |" in capsys.readouterr().out
    kept = [Path(f"runs/tasks/data/grpo-tiny/{name}.jsonl").read_text().splitlines()
            for name in ("train", "test")]
    assert len(kept[0]) + len(kept[1]) == 481 and not set(kept[0]) & set(kept[1])
    starts = [json.loads(Path(f"runs/tasks/grpo-tiny-{start}-0/config.json").read_text())
              ["train"]["init_from"] for start in ("random", "pretrained")]
    assert starts == ["runs/tasks/random-sums-tiny-0", "runs/sums-tiny"]

    monkeypatch.setattr("lmjax.benchmarks.finetuning._train", None)  # nothing is left to run
    monkeypatch.setattr("lmjax.benchmarks.finetuning._pretrain", lambda row: None)
    assert main(command) == 0 and json.loads(Path("figures.json").read_text())["rows"] == rows
    assert main([*command, "grpo.train.seed=1"]) == 2  # the last option is --set
    assert "expected runs of grpo:tiny with --set grpo.train.steps=2 grpo.train.seed=1" in (
        capsys.readouterr().err)
