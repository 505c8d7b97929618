"""Stores keep their promises, a folder and an object store alike, and an object store that fails is one sentence."""

import importlib
import io
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.addresses import hide_credentials
from pipeline.bank import PromptBank, object_store
from pipeline.bank.access import open_store
from pipeline.bank.object_store import ObjectStore, open_object_store
from pipeline.bank.store import Store
from pipeline.errors import BankError, MissingFileError, StorageError, UnreachableError

if TYPE_CHECKING:
    from tests.bank.s3_server import S3Server

pytest_plugins = ["tests.bank.s3_server", "tests.bank.azurite"]

ROOT = Path(__file__).parents[2]
CLIMBING = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../a",
    "a/../b",
    "a//b",
    "a/",
    ".hidden",
    "a/.b",
    "a\\b",
    "a\nb",
    "a b",
    "ä",
    "%2e",
]


@dataclass(frozen=True)
class Place:
    """A store, and a way to write into it past the code under test."""

    store: Store
    plant: Callable[[str, bytes], None]


@pytest.fixture(
    params=[
        "folder",
        pytest.param("object store", marks=pytest.mark.processes),
        pytest.param("Azure", marks=[pytest.mark.processes, pytest.mark.slow]),
    ]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "Azure":
        elsewhere = open_object_store(request.getfixturevalue("azure_uri"))
        return Place(elsewhere, lambda key, data: elsewhere._objects.put(key, data) and None)
    if request.param == "object store":
        s3: S3Server = request.getfixturevalue("s3")
        uri = s3.new_uri()
        return Place(open_store(uri, create=True), lambda key, data: s3.put(f"{uri}/{key}", data))
    root = tmp_path / "bank"

    def plant(key: str, data: bytes) -> None:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)

    return Place(open_store(root, create=True), plant)


@pytest.fixture
def store(place: Place) -> Store:
    return place.store


