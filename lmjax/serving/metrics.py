"""What Prometheus reads at /metrics."""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmjax.serving.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# Figures that rise and fall; the others only grow.
LEVELS = ("queued", "running", "slots", "cache_bytes", "cache_tokens", "cache_used",
          "prefix_tokens", "prefix_used")


class EngineCollector(Collector):
    """The engines' own figures, read when they are asked for."""

    def __init__(self, engines: Mapping[str, Engine]):
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """One family per figure, with one sample per model."""
        stats = {name: engine.stats() for name, engine in self._engines.items()}
        for key in dict.fromkeys(key for figures in stats.values() for key in figures):
            kind = GaugeMetricFamily if key in LEVELS else CounterMetricFamily
            family = kind(f"lmjax_engine_{key}", f"{key.replace('_', ' ')} of the engine",
                          labels=["model"])
            for name, figures in stats.items():
                family.add_metric([name], figures[key])
            yield family


class Metrics:
    """Counts requests, and times them and their first tokens."""

    def __init__(self, engines: Mapping[str, Engine]):
        disable_created_metrics()  # a second sample per counter, which nobody reads
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engines))
        self._requests = Counter("lmjax_http_requests", "answered requests",
                                 ["endpoint", "status"], registry=self._registry)
        self._seconds = Histogram("lmjax_http_request_seconds", "time until a response has ended",
                                  ["endpoint"], buckets=SECONDS, registry=self._registry)
        self._first = Histogram("lmjax_first_token_seconds", "time until an answer's first token",
                                ["model"], buckets=SECONDS, registry=self._registry)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Counts a request that was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def first_tokens(self, model: str, seconds: Sequence[float]) -> None:
        """Notes when answers began."""
        for one in seconds:
            self._first.labels(model).observe(one)

    def text(self) -> bytes:
        """The exposition in Prometheus's text format."""
        return generate_latest(self._registry)
