"""The metrics of a service, in Prometheus' format."""

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class StateCounts(Protocol):
    """What a cache of prompts' states counts; `PromptStateCache` does."""

    limit: int
    nbytes: int
    hits: int
    misses: int
    evictions: int


class ServiceMetrics(Collector):
    """The metrics of one replica, in a registry of its own.

    The proxy routes each scrape to any replica, so every sample carries its replica's name.
    """

    def __init__(self, replica: str, states: StateCounts | None = None) -> None:
        self._replica = replica
        self._states = states
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "promptbank_requests", "Requests by route and HTTP status.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "promptbank_request_seconds", "Time to answer.", ["route"], buckets=_SECONDS, registry=registry
        )
        self.in_progress = Gauge("promptbank_requests_in_progress", "Requests not answered yet.", registry=registry)
        self.rows = Counter("promptbank_rows", "Rows answered, by task.", ["task"], registry=registry)
        self.batch_rows = Histogram(
            "promptbank_batch_rows",
            "Rows of a batch, over all its requests.",
            ["kind"],
            buckets=_ROWS,
            registry=registry,
        )
        self.version = Gauge("promptbank_bank_version", "Version of the bank that is served.", registry=registry)
        self.watch_error = Gauge(
            "promptbank_watch_error",
            "1 while the bank cannot be followed, with the reason.",
            ["error"],
            registry=registry,
        )

    def watched(self, version: int, error: str | None) -> None:
        """Record what the last refresh of the bank gave."""
        self.version.set(version)
        self.watch_error.clear()
        if error is not None:
            self.watch_error.labels(error).set(1)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        for metric in (*self._registry.collect(), *self._of_states()):
            metric.samples = [
                sample._replace(labels={**sample.labels, "replica": self._replica}) for sample in metric.samples
            ]
            yield metric

    def _of_states(self) -> Iterator[Metric]:
        states = self._states
        if states is None:
            return
        counters = {
            "hits": ("A prompt's keys and values were asked for and held.", states.hits),
            "misses": ("They had to be computed.", states.misses),
            "evictions": ("They left the cache for want of room.", states.evictions),
        }
        for name, (told, count) in counters.items():
            yield CounterMetricFamily(f"promptbank_state_cache_{name}", told, count)
        yield GaugeMetricFamily("promptbank_state_cache_bytes", "Held keys and values of prompts.", states.nbytes)
        yield GaugeMetricFamily("promptbank_state_cache_limit_bytes", "What they may take, cache_mib.", states.limit)
