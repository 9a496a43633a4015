"""Packing: every prediction once, no needless cut, and the rows that the plan says."""

import numpy as np
import pytest

from lmjax.data import packing
from lmjax.data.rows import empty_rows, fill_rows, ramps

METHODS = sorted(packing.METHODS)


def corpora():
    rng = np.random.default_rng(0)
    yield "one", np.array([5]), 8
    yield "exact", np.array([8, 16, 8]), 8
    yield "ones", np.ones(17, np.int64), 4
    yield "short", rng.integers(1, 8, 200), 8
    yield "long", rng.integers(1, 100, 60), 16
    yield "tiny row", rng.integers(1, 9, 50), 2
    yield "lognormal", np.maximum(1, rng.lognormal(3, 1.2, 3000)).astype(np.int64), 128


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("corpus", list(corpora()), ids=lambda corpus: corpus[0])
def test_every_prediction_is_in_exactly_one_row(method, corpus):
    _, lengths, seq_len = corpus
    plan = packing.make_plan(method, lengths, seq_len)
    ends = np.cumsum(lengths)
    seen = np.zeros(ends[-1], np.int64)
    np.add.at(seen, ramps((ends - lengths)[plan.document_P] + plan.start_P, plan.length_P), 1)
    assert (seen == 1).all()
    assert plan.predictions == lengths.sum()
    for row in range(plan.num_rows):
        pieces = slice(plan.first_N[row], plan.first_N[row + 1])
        length = plan.length_P[pieces]
        assert length.sum() <= seq_len and len(length) > 0 and (length > 0).all()


@pytest.mark.parametrize("method", ["best_fit", "none"])
def test_only_documents_longer_than_a_row_are_cut(method):
    for _, lengths, seq_len in corpora():
        plan = packing.make_plan(method, lengths, seq_len)
        pieces = np.bincount(plan.document_P, minlength=len(lengths))
        np.testing.assert_array_equal(pieces, -(-lengths // seq_len))


def best_fit_twin(lengths, seq_len):
    """One piece after the other, longest first, into the fullest row that takes it."""
    room = []
    for size in sorted((int(n) for n in packing.cut(lengths, seq_len)[2]), reverse=True):
        fits = [(left, row) for row, left in enumerate(room) if left >= size]
        if fits:
            room[min(fits)[1]] -= size
        else:
            room.append(seq_len - size)
    return sorted(room)


def test_best_fit_is_best_fit_decreasing():
    rng = np.random.default_rng(1)
    for _ in range(60):
        seq_len = int(rng.integers(2, 40))
        lengths = rng.integers(1, rng.integers(2, 60), rng.integers(1, 80))
        plan = packing.make_plan("best_fit", lengths, seq_len)
        used = np.add.reduceat(plan.length_P, plan.first_N[:-1])
        assert sorted(seq_len - used) == best_fit_twin(lengths, seq_len)


def test_concat_leaves_room_in_the_last_row_only():
    for _, lengths, seq_len in corpora():
        plan = packing.make_plan("concat", lengths, seq_len)
        assert plan.num_rows == -(-lengths.sum() // seq_len)
        used = np.add.reduceat(plan.length_P, plan.first_N[:-1])
        assert (used[:-1] == seq_len).all()


@pytest.mark.parametrize("method", METHODS)
def test_filled_rows_hold_what_their_pieces_say(method):
    rng = np.random.default_rng(2)
    lengths, seq_len = rng.integers(1, 30, 40), 12
    tokens = rng.integers(0, 1000, int((lengths + 1).sum())).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    plan = packing.make_plan(method, lengths, seq_len)
    rows = rng.permutation(plan.num_rows)[: plan.num_rows - 1]
    pieces, place = plan.select(rows)
    at = offsets[plan.document_P[pieces]] + plan.start_P[pieces]
    got = fill_rows(tokens, at, plan.length_P[pieces], place, len(rows), seq_len)
    want = empty_rows(len(rows), seq_len)
    for i, row in enumerate(rows):
        column = 0
        for segment, p in enumerate(range(plan.first_N[row], plan.first_N[row + 1]), 1):
            for j in range(plan.length_P[p]):
                source = offsets[plan.document_P[p]] + plan.start_P[p] + j
                values = (tokens[source], tokens[source + 1], segment, j, 1.0)
                for name, value in zip(want, values, strict=True):
                    want[name][i, column] = value
                column += 1
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        assert got[name].dtype == (np.float32 if name == "loss_mask" else np.int32)


def test_unknown_method():
    with pytest.raises(ValueError, match="packing: expected one of .*best_fit.* got 'worst_fit'"):
        packing.make_plan("worst_fit", np.ones(3), 8)
