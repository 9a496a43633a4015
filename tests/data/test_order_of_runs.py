"""What a run trained on, by its own records: over a killed process, other batch sizes and other numbers of hosts."""

import json
import signal
import socket
import subprocess

import jax
import numpy as np
import pytest
from processes import finish, lines, start, wait_for

from lmjax.cli.data import make_reader, open_run
from lmjax.cli.main import main
from lmjax.data import DataConfig, TokenizerConfig, make_batches
from lmjax.data.augmentation import AugmentConfig
from lmjax.data.objectives import ObjectiveConfig
from lmjax.data.tokenizers import train_tokenizer
from lmjax.training.checkpoint import checkpoint_steps, read_about

SOURCES = json.dumps([{"name": "a", "uri": "synthetic:70"}, {"name": "b", "uri": "synthetic:90", "weight": 2.0}])
STEPS = 60
RUN = (f"data.sources={SOURCES}", f"train.steps={STEPS}", "optimizer.warmup_steps=2", "checkpoint.every=4",
       "model.num_layers=1")


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Two processes of 16 rows a step, one of them killed; then one process of 6 rows a step with another mixture."""
    workdir = tmp_path_factory.mktemp("moved") / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = [start(workdir, *RUN, "train.batch_size=16", "mesh.data=4", devices=2, env={
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)})
        for i in range(2)]
    wait_for(running[0], lambda: checkpoint_steps(workdir / "checkpoints"))
    running[1].send_signal(signal.SIGKILL)
    assert running[1].wait() == -signal.SIGKILL
    try:
        running[0].wait(timeout=5)  # it cannot go on alone
    except subprocess.TimeoutExpired:
        running[0].kill()
        running[0].wait()
    saved = checkpoint_steps(workdir / "checkpoints")[-1]
    assert 4 <= saved <= 50
    row = saved * 16 + 40
    stages = json.dumps([{"row": row, "weights": {"a": 1.0}}])
    printed = finish(workdir, *RUN, "train.batch_size=6", f"data.stages={stages}", devices=1)
    assert f"batch size: 16 rows up to step {saved}, 6 from there on" in printed
    assert f"plan: rows {row:,} to {saved * 16 + (STEPS - saved) * 6 - 1:,}: a 100.0%" in printed
    return workdir, saved


@pytest.mark.long
def test_every_row_is_seen_once_over_a_kill_and_other_batch_sizes(moved):
    workdir, saved = moved
    about = read_about(workdir / "checkpoints" / str(STEPS))
    end = saved * 16 + (STEPS - saved) * 6
    assert about["data"]["next_row"] == end
    assert about["data"]["batches"] == [[0, 0, 16], [saved, saved * 16, 6]]
    assert len(json.dumps(about["data"])) < 1000
    # Rows differ in how much of them is padding, so the count of tokens after each step tells which rows it had.
    run = open_run(workdir)
    ends = np.cumsum(run.split.rows(np.arange(end))["loss_mask"].sum(axis=1))
    want = {k: int(ends[run.steps.rows(k) - 1]) for k in range(1, STEPS + 1)}
    assert {r["step"]: r["tokens"] for r in lines(workdir) if "loss" in r} == want
    np.testing.assert_array_equal(run.split.locate(np.arange(saved * 16 + 40, end))[0], 0)


def test_show_prints_what_a_step_trained_on(moved, capsys):
    """The batches that training makes, word for word."""
    workdir, saved = moved
    run = open_run(workdir)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for step, size in ((saved, 16), (saved + 1, 6)):
        first = run.steps.rows(step - 1)
        batch = next(make_batches(run.split, batch_size=size, start_row=first, steps=1, sharding=one))
        assert main(["data", "show", "--workdir", str(workdir), "--step", str(step)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"step {step}: rows ")
        said = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
        targets, segments = np.asarray(batch["targets"]), np.asarray(batch["segment_ids"])
        want = [" ".join(map(str, row[ids == s])) for row, ids in zip(targets, segments, strict=True)
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
            (["show", "--workdir", str(workdir), "--step", str(STEPS + 1)], f"--step: expected 1 to {STEPS}"),
            (["order", "--workdir", str(workdir), "--from", "5", "--to", "4"], "expected 0 <= from <= to"),
            (["show", "--workdir", str(tmp_path)], "no config.json there")):
        assert main(["data", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_stage_that_changes_rows_already_seen_is_refused(moved):
    workdir, saved = moved
    stages = json.dumps([{"row": saved * 16, "weights": {"b": 1.0}}])
    printed = finish(workdir, *RUN, "train.batch_size=6", f"data.stages={stages}", expect=2)
    assert "data.stages that are the same before row" in printed


def test_a_run_over_its_cap_is_refused_before_it_starts(tmp_path):
    printed = finish(tmp_path / "run", *RUN, "train.batch_size=16", "data.max_epochs.a=1", expect=2)
    assert "data.max_epochs.a: expected at most 1 epochs of it, got a run of 960 rows that takes 4.5" in printed
    assert not (tmp_path / "run" / "config.json").exists()


def test_added_ids_are_shown_by_their_names(tmp_path):
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=280), ["def read(self): return self.text"] * 5)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.to_bytes())
    mask = tokenizer.vocab_size
    ids = [1, *tokenizer.encode("def r"), mask, mask, *tokenizer.encode("(self)\u00e9"), 2]
    data = DataConfig(seq_len=32, objective=ObjectiveConfig(augment=AugmentConfig(share=1.0)))
    assert make_reader(data, str(tmp_path))(np.array(ids)) == "def r[MASK][MASK](self)\u00e9"
    assert make_reader(data, str(tmp_path))(np.array(ids[:0], int)) == ""
