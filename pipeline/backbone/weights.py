"""Weights read some rows of a tensor at a time, so that no process ever holds the whole model."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.backbone.files import UNQUANTISED, ModelFiles, quantization_of
from pipeline.backbone.weight_files import weight_files
from pipeline.errors import BackboneError

_PIECE = 2**22
"""Entries that are read at a time for a digest."""
_MOST_READERS = 8
_OF_MATRICES = ("weight_scale_inv", "weight_scale", "weight.absmax", "SCB")
"""What is stored beside a quantised matrix, in place of `weight`."""


class Read(Protocol):
    def __call__(self, name: str, first: int = 0, last: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class WeightSource:
    """Tensors by the name under which they are stored."""

    origin: str
    names: frozenset[str]
    shape: Callable[[str], tuple[int, ...]]
    read: Read
    """Name -> the tensor as stored (GGUF: dequantised to float32), or its rows from `first` up to `last`."""
    stored: Callable[[str], Iterator[Any]]
    """Name -> the tensor's stored bytes, piece by piece, for a digest."""
    reads_rows: bool
    """Whether reading some rows costs less than reading the whole tensor."""
    whole: frozenset[str] = frozenset()
    """Names of tensors of which this is not so."""


def open_weights(files: ModelFiles, skeleton: nn.Module) -> WeightSource:
    """Open a model's weights; `skeleton` (on the meta device) maps GGUF's names to transformers'.

    Raises: BackboneError when a file is damaged.
    """
    if files.gguf:
        from pipeline.backbone.gguf_weights import open_gguf  # which needs the types above

        return open_gguf(files, skeleton)
    source = _open_safetensors(files)
    settings = quantization_of(files)
    if not settings:
        _check_floats(source)
        return source
    from pipeline.backbone.quantised import dequantised  # which needs the types above

    return dequantised(source, settings)


def _check_floats(source: WeightSource) -> None:
    """Raises: BackboneError for scales of quantised matrices, which would be passed over without a word."""
    stems = {name.removesuffix("weight") for name in source.names if name.endswith(".weight")}
    scale = next((f"{stem}{end}" for end in _OF_MATRICES for stem in stems if f"{stem}{end}" in source.names), None)
    if scale:
        raise BackboneError(
            f"{source.origin}: the weights hold '{scale}', so they are quantised, but config.json has no "
            f"quantization_config that tells how; {UNQUANTISED}"
        )


def weights_digest(source: WeightSource) -> str:
    """Digest of every tensor's name and stored bytes, whatever files they are in. Tensors are read in parallel."""
    total = hashlib.sha256()
    names = sorted(source.names)
    with ThreadPoolExecutor(min(_MOST_READERS, os.cpu_count() or 1)) as pool:
        for name, digest in zip(names, pool.map(lambda name: _digest(source.stored(name)), names), strict=True):
            total.update(f"{name}\0".encode())
            total.update(digest)
    return total.hexdigest()


def _digest(pieces: Iterator[Any]) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def same_bytes(source: WeightSource, names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether the first tensors have the stored bytes of the others, one by one."""
    return len(names) == len(others) and all(
        name == other or _digest(source.stored(name)) == _digest(source.stored(other))
        for name, other in zip(names, others, strict=True)
    )


@dataclass(frozen=True)
class _Stored:
    """Where a safetensors file keeps a tensor."""

    file: BinaryIO
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """Read into memory of our own: of a mapped file, every page that was read would count as this process's."""
        stop = self.shape[0] if last is None and self.shape else last
        tensor = torch.empty(self.shape if stop is None else (stop - first, *self.shape[1:]), dtype=self.dtype)
        start = self.offset + first * math.prod(self.shape[1:]) * self.dtype.itemsize
        left = tensor.view(-1).view(torch.uint8).numpy().data
        while left:
            count = os.preadv(self.file.fileno(), [left], start)
            if count == 0:
                raise BackboneError(f"{self.file.name} became shorter while it was read; fetch the model again")
            left, start = left[count:], start + count
        return tensor


_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
}


def _open_safetensors(files: ModelFiles) -> WeightSource:
    stored: dict[str, _Stored] = {}
    for path in weight_files(files.folder, files.name):
        try:
            with safe_open(path, framework="pt"):  # checks the header against the file
                stored.update(_stored_in(path))
        except (SafetensorError, OSError) as error:
            raise BackboneError(f"{path} is damaged or incomplete ({error}); fetch the model again") from error
        except KeyError as error:
            raise BackboneError(
                f"{path} holds numbers of the type {error}, as only quantised weights do; {UNQUANTISED}"
            ) from error

    def read(name: str, first: int = 0, last: int | None = None) -> Tensor:
        return stored[name].read(first, last)

    def pieces(name: str) -> Iterator[Any]:
        shape = stored[name].shape
        rows = shape[0] if shape else 1
        step = max(1, _PIECE // max(1, math.prod(shape[1:])))
        for first in range(0, rows, step):
            tensor = stored[name].read(first, min(first + step, rows)) if shape else stored[name].read()
            yield tensor.view(-1).view(torch.uint8).numpy()

    return WeightSource(
        str(files.folder), frozenset(stored), lambda name: stored[name].shape, read, pieces, reads_rows=True
    )


def _stored_in(path: Path) -> dict[str, _Stored]:
    """Read the header. The format is: the header's size in 8 bytes, the header in JSON, the tensors' bytes."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed with the source that holds it)
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(os.pread(file.fileno(), size, 8))
    header.pop("__metadata__", None)
    return {
        name: _Stored(file, _TYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }
