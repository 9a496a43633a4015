"""The order of rows: a bijection of every epoch, well shuffled, and exact shares."""

import numpy as np
import pytest

from lmjax.data.hashing import fold, key_of, permute
from lmjax.data.order import BLOCK, PERIOD, BlockMixture, StagedMixture, block_counts

FROZEN_PERMUTATION = [4, 8, 0, 7, 5, 2, 9, 6, 3, 1]
FROZEN_ROWS = [[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 4, 2, 3, 1]]  # source, epoch, row


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4095, 4097, 99_991, 1 << 17])
def test_permute_is_a_bijection(n):
    for seed in (0, 1):
        got = permute(np.arange(n), n, key_of("test", seed))
        assert got.dtype == np.int64
        np.testing.assert_array_equal(np.sort(got), np.arange(n))


def test_permute_takes_any_index_alone_and_a_key_for_each():
    n, keys = 1000, fold(key_of("k"), np.arange(5))
    index = np.random.default_rng(0).integers(0, n, 50)
    which = np.arange(50) % 5
    mixed = permute(index, n, keys[which])
    for i in range(50):
        whole = permute(np.arange(n), n, keys[which[i]])
        assert permute(index[i : i + 1], n, keys[which[i]])[0] == mixed[i] == whole[index[i]]


@pytest.mark.parametrize("n", [16, 100, 1000])
def test_permute_looks_random(n):
    """Each value is at each place about equally often, and neighbours are separated."""
    trials = 4000
    index = np.tile(np.arange(n), trials // n * 10 if n >= 100 else trials)
    copies = len(index) // n
    keys = np.repeat(fold(key_of("random"), np.arange(copies)), n)
    got = permute(index, n, keys).reshape(copies, n)
    counts = np.bincount(got[:, 0], minlength=n)
    chi2 = ((counts - copies / n) ** 2 / (copies / n)).sum()
    assert abs(chi2 - (n - 1)) < 6 * np.sqrt(2 * (n - 1))
    steps = np.diff(got, axis=1)
    assert abs((steps == 1).mean() - 1 / n) < 6 / np.sqrt(steps.size * n)
    correlation = np.corrcoef(np.broadcast_to(np.arange(n), got.shape).ravel(), got.ravel())[0, 1]
    assert abs(correlation) < 6 / np.sqrt(got.size)


def test_the_order_does_not_change_from_release_to_release():
    """Runs that an earlier version started must continue in the same order."""
    np.testing.assert_array_equal(permute(np.arange(10), 10, key_of("frozen")), FROZEN_PERMUTATION)
    mixture = StagedMixture(names=["a", "b"], sizes=[5, 7], stages=[(0, [1, 2])], seed=3)
    np.testing.assert_array_equal(np.stack(mixture.locate(np.arange(6))), FROZEN_ROWS)


def test_every_row_of_every_epoch_once():
    mixture = StagedMixture(names=["a", "b", "c"], sizes=[13, 200, 1], stages=[(0, [1, 5, 0.5])],
                            seed=0)
    source, epoch, row = mixture.locate(np.arange(20_000))
    for s, size in enumerate(mixture.sizes):
        mine = source == s
        assert (np.diff(np.unique(epoch[mine])) == 1).all()
        assert (np.diff(epoch[mine]) >= 0).all()  # one epoch is through before the next begins
        for e in range(int(epoch[mine].max())):
            np.testing.assert_array_equal(np.sort(row[mine & (epoch == e)]), np.arange(size))
    assert not np.array_equal(row[(source == 1) & (epoch == 0)], row[(source == 1) & (epoch == 1)])


def test_any_cut_of_the_run_gives_the_same_rows():
    mixture = StagedMixture(names=["a", "b"], sizes=[100, 37], stages=[(0, [3, 1]), (700, [1, 9])],
                            seed=5)
    g = np.arange(3 * BLOCK + 17)
    whole = np.stack(mixture.locate(g))
    shuffled = np.random.default_rng(0).permutation(g)
    np.testing.assert_array_equal(np.stack(mixture.locate(shuffled)), whole[:, shuffled])
    far = np.arange(10**12, 10**12 + 50)  # the position is not counted up to
    at_once = np.stack(mixture.locate(far))
    np.testing.assert_array_equal(at_once[:, 7:9], np.stack(mixture.locate(far[7:9])))


WEIGHTS = [[1.0], [1, 1], [1, 2.5], [0.001, 1, 1], [1e-6, 3], [1] * 30, [5, 1e-3, 1e-3, 1e-3]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_are_exact_block_by_block(weights):
    weights = np.array(weights, float)
    total = block_counts(weights)
    counts = np.diff(total, axis=0)
    assert (counts >= 0).all() and (counts.sum(axis=1) == BLOCK).all()
    ideal = np.arange(PERIOD + 1)[:, None] * BLOCK * weights / weights.sum()
    assert np.abs(total - ideal).max() <= 2


def test_seen_counts_what_running_says():
    mixture = BlockMixture(weights=[1, 2, 4], seed=1)
    source, index = mixture.running(np.arange(1000))
    for rows in (0, 1, BLOCK - 1, BLOCK, 700, 1000):
        np.testing.assert_array_equal(mixture.seen(rows), np.bincount(source[:rows], minlength=3))
    for s in range(3):  # so a source's rows before any point are the first of its own order
        np.testing.assert_array_equal(index[source == s], np.arange((source == s).sum()))


def test_seeds_and_names_give_other_orders():
    def rows(seed, name):
        return StagedMixture(names=[name], sizes=[500], stages=[(0, [1])],
                             seed=seed).locate(np.arange(100))[2]

    assert len({rows(seed, name).tobytes() for seed in (0, 1) for name in "ab"}) == 4
