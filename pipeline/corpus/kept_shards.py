"""Token shards of single source files, kept beside the shard folders, so that a corpus that grew is not tokenised anew.

A shard folder and this store hold the same files by hard links. So each folder is complete by itself and may be
removed at any time, and a shard takes its room once. A shard that no folder has any more is removed by the next build.
Where a file system has no hard links nothing is kept, and a corpus that changed is tokenised as a whole.
"""

import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.corpus.reader import known_digest
from pipeline.corpus.tally import EMPTY_TALLY, ShardTally
from pipeline.corpus.writing import SHARDS
from pipeline.sealed_files import DamagedError, open_json, sealed_json


@dataclass(frozen=True)
class FileShards:
    """The shards of one source file, or of several together."""

    digests: Mapping[str, str] = field(default_factory=dict)
    """By name."""
    tally: ShardTally = EMPTY_TALLY

    def __add__(self, other: "FileShards") -> "FileShards":
        return FileShards({**self.digests, **other.digests}, self.tally + other.tally)


NO_SHARDS = FileShards()


@dataclass(frozen=True)
class KeptShards:
    folder: Path

    def link(self, key: str, folder: Path) -> FileShards | None:
        """Put the shards of a source file into a folder, by its key; None where they are not there whole."""
        try:
            kept = open_json(self._record(key).read_bytes(), ())
            for name, digest in kept["digests"].items():
                if known_digest(self.folder / name) != digest:
                    return None
            for name in kept["digests"]:
                os.link(self.folder / name, folder / name)
        except (OSError, DamagedError):
            return None
        return FileShards(kept["digests"], ShardTally.from_dict(kept["tally"]))

    def keep(self, key: str, folder: Path, shards: FileShards) -> None:
        """Keep the shards of a source file that are in a folder, if hard links are possible. Raises: OSError."""
        self.folder.mkdir(exist_ok=True)
        try:
            for name in shards.digests:
                os.link(folder / name, self.folder / name)
        except OSError:
            return
        content = {"digests": dict(shards.digests), "tally": shards.tally.to_dict()}
        temporary = self.folder / f".{uuid.uuid4().hex}"
        temporary.write_bytes(sealed_json(content))
        temporary.replace(self._record(key))

    def remove_unused(self) -> None:
        """Remove shards that no folder has, and the records of those."""
        for shard in self.folder.glob(SHARDS):
            with suppress(OSError):  # another builder removes it just now
                if shard.stat().st_nlink == 1:
                    shard.unlink()
                    self._record(shard.name.partition("-")[0]).unlink(missing_ok=True)

    def _record(self, key: str) -> Path:
        return self.folder / f"{key}.json"
