"""A preparation that is killed and started again ends with the same bytes."""

import random
import signal
import subprocess
import sys
import time

import pytest
from small_corpus import contents, make_config, silent, write_texts

from lmjax.data import store
from lmjax.data.pipeline import open_splits
from lmjax.data.preparation.prepare import prepare
from lmjax.runtime.files import Busy


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts")


KILLED = """
import os, signal, sys
from lmjax.data.preparation import prepare, stages
from tests.small_corpus import make_config
def stop(*args, **kwargs):
    print("here", flush=True)
    signal.pause()
for module in (prepare, stages):
    if hasattr(module, sys.argv[3]):
        setattr(module, sys.argv[3], stop)
prepare.prepare(make_config(sys.argv[1]), sys.argv[2], log=lambda line: None)
"""


def start(texts, out, stage):
    command = [sys.executable, "-c", KILLED, str(texts), str(out), stage]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


@pytest.mark.long
def test_killed_at_any_stage_and_started_again(texts, tmp_path):
    out = tmp_path / "out"
    prepare(make_config(texts), str(tmp_path / "straight"), log=silent)
    for stage in ("_tokens", "_manifest"):
        process = start(texts, out, stage)
        assert process.stdout.readline() == b"here\n"
        with pytest.raises(Busy, match="expected nobody else at work there, got another process"):
            prepare(make_config(texts), str(out), log=silent)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not out.exists() and (tmp_path / ".out.partial").exists()
    prepare(make_config(texts), str(out), log=silent)
    assert contents(out) == contents(tmp_path / "straight")
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.long)])
def test_killed_at_random_moments(texts, tmp_path, kills):
    out, rng = tmp_path / "out", random.Random(kills)
    for _ in range(kills):
        process = start(texts, out, "-")
        time.sleep(rng.uniform(0.5, 2.5))
        process.kill()
        process.wait()
        process.stdout.close()
        if out.exists():
            store.read_manifest(str(out))
    prepare(make_config(texts), str(out), log=silent)
    open_splits(make_config(texts), str(out), verify=True)
