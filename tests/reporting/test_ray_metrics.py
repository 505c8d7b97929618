"""A run's figures where Prometheus scrapes a Ray cluster."""

import re
import socket
import time
import urllib.request

import pytest
import ray

from pipeline.reporting.events import Event
from pipeline.run.tracking import RayMetrics

STEP: Event = {
    "event": "step",
    "step": 40,
    "live": 1,
    "tokens_per_second": 310.0,
    "padding": 0.25,
    "gathered_bytes": 2**30,
    "trials": {"sst2": {"step": 40, "loss": 0.5}},
}


@pytest.fixture
def endpoint():
    if ray.is_initialized():
        ray.shutdown()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False, _metrics_export_port=port)
    yield f"http://127.0.0.1:{port}/metrics"
    ray.shutdown()


def scrape(endpoint: str) -> dict[str, float]:
    """Value by name and, where it has one, stage, of this run's figures."""
    try:
        text = urllib.request.urlopen(endpoint, timeout=5).read().decode()
    except OSError:
        return {}
    lines = re.findall(r'^ray_promptbank_(\w+)\{(.*run="night".*)\} (\S+)$', text, re.MULTILINE)
    stages = {tags: re.search(r'stage="(\w+)"', tags) for _, tags, _ in lines}
    return {name + (f"/{stages[tags][1]}" if stages[tags] else ""): float(value) for name, tags, value in lines}


def wait_for(endpoint: str, expected: dict[str, float]) -> None:
    deadline = time.monotonic() + 60
    while not expected.items() <= (found := scrape(endpoint)).items():
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_clusters_metrics_endpoint_tells_stage_step_speed_and_trials_and_none_after_the_end(endpoint):
    metrics = RayMetrics("night")
    trials = [{"trial": name, "task": name, "max_steps": 100} for name in ("sst2", "trec")]
    metrics.hear({"event": "launch", "trials": trials})
    metrics.hear({"event": "stage", "name": "tuning", "text": "rank 0 holds 64 MiB"})
    metrics.hear(STEP)
    figures = {"step": 40, "live_trials": 1, "waiting_trials": 1, "tokens_per_second": 310, "padding_share": 0.25}
    wait_for(endpoint, {**figures, "gathered_bytes": 2**30, "stage/tuning": 1, "stage/corpus": 0})
    metrics.close()
    wait_for(endpoint, {"step": 40, "live_trials": 0, "waiting_trials": 0, "tokens_per_second": 0, "stage/tuning": 0})
