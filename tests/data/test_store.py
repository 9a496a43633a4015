"""The token store: what was written comes back, from memory or in place, and damage is noticed."""

import json

import numpy as np
import pytest

from lmjax.data import store


@pytest.fixture
def written(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60_000, n).astype(np.uint16) for n in rng.integers(2, 3000, 40)]
    facts = store.write_split(str(tmp_path), "s", "train", documents,
                              [f"doc {i}" for i in range(40)],
                              vocab_size=60_000, text_bytes=123)
    return tmp_path, documents, facts


def open_split(written, **kwargs):
    return store.SplitStore(str(written[0]), "s", "train", written[2], **kwargs)


def test_an_array_is_the_same_whatever_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD", 1 << 14)
    values = np.random.default_rng(0).integers(0, 1000, 100_000).astype(np.uint16)
    for cuts in ([], [1, 5, 16384, 16385, 90_000], range(0, 100_000, 777)):
        got = store.write_array(str(tmp_path / "a"), np.split(values, cuts), size=len(values),
                                dtype=values.dtype)
        assert got == store.digest(values)
        np.testing.assert_array_equal(store.open_array(str(tmp_path / "a")).read().result(), values)


@pytest.mark.parametrize("memory_limit", [0, 1 << 30])
def test_what_was_written_comes_back(written, memory_limit):
    _, documents, facts = written
    split = open_split(written, memory_limit=memory_limit, verify=True)
    lengths = np.array([len(d) for d in documents])
    np.testing.assert_array_equal(split.lengths, lengths - 1)
    np.testing.assert_array_equal(split.tokens(), np.concatenate(documents))
    assert split.ids == [f"doc {i}" for i in range(40)]
    assert facts["tokens"] == lengths.sum() and facts["predictions"] == lengths.sum() - 40
    assert split.tokens().dtype == np.uint16
    rng = np.random.default_rng(1)
    starts = rng.integers(0, facts["tokens"] - 500, 100)
    sizes = rng.integers(1, 500, 100)
    flat, at = split.gather(starts, sizes)
    for begin, size, place in zip(starts, sizes, at, strict=True):
        np.testing.assert_array_equal(flat[place : place + size],
                                      split.tokens()[begin : begin + size])


def test_more_than_one_shard_and_wide_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD", 1 << 15)
    documents = [np.arange(100_000) % 70_001]
    facts = store.write_split(str(tmp_path), "s", "train", documents, ["a"], vocab_size=70_001,
                              text_bytes=1)
    split = store.SplitStore(str(tmp_path), "s", "train", facts, memory_limit=0)
    assert len(list((tmp_path / "s/train/tokens/c").iterdir())) == 4
    flat, at = split.gather(np.array([69_500, 32_000]), np.array([1000, 2000]))
    np.testing.assert_array_equal(flat[at[1] : at[1] + 2000], documents[0][32_000:34_000])
    assert flat.dtype == np.uint32 and flat.max() == 70_000


def test_equal_content_has_an_equal_fingerprint_however_it_is_stored(tmp_path, written,
                                                                     monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 1 << 10)
    _, documents, facts = written
    again = store.write_split(str(tmp_path / "b"), "s", "train", documents,
                              [f"doc {i}" for i in range(40)],
                              vocab_size=60_000, text_bytes=123)
    assert again == facts


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("memory_limit", [0, 1 << 30])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_noticed(written, damage, memory_limit, verify):
    chunk = written[0] / "s/train/tokens/c/0"
    raw = bytearray(chunk.read_bytes())
    if damage == "remove":
        chunk.unlink()
    elif damage == "truncate":
        chunk.write_bytes(raw[: len(raw) // 2])
    else:
        raw[len(raw) // 3] ^= 4
        chunk.write_bytes(raw)
    with pytest.raises(ValueError,
                       match="tokens: expected the array of sha256 .*, got .*; delete the dir"):
        split = open_split(written, memory_limit=memory_limit, verify=verify)
        split.tokens()  # unless verified, damage is noticed when it is read


def test_a_chunk_of_zeros_is_stored(tmp_path):
    path, zeros = str(tmp_path / "zeros"), np.zeros(40_000, np.uint16)
    store.write_array(path, [zeros], size=len(zeros), dtype=zeros.dtype)
    np.testing.assert_array_equal(store.open_array(path).read().result(), zeros)


def test_another_array_in_the_place_of_one_is_noticed(written):
    tmp_path, documents, _ = written
    tokens = np.concatenate(documents)

    def replace(values):
        store.write_array(str(tmp_path / "s/train/tokens"), [values], size=len(values),
                          dtype=values.dtype)

    replace(tokens[:-1])
    with pytest.raises(ValueError, match=r"got the shape \[\d+\] where the manifest says"):
        open_split(written)
    replace(tokens[::-1])
    with pytest.raises(ValueError, match="got sha256"):
        open_split(written, verify=True)


@pytest.mark.parametrize("content, got", [
    (None, "no manifest.json"), ("{", "expected JSON"), ("[]", r"got \[\]"),
    (json.dumps({"format": "lmjax-tokens", "version": 99}), "version 1, got .*99"),
])
def test_a_directory_that_is_no_store(tmp_path, content, got):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=got) as error:
        store.read_manifest(str(tmp_path))
    assert "\n" not in str(error.value)


def test_addresses():
    assert store.kvstore("gs://bucket/a/b") == {"driver": "gcs", "bucket": "bucket", "path": "a/b/"}
    for other in ("s3://bucket/a", "az://b/c"):
        with pytest.raises(ValueError, match=f"expected a local path or gs://.*, got {other}"):
            store.kvstore(other)
    assert store.kvstore("/data/x") == {"driver": "file", "path": "/data/x/"}
