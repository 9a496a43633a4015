"""What /openapi.json publishes is what is checked; schemathesis looks for a difference."""

import re
import shutil
import signal
import subprocess

import pytest
import servers

from lmjax.serving.openapi import below
from lmjax.serving.schema import CompletionRequest

SCHEMATHESIS = shutil.which("schemathesis")


@pytest.mark.parametrize("n", [11, 20, 99, 100, 101, 320, 4096, 50257])
def test_a_pattern_of_the_numbers_below(n):
    pattern = re.compile(below(n))
    assert [i for i in range(2 * n) if pattern.search(str(i))] == list(range(n))
    assert not any(map(pattern.search, ("", "00", "01", "-1", "1.0", "a", "1a")))


def test_a_whole_number_may_have_a_point_as_in_json_schema():
    asked = CompletionRequest.model_validate_json('{"model": "m", "prompt": [5.0], "seed": 7.0}')
    assert asked.prompt == [5] and asked.seed == 7
    for wrong in ("5.5", "true", '"5"', "[5.5]", "[true]"):
        with pytest.raises(ValueError):
            CompletionRequest.model_validate_json(f'{{"model": "m", "prompt": {wrong}, "n": "1"}}')


@pytest.mark.slow
@pytest.mark.skipif(not SCHEMATHESIS, reason="schemathesis is not installed, so nothing looks for "
                    "requests that the schema misjudges: pip install schemathesis")
@pytest.mark.parametrize("key", ["", "a-key"])
def test_schemathesis_finds_nothing(tmp_path, key):
    servers.make(tmp_path / "tiny", length=8192)  # what it makes up may be long
    servers.make(tmp_path / "vectors", "encoder", length=8192)
    server = servers.Server(tmp_path, tmp_path / "tiny", tmp_path / "vectors",
                            "--max-length", "1024",  # for an answer without a limit of its own
                            env={"LMJAX_API_KEY": key} if key else {})
    header = ["--header", f"Authorization: Bearer {key}"] if key else []
    try:
        done = subprocess.run(
            [SCHEMATHESIS, "run", f"{server.url}/openapi.json", "--max-examples", "40",
             "--seed", "1", "--request-timeout", "120", "--suppress-health-check", "all", *header],
            cwd=tmp_path, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout
        assert "Traceback" not in server.text() and server.stop() == 0
    finally:
        server.stop(signal.SIGKILL)
