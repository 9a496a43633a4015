"""Early stopping, and the best checkpoint beside the newest, through kills at any moment."""

import json
import pathlib
import signal

import pytest
from processes import assert_same_run, lines, one_line, run_here, start, wait_for

from lmjax.errors import UserError
from lmjax.training.best import Best, restored
from lmjax.training.checkpoint import checkpoint_steps
from lmjax.training.pretrained import find

# The learning rate rises until the loss on held-out data does, too.
RISING = ("train.steps=40", "optimizer.warmup_steps=20", "optimizer.peak_lr=0.15", "eval.every=1",
          "checkpoint.every=5", "checkpoint.keep_last=1", "eval.metric=loss", "eval.patience=2",
          "checkpoint.keep_best=true", "model.dropout=0.1")
DEVICES = 8  # of this process, so that a process of its own computes the same


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    assert run_here(workdir, *RISING) == 0
    return workdir


def evaluations(workdir: pathlib.Path) -> dict[int, float]:
    """The losses by step on the usual batches, which come before the whole set of the last step."""
    return {row["step"]: row["eval/loss"] for row in reversed(lines(workdir)) if "eval/loss" in row}


def best_of(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "checkpoints" / "best.json").read_text())


@pytest.mark.long
def test_a_run_ends_early_and_keeps_its_best_step(straight, capsys):
    losses = evaluations(straight)
    best, last = min(losses, key=losses.get), max(losses)
    assert 1 < best and last == best + 2 < 40, losses
    assert checkpoint_steps(straight / "checkpoints") == [best, last]
    assert best_of(straight) == {"metric": "loss", "value": losses[best], "step": best,
                                 "waited": 2, "evaluated": last}
    event, = (row for row in lines(straight, "timing.jsonl") if row.get("event") == "ended_early")
    assert event["step"] == last and event["best_step"] == best and event["value"] == losses[best]
    page = (straight / "report.html").read_text()
    assert f"Its best step by loss is {best} ({losses[best]:.3f}); it ended early, at" in page
    before = (straight / "metrics.jsonl").read_bytes()
    assert run_here(straight, *RISING) == 0
    said = capsys.readouterr().err
    assert f"finished: it ended early at step {last}: 2 evaluations found nothing better" in said
    assert (straight / "metrics.jsonl").read_bytes() == before
    for path, options in ((straight, {"step": "best"}), (straight / "checkpoints" / "best", {})):
        assert find(path, **options).about["step"] == best
    assert find(straight).about["step"] == last
    with pytest.raises(UserError, match=f"the checkpoint of step {best}"):
        find(straight / "checkpoints" / str(best), step=last)


# Python for a process: it says when an evaluation begins and ends, and waits for a kill each time.
SAYS = """
import time
from lmjax.training import loop
evaluate = loop._evaluate
def told(run, records, stop, step, state):
    print(f"<evaluating {step}>", flush=True)
    time.sleep(0.3)
    complete = evaluate(run, records, stop, step, state)
    print(f"<evaluated {step}>", flush=True)
    time.sleep(0.3)
    return complete
loop._evaluate = told
"""


@pytest.mark.slow
def test_kills_change_neither_the_end_nor_the_best(straight, tmp_path):
    workdir, known = tmp_path / "run", best_of(straight)
    best, last = known["step"], known["evaluated"]
    log = pathlib.Path(f"{workdir}.log")

    def saving_the_best():
        return (workdir / "checkpoints" / str(best)).exists() and best not in checkpoint_steps(
            workdir / "checkpoints")

    def says(text):
        return lambda: text in log.read_text()

    # The best step is evaluated and noted but not saved; it is being saved; the last evaluation has
    # begun; it is noted, but the newest checkpoint is of a step before.
    for moment in (says(f"<evaluated {best}>"), saving_the_best,
                   says(f"<evaluating {last}>"), says(f"<evaluated {last}>")):
        log.write_text("")
        process = start(workdir, *RISING, devices=DEVICES, first=SAYS)
        wait_for(process, moment)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended before the kill:\n{log.read_text()}"
    assert run_here(workdir, *RISING) == 0
    assert_same_run(straight, workdir, ["metrics.jsonl", "checkpoints/best.json"])
    assert checkpoint_steps(workdir / "checkpoints") == [best, last]
    assert run_here(workdir, *RISING) == 0, "it knows that it is finished"
    assert_same_run(straight, workdir, ["metrics.jsonl", "checkpoints/best.json"])


def test_the_best_compares_numbers_only_and_repeats_no_step():
    best = Best("loss").after(2, float("nan"))
    assert (best.value, best.step, best.waited) == (None, 0, 1)
    best = best.after(4, 3.0).after(6, float("inf")).after(8, 3.0)
    assert (best.value, best.step, best.waited, best.evaluated) == (3.0, 4, 2, 8)
    assert best.after(8, 1.0) == best, "a step that is evaluated again counts once"
    records = [vars(Best("loss").after(4, 3.0)), vars(best), {}, vars(Best("perplexity", 9., 6))]
    assert restored("loss", 7, *records) == Best("loss", 3.0, 4, 0, 4)
    assert restored("loss", 8, *records) == best
    assert restored("bits_per_byte", 8, *records) == Best("bits_per_byte")


@pytest.mark.parametrize("overrides, said", [
    (["eval.metric=f2"], "eval.metric: expected one of loss, perplexity, bits_per_byte"),
    (["eval.patience=2", "eval.every=2"], "eval.patience: expected a metric to be patient with"),
    (["eval.metric=loss", "eval.every=0"], "eval.every: expected more than 0, since eval.metric"),
    (["checkpoint.keep_best=true"], "checkpoint.keep_best: expected false, since eval.metric"),
])
def test_what_does_not_go_together_is_refused(overrides, said, tmp_path, capsys):
    assert run_here(tmp_path / "run", *overrides) == 2
    assert said in one_line(capsys.readouterr().err)


def test_a_model_that_has_no_best_step_says_so(straight, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="a run that records its best step"):
        find(tmp_path, step="best")
    with pytest.raises(UserError, match="step: expected a number, or"):
        find(straight, step="last")
