"""Damaged, lying and oversized files, and names that climb out, are refused by name."""

import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from pipeline.bank import PromptBank
from pipeline.bank.sealed import seal
from pipeline.errors import BankError

PLACES = ["aliases/latest/1.json", "versions/1.json", "blobs/sha256"]


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def file_at(uri: Path, place: str) -> Path:
    path = uri / place
    return next(path.iterdir()) if path.is_dir() else path


def reseal(path: Path, change: Callable[[str], str]) -> None:
    """Change a sealed file as someone who can compute digests would."""
    body = path.read_bytes().partition(b"\n")[2]
    changed = change(body.decode()).encode()
    assert changed != body
    overwrite(path, seal(changed))
    move = path.parents[1] / "aliases/latest/1.json"
    if path.parent.name == "versions" and move.exists():
        new = hashlib.sha256(changed).hexdigest()
        reseal(move, lambda text: re.sub('"manifest":"[0-9a-f]{64}"', f'"manifest":"{new}"', text))


def replace_blob(uri: Path, data: bytes) -> Path:
    """Put `data` in place of the bank's one blob, with an honest digest in name and manifest."""
    old = file_at(uri, "blobs/sha256")
    digest = hashlib.sha256(data).hexdigest()
    new = old.with_name(f"{digest}.safetensors")
    new.write_bytes(data)
    reseal(uri / "versions/1.json", lambda text: text.replace(old.stem, digest))
    return new


@pytest.fixture
def one_prompt(bank, uri, new_prompt, publish) -> Path:
    publish(bank, new_prompt())
    return uri


@pytest.mark.parametrize("place", PLACES)
def test_one_flipped_bit_in_any_byte_is_refused_with_the_files_name(one_prompt, place):
    path = file_at(one_prompt, place)
    good = path.read_bytes()
    for at in range(len(good)):
        flipped = bytearray(good)
        flipped[at] ^= 1 << (at % 8)
        overwrite(path, bytes(flipped))
        with pytest.raises(BankError) as caught:
            PromptBank.open(one_prompt).load("sst2")
        assert str(path) in str(caught.value)
    overwrite(path, good)
    PromptBank.open(one_prompt).load("sst2")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("keep", [0, 1, 80, -1])
def test_a_truncated_file_is_refused_with_its_name(one_prompt, place, keep):
    path = file_at(one_prompt, place)
    overwrite(path, path.read_bytes()[:keep])
    with pytest.raises(BankError, match=path.name):
        PromptBank.open(one_prompt).load("sst2")


@pytest.mark.parametrize("place", PLACES)
def test_a_missing_file_is_refused_with_its_name(one_prompt, place):
    reader = PromptBank.open(one_prompt)
    file_at(one_prompt, place).unlink()
    with pytest.raises(BankError, match=r"is missing|no alias 'latest'"):
        PromptBank.open(one_prompt).load("sst2")
    if "blobs" not in place:  # what an open reader has seen, it keeps
        assert reader.load("sst2").version == 1


@pytest.mark.parametrize(("place", "size"), [("versions/1.json", 2**28 + 1), ("blobs/sha256", 2**30 + 1)])
def test_an_oversized_file_is_refused_without_reading_it(one_prompt, place, size):
    path = file_at(one_prompt, place)
    path.chmod(0o644)
    os.truncate(path, size)  # a sparse file
    with pytest.raises(BankError, match=f"{path.name} is refused: {size:,} bytes, above the limit"):
        PromptBank.open(one_prompt).load("sst2")


def header(text: dict[str, object], data: bytes = bytes(128)) -> bytes:
    encoded = json.dumps(text).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@pytest.mark.parametrize(
    "lie",
    [
        save({"prompt": np.zeros((8, 4), np.float32)}),
        save({"prompt": np.zeros((4, 8), np.float16)}),
        save({"other": np.zeros((4, 8), np.float32)}),
        save({"prompt": np.zeros((4, 8), np.float32), "more": np.zeros(1, np.float32)}),
        save({"prompt": np.zeros((4, 8), np.float32)})[:-1],
        save({"prompt": np.zeros((4, 8), np.float32)}) + b"\0",
        header({"prompt": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 2**60]}}),
        header({"prompt": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 128]}}),
        header({"prompt": {"dtype": "BF16", "shape": [8, 8], "data_offsets": [0, 128]}}),
        struct.pack("<Q", 2**60) + b"{}",
        b"\x80\x04N.",
        b"",
    ],
    ids=["shape", "dtype", "key", "more", "short", "long", "offsets", "overflow", "bf16", "length", "pickle", "empty"],
)
def test_a_blob_that_is_not_what_the_manifest_says_is_refused_with_its_name(one_prompt, lie):
    path = replace_blob(one_prompt, lie)
    with pytest.raises(BankError, match=f"{path.name} is refused"):
        PromptBank.open(one_prompt).load("sst2")