@pytest.fixture
def cloud(s3: "S3Server") -> ObjectStore:
    return open_object_store(s3.new_uri())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same settings in smaller numbers."""
    monkeypatch.setattr(object_store, "_RETRY_SECONDS", 0.5)
    monkeypatch.setattr(object_store, "_RETRIES", {"max_retries": 2, "retry_timeout": timedelta(seconds=0.5)})
    monkeypatch.setattr(object_store, "_CLIENT", {"connect_timeout": "1s", "read_timeout": "500ms", "timeout": "5s"})


ELSEWHERE = {
    "GOOGLE_BEARER_TOKEN": "test",
    "AZURE_STORAGE_ACCOUNT_NAME": "account",
    "AZURE_STORAGE_ACCOUNT_KEY": "dGVzdA==",
}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Leads every cloud's addresses to one server."""

    def lead(server: str) -> None:
        for name in ("AWS_ENDPOINT_URL", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT"):
            monkeypatch.setenv(name, server)
        for name, value in ELSEWHERE.items():
            monkeypatch.setenv(name, value)

    return lead


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has probed its store already."""
    monkeypatch.setattr(ObjectStore, "_probe", lambda self: None)


# What every store promises


@pytest.mark.processes
def test_what_was_created_is_there_and_can_be_read(store):
    assert store.create("versions/1.json", b"one")
    assert store.exists("versions/1.json")
    assert store.read("versions/1.json", 100) == b"one"
    assert store.where("versions/1.json") == f"{store.uri}/versions/1.json"


def test_a_key_that_exists_is_never_written_again(store):
    assert store.create("versions/1.json", b"one")
    assert store.create("versions/1.json", b"two") is False
    assert store.create("versions/1.json", b"two!") is False
    assert store.read("versions/1.json", 100) == b"one"


def test_content_is_read_by_ranges(store):
    store.create("a", bytes(range(100)))
    content = store.open("a", 100)
    assert content.size == 100
    assert content.read(10, 20) == bytes(range(10, 20))
    assert content.read(90, 200) == bytes(range(90, 100))
    assert content.read(5, 5) == b""


def test_a_large_value_and_an_empty_one_are_kept_whole(store):
    large = os.urandom(2**20) * 12
    assert store.create("large", large) and not store.create("large", large[::-1])
    assert store.read("large", len(large)) == large
    assert store.create("empty", b"")
    assert store.read("empty", 0) == b"" and store.open("empty", 0).size == 0


@pytest.mark.parametrize("operation", ["open", "read"])
def test_what_is_missing_is_a_sentence(store, operation):
    with pytest.raises(MissingFileError) as caught:
        getattr(store, operation)("versions/1.json", 100)
    assert str(caught.value) == f"{store.uri}/versions/1.json is missing"
    assert not store.exists("versions/1.json")


@pytest.mark.parametrize("operation", ["open", "read"])
def test_what_is_above_the_limit_is_refused(store, operation):
    store.create("a", bytes(2000))
    assert getattr(store, operation)("a", 2000)
    with pytest.raises(BankError) as caught:
        getattr(store, operation)("a", 1999)
    assert str(caught.value) == f"{store.uri}/a is refused: 2,000 bytes, above the limit of 1,999"


def test_a_renewed_key_is_younger_and_holds_the_same(store):
    store.create("blobs/a", b"data")
    (before,) = store.list_files("blobs")
    time.sleep(1.1)  # S3 counts whole seconds
    store.renew("blobs/a", b"data")
    (after,) = store.list_files("blobs")
    assert after.modified >= before.modified + 1
    assert store.read("blobs/a", 100) == b"data"


def test_a_folder_lists_what_is_directly_in_it(place):
    for key in ["a/1.json", "a/2.json", "a/deep/3.json", "a/deep/er/4.json", "ab/5.json", "b", "a-b/6.json"]:
        place.store.create(key, b"x" * len(key))
    place.plant("a/.1234.tmp", b"left by a killed writer")
    assert sorted(place.store.list_names("a")) == ["1.json", "2.json", "deep"]
    assert sorted(place.store.list_names("a/deep")) == ["3.json", "er"]
    assert {entry.name: entry.size for entry in place.store.list_files("a")} == {"1.json": 8, "2.json": 8}
    assert all(abs(entry.modified - time.time()) < 60 for entry in place.store.list_files("a"))


def test_a_folder_that_is_not_there_is_empty(store):
    assert not store.list_names("versions") and not store.list_files("versions") and not store.list_leftovers()


def test_a_folder_of_more_than_a_thousand_files_is_listed_whole(store):
    names = {f"{i}.json" for i in range(1, 1203)}
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda name: store.create(f"versions/{name}", b"{}"), names))
    assert set(store.list_names("versions")) == names
    assert {entry.name for entry in store.list_files("versions")} == names


def test_what_was_deleted_is_gone_and_may_be_deleted_again(store):
    store.create("a/b", b"1")
    store.create("a/c", b"2")
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b") and store.read("a/c", 1) == b"2"
    assert store.create("a/b", b"3")


@pytest.mark.parametrize("key", CLIMBING)
def test_a_key_that_could_climb_out_is_refused_by_every_operation(store, key):
    operations: list[Callable[[], Any]] = [
        lambda: store.open(key, 100),
        lambda: store.read(key, 100),
        lambda: store.create(key, b""),
        lambda: store.renew(key, b""),
        lambda: store.exists(key),
        lambda: store.list_names(key),
        lambda: store.list_files(key),
        lambda: store.delete(key),
    ]
    for operation in operations:
        with pytest.raises(BankError, match="is refused: it could climb out of the bank"):
            operation()


def test_of_many_threads_that_create_one_key_exactly_one_wins(store):
    size, rounds = 8, 25
    barrier = Barrier(size, timeout=30)

    def compete(me: int) -> list[bool]:
        won = []
        for i in range(rounds):
            barrier.wait()
            won.append(store.create(f"versions/{i}.json", bytes([me]) * 100_000))
        return won

    with ThreadPoolExecutor(size) as pool:
        outcomes = list(pool.map(compete, range(size)))
    for i in range(rounds):
        winners = [me for me in range(size) if outcomes[me][i]]
        assert len(winners) == 1
        assert store.read(f"versions/{i}.json", 100_000) == bytes(winners) * 100_000


def start(code: str, *args: object) -> subprocess.Popen:
    """Python code in a process of its own."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, **pipes)


COMPETITOR = """
import sys
from pipeline.bank.access import open_store
store, me = open_store(sys.argv[1], create=True), sys.argv[2]
print("ready", flush=True)
for line in sys.stdin:
    print(store.create(line.strip(), me.encode() * 1000), flush=True)
"""


@pytest.mark.processes
def test_of_many_processes_that_create_one_key_exactly_one_wins(store):
    size, rounds = 3, 60
    processes = [start(COMPETITOR, store.uri, me) for me in range(size)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    all_winners = []
    for i in range(rounds):
        for me in range(size):
            other = processes[(i + me) % size]  # another one hears of it first each time
            other.stdin.write(f"versions/{i}.json\n")
            other.stdin.flush()
        winners = [me for me, process in enumerate(processes) if process.stdout.readline() == "True\n"]
        assert len(winners) == 1
        assert store.read(f"versions/{i}.json", 1000) == str(winners[0]).encode() * 1000
        all_winners += winners
    for process in processes:
        assert process.communicate() == ("", None) and process.returncode == 0
    assert len(set(all_winners)) > 1, "they did not compete"


def test_threads_may_share_a_store(store):
    def work(me: int) -> None:
        for i in range(10):
            assert store.create(f"a{me}/{i}", bytes([me, i]))
            assert store.read(f"a{me}/{i}", 2) == bytes([me, i])
            assert len(store.list_names(f"a{me}")) == i + 1
            assert store.exists(f"a{me}/{i}")
        store.delete(f"a{me}/0")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


# What only object stores have to promise


@pytest.mark.processes
def test_banks_in_one_bucket_do_not_see_each_other(s3):
    uri = s3.new_uri()
    one, other, below = (open_object_store(f"{uri}{end}") for end in ("/a", "/ab/", "/a/versions/more"))
    one.create("versions/1.json", b"one")
    other.create("versions/2.json", b"two")
    below.create("3.json", b"three")
    assert sorted(one.list_names("versions")) == ["1.json", "more"] and other.list_names("versions") == ("2.json",)
    assert open_object_store(f"{uri}/a/").read("versions/1.json", 3) == b"one"
    assert open_object_store(f"{uri}/a/").uri == one.uri == f"{uri}/a"


@pytest.mark.processes
def test_a_bank_may_be_a_whole_bucket(s3):
    s3.put("s3://whole")
    store = open_object_store("s3://whole")
    assert store.create("versions/1.json", b"one") and store.list_names("versions") == ("1.json",)
    assert store.where("versions/1.json") == "s3://whole/versions/1.json"


@pytest.mark.processes
def test_folders_that_a_console_made_and_other_stray_objects_are_ignored(s3):
    uri = s3.new_uri()
    store = open_object_store(uri)
    store.create("versions/1.json", b"one")
    for stray in ["/versions/", "/versions/deep/", "/versions/.hidden", "/"]:
        s3.put(uri + stray)
    assert sorted(store.list_names("versions")) == ["1.json", "deep"]
    assert [entry.name for entry in store.list_files("versions")] == ["1.json"]


@pytest.mark.processes
def test_an_object_whose_name_nobody_can_read_is_named(s3):
    uri = s3.new_uri()
    s3.put(f"{uri}/versions//1.json")
    with pytest.raises(StorageError, match=r"cannot list .*: there is an object whose name .*; delete it"):
        open_object_store(uri).list_names("versions")


@contextmanager
def serving(answer: Callable[["Visit"], None]) -> Iterator[str]:
    """A server that gives every request to `answer`; its address."""

    class Visits(Visit):
        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = lambda self: answer(self)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Visits)
    server.daemon_threads = True
    server.block_on_close = False
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Visit(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def complain(self, status: int, code: str) -> None:
        self.say(status, f"<?xml version='1.0'?>\n<Error><Code>{code}</Code><Message>…</Message></Error>".encode())

    def forward(self, endpoint: str) -> Callable[[], None]:
        """Have the request carried out; what gives the answer to the client."""
        connection = HTTPConnection(endpoint.removeprefix("http://"))
        connection.request(self.command, self.path, self.body(), dict(self.headers))
        answer = connection.getresponse()
        body = answer.read() if self.command != "HEAD" else b""
        names = {"ETag", "Last-Modified", "Content-Length"}
        headers = {name.replace("-", "_"): value for name, value in answer.getheaders() if name in names}
        return lambda: self.say(answer.status, body, **headers)

    def hang_up(self) -> None:
        self.close_connection = True

    def reset(self) -> None:
        """Break off, so that the client is told nothing but "connection reset"."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True


LOST = {
    "the connection is closed": Visit.hang_up,  # obstore sends it again by itself
    "the connection is reset": Visit.reset,  # obstore gives up
    "a gateway says 502": lambda visit: visit.say(502),
    "there is silence": lambda visit: time.sleep(1),
}


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST.keys())
@pytest.mark.processes
def test_a_put_whose_answer_was_lost_is_ours_when_it_arrived(s3, monkeypatch, impatient, lost):
    arrived = []

    def answer(visit: Visit) -> None:
        reply = visit.forward(s3.endpoint)
        if visit.command == "PUT" and not arrived:
            arrived.append(visit.path)
            lost(visit)
        else:
            reply()

    uri = s3.new_uri()
    with serving(answer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        store = open_object_store(uri)
        assert store.create("versions/1.json", b"mine") is True
        assert store.create("versions/1.json", b"others") is False
        assert store.read("versions/1.json", 100) == b"mine"
    assert arrived


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST.keys())
@pytest.mark.processes
def test_a_put_that_was_lost_is_not_ours_when_another_was_first(s3, probed, monkeypatch, impatient, lost):
    uri = s3.new_uri()
    refusals = []

    def answer(visit: Visit) -> None:
        if visit.command == "PUT" and not refusals:
            refusals.append(visit.body())
            s3.put(f"{uri}/versions/1.json", b"others")
            lost(visit)
        else:
            visit.forward(s3.endpoint)()

    with serving(answer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        assert open_object_store(uri).create("versions/1.json", b"mine") is False
    assert refusals == [b"mine"]


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST.keys())
@pytest.mark.processes
def test_a_put_that_never_arrived_is_sent_again(s3, probed, monkeypatch, impatient, lost):
    lost_ones = []

    def answer(visit: Visit) -> None:
        if visit.command == "PUT" and not lost_ones:
            lost_ones.append(visit.body())
            lost(visit)
        else:
            visit.forward(s3.endpoint)()

    monkeypatch.setattr(object_store, "_RETRY_SECONDS", 5.0)
    with serving(answer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        store = open_object_store(s3.new_uri())
        assert store.create("versions/1.json", b"mine") is True
        assert store.read("versions/1.json", 100) == b"mine"
    assert lost_ones == [b"mine"]


@pytest.mark.processes
def test_equal_bytes_are_ours_but_a_blobs(cloud):
    """Of stores this one alone: see `ObjectStore.create`."""
    assert cloud.create("versions/1.json", b"same") and cloud.create("versions/1.json", b"same")
    assert cloud.create("blobs/a", b"same") and not cloud.create("blobs/a", b"same")


@pytest.mark.processes
def test_a_conflict_with_a_writer_that_came_to_nothing_is_tried_again(s3, monkeypatch):
    """S3 answers 409 while another conditional put or a deletion is under way, and obstore says "already exists"."""
    conflicts = iter(range(3))

    def answer(visit: Visit) -> None:
        if visit.command == "PUT" and next(conflicts, None) is not None:
            visit.body()
            visit.complain(409, "ConditionalRequestConflict")
        else:
            visit.forward(s3.endpoint)()

    with serving(answer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        store = open_object_store(s3.new_uri())
        assert store.create("versions/1.json", b"mine") is True
        assert store.read("versions/1.json", 100) == b"mine"
    assert next(conflicts, None) is None


@pytest.mark.parametrize(
    ("uri", "condition", "refusal"),
    [
        ("s3://prompts/a", ("If-None-Match", "*"), (412, "PreconditionFailed")),
        ("gs://prompts/a", ("x-goog-if-generation-match", "0"), (412, "PreconditionFailed")),
        ("az://prompts/a", ("If-None-Match", "*"), (409, "BlobAlreadyExists")),
    ],
)
@pytest.mark.processes
def test_every_cloud_is_asked_to_create_only_what_is_absent(s3, probed, elsewhere, uri, condition, refusal):
    asked = []

    def answer(visit: Visit) -> None:
        if visit.command == "PUT":
            asked.append((visit.headers.get(condition[0]), visit.body()))
            visit.complain(*refusal)
        else:
            visit.say(200, b"others", ETag='"x"', Last_Modified=GMT)

    with serving(answer) as server:
        elsewhere(server)
        assert open_object_store(uri).create("versions/1.json", b"mine") is False
    assert asked == [(condition[1], b"mine")]


GMT = "Mon, 01 Jan 2024 00:00:00 GMT"


@pytest.mark.processes
def test_a_gigabyte_above_the_limit_is_not_downloaded(s3, monkeypatch):
    sent = []

    def answer(visit: Visit) -> None:
        visit.send_response(200)
        for name, value in {"Content-Length": str(2**30), "ETag": '"x"', "Last-Modified": GMT}.items():
            visit.send_header(name, value)
        visit.end_headers()
        try:
            for _ in range(2**10):
                visit.wfile.write(bytes(2**20))
                sent.append(2**20)
        except OSError:
            visit.close_connection = True

    with serving(answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        with pytest.raises(BankError, match="1,073,741,824 bytes, above the limit of 100"):
            open_object_store("s3://prompts").read("versions/1.json", 100)
        time.sleep(0.2)
    assert sum(sent) < 2**25


@pytest.mark.processes
def test_a_body_that_breaks_off_is_fetched_on(s3, monkeypatch):
    data = os.urandom(100_000)
    ranges = []

    def answer(visit: Visit) -> None:
        asked = visit.headers.get("Range", "bytes=0-99999")
        start, end = map(int, re.findall(r"\d+", asked))
        ranges.append(start)
        part = {"Content_Range": f"bytes {start}-{end}/100000"} if "Range" in visit.headers else {}
        headers = {"Content_Length": str(end + 1 - start), "ETag": '"x"', "Last_Modified": GMT, **part}
        visit.say(206 if part else 200, data[start : start + 60_000], **headers)
        visit.close_connection = True

    with serving(answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        assert open_object_store("s3://prompts").read("a", 100_000) == data
    assert len(ranges) > 1


# Whether a store is fit


@pytest.mark.processes
def test_a_store_that_overwrites_what_it_should_only_create_is_refused_before_the_first_write(
    s3, monkeypatch, new_prompt, publish
):
    """moto without the header that it would keep to; s3rver and pys3local, tried by hand, do the same."""

    def forget_the_condition(visit: Visit) -> None:
        del visit.headers["If-None-Match"]
        visit.forward(s3.endpoint)()

    uri = s3.new_uri()
    with serving(forget_the_condition) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        for _ in range(2):  # it stays refused
            with pytest.raises(BankError, match=rf"^{uri} is refused: its store overwrites .* docs/stores\.md"):
                publish(PromptBank.open(uri, create=True), new_prompt())
        store = open_object_store(uri)
        assert not store.list_names("versions") and not store.list_names("blobs") and not store.list_names("probes")


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST.keys())
@pytest.mark.processes
def test_an_unfit_store_is_refused_although_the_probes_second_put_fails_once(s3, monkeypatch, impatient, lost):
    puts = []

    def answer(visit: Visit) -> None:
        if visit.command == "PUT":
            puts.append(visit.path)
            if len(puts) == 2:
                visit.body()
                lost(visit)  # nothing is carried out, so the first put's bytes stand
                return
        del visit.headers["If-None-Match"]
        visit.forward(s3.endpoint)()

    monkeypatch.setattr(object_store, "_RETRY_SECONDS", 5.0)
    with serving(answer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        with pytest.raises(BankError, match="its store overwrites"):
            open_object_store(s3.new_uri()).create("versions/1.json", b"mine")
    assert len(puts) == 3


@pytest.mark.processes
def test_who_may_not_write_probes_is_told_of_the_right_that_every_writer_needs(s3, monkeypatch):
    def refuse_probes(visit: Visit) -> None:
        visit.complain(403, "AccessDenied") if "/probes/" in visit.path else visit.forward(s3.endpoint)()

    with serving(refuse_probes) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        with pytest.raises(StorageError, match=r"403 AccessDenied; .* under probes/ too \(docs/stores\.md\)$"):
            open_object_store(s3.new_uri()).create("versions/1.json", b"mine")


@pytest.mark.processes
def test_a_store_is_probed_once_a_process_by_its_writers_alone(s3, monkeypatch):
    asked = []

    def answer(visit: Visit) -> None:
        if "/probes" in visit.path or "?delete" in visit.path:  # obstore deletes in bulk
            asked.append((visit.command, visit.headers.get("If-None-Match")))
        visit.forward(s3.endpoint)()

    uri = s3.new_uri()
    with serving(answer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        reader = open_object_store(uri)
        assert reader.list_names("versions") == () and not reader.exists("versions/1.json")
        assert asked == []
        with ThreadPoolExecutor(4) as pool:
            keys = [f"versions/{number}.json" for number in range(1, 9)]
            assert all(pool.map(lambda key: open_object_store(uri).create(key, b"1"), keys))
    assert [command for command, _ in asked] == ["PUT", "PUT", "GET", "POST"]
    assert [condition for command, condition in asked if command == "PUT"] == ["*", "*"]


@pytest.mark.processes
def test_who_may_not_delete_may_publish_and_the_collector_takes_the_probe(s3, monkeypatch, new_prompt, publish):
    def refuse_deletions(visit: Visit) -> None:
        visit.complain(403, "AccessDenied") if "?delete" in visit.path else visit.forward(s3.endpoint)()

    uri = s3.new_uri()
    with serving(refuse_deletions) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        assert publish(PromptBank.open(uri, create=True), new_prompt()) == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    bank = PromptBank.open(uri)
    (name,) = open_object_store(uri).list_names("probes")
    assert bank.verify().problems == () and bank.collect(dry_run=True).keys == ()
    later = time.time() + 8 * 24 * 3600
    monkeypatch.setattr("pipeline.bank.collect.time.time", lambda: later)
    assert bank.collect().keys == (f"probes/{name}",)
    assert not open_object_store(uri).list_names("probes")


@pytest.mark.processes
def test_publishers_whose_every_answer_is_lost_overwrite_nothing(s3, monkeypatch, impatient, new_prompt, publish):
    """The put of a version or a move is carried out, and then its connection is dropped, once a put and publisher."""
    puts: list[tuple[str, str | None]] = []
    lost: set[tuple[str, bytes]] = set()

    def answer(visit: Visit) -> None:
        numbered = re.search(r"(versions|aliases)/", visit.path)
        if visit.command != "PUT" or not numbered:
            visit.forward(s3.endpoint)()
            return
        puts.append((visit.path, visit.headers.get("If-None-Match")))
        body = visit.rfile.read(int(visit.headers["Content-Length"]))
        visit.rfile = io.BytesIO(body)  # type: ignore[assignment]
        reply = visit.forward(s3.endpoint)
        if (visit.path, body) in lost:
            reply()
        else:
            lost.add((visit.path, body))
            visit.hang_up()

    uri, rounds = s3.new_uri(), 6
    monkeypatch.setattr(object_store, "_RETRY_SECONDS", 10.0)
    with serving(answer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)

        def work(me: int) -> list[int]:
            bank = PromptBank.open(uri, create=True)
            return [publish(bank, new_prompt(f"p{me}-{number}")) for number in range(rounds)]

        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(work, range(2)))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert sorted(got[0] + got[1]) == list(range(1, 2 * rounds + 1))
    bank = PromptBank.open(uri)
    assert len(bank.names()) == 2 * rounds and bank.verify().problems == ()
    for me in range(2):
        for number, version in enumerate(got[me]):
            assert bank.manifest(version).prompts[f"p{me}-{number}"].tuned_in == version
    assert {condition for _, condition in puts} == {"*"} and len(lost) >= 2 * rounds


# Sentences

OPERATIONS: dict[str, Callable[[Store], Any]] = {
    "read": lambda store: store.read("versions/1.json", 100),
    "open": lambda store: store.open("versions/1.json", 100),
    "create": lambda store: store.create("versions/1.json", b"mine"),
    "renew": lambda store: store.renew("versions/1.json", b"mine"),
    "exists": lambda store: store.exists("versions/1.json"),
    "list_names": lambda store: store.list_names("versions"),
    "list_files": lambda store: store.list_files("versions"),
    "delete": lambda store: store.delete("versions/1.json"),
}


def sentence_of(operation: str, uri: str = "s3://prompts/nightly") -> str:
    """The error of an operation, which is one line and comes in time."""
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        OPERATIONS[operation](open_object_store(uri))
    assert time.monotonic() - started < 20
    sentence = str(caught.value)
    verb = {"create": "write", "renew": "write", "list_names": "list", "list_files": "list", "delete": "delete"}
    place = f"{uri}/versions" + ("" if operation.startswith("list") else "/1.json")
    assert sentence.startswith(f"cannot {verb.get(operation, 'read')} {place}: ")
    assert "\n" not in sentence and len(sentence) < 300 and "Generic" not in sentence
    return sentence.partition(f"{place}: ")[2]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.processes
def test_a_store_that_nobody_serves_is_a_sentence(s3, probed, monkeypatch, impatient, operation):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    expected = "nothing answers at http://127.0.0.1:1; check the endpoint and the network"
    assert sentence_of(operation) == expected


@pytest.mark.parametrize("operation", sorted(OPERATIONS.keys() - {"exists"}))  # its answer says nothing of buckets
@pytest.mark.processes
def test_a_bucket_that_is_not_there_is_a_sentence(s3, probed, operation):
    assert sentence_of(operation, "s3://none/nightly") == "there is no such bucket; make it, or fix the address"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.processes
def test_forbidden_is_a_sentence(s3, probed, monkeypatch, operation):
    visits = []

    def refuse(visit: Visit) -> None:
        visits.append(visit.body())
        visit.complain(403, "AccessDenied")

    with serving(refuse) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        sentence = sentence_of(operation)
    code = "" if operation == "exists" else " AccessDenied"  # there is no body to tell it
    assert sentence == f"the store answers 403{code}; check the credentials, and what they are allowed to do there"
    assert len(visits) == 1


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.processes
def test_a_store_that_fails_for_ever_is_a_sentence(s3, probed, monkeypatch, impatient, operation):
    visits = []

    def answer(visit: Visit) -> None:
        visits.append(visit.body())
        visit.complain(503, "SlowDown")

    with serving(answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        code = "" if operation == "exists" else " SlowDown"
        assert sentence_of(operation) == f"the store answers 503{code}; try again later"
    assert len(visits) > 1


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.processes
def test_a_store_that_hangs_is_a_sentence(s3, probed, monkeypatch, impatient, operation):
    over = Event()
    with serving(lambda visit: over.wait(20) and None) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        sentence = sentence_of(operation)
        over.set()
    assert sentence == f"{server} does not answer in time; check the endpoint, or try again later"


@pytest.mark.parametrize("operation", ["create", "renew"])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Visit.hang_up, "the connection to {server} breaks off; check the network, or try again later"),
        (Visit.reset, "the connection to {server} breaks off; check the network, or try again later"),
        (
            lambda visit: visit.complain(409, "ConditionalRequestConflict"),
            "the store answers 409 ConditionalRequestConflict again and again; see who else writes there",
        ),
        (
            lambda visit: visit.complain(501, "NotImplemented"),
            "the store answers 501 NotImplemented; a bank needs a store that can create an object only if it is absent",
        ),
        (
            lambda visit: visit.complain(400, "AuthorizationHeaderMalformed"),
            "the store answers 400 AuthorizationHeaderMalformed; check the endpoint, the region and the bucket",
        ),
        (lambda visit: visit.say(301), "the bucket is in another region; set AWS_REGION"),
        *(
            (
                lambda visit, status=status: visit.say(status, b"<!DOCTYPE HTML>"),
                f"{{server}} answers {status} as no object store does; fix the endpoint (AWS_ENDPOINT_URL)",
            )
            for status in (404, 405, 501)
        ),
    ],
)
@pytest.mark.processes
def test_other_refusals_of_a_write_are_sentences(s3, probed, monkeypatch, impatient, operation, answer, expected):
    def refuse_writes(visit: Visit) -> None:
        visit.body()
        answer(visit) if visit.command == "PUT" else visit.complain(404, "NoSuchKey")

    with serving(refuse_writes) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        assert sentence_of(operation) == expected.format(server=server)


@pytest.mark.processes
def test_a_host_without_an_address_is_a_sentence(s3, monkeypatch, impatient):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://bank.invalid")
    monkeypatch.setenv("NO_PROXY", "bank.invalid")  # a proxy would say something else
    assert sentence_of("read") == "the host of http://bank.invalid is not known; check the endpoint and the network"


@pytest.mark.parametrize(
    ("uri", "allow"),
    [("s3://a/b", "AWS_ALLOW_HTTP"), ("gs://a/b", "GOOGLE_ALLOW_HTTP"), ("az://a/b", "AZURE_ALLOW_HTTP")],
)
@pytest.mark.processes
def test_plain_http_that_was_not_allowed_is_a_sentence_for_its_cloud(s3, elsewhere, monkeypatch, uri, allow):
    elsewhere(s3.endpoint)
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    expected = f"{s3.endpoint} is plain http; set {allow}=true to allow it, or name an https:// endpoint"
    assert sentence_of("read", uri) == expected
    with pytest.raises(StorageError) as caught:
        open_object_store(uri).read("a", 1)
    assert not isinstance(caught.value, UnreachableError)  # to wait would not help
    monkeypatch.setenv(allow, "true")
    assert "plain http" not in str(outcome(lambda: open_object_store(uri).read("a", 1)))


def outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (BankError, StorageError) as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["s3://prompts/a", "gs://prompts/a", "az://prompts/a"])
@pytest.mark.processes
def test_a_web_server_is_told_from_a_store(s3, elsewhere, tmp_path, uri):
    """Python's own: it answers 404 with a page to GET, 404 to HEAD and 501 to PUT."""
    names = {"s": "AWS_ENDPOINT_URL", "g": "GOOGLE_BASE_URL", "a": "AZURE_STORAGE_ENDPOINT"}
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        host = f"http://127.0.0.1:{server.server_port}"
        elsewhere(host)
        store = open_object_store(uri)
        for operation, status in {"read": 404, "list_names": 404, "create": 501}.items():
            told = f": {host} answers {status} as no object store does; fix the endpoint ({names[uri[0]]})"
            with pytest.raises(StorageError, match=re.escape(told)):
                OPERATIONS[operation](store)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.processes
def test_a_server_without_tls_under_https_is_a_sentence(s3, monkeypatch, impatient):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint.replace("http:", "https:"))
    assert "does not speak TLS that can be trusted; check its certificate" in sentence_of("read")


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "both"])
@pytest.mark.processes
def test_missing_credentials_are_a_sentence(s3, monkeypatch, impatient, missing):
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if missing == "both" else (missing,):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError) as caught:
        open_object_store("s3://prompts/nightly").list_names("versions")
    sentence = str(caught.value)
    assert ": no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, " in sentence
    assert "\n" not in sentence and "Generic" not in sentence


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://host/folder",
        "http://host/folder",
        "https://host/folder",
        "memory:///",
        "s3://",
        "s3:///folder",
        "gs://",
        "az://container/folder",  # without an account
        "s3://bucket/../other",
        "s3://bucket/./a",
        "s3://bucket/a//b",
        "s3://bucket/%2e%2e/other",
        "s3://bucket/a?region=x",
        "s3://bucket/a#b",
        "s3://key:secret@bucket/a",
    ],
)
@pytest.mark.processes
def test_an_address_that_cannot_be_is_refused_and_told_what_can(s3, monkeypatch, uri):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(BankError) as caught:
        open_store(uri, create=False)
    sentence = str(caught.value)
    assert sentence.startswith(f"the bank's address {hide_credentials(uri)!r} is refused (")
    assert "s3://bucket/folder, gs://bucket/folder, az://container/folder" in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket",
        "s3://bucket/a/b/",
        "gs://bucket/a",
        "az://container/a",
        "azure://container/a",
        "abfs://container@account.dfs.core.windows.net/a",
        "https://bucket.s3.eu-west-1.amazonaws.com/a",
    ],
)
@pytest.mark.processes
def test_every_cloud_has_an_address(s3, monkeypatch, uri):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    store = open_store(uri, create=True)
    assert isinstance(store, ObjectStore) and store.where("a") == f"{uri.rstrip('/')}/a"


