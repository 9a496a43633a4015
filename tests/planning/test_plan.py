"""The command `lmjax plan`: what it refuses, and steps for a TPU that is not here."""

import importlib.util
import json

import jax
import pytest

from lmjax.cli.main import main
from lmjax.planning import plan
from lmjax.runtime.chips import CHIPS

# By JAX's minor version, each with its own libtpu: seconds of cycles and bytes of memory.
PINNED = {
    "10": {"seconds": 0.0018056, "peak": 19_649_024},
    "12": {"seconds": 0.0017340, "peak": 16_507_904},
}
TINY = ["plan", "--config", "configs/llama2_7b.py:tiny"]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed")


@pytest.mark.parametrize("arguments, message", [
    (["--out", "{0}/file"],
     "--out: expected a directory that can be written, got the file {0}/file; move it away"),
    (["--out", "{0}/file/below"], "can be written, got the file {0}/file; move it away"),
    (["--tokens=-5"], "--tokens: expected 0 or more, got -5; "),
    (["--tokens=nan"], "expected 0 or more, got nan; ")])
def test_bad_arguments_are_refused_before_the_step_is_compiled(arguments, message, tmp_path,
                                                               monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(plan, "compiled", lambda *_: pytest.fail("it was compiled"))
    arguments = [text.format(tmp_path) for text in arguments]
    assert main([*TINY, "--topology", "cpu", *arguments]) == 2
    assert message.format(tmp_path) in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("arguments, message", [
    (["--topology", "v9:2x2"], "--topology: expected one such as"),
    (["--topology", "cpu", "--search"], "--search: expected a TPU topology"),
    (["--topology", "cpu", "--config.mesh.fsdp=3"],
     "config.mesh: expected axes whose product is the 8 devices")])
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LMJAX_PLAN_CACHE", str(tmp_path))
    assert main([*TINY, *arguments]) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("lmjax: error: ") and message in error
    assert all(line.startswith("compiling for") for line in progress)  # on a slow machine


@needs_libtpu
def test_a_step_for_tpu_costs_what_it_did(tmp_path, monkeypatch, capsys):
    """A performance test without noise: a step's cycles and memory are the same every time."""
    monkeypatch.setenv("LMJAX_PLAN_CACHE", str(tmp_path))
    out = tmp_path / "out"
    overrides = ["model.embed_dim=256", "model.mlp_dim=512", "model.num_heads=4",
                 "data.seq_len=512", "train.batch_size=32", "mesh.fsdp=16"]
    assert main([*TINY, "--topology", "v5e:4x4", "--out", str(out),
                 *(f"--config.{item}" for item in overrides)]) == 0
    report = json.loads((out / "plan.json").read_text())
    assert report["basis"] == "the compiler's cycles"
    assert report["fits"] and report["limit"] == CHIPS["v5e"].hbm
    expected, seconds = PINNED[jax.__version__.split(".")[1]], report["seconds"]
    assert seconds["matmul"] + seconds["other"] == pytest.approx(expected["seconds"], rel=0.02)
    assert report["memory"]["peak"] == pytest.approx(expected["peak"], rel=0.02)
    assert "whole step" in capsys.readouterr().out


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("embed, kinds", [("fsdp", {"all-reduce"}),
                                          ('["data","fsdp"]', {"all-gather", "reduce-scatter"})])
def test_slices_sum_gradients_and_gather_only_weights_that_they_split(embed, kinds, tmp_path,
                                                                      monkeypatch, capsys):
    """Each of n = 2 chips with the same shard sends it once (2 (n-1)/n of it), in bfloat16."""
    monkeypatch.setenv("LMJAX_PLAN_CACHE", str(tmp_path))
    overrides = ("model.embed_dim=512 model.mlp_dim=1024 model.num_heads=4 data.seq_len=256 "
                 "train.batch_size=32 mesh.data=2 mesh.fsdp=4 "
                 f"mesh.rules.embed={embed}").split()
    assert main([*TINY, "--topology", "2xv5e:2x2", "--out", str(tmp_path / "out"),
                 *(f"--config.{item}" for item in overrides)]) == 0
    report = json.loads((tmp_path / "out/plan.json").read_text())
    sent = {row["kind"]: row for row in report["collectives"]
            if row["link"] == "dcn" and row["bytes"] > 2**20}
    assert set(sent) == kinds and all(row["asynchronous"] for row in sent.values())
    size = sum(row["bytes"] for row in sent.values())
    assert sum(row["seconds"] for row in sent.values()) == pytest.approx(size / CHIPS["v5e"].dcn)
    if embed == "fsdp":
        assert 1 <= sent["all-reduce"]["bytes"] / (2 * report["parameters"] / 4) < 1.5
    assert ("gathered over dcn" in capsys.readouterr().out) == (embed != "fsdp")
