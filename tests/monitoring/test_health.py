"""Which steps are at fault follows from the figures of the steps, whenever it is asked."""

import json
import math
import random
import statistics

import pytest

from lmjax.monitoring import health
from lmjax.monitoring.health import UNLIMITED, WINDOW, Health


def figures(seed: int, steps: int) -> list[tuple[float, float]]:
    """Losses that fall, and gradient norms with a long tail, as those of a run do."""
    rng = random.Random(seed)
    return [(3 + 3 / step**0.5 + rng.gauss(0, 0.05), math.exp(rng.gauss(0, 0.3)))
            for step in range(1, steps + 1)]


def test_no_false_alarm_and_every_spike_is_found():
    for seed in range(5):
        judge = Health("record")
        for step, (loss, norm) in enumerate(figures(seed, 1000), 1):
            assert judge.judge(step, loss, norm) is None, (seed, step)
        for loss, norm in ((6.0, 1.0), (3.0, 30.0), (math.nan, 1.0), (3.0, math.inf)):
            assert judge.judge(1001, loss, norm) is not None
        assert judge.skipped == 2  # those that are not finite


def test_limits_are_the_same_when_a_step_starts_and_when_it_is_judged():
    """A step starts before the step before it is judged, unless the run evaluates between them."""
    at_start, judge = [UNLIMITED], Health("skip")
    level = [(9.0, 1.0)] * 60  # becomes the baseline
    for step, (loss, norm) in enumerate([*figures(1, 100), *level, *figures(0, 400)], 1):
        at_start.append(judge.limits(step + 1))
        assert judge.limits(step) == at_start[step - 1]
        judge.judge(step, loss, norm)
        assert judge.limits(step + 1) == at_start[step]
    losses = [loss for loss, _ in figures(0, 400)][-WINDOW - 1 : -1]
    median = statistics.median(losses)
    spread = 1.4826 * statistics.median(abs(loss - median) for loss in losses)
    wanted = median + 10 * max(spread, 0.02 * median)
    assert judge.limits(561)[0] == pytest.approx(wanted, rel=1e-6)


def test_a_restored_run_goes_on_with_the_same_judgement():
    judge, bad = Health("skip", 3), [(math.nan, 1.0)] * 3
    for step, (loss, norm) in enumerate([*figures(1, 100), *bad[:2]], 1):
        judge.judge(step, loss, norm)
    again = Health("skip", 3)
    again.restore(json.loads(json.dumps(judge.state())))
    assert again.limits(103) == judge.limits(103) != UNLIMITED
    found = again.judge(103, *bad[2])
    assert found.first == 101 and again.rewinds(found).first == 101 and again.skipped == 3
    fresh = Health("skip", 3)
    fresh.restore({})  # a checkpoint from before
    assert fresh.rewinds(fresh.judge(103, *bad[2])) is None


@pytest.mark.parametrize("policy", ["record", "skip"])
def test_a_new_level_becomes_the_baseline(policy):
    judge = Health(policy, health.PATIENCE + 1)
    for step, (loss, norm) in enumerate(figures(2, 100), 1):
        judge.judge(step, loss, norm)
    found = [judge.judge(step, 9.0, 1.0) for step in range(101, 101 + 60)]
    bad = health.PATIENCE + 1  # the last of these steps had begun when the one before was judged
    assert [bool(f) for f in found] == [True] * bad + [False] * (60 - bad)
    assert not any(judge.rewinds(f) for f in found if f)


@pytest.mark.parametrize("policy, rewinds", [("off", False), ("record", False), ("rewind", True)])
def test_the_policy_decides_what_a_spike_leads_to(policy, rewinds):
    judge = Health(policy, 5)
    for step, (loss, norm) in enumerate(figures(3, 100), 1):
        judge.judge(step, loss, norm)
    found = judge.judge(101, 9.0, 1.0)
    assert (found is None) == (policy == "off")
    assert found is None or (judge.rewinds(found) is not None) == rewinds


def test_only_consecutive_skipped_steps_lead_to_a_rewind():
    """A recorded spike has changed the state; a step that is not finite says nothing of levels."""
    judge = Health("record", 3)
    for step, (loss, norm) in enumerate(figures(4, 100), 1):
        judge.judge(step, loss, norm)
    for step in range(101, 105):
        assert judge.rewinds(judge.judge(step, 9.0, 1.0)) is None
    for step in (105, 106):
        assert judge.rewinds(judge.judge(step, math.nan, 1.0)) is None
    assert judge.rewinds(judge.judge(107, 9.0, 1.0)) is None
    for step in (108, 109):
        assert judge.rewinds(judge.judge(step, math.nan, 1.0)) is None
    found = judge.rewinds(judge.judge(110, math.nan, 1.0))
    assert (found.first, found.step, found.is_spike) == (108, 110, False)


def test_a_run_goes_on_if_all_skipped_steps_are_spikes():
    judge, mixed = Health("skip", 2), Health("skip", 2)
    for step, (loss, norm) in enumerate(figures(5, 100), 1):
        judge.judge(step, loss, norm)
        mixed.judge(step, loss, norm)
    judge.judge(101, 9.0, 1.0)
    mixed.judge(101, math.nan, 1.0)
    found, other = (h.rewinds(h.judge(102, 9.0, 1.0)) for h in (judge, mixed))
    assert (found.first, found.is_spike) == (101, True)
    assert (other.first, other.is_spike) == (101, False)