@pytest.mark.parametrize(
    ("place", "old", "new", "sentence"),
    [
        ("versions/1.json", '"version":1', '"version":2', "says that it is version 2"),
        ("versions/1.json", '"format":1', '"format":2', "upgrade the library"),
        ("versions/1.json", '"prompts":{\n', '"prompts":{', "one prompt per line"),
        ("versions/1.json", '"name":"sst2"', '"name":"cr"', "record of another"),
        ("versions/1.json", '"sst2":{', '"../x":{', "name is invalid"),
        ("versions/1.json", '"status":"tuned"', '"status":"great"', "'status'"),
        ("versions/1.json", '"digest":"', '"digest":"../../', "'digest'"),
        ("versions/1.json", '"length":4', '"length":' + "[" * 10_000, "prompt 'sst2'"),
        ("aliases/latest/1.json", '"alias":"latest"', '"alias":"prod"', "move 1 of 'prod'"),
        ("aliases/latest/1.json", '"seq":1', '"seq":2', "move 2 of 'latest'"),
        ("aliases/latest/1.json", '"version":1', '"version":"../1"', "'version'"),
    ],
)
def test_a_sealed_file_that_lies_is_refused_with_its_name(one_prompt, place, old, new, sentence):
    reseal(one_prompt / place, lambda text: text.replace(old, new))
    with pytest.raises(BankError) as caught:
        bank = PromptBank.open(one_prompt)
        bank.manifest(1)
        bank.load("sst2")
    assert str(one_prompt / place) in str(caught.value) and sentence in str(caught.value)


def test_a_manifest_that_was_replaced_under_its_alias_is_refused(one_prompt):
    path = one_prompt / "versions/1.json"
    overwrite(path, seal(path.read_bytes().partition(b"\n")[2].replace(b'"run":"nightly"', b'"run":"another"')))
    with pytest.raises(BankError, match=r"versions/1\.json is refused: .* it was replaced"):
        PromptBank.open(one_prompt)


def test_a_prompt_there_twice_is_refused(one_prompt):
    def twice(text: str) -> str:
        head, prompt, end = text.split("\n", 2)
        return "\n".join([head, prompt + ",", prompt, end])

    reseal(one_prompt / "versions/1.json", twice)
    with pytest.raises(BankError, match=r"versions/1\.json is refused: .*twice"):
        PromptBank.open(one_prompt).manifest(1)


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "", "a/b", "/etc/passwd", "a\\b", "a\n", "a\0b", ".tmp", "é", "a" * 129]
)
def test_names_that_climb_out_are_refused_with_the_name(one_prompt, name):
    bank = PromptBank.open(one_prompt)
    for refused in (
        lambda: bank.load(name),
        lambda: bank.load(f"sst2@{name}"),
        lambda: bank.alias_history(name),
        lambda: PromptBank.open(one_prompt, alias=name),
    ):
        with pytest.raises(BankError) as caught:
            refused()
        assert repr(name) in str(caught.value)


def test_a_damaged_bank_is_not_published_to(one_prompt, new_prompt, publish):
    """Otherwise a new version would descend from a manifest, or share a blob, that nobody can read."""
    for place in PLACES:
        path = file_at(one_prompt, place)
        good = path.read_bytes()
        overwrite(path, good[:-3] + b"x" + good[-2:])
        before = sorted(one_prompt.rglob("*"))
        with pytest.raises(BankError, match=f"{path.name} is damaged"):
            publish(PromptBank.open(one_prompt, alias="new", create=True), new_prompt(steps=9))
        assert sorted(one_prompt.rglob("*")) == before
        overwrite(path, good)


