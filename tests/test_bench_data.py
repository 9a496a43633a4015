"""The benchmark of the training pipeline runs, over every objective."""

from lmjax import bench_pipeline


def test_every_objective_is_measured(monkeypatch):
    monkeypatch.setattr(bench_pipeline, "DOCUMENTS", 60)
    found = bench_pipeline.bench_pipeline(seconds=0.02)
    assert set(found) == set(bench_pipeline.OBJECTIVES) and min(found.values()) > 1000
