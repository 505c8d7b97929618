"""The service's benchmark on a tiny model: both sides answer the same rows, and every request is counted."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SettingsError
from pipeline.lab.benchmark.serving import Client, ServingOptions, compare_serving, save_serving, serving_tables
from tests.corpora import reviews
from tests.tiny import make_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("film", "food")):
        (folder / name).mkdir()
        texts, labels = zip(*reviews(20, seed), strict=True)
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / name / "dev.parquet")
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("model"), "llama", seed=1, scale=2.0)
    return ServingOptions(str(model), 4, (8, 20), 3, 1, 2, 0)


@pytest.mark.processes
def test_both_sides_answer_the_same_rows(data, options, tmp_path):
    figures = compare_serving(data, ["film", "food"], Path(__file__).parents[3], options)
    assert [batch.name for batch in figures.batches] == [
        "classify 8 rows",
        "classify 20 rows",
        "generate 8 rows, 3 tokens",
    ]
    for batch in figures.batches:
        assert set(batch.seconds) == {"now", "now, exact products", "earlier"}
        assert batch.alike["earlier"] == 1.0 and batch.ratios["now"] == 1.0
    save_serving(tmp_path / "serving.json", figures)
    assert json.loads((tmp_path / "serving.json").read_text())["http"] == []
    assert len(serving_tables(figures)) == 2


def test_a_folder_without_this_project_is_refused(data, options, tmp_path):
    with pytest.raises(SettingsError, match="git worktree add"):
        compare_serving(data, ["film"], tmp_path, options)


class _EverySecondFails(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[dict]] = []

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(503 if len(self.asked) % 2 == 0 else 200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


def test_a_client_waits_for_each_answer_and_counts_those_that_fail():
    with ThreadingHTTPServer(("127.0.0.1", 0), _EverySecondFails) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        taken, failed = [], []
        rows = [("good", "film"), ("bad", "food")]
        Client(server.server_port, "generate", rows, 5).until(time.monotonic() + 0.5, 1, taken, failed)
        server.shutdown()
    asked = _EverySecondFails.asked
    assert len(asked) == len(taken) == len(failed) and len(asked) > 1
    assert failed == [i % 2 for i in range(len(asked))]
    assert [body["rows"][0]["task"] for body in asked[:2]] == ["food", "film"] and asked[0]["max_new_tokens"] == 5