def test_leftovers_of_a_killed_publisher_are_no_content(one_prompt):
    for folder in (*one_prompt.rglob("*"), one_prompt):
        if folder.is_dir():
            (folder / ".0123.tmp").write_bytes(b"half")
    for stray in ("versions/2.json.bak", "versions/02.json", "versions/x.json", "aliases/latest/9.txt"):
        (one_prompt / stray).write_text("{}")
    bank = PromptBank.open(one_prompt)
    assert (bank.version, bank.versions(), bank.aliases()) == (1, (1,), {"latest": 1})


def _make_fifo(path: Path) -> None:
    os.mkfifo(path)


def _make_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listening:  # its address may have 108 bytes
        listening.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def _make_dead_link(path: Path) -> None:
    path.symlink_to("nowhere")


def _make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def _make_device_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


OTHERS = {
    "a FIFO": _make_fifo,
    "a folder": Path.mkdir,
    "a socket": _make_socket,
    "a device": _make_device_link,
    "a link that leads nowhere": _make_dead_link,
    "a link in a circle": _make_loop,
}

LOOK = """
import json, sys
from pipeline.bank import PromptBank
from pipeline.errors import BankError
from tests.bank.conftest import make_prompt, publish

def told(look):
    try:
        return repr(look(PromptBank.connect(sys.argv[1])))
    except BankError as error:
        return str(error)

print(json.dumps({
    "problems": PromptBank.connect(sys.argv[1]).verify().problems,
    "ls": told(lambda bank: bank.aliases()),
    "log": told(lambda bank: [bank.manifest(number) for number in bank.versions()]),
    "load": told(lambda bank: bank.load("sst2@1")),
    "publish": told(lambda bank: publish(bank, make_prompt("sst2"), make_prompt("cr"))),
    "collect": told(lambda bank: bank.collect()),
}))
"""


def look_at(uri: Path) -> dict[str, Any]:
    """What a process of its own is told of a bank by each operation; it may not hang."""
    command = [sys.executable, "-c", LOOK, str(uri)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.processes
def test_what_is_no_file_is_refused_by_name_and_kind_and_holds_nobody_up(one_prompt, place, kind):
    path = file_at(one_prompt, place)
    path.unlink()
    OTHERS[kind](path)
    told = look_at(one_prompt)
    shown = "a link that leads nowhere" if kind == "a link in a circle" else kind
    refused = f"{path} is refused: it is {shown}"
    assert [problem.startswith(refused) for problem in told["problems"]] == [True]
    for look in {"a": ["ls", "publish"], "v": ["log", "load", "collect"], "b": ["load", "publish"]}[place[0]]:
        assert told[look].startswith(refused), look


def test_a_link_to_a_file_is_read_as_the_file(one_prompt, tmp_path):
    for place in PLACES:
        path = file_at(one_prompt, place)
        path.symlink_to(path.rename(tmp_path / path.name.replace("1", place[0])))
    assert PromptBank.open(one_prompt).load("sst2").version == 1
    assert PromptBank.open(one_prompt).verify().problems == ()


@pytest.mark.processes
def test_what_is_no_folder_in_an_aliass_place_is_listed(one_prompt):
    _make_fifo(one_prompt / "aliases" / "stable")
    told = look_at(one_prompt)
    assert told["problems"] == [f"{one_prompt}/aliases/stable is refused: it is not a folder; remove it"]


def test_an_empty_folder_is_no_alias(one_prompt):
    """A publisher makes it before the move, for which its disk then had no room."""
    (one_prompt / "aliases" / "stable").mkdir()
    bank = PromptBank.open(one_prompt)
    assert bank.aliases() == {"latest": 1}
    assert bank.verify().aliases == 1 and bank.verify().problems == ()
    with pytest.raises(BankError, match="has no alias 'stable'; known: latest"):
        PromptBank.open(one_prompt, "stable")


@pytest.mark.parametrize("kind", ["a FIFO", "a folder"])
@pytest.mark.processes
def test_what_is_no_file_in_the_cache_is_passed_over(one_prompt, tmp_path, kind):
    cache = tmp_path / "cache"
    PromptBank.open(one_prompt, cache=cache).load("sst2")
    for path in [path for path in cache.rglob("*") if path.is_file()]:
        path.unlink()
        OTHERS[kind](path)
    code = "import sys; from pipeline.bank import PromptBank as B; B.open(sys.argv[1], cache=sys.argv[2]).load('sst2')"
    command = [sys.executable, "-c", code, str(one_prompt), str(cache)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], timeout=60).returncode == 0
