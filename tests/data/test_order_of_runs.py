"""What a run trained on, by its records, across a killed process, other batch sizes and hosts."""

import contextlib
import io
import json
import signal
import subprocess

import jax
import numpy as np
import pytest
from processes import lines, one_line, run_here, start_together, wait_for

from lmjax.cli.data import make_reader, open_run
from lmjax.cli.main import main
from lmjax.data.augmentation import AugmentConfig
from lmjax.data.batches import make_batches
from lmjax.data.config import DataConfig
from lmjax.data.objectives import ObjectiveConfig
from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.training.checkpoint import checkpoint_steps, read_about

SOURCES = json.dumps([{"name": "a", "uri": "synthetic:70"},
                      {"name": "b", "uri": "synthetic:90", "weight": 2.0}])
STEPS = 60
BEFORE, AFTER = 16, 8  # rows per step
RUN = (f"data.sources={SOURCES}", f"train.steps={STEPS}", "optimizer.warmup_steps=2",
       "checkpoint.every=4", "model.num_layers=1", "eval.every=0", "eval.batches=1")


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """(workdir, step): a run of two processes, one killed, that one process resumes at the step.

    After the step the run has another batch size and, 40 rows later, another mixture.
    """
    workdir = tmp_path_factory.mktemp("moved") / "run"
    running = start_together(workdir, *RUN, f"train.batch_size={BEFORE}", "mesh.data=2",
                             processes=2, devices=1)
    wait_for(running[0], lambda: checkpoint_steps(workdir / "checkpoints"))
    running[1].send_signal(signal.SIGKILL)
    assert running[1].wait() == -signal.SIGKILL
    try:
        running[0].wait(timeout=1)  # it cannot continue alone
    except subprocess.TimeoutExpired:
        running[0].kill()
        running[0].wait()
    saved = checkpoint_steps(workdir / "checkpoints")[-1]
    assert 4 <= saved <= 50
    row = saved * BEFORE + 40
    stages = json.dumps([{"row": row, "weights": {"a": 1.0}}])
    with contextlib.redirect_stderr(io.StringIO()) as out:
        assert run_here(workdir, *RUN, f"train.batch_size={AFTER}", f"data.stages={stages}",
                        f"checkpoint.every={STEPS}") == 0
    printed = out.getvalue()
    assert f"batch size: {BEFORE} rows up to step {saved}, {AFTER} from there on" in printed
    assert f"plan: rows {row:,} to {end_of(saved) - 1:,}: a 100.0%" in printed
    return workdir, saved


def end_of(saved):
    """Rows of the whole run."""
    return saved * BEFORE + (STEPS - saved) * AFTER


@pytest.mark.long
def test_every_row_is_seen_once_over_a_kill_and_other_batch_sizes(moved):
    workdir, saved = moved
    about = read_about(workdir / "checkpoints" / str(STEPS))
    end = end_of(saved)
    assert about["data"]["next_row"] == end
    assert about["data"]["batches"] == [[0, 0, BEFORE], [saved, saved * BEFORE, AFTER]]
    assert len(json.dumps(about["data"])) < 1000
    # Rows have different amounts of padding, so the tokens up to each step tell which rows it had.
    run = open_run(workdir)
    ends = np.cumsum(run.split.rows(np.arange(end))["loss_mask"].sum(axis=1))
    want = {k: int(ends[run.steps.rows(k) - 1]) for k in range(1, STEPS + 1)}
    assert {r["step"]: r["tokens"] for r in lines(workdir) if "loss" in r} == want
    np.testing.assert_array_equal(run.split.locate(np.arange(saved * BEFORE + 40, end))[0], 0)


def test_show_prints_what_a_step_trained_on(moved, capsys):
    """The batches that training makes, token by token."""
    workdir, saved = moved
    run = open_run(workdir)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for step, size in ((saved, BEFORE), (saved + 1, AFTER)):
        first = run.steps.rows(step - 1)
        batch = next(make_batches(run.split, batch_size=size, start_row=first, steps=1,
                                  sharding=one))
        assert main(["data", "show", "--workdir", str(workdir), "--step", str(step)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"step {step}: rows ")
        said = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
        targets, segments = np.asarray(batch["targets"]), np.asarray(batch["segment_ids"])
        want = [" ".join(map(str, row[ids == s]))
                for row, ids in zip(targets, segments, strict=True)
                for s in range(1, ids.max() + 1)]
        assert said == want and printed.count("\nrow ") == size


def test_order_lists_rows(moved, capsys):
    workdir, _ = moved
    assert main(["data", "order", "--workdir", str(workdir), "--from", "5", "--to", "40"]) == 0
    listed = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
    run = open_run(workdir)
    want = zip(range(5, 41), *(x.tolist() for x in run.split.locate(np.arange(5, 41))), strict=True)
    assert [(int(r), "ab".index(s), int(e), int(p)) for r, s, e, p, _ in listed] == list(want)


def test_what_cannot_be_shown_is_refused(moved, tmp_path, capsys):
    workdir, _ = moved
    for arguments, message in (
            (["show", "--workdir", str(workdir), "--step", str(STEPS + 1)],
             f"--step: expected 1 to {STEPS}"),
            (["order", "--workdir", str(workdir), "--from", "5", "--to", "4"],
             "expected 0 <= from <= to"),
            (["show", "--workdir", str(tmp_path)], "no config.json there")):
        assert main(["data", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_stage_that_changes_rows_already_seen_is_refused(moved, capsys):
    workdir, saved = moved
    stages = json.dumps([{"row": saved * BEFORE, "weights": {"b": 1.0}}])
    assert run_here(workdir, *RUN, f"train.batch_size={AFTER}", f"data.stages={stages}") == 2
    assert "data.stages that are the same before row" in one_line(capsys.readouterr().err)


def test_a_run_over_its_cap_is_refused_before_it_starts(tmp_path, capsys):
    run = tmp_path / "run"
    assert run_here(run, *RUN, f"train.batch_size={BEFORE}", "data.max_epochs.a=1") == 2
    expected = ("data.max_epochs.a: expected at most 1 epochs of it, got a run of 960 rows that "
                "takes 4.5")
    assert expected in one_line(capsys.readouterr().err)
    assert not (run / "config.json").exists()


def test_added_ids_are_shown_by_their_names(tmp_path):
    texts = ["def read(self): return self.text"] * 5
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=280), texts)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.to_bytes())
    manifest = {"tokenizer": {"hash": tokenizer.hash}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    mask = tokenizer.vocab_size
    ids = [1, *tokenizer.encode("def r"), mask, mask, *tokenizer.encode("(self)\u00e9"), 2]
    data = DataConfig(seq_len=32, objective=ObjectiveConfig(augment=AugmentConfig(share=1.0)))
    assert make_reader(data, str(tmp_path))(np.array(ids)) == "def r[MASK][MASK](self)\u00e9"
    assert make_reader(data, str(tmp_path))(np.array(ids[:0], int)) == ""
