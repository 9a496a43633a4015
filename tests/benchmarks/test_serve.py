"""The benchmark of serving measures the same requests served, offline and one by one."""

import json

import pytest

from lmjax.benchmarks import serve as bench_serve
from lmjax.cli.main import main

TINY = ("num_layers=1", "embed_dim=16", "num_heads=2", "num_kv_heads=2", "mlp_dim=16",
        "vocab_size=64")


@pytest.mark.slow
def test_the_same_requests_are_served_in_three_ways(monkeypatch, tmp_path, capsys):
    work = bench_serve.Workload((2, 5), (3, 6), 2)
    for name, value in dict(CLIENTS=3, ALONE=2, WORKLOADS={"small": work}).items():
        monkeypatch.setattr(bench_serve, name, value)
    out = tmp_path / "figures.json"
    assert main(["bench", "serve", "--config", "configs/quickstart.py", "--seconds", "0.01",
                 "--out", str(out), *(f"--config.model.{item}" for item in TINY)]) == 0
    found = json.loads(out.read_text())["workloads"]["small"]
    assert set(found["tokens_per_second"]) == {"served", "offline", "alone"}
    assert found["requests"] == 6 and found["rounds"] >= 3 and 1 <= found["rows_per_step"] <= 3
    assert 0 < found["first_token_seconds"]["50"] <= found["first_token_seconds"]["99"]
    assert f"{found['beside']['offline']:.2f} times an offline batch" in capsys.readouterr().out


def test_an_encoder_is_refused_before_it_is_made(capsys):
    assert main(["bench", "serve", "--config", "configs/bert.py:tiny"]) == 2
    assert "--config: expected a decoder" in capsys.readouterr().err
