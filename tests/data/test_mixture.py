"""The order of rows over a run with stops, other hosts, other batch sizes and other mixtures."""

import json

import numpy as np
import pytest

from lmjax.data import batches
from lmjax.data.config import DataConfig, MixtureStage
from lmjax.data.order import BLOCK, StagedMixture, Steps
from lmjax.data.pipeline import open_splits
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import TokenizerConfig

HOSTS = [1, 2, 3, 4, 8]
NAMES, SIZES = ("a", "b", "c"), (97, 230, 1)


def mixture(stages, seed=7):
    return StagedMixture(names=NAMES, sizes=SIZES, stages=stages, seed=seed)


def shares_of(batch_size, hosts):
    """The rows of a batch that each host reads, by the function that production asks."""
    per_host = batch_size // hosts
    return [batches.rows_of([(slice(h * per_host, (h + 1) * per_host),)], batch_size)
            for h in range(hosts)]


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long)
                                         for seed in range(2, 6))])
def test_every_row_once_in_the_same_order_whatever_happens(seed):
    """Starts a run ten times, with other hosts and batch sizes, and twice with another mixture.

    Steps after the last checkpoint of a start are lost. Of all others, the rows of every host are
    compared.
    """
    rng = np.random.default_rng(seed)
    stages, state, step, seen = [(0, (1.0, 2.0, 0.01))], None, 0, []
    for start in range(10):
        hosts = int(rng.choice(HOSTS))
        size = hosts * int(rng.integers(1, 9))
        if state is None:
            steps = Steps([(0, 0, size)])
        else:
            assert len(state) < 1000
            steps = Steps.restored(json.loads(state), step).resumed(step, size)
        if start in (3, 6):  # rows that were trained on keep their mixture, others get a new one
            row = steps.rows(step) + int(rng.integers(0, 2 * BLOCK))
            stages = [*stages, (row, tuple(rng.random(3) + 0.01))]
            stages = sorted(dict(stages).items())
        order, saved = mixture(stages), int(rng.integers(1, 40))
        lost = int(rng.integers(0, 9))  # steps after the checkpoint
        for k in range(step, step + saved + lost):
            first = steps.rows(k)
            assert steps.rows(k + 1) - first == size
            rows = [np.stack(order.locate(first + local)) for local in shares_of(size, hosts)]
            if k < step + saved:
                seen += rows
        step += saved
        state = json.dumps(steps.state(step))
    got = np.concatenate(seen, axis=1)
    np.testing.assert_array_equal(got, np.stack(mixture(stages).locate(np.arange(got.shape[1]))))
    source, epoch, row = got
    for s, size in enumerate(SIZES):
        mine = source == s
        for e in range(int(epoch[mine].max())):
            np.testing.assert_array_equal(np.sort(row[mine & (epoch == e)]), np.arange(size))
        last = row[mine & (epoch == epoch[mine].max())]
        assert len(np.unique(last)) == len(last)


def test_the_step_of_a_row_is_found_after_every_change():
    steps = Steps([(0, 0, 8)]).resumed(10, 8).resumed(10, 4).resumed(13, 16).resumed(13, 2)
    assert [tuple(c) for c in steps.changes] == [(0, 0, 8), (10, 80, 4), (13, 92, 2)]
    assert [steps.rows(k) for k in (0, 1, 10, 11, 13, 14, 20)] == [0, 8, 80, 84, 92, 94, 106]
    assert Steps([(0, 0, 8)]).resumed(0, 3).rows(5) == 15


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_left_out_whatever_was_left_out_before(seed):
    """Against a twin that lists the rows of every step and cuts the list."""
    rng = np.random.default_rng(seed)
    steps, twin = Steps([(0, 0, 4)]), [*range(400)]
    for _ in range(4):
        step = int(rng.integers(0, 30))
        last = step + int(rng.integers(1, 6))  # its rows and those before it, after `step`, go
        first, end = steps.rows(step), steps.of(last)[1]
        steps = steps.without(step, end)
        twin = [row for row in twin if not first <= row < end]
        assert [list(range(*steps.of(k))) for k in range(1, 60)] == [
            twin[4 * (k - 1) : 4 * k] for k in range(1, 60)]
        assert Steps.restored(json.loads(json.dumps(steps.state(step))), step).resumed(
            step, 4).changes == steps.changes


@pytest.mark.parametrize("seed", range(20))
def test_a_new_batch_size_keeps_out_what_was_left_out(seed):
    """A run goes back before a change of batch size, or before rows that it left out."""
    rng = np.random.default_rng(seed)
    steps, gone = Steps([(0, 0, 4)]).resumed(20, 6), set()
    for step in rng.integers(0, 50, 3).tolist():
        first, end = steps.rows(step), steps.of(step + int(rng.integers(1, 6)))[1]
        last_gap = max(gone, default=-1) + 1
        if last_gap > first:  # before a change of size nothing can be left out after it
            continue
        steps, gone = steps.without(step, end), gone | {*range(first, end)}
    assert steps.trained(100) == sum(end - first for first, end in map(steps.of, range(1, 101)))
    start, size = int(rng.integers(0, 15)), int(rng.integers(1, 9))
    again = steps.resumed(start, size)
    spans = [again.of(k) for k in range(1, 200)]
    assert spans[:start] == [steps.of(k) for k in range(1, start + 1)]
    assert {end - first for first, end in spans[start:]} == {size}
    taken = [row for span in spans for row in range(*span)]
    assert taken == sorted(set(taken)) and not gone.intersection(taken)
    assert again.trained(199) == len(taken)
    gaps = len([row for row in gone if row - 1 not in gone])
    assert len({*range(taken[-1])} - {*taken} - gone) <= gaps * (size - 1)
    for k in range(start, 199):
        assert again.step_of(again.rows(k)) == k


