"""Ranks of one machine read each other's weights from memory, where gloo would send them through a socket.

Frozen weights make this simple. A piece is written once, before anybody reads it, so no rank ever waits for another.
The system copies what is read, and nothing is mapped: a rank's resident memory holds its own pieces alone.
"""

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class NodeMemory:
    """A rank's pieces in an anonymous memory file, which is freed when the last process that has it open ends."""

    own: FileIO
    everyones: Sequence[FileIO]
    """The files of all ranks, by rank. Ranks write their pieces in the same order, so an offset holds for all."""
    _offsets: dict[int, int] = field(default_factory=dict)
    """Where a piece is in its file, by its address in memory."""

    def keep(self, piece: Tensor) -> Tensor:
        """Put a flat piece of a matrix into this rank's file; every rank must keep one of the same size now."""
        # Mapped areas begin at whole pages.
        offset, size = os.fstat(self.own.fileno()).st_size, piece.nbytes
        self.own.truncate(offset + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        kept = torch.frombuffer(mmap.mmap(self.own.fileno(), size, offset=offset), dtype=piece.dtype).copy_(piece)
        self._offsets[kept.data_ptr()] = offset
        return kept

    def holds(self, piece: Tensor) -> bool:
        """Whether `keep` returned this very tensor; the answer is the same on every rank."""
        return piece.data_ptr() in self._offsets

    def gather(self, piece: Tensor, whole: Tensor) -> None:
        """Fill `whole` (flat) with the parts of all ranks; `piece` is this rank's part."""
        offset = self._offsets[piece.data_ptr()]
        for file, place in zip(self.everyones, whole.chunk(len(self.everyones)), strict=True):
            data, read = place.view(torch.uint8).numpy().data, 0
            while read < len(data):
                got = os.preadv(file.fileno(), [data[read:]], offset + read)  # 2 GiB at most
                assert got > 0, "a rank's memory file is shorter than this rank's own"
                read += got


def join_node_memory() -> NodeMemory | None:
    """Memory that all ranks can read; None where they are not all on one machine, or may not open each other's files.

    Every rank of torch.distributed must call this. All of them get one, or none does.
    """
    own = FileIO(os.memfd_create("partitions"), "r+")
    here = _BOOT.read_text(), os.getpid(), own.fileno(), os.fstat(own.fileno()).st_ino
    everyones = [here] * dist.get_world_size()
    dist.all_gather_object(everyones, here)
    opened = [_open(*file) if boot == here[0] else None for boot, *file in everyones]
    missing = torch.tensor([float(None in opened)])
    dist.all_reduce(missing)
    return None if missing else NodeMemory(own, [file for file in opened if file is not None])


def _open(process: int, descriptor: int, inode: int) -> FileIO | None:
    """Another process's memory file; None where the system refuses, or the number is another container's process."""
    with suppress(OSError):
        file = FileIO(f"/proc/{process}/fd/{descriptor}")
        if os.fstat(file.fileno()).st_ino == inode:
            return file
    return None
