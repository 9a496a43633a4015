"""Every file of stored data is damaged in turn: an error names it and the fix, or nothing changes.

Each file is deleted, emptied, cut in half, and has bits flipped in many places.
"""

import hashlib
import pathlib
import random
import re
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from small_corpus import make_config, silent, write_texts

from lmjax.data import store
from lmjax.data.computed import ComputedMixture
from lmjax.data.config import DataConfig
from lmjax.data.pipeline import Split, open_splits
from lmjax.data.preparation.ledger import trace
from lmjax.data.preparation.prepare import prepare
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import TokenizerConfig, prepared_tokenizer
from lmjax.errors import UserError
from lmjax.reporting.run_files import read_run

FLIPS = 5  # places per file in which a bit is flipped
FIX = re.compile(r"; (delete|restore|prepare|move)")
# What nothing reads when it trains, traces or reports: reports for people and receipts.
UNREAD = re.compile(r"receipt|data_report\.html|contamination\.json")


def damages(content: bytes) -> Iterator[tuple[str, bytes | None]]:
    """What becomes of a file: None if it is deleted."""
    yield "deleted", None
    yield "emptied", b""
    yield "cut", content[: len(content) // 2]
    rng = random.Random(0)
    for _ in range(FLIPS):
        flipped = bytearray(content)
        place = rng.randrange(len(content))
        flipped[place] ^= 1 << rng.randrange(8)
        yield f"flipped at {place}", bytes(flipped)


def check_all(folder: pathlib.Path, read: Callable[[], str]) -> dict[str, int]:
    """Damages each file of `folder` in turn; returns how often that was noticed, by file."""
    intact, noticed = read(), {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content, name = file.read_bytes(), str(file.relative_to(folder))
        for what, damaged in damages(content):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            try:
                assert read() == intact, f"{name}, {what}: other content was read silently"
            except UserError as error:
                named = re.sub(r"/(c/\d+|zarr\.json)$", "", name)  # an array by its directory
                assert named in str(error), (name, what, error)
                assert FIX.search(str(error)) and "\n" not in str(error), (name, what, error)
                noticed[name] = noticed.get(name, 0) + 1
            file.write_bytes(content)
    assert read() == intact
    return noticed


def digest_of(split: Split, sha256: "hashlib._Hash") -> None:
    rows = split.rows(np.arange(split.num_rows()))
    for name in sorted(rows):
        sha256.update(rows[name].tobytes())
    for source in split.sources:
        sha256.update(repr([source.documents_at(row) for row in range(source.num_rows)]).encode())


@pytest.mark.long
@pytest.mark.parametrize("memory_limit_mib", [pytest.param(0, marks=pytest.mark.slow), 64])
def test_each_file_of_prepared_data(tmp_path, monkeypatch, memory_limit_mib):
    monkeypatch.setattr(store, "CHUNK", 1 << 10)
    monkeypatch.setattr(store, "SHARD", 1 << 12)
    texts = write_texts(tmp_path / "texts", count=30)
    shutil.copy(texts / "000.txt", texts / "copy.txt")  # a duplicate, for the ledger
    config = make_config(texts, memory_limit_mib=memory_limit_mib)
    out = pathlib.Path(prepare(config, str(tmp_path / "data"), log=silent))
    assert len(list((out / "texts/train/tokens/c").iterdir())) > 1
    run = tmp_path / "run"  # of which a report could be made
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (run / "data").symlink_to(out)
    gone = next(f"texts/{name}" for name in ("000.txt", "copy.txt"))

    def read() -> str:
        sha256 = hashlib.sha256(prepared_tokenizer(str(out)).to_bytes())
        for split in open_splits(config, str(out)):
            digest_of(split, sha256)
        sha256.update(repr(read_run(run).baselines).encode())
        try:
            sha256.update(repr(trace(str(out), gone)).encode())
        except UserError as error:
            if "the id of a document that was read" not in str(error):
                raise
        return sha256.hexdigest()

    noticed = check_all(out, read)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert set(noticed) == {name for name in files if not UNREAD.search(name)}
    # Every damage of tokens is noticed, and of all that has a hash.
    for name, count in noticed.items():
        if not name.endswith("zarr.json"):
            assert count == 3 + FLIPS or name == "manifest.json", (name, count)


@pytest.mark.long
def test_each_file_of_what_a_teacher_predicted(tmp_path):
    """`computed` stores two pairs for every position of the rows of a run."""
    config = DataConfig(sources=(SourceConfig("s", "synthetic:20"),), seq_len=8,
                        tokenizer=TokenizerConfig(vocab_size=64))
    split, _ = open_splits(config)

    def made() -> ComputedMixture:
        mixture = ComputedMixture(split, str(tmp_path / "kept"), ("ids", "values"), length=8,
                                  count=2, fingerprint="f")
        mixture.cover(20)
        return mixture

    rng = np.random.default_rng(0)
    made().write([(rng.integers(0, 60, (20, 16)), rng.normal(size=(20, 16)).astype(np.float32))], 0,
                 {})

    def read() -> str:
        sha256, mixture = hashlib.sha256(), made()
        if mixture.missing(mixture.stored).num_rows():
            raise UserError("rows", "none", "restore: a run computes them again", "manifest.json")
        for values in mixture.rows(np.arange(20)).values():
            sha256.update(values.tobytes())
        return sha256.hexdigest()

    assert set(check_all(tmp_path / "kept", read)) == {"manifest.json", "0/c/0", "0/zarr.json"}