def test_rows_that_are_left_out_do_not_count_as_trained_on():
    steps = Steps([(0, 0, 8)]).without(0, 16).without(4, 80)
    assert [steps.of(k) for k in (1, 4, 5)] == [(16, 24), (40, 48), (80, 88)]
    assert [steps.trained(k) for k in (0, 4, 10)] == [0, 32, 80]
    assert [tuple(c) for c in steps.changes] == [(0, 16, 8), (4, 80, 8)]


def test_a_stage_has_its_own_shares_and_takes_up_where_the_last_one_left():
    stages = [(0, (1.0, 1.0, 0.0)), (700, (0.0, 3.0, 1.0)), (1500, (1.0, 0.0, 0.0))]
    order = mixture(stages)
    g = np.arange(2000)
    source, epoch, row = order.locate(g)
    bounds = [0, 700, 1500, 2000]
    for (_, weights), begin, end in zip(stages, bounds[:-1], bounds[1:], strict=True):
        share = np.bincount(source[begin:end], minlength=3) / (end - begin)
        np.testing.assert_allclose(share, np.array(weights) / sum(weights), atol=0.03)
        assert all(share[s] == 0 for s in range(3) if not weights[s])
    for s, size in enumerate(SIZES):  # the running index counts on through the stages
        index = (epoch * size)[source == s]
        assert (np.diff(index) >= 0).all()
        assert (epoch[source == s] == np.arange((source == s).sum()) // size).all()
    for rows in (0, 1, 699, 700, 701, 1500, 1999, 2000):
        np.testing.assert_array_equal(order.seen(rows), np.bincount(source[:rows], minlength=3))
    before = mixture(stages[:1]).locate(g[:700])
    np.testing.assert_array_equal(np.stack(before), np.stack((source, epoch, row))[:, :700])


def test_tens_of_sources():
    weights = np.random.default_rng(0).random(40) ** 3
    order = StagedMixture(names=[str(i) for i in range(40)], sizes=[1000] * 40,
                          stages=[(0, weights)], seed=0)
    rows = 800 * BLOCK
    assert np.abs(order.seen(rows) - rows * weights / weights.sum()).max() <= 2
    source, _, _ = order.locate(np.arange(rows - BLOCK, rows))
    np.testing.assert_array_equal(np.bincount(source, minlength=40),
                                  order.seen(rows) - order.seen(rows - BLOCK))


def data(**kwargs):
    sources = SourceConfig("a", "synthetic:50", 1.0), SourceConfig("b", "synthetic:50", 3.0)
    fields = {"sources": sources, "tokenizer": TokenizerConfig(64), "seq_len": 16}
    return DataConfig(**fields | kwargs)


def test_a_later_stage_leaves_the_fingerprint_of_earlier_rows():
    plain, _ = open_splits(data())
    staged, _ = open_splits(data(stages=(MixtureStage(300, {"a": 1.0}),)))
    for rows in (0, 300):
        assert staged.fingerprint_of(rows) == plain.fingerprint_of(10**6) == plain.fingerprint
    assert staged.fingerprint_of(301) != plain.fingerprint
    other, _ = open_splits(data(stages=(MixtureStage(0, {"a": 1.0, "b": 1.0}),)))
    assert other.fingerprint_of(0) != plain.fingerprint


def test_the_plan_says_shares_and_epochs_and_a_cap_is_kept():
    split, _ = open_splits(data(stages=(MixtureStage(256, {"a": 1.0}),)))
    assert split.plan(512) == ["rows 0 to 255: a 25.0%, b 75.0%", "rows 256 to 511: a 100.0%",
                               "a: 320 rows, 6.40 epochs of 50", "b: 192 rows, 3.84 epochs of 50"]
    assert split.plan(100)[0].startswith("rows 0 to 99: ")
    split.check_epochs(512, {"a": 6.4, "b": 4.0})
    told = r"max_epochs.a: expected at most 6.3 .*512 rows that takes 6.40; lower"
    with pytest.raises(ValueError, match=told):
        split.check_epochs(512, {"a": 6.3})


@pytest.mark.parametrize("fields, message", [
    ({"stages": (MixtureStage(5, {"c": 1.0}),)}, "names of sources .a, b., got 'c'"),
    ({"max_epochs": {"c": 1.0}}, "names of sources"),
    ({"max_epochs": {"a": -1.0}}, "max_epochs.a: expected at least 0"),
    ({"stages": (MixtureStage(5, {"a": 1.0}), MixtureStage(5, {"b": 1.0}))},
     "stages: expected rising rows"),
])
def test_a_bad_plan_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        data(**fields)
    with pytest.raises(ValueError, match="weights: expected one above 0"):
        MixtureStage(0, {"a": 0.0})
