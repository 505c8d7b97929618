"""Splits of the Hugging Face hub, from a server of our own that answers as the hub does over HTTP."""

import hashlib
import json
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from pipeline.corpus.tables.hub import hub_split
from pipeline.errors import CorpusError, UnreachableError
from tests.corpus.tables.rows import HERE, Rows, open_rows, read_rows

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A hub with the dataset `me/films`; `files` and `card` are what it holds."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.card: dict[str, Any] = {}
        self.refusal: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
                hub.json(self, [entry for path in asked.get("paths", []) for entry in hub.entries(path)])

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()

    def entries(self, path: str) -> list[dict[str, Any]]:
        if path in self.files:
            data = self.files[path]
            return [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}]
        if any(name.startswith(f"{path}/") for name in self.files):
            return [{"type": "directory", "path": path, "oid": "0" * 40}]
        return []

    def json(self, request: BaseHTTPRequestHandler, value: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.bytes(request, data, status, {"Content-Type": "application/json", **headers})

    def bytes(self, request: Any, data: bytes, status: int, headers: Mapping[str, str], body: bool = True) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(data)

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(request.path).path)
        if self.refusal is not None:
            return self.json(request, {"error": "not now"}, self.refusal)
        if found := re.fullmatch(r"/api/datasets/me/films(?:/revision/(.+))?", path):
            if found[1] not in (None, "main", "v1", SHA):
                return self.json(request, {"error": "no"}, 404, **{"X-Error-Code": "RevisionNotFound"})
            listed = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            about = {"id": "me/films", "sha": SHA, "siblings": listed, "cardData": self.card}
            return self.json(request, {**about, "lastModified": "2026-11-01T00:00:00.000Z"})
        if found := re.fullmatch(r"/datasets/me/films/resolve/[^/]+/(.+)", path):
            return self.file(request, self.files[found[1]], with_body)
        if found := re.fullmatch(r"/api/datasets/me/films/tree/[^/]+(?:/(.+))?", path):
            inside = [name for name in self.files if found[1] is None or name.startswith(f"{found[1]}/")]
            return self.json(request, [entry for name in inside for entry in self.entries(name)])
        return self.json(request, {"error": "no"}, 404, **{"X-Error-Code": "RepoNotFound"})

    def file(self, request: BaseHTTPRequestHandler, data: bytes, with_body: bool) -> None:
        about = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked is None:
            return self.bytes(request, data, 200, about, with_body)
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        about["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self.bytes(request, data[first : last + 1], 206, about, with_body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub()
    endpoint = f"http://127.0.0.1:{served.server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield served
    served.server.shutdown()
    huggingface_hub.HfFileSystem.clear_instance_cache()


def _parquet(*texts: str, **more: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": list(texts), **more}), sink)
    return bytes(sink.getvalue())


def test_a_split_is_the_files_that_are_named_after_it(hub: Hub) -> None:
    hub.files = {
        "README.md": b"", "data/train-00000-of-00002.parquet": _parquet("a"),
        "data/train-00001-of-00002.parquet": _parquet("b"), "data/validation-00000-of-00001.parquet": _parquet("c"),
        "data/unsupervised-00000-of-00001.parquet": _parquet("d"), "train.jsonl": b'{"text": "twice"}\n',
    }  # fmt: skip
    for split, texts in {"train": "ab", "validation": "c", "dev": "c", "unsupervised": "d"}.items():
        source = open_rows(f"hf://datasets/me/films/{split}")
        assert read_rows(source, ["text"]) == Rows((text,) for text in texts), split
        (table,) = source.tables
        assert (table.address, table.version) == (f"hf://datasets/me/films/{split}", SHA)
        assert all(SHA in file.path for file in source.files)
    assert open_rows("hf://datasets/me/films@v1/train").rows == 2


def test_the_dataset_cards_word_counts_before_names(hub: Hub) -> None:
    hub.files = {
        "en/a.jsonl": b'{"text": "a"}\n',
        "en/b.jsonl": b'{"text": "b"}\n',
        "de/train.jsonl": b'{"text": "c"}\n',
    }
    files = [{"split": "train", "path": ["en/a.jsonl", "en/b*"]}]
    hub.card = {"configs": [
        {"config_name": "en", "data_files": files, "default": True},
        {"config_name": "de", "data_files": [{"split": "train", "path": "de/*"}]},
    ]}  # fmt: skip
    assert read_rows(open_rows("hf://datasets/me/films/train"), ["text"]) == Rows([("a",), ("b",)])


def test_class_names_of_the_card_are_the_texts_of_numbers(hub: Hub) -> None:
    hub.files = {"train.parquet": _parquet("a", "b", label=[1, 0])}
    names = {"class_label": {"names": {"0": "negative", "1": "positive"}}}
    hub.card = {"dataset_info": {"features": [{"name": "text", "dtype": "string"}, {"name": "label", "dtype": names}]}}
    read = read_rows(open_rows("hf://datasets/me/films/train"), ["text", "label"])
    assert read == Rows([("a", "positive"), ("b", "negative")])


def test_a_split_takes_columns_a_filter_and_a_limit(hub: Hub) -> None:
    hub.files = {"train.csv": b"body,stars\na,1\nb,5\nc,5\n"}
    taken = {"columns": {"text": "body"}, "types": {"stars": "integer"}, "where": "stars > 4", "limit": 1}
    assert read_rows(open_rows({"path": "hf://datasets/me/films/train", **taken}), ["text"]) == Rows([("b",)])


def test_what_the_hub_does_not_have_is_one_sentence(hub: Hub) -> None:
    hub.files = {"data/train.parquet": _parquet("a")}
    for path, reason in [
        ("me/films/nothing", "neither a folder of the dataset nor a split .*they tell train"),
        ("me/films@v9/train", "has no revision 'v9'"),
        ("me/none/train", "there is no dataset me/none on the hub, or it is private"),
    ]:
        with pytest.raises(CorpusError, match=f"^{HERE}: .*{reason}") as refused:
            open_rows(f"hf://datasets/{path}")
        assert "\n" not in str(refused.value)
    hub.refusal = 503
    with pytest.raises(UnreachableError, match=r"the hub does not answer .*try again later") as away:
        open_rows("hf://datasets/me/films/train")
    assert "\n" not in str(away.value)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("hf://datasets/me/films/train", ("me/films", None, "train")),
        ("hf://datasets/me/films@v1/train", ("me/films", "v1", "train")),
        ("hf://datasets/me/films@refs/convert/parquet/train", ("me/films", "refs/convert/parquet", "train")),
        ("hf://datasets/me/films", None),
        ("hf://datasets/me/films/data/train-*.parquet", None),
        ("hf://models/me/films/train", None),
        ("s3://datasets/me/films/train", None),
    ],
)
def test_a_split_is_named_behind_the_dataset(path: str, split: tuple[str, str | None, str] | None) -> None:
    found = hub_split(path)
    assert (found and (found.repo, found.revision, found.split)) == split