@pytest.mark.processes
def test_an_endpoint_without_a_scheme_is_refused(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(BankError, match=r"AWS_ENDPOINT_URL is '127\.0\.0\.1:9000', and must begin with https:// or"):
        open_object_store("s3://prompts")


def test_without_obstore_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    monkeypatch.delitem(sys.modules, "pipeline.bank.object_store")
    with pytest.raises(BankError) as caught:
        open_store("s3://prompts", create=True)
    assert str(caught.value) == "object stores need one more package: pip install 'promptbank[cloud]'"
    monkeypatch.undo()
    assert importlib.import_module("pipeline.bank.object_store") is object_store


FORKING = """
import os, signal, sys
from pipeline.bank.access import open_store
from pipeline.errors import StorageError
opened = open_store(sys.argv[1], create=True)
if os.fork() == 0:
    signal.alarm(10)
    opened.create("before", b"1")  # nothing was asked before the fork
    os._exit(0)
assert os.wait()[1] == 0
opened.create("after", b"1")
for again in (lambda: opened, lambda: open_store(sys.argv[1], create=True)):
    if os.fork() == 0:
        signal.alarm(10)
        try:
            again().read("after", 1)
        except StorageError as error:
            print(error, flush=True)
            os._exit(0)
        os._exit(1)
    assert os.wait()[1] == 0
print(opened.read("before", 1))
"""


@pytest.mark.processes
def test_a_forked_process_is_told_so_instead_of_hanging(s3):
    process = start(FORKING, s3.new_uri())
    out, _ = process.communicate(timeout=60)
    *told, last = out.splitlines()
    assert process.returncode == 0 and last == "b'1'"
    assert len(told) == 2 and all("when this process was forked, and cannot be used in it" in line for line in told)


@pytest.mark.slow
@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.processes
def test_a_dead_store_holds_a_reader_for_less_than_a_minute(s3, monkeypatch, silent):
    over = Event()
    with serving(lambda visit: over.wait(100) and None) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server if silent else "http://127.0.0.1:1")
        started = time.monotonic()
        with pytest.raises(StorageError):
            open_object_store("s3://prompts").read("versions/1.json", 100)
        over.set()
    assert time.monotonic() - started < 60
