"""Splits and batches: pure, complete, and the same however many devices and processes there are."""

import math
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from lmjax.data import batches
from lmjax.data.batches import eval_batches, make_batches
from lmjax.data.config import DataConfig
from lmjax.data.pipeline import open_splits
from lmjax.data.rows import DECODER
from lmjax.data.store import write_manifest, write_split
from lmjax.data.synthetic import BOS_ID, EOS_ID, SyntheticRows
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import TokenizerConfig

V, L = 50, 16
METHODS = ["best_fit", "concat", "none"]
TWO = (SourceConfig("a", "text:x"), SourceConfig("b", "text:y", weight=2.0))


def make_config(**kwargs):
    return DataConfig(**{"sources": TWO, "tokenizer": TokenizerConfig(vocab_size=V),
                         "seq_len": L} | kwargs)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A prepared directory of two sources, with documents of 1 to 60 tokens between BOS and EOS."""
    path, rng, entries = tmp_path_factory.mktemp("store"), np.random.default_rng(0), {}
    for name, count in (("a", 30), ("b", 70)):
        entries[name] = {}
        for split, share in (("train", count), ("heldout", count // 10)):
            documents = [[1, *rng.integers(4, V, rng.integers(1, 60)), 2] for _ in range(share)]
            ids = [f"{name}{i}" for i in range(share)]
            entries[name][split] = write_split(str(path), name, split, documents, ids, vocab_size=V,
                                               text_bytes=7)
    write_manifest(str(path), {"format": "lmjax-tokens", "version": 1, "sources": entries,
                               "config": make_config().prepared_by(),
                               "tokenizer": {"vocab_size": V}})
    return str(path)


def sharding(spec, shape=(4, 2), axes=("data", "context")):
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    return NamedSharding(mesh, PartitionSpec(*spec))


ONE = SingleDeviceSharding(jax.devices()[0])


def to_numpy(iterator):
    return [{name: np.asarray(value) for name, value in batch.items()} for batch in iterator]


def assert_same(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        for name in DECODER:
            np.testing.assert_array_equal(x[name], y[name])


def pairs(rows):
    """Every prediction as (input, target, position), unmasked ones only."""
    kept = rows["loss_mask"] > 0
    assert ((rows["segment_ids"] > 0) == kept).all()
    return np.stack([rows[n][kept] for n in ("tokens", "targets", "positions")], axis=1)


@pytest.mark.parametrize("memory_limit_mib", [0, 1024])
@pytest.mark.parametrize("packing", METHODS)
def test_an_epoch_is_every_prediction_once(directory, packing, memory_limit_mib):
    sources = (SourceConfig("a", "text:x"), SourceConfig("b", "text:y", weight=1.0))
    config = make_config(packing=packing, memory_limit_mib=memory_limit_mib, sources=sources)
    train, heldout = open_splits(config, directory, verify=True)
    for split, parts in ((train, train.sources), (heldout, heldout.sources)):
        for part in parts:
            tokens = part.store.tokens().astype(np.int64)
            inside = np.flatnonzero(tokens[:-1] != 2)
            want = np.stack([tokens[inside], tokens[inside + 1]], axis=1)
            got = pairs(part.rows_at(np.arange(part.num_rows)))[:, :2]
            np.testing.assert_array_equal(np.sort(got, axis=0), np.sort(want, axis=0))
            assert sorted(map(tuple, got)) == sorted(map(tuple, want))
            assert len(got) == part.predictions
        assert split.predictions == sum(p.predictions for p in parts)
    rows = pairs(heldout.rows(np.arange(heldout.num_rows())))
    assert len(rows) == heldout.predictions


def test_training_goes_through_every_row_of_a_source_before_any_again(directory):
    train, _ = open_splits(make_config(), directory)
    source, _, row = train.locate(np.arange(1000))
    for s, part in enumerate(train.sources):
        mine = row[source == s]
        size = part.num_rows
        for begin in range(0, len(mine) - size, size):
            np.testing.assert_array_equal(np.sort(mine[begin : begin + size]), np.arange(size))
    assert abs((source == 1).mean() - 2 / 3) < 0.01
    assert train.epochs(1000)["b"] == (source == 1).sum() / train.sources[1].num_rows
    assert train.num_rows("a") + train.num_rows("b") == train.num_rows()


def test_rows_are_a_pure_function(directory):
    train, _ = open_splits(make_config(), directory)
    again, _ = open_splits(make_config(memory_limit_mib=0), directory)
    g = np.random.default_rng(0).integers(0, 10**9, 64)
    whole = train.rows(g)
    for i in range(64):
        one = again.rows(g[i : i + 1])
        assert all(np.array_equal(one[n][0], whole[n][i]) for n in DECODER)


@pytest.mark.parametrize("change", [{"seed": 1}, {"seq_len": 8}, {"packing": "none"},
                                    {"sources": (TWO[0], SourceConfig("b", "text:y"))}])
def test_the_fingerprint_names_all_that_decides_the_rows(directory, change):
    same = open_splits(make_config(memory_limit_mib=0), directory)[0].fingerprint
    assert open_splits(make_config(), directory)[0].fingerprint == same
    assert open_splits(make_config(**change), directory)[0].fingerprint != same


def test_other_data_than_the_config_says_is_refused(directory, tmp_path):
    with pytest.raises(ValueError,
                       match="expected data prepared with min_chars = 5, got 32; repeat the c"):
        open_splits(make_config(min_chars=5), directory)
    with pytest.raises(ValueError, match="no manifest.json"):
        open_splits(make_config(), str(tmp_path))


SPECS = [((("data", "context"),), (4, 2)), (("data", "context"), (4, 2)),
         ((None, "context"), (1, 8)),
         ((), (8, 1)), (("data",), (2, 4))]


@pytest.mark.parametrize("kind", [pytest.param("store", marks=pytest.mark.long), "synthetic"])
def test_batches_are_the_same_on_any_mesh_and_from_any_start(directory, kind):
    synthetic = (SourceConfig("s", "synthetic:40"),)
    config = make_config() if kind == "store" else make_config(sources=synthetic)
    train, _ = open_splits(config, directory)
    want = [train.rows(np.arange(8 * s, 8 * s + 8)) for s in range(6)]
    assert_same(to_numpy(make_batches(train, batch_size=8, start_row=0, steps=6, sharding=ONE)),
                want)
    for spec, shape in SPECS:
        where = sharding(spec, shape)
        got = list(make_batches(train, batch_size=8, start_row=16, steps=4, sharding=where))
        assert all(b["tokens"].sharding.is_equivalent_to(where, 2) for b in got)
        assert_same(to_numpy(got), want[2:])


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_processes_read_only_their_rows_and_together_all(directory, processes):
    """As if devices 0..k-1 were process 0's, the next k process 1's, and so on."""
    train, _ = open_splits(make_config(), directory)
    shape = (16, L)
    for spec, mesh_shape in SPECS:
        where = sharding(spec, mesh_shape)
        index = where.devices_indices_map(shape)
        whole, covered = train.rows(np.arange(16))["tokens"], np.zeros(shape, bool)
        for group in np.array_split(np.array(jax.devices(), object), processes):
            local = batches.rows_of([index[d] for d in group], 16)
            if spec and spec[0] == ("data", "context"):
                assert len(local) == 16 // processes
            rows, place = train.rows(local)["tokens"], {int(r): i for i, r in enumerate(local)}
            for device in group:
                begin, stop, _ = index[device][0].indices(16)
                got = rows[place[begin] : place[begin] + stop - begin, index[device][1]]
                np.testing.assert_array_equal(got, whole[index[device]])
                covered[index[device]] = True
        assert covered.all()


@pytest.mark.parametrize("batch_size", [1, 3, 8, 1000])
def test_evaluation_sees_every_row_once(directory, batch_size):
    _, heldout = open_splits(make_config(), directory)
    got = to_numpy(eval_batches(heldout, batch_size, ONE))
    rows = {n: np.concatenate([b[n] for b in got]) for n in DECODER}
    total = heldout.num_rows()
    assert len(rows["tokens"]) == -(-total // batch_size) * batch_size
    assert sum(b["loss_mask"].sum() for b in got) == heldout.predictions
    assert not any(rows[n][total:].any() for n in DECODER)
    assert_same([{n: rows[n][:total] for n in DECODER}], [heldout.rows(np.arange(total))])


def test_partial_evaluation_draws_from_every_source():
    """Each source gives its share of rows, the same in every call, none of them twice."""
    sizes = {"first": 400, "second": 100, "third": 500}
    sources = tuple(SourceConfig(name, f"synthetic:{10 * size}") for name, size in sizes.items())
    _, heldout = open_splits(make_config(sources=sources, heldout_fraction=0.1))
    assert [s.num_rows for s in heldout.sources] == list(sizes.values())
    whole = heldout.rows(np.arange(heldout.num_rows()))["tokens"]
    of = {row.tobytes(): i for i, row in enumerate(whole)}
    assert len(of) == len(whole)
    got = np.concatenate([b["tokens"] for b in to_numpy(eval_batches(heldout, 20, ONE, most=5))])
    drawn = np.array([of[row.tobytes()] for row in got])
    assert len(set(drawn)) == 100
    counts = np.bincount(heldout.locate(drawn)[0], minlength=3)
    np.testing.assert_allclose(counts, [40, 10, 50], atol=15)  # three standard deviations
    assert counts.min() > 0
    again = np.concatenate([b["tokens"] for b in to_numpy(eval_batches(heldout, 50, ONE, most=2))])
    np.testing.assert_array_equal(again, got)


def test_a_mesh_that_does_not_divide_is_refused_at_once(directory):
    train, heldout = open_splits(make_config(), directory)
    where = sharding(("data",), (8, 1))
    with pytest.raises(ValueError,
                       match=r"batch_size, seq_len: expected multiples .*got \(6, 16\); change"):
        make_batches(train, batch_size=6, start_row=0, steps=1, sharding=where)
    with pytest.raises(ValueError, match="batch_size, seq_len"):
        eval_batches(heldout, 6, where)


def test_tensorflow_is_asked_for_where_it_is_not_installed(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ValueError,
                       match="expected TensorFlow, .*got none; pip install tensorflow-cpu"):
        make_batches(open_splits(make_config(), directory)[0], batch_size=8, start_row=0, steps=1,
                     sharding=ONE)


@pytest.mark.parametrize("kind", ["store", "synthetic"])
def test_an_error_in_the_background_reaches_the_loop_as_it_is(directory, kind, monkeypatch):
    sources = TWO if kind == "store" else (SourceConfig("s", "synthetic:40"),)
    train, _ = open_splits(make_config(sources=sources), directory)
    good = train.rows

    def rows(g):
        if g[0] >= 8:
            raise ValueError("expected a disk, got none; buy one")
        return good(g)

    monkeypatch.setattr(train, "rows", rows)
    stream = make_batches(train, batch_size=4, start_row=0, steps=9, sharding=ONE)
    next(stream), next(stream)
    with pytest.raises(ValueError, match="^expected a disk, got none; buy one$"):
        list(stream)


def test_leaving_early_ends_the_thread():
    train, _ = open_splits(make_config(sources=(SourceConfig("s", "synthetic:40"),)))
    stream = make_batches(train, batch_size=4, start_row=0, steps=10**6, sharding=ONE)
    next(stream)
    stream.close()
    never_used = make_batches(train, batch_size=4, start_row=0, steps=10**6, sharding=ONE)
    del never_used
    deadline = time.monotonic() + 5
    while any(t.name == "lmjax-data" and t.is_alive() for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("fields, message", [
    ({"packing": "worst"}, "packing: expected one of"),
    ({"seq_len": 1}, "seq_len: expected at least 2"),
    ({"heldout_fraction": 0.0}, "heldout_fraction"), ({"broken_budget": 2.0}, "broken_budget"),
    ({"clean": ("soap",)}, "clean: expected one of"),
    ({"sources": ()}, "sources: expected one or more"),
    ({"sources": (TWO[0], TWO[0])}, "different names"),
    ({"sources": (TWO[0], SourceConfig("s", "synthetic"))}, "all or none"),
])
def test_a_bad_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def synthetic(**kwargs):
    defaults = {"name": "s", "vocab_size": 40, "seq_len": 64, "num_rows": 400, "seed": 0,
                "split": "train"}
    return SyntheticRows(**defaults | kwargs)


def test_synthetic_rows_have_the_entropy_they_say():
    source = synthetic()
    rows = source.rows_at(np.arange(400))
    kept = rows["loss_mask"] > 0
    assert kept.sum() == source.predictions and (~kept).any()
    token, target = rows["tokens"][kept], rows["targets"][kept]
    assert target.min() >= 2 and not (target == BOS_ID).any() and not (token == EOS_ID).any()
    counts = np.zeros((40, 40))
    np.add.at(counts, (token, target), 1)
    p = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    loss = -np.log(p[token, target]).mean()  # of the best table that these rows themselves allow
    assert abs(loss - source.entropy) < 0.03 < source.entropy < math.log(40) / 2
    assert ((counts > 0).sum(axis=1) <= 5).all()


def test_synthetic_segments_are_documents():
    rows = synthetic().rows_at(np.arange(50))
    kept = rows["loss_mask"] > 0
    begins = kept & (rows["tokens"] == BOS_ID)
    np.testing.assert_array_equal(rows["segment_ids"], np.where(kept, np.cumsum(begins, axis=1), 0))
    np.testing.assert_array_equal(rows["positions"] == 0, begins | ~kept)
    after = kept[:, 1:] & (rows["targets"][:, :-1] == EOS_ID)
    np.testing.assert_array_equal(begins[:, 1:], after)
    same = kept[:, 1:] & ~begins[:, 1:]
    np.testing.assert_array_equal(rows["tokens"][:, 1:][same], rows["targets"][:, :-1][same])


def test_synthetic_splits_and_seeds_differ_but_share_the_chain():
    a, b, c = synthetic(), synthetic(split="heldout"), synthetic(seed=1)
    n = np.arange(20)
    assert not np.array_equal(a.rows_at(n)["tokens"], b.rows_at(n)["tokens"])
    assert len({s.fingerprint for s in (a, b, c)}) == 3
    np.testing.assert_array_equal(a._next_VK, b._next_VK)
    assert not np.array_equal(a._next_VK, c._next_VK)
    with pytest.raises(ValueError, match="vocab_size: expected at least 8"):
        synthetic(vocab_size=7)
