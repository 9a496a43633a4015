"""A run that several tests look at: profiled, stopped and resumed."""

import pytest
from processes import finish

SHORT = ("train.steps=6", "optimizer.warmup_steps=2", "checkpoint.every=2", "eval.every=3",
         "eval.batches=1")

STOP_AT_STEP_4 = """
import os, signal
from lmjax.training.records import Records
log_step = Records.log_step
def stop(self, step, metrics):
    if step == 3:  # step 4 is already running
        os.kill(os.getpid(), signal.SIGTERM)
    log_step(self, step, metrics)
Records.log_step = stop
"""


@pytest.fixture(scope="session")
def watched(tmp_path_factory):
    """A run of 6 steps that was stopped at step 4 and resumed.

    Its directory, what the first start printed, and what the second start printed.
    """
    workdir = tmp_path_factory.mktemp("watched") / "run"
    first = finish(workdir, *SHORT, "watch.profile=2:3", f"watch.hlo={workdir}/hlo",
                   "watch.stall_seconds=60", first=STOP_AT_STEP_4)
    return workdir, first, finish(workdir, *SHORT, "watch.profile=2:3")
