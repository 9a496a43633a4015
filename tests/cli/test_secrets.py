"""No credential leaves: not in messages, tracebacks, logs, records, reports or checkpoints."""

import pathlib

import pytest
from processes import FINISHED, finish, run_here

from lmjax.cli import main as cli
from lmjax.errors import UserError, masked

CANARY = "canary7Zq"
ADDRESSES = [f"gs://me:{CANARY}@bucket/x", f"https://{CANARY}@host/x",
             f"s3://bucket/x?X-Amz-Signature={CANARY}&b=1"]
KEYS = ["train.init_from", "checkpoint.directory", "data.directory", "data.tokenizer.path",
        "distill.teacher", "watch.hlo", "data.sources.0.uri"]


def check_no_canary(folder: pathlib.Path) -> None:
    for path in folder.rglob("*"):
        assert CANARY not in path.name
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("address", [
    ADDRESSES[0], *(pytest.param(address, marks=pytest.mark.long) for address in ADDRESSES[1:])])
def test_an_address_with_credentials_is_refused_without_showing_them(address, tmp_path, capsys):
    for key in KEYS:
        given = f"text:{address}" if key.endswith("uri") else address
        assert run_here(tmp_path / "run", *FINISHED, f"{key}={given}") == 2, key
    assert cli.main(["train", "--config", "configs/synthetic.py:tiny", "--workdir", address]) == 2
    printed = "".join(capsys.readouterr())
    assert CANARY not in printed and printed.count("***") > len(KEYS)
    check_no_canary(tmp_path)


@pytest.mark.parametrize("text, shown", [
    ("--config.x.hf_token=abc", "--config.x.hf_token=***"),
    ("Authorization: Bearer abcdefgh1234", "Authorization: Bearer ***"),
    ("AWS_SECRET_ACCESS_KEY=zz9 b", "AWS_SECRET_ACCESS_KEY=*** b"),
    ("key hf_ABCDEFGHIJKLMNOPQRST", "key ***"),
    *((text, text) for text in ("distill.stored_tokens=8", "bos_token=<s>", "me@example.org",
                                "https://host/a@b", "data.tokenizer.path=/x", "scikit sk-learn")),
])
def test_only_credentials_are_masked(text, shown):
    assert masked(text) == shown
    assert shown in str(UserError("a", text, "b"))


@pytest.mark.slow
def test_a_crash_with_credentials_in_flags_and_in_its_traceback(tmp_path):
    crash = f"""
from lmjax.training.records import Records
log_step = Records.log_step
def crashes(self, step, metrics):
    log_step(self, step, metrics)
    if step == 3:
        raise RuntimeError("https://me:{CANARY}@host: 403")
Records.log_step = crashes
"""
    printed = finish(tmp_path / "run", *FINISHED, expect=1, first=crash,
                     env={"LIBTPU_INIT_ARGS": f"--api_key={CANARY}"})
    assert "https://***@host: 403" in printed and "Traceback" in printed
    assert "LIBTPU_INIT_ARGS: --api_key=***" in printed
    assert (tmp_path / "run/run.json").exists() and (tmp_path / "run/checkpoints/2").exists()
    check_no_canary(tmp_path)
