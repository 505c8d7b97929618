"""Tell which files of a folder are Parquet, whatever their names, and how to convert one that is not."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from pyarrow import fs

_MAGIC = (b"PAR1", b"PARE")
_LOOKERS = 16
# Endings of copies that are not meant to be read, and of files that are not complete yet.
_ASIDE = r"(bak|backup|old|orig|tmp|temp|part|partial|inprogress|crdownload|copy|save|swp|crc)"
# Only behind .parquet is `_part1` such an ending: without it, it names one part of the data.
_SET_ASIDE = re.compile(rf"(~|\.{_ASIDE}|\.(parquet|parq|pqt?)[_-]{_ASIDE})\d*$")
# Endings that say what a file is, so that a store is not asked for the first bytes of thousands of files.
_OTHER = re.compile(
    r"\.(jsonl?|ndjson|[ct]sv|txt|text|md|rst|html?|xml|ya?ml|toml|py|ipynb|sql|log|pdf|png|jpe?g|gif|arrow|feather|ipc|orc"
    r"|avro|lance|zip|tar|tgz|xlsx?|safetensors|npy|npz)(\.(gz|bz2|zst|xz))?$"
)
_STREAM = "Arrow IPC", "pyarrow.ipc", "pyarrow.ipc.open_stream({file!r}).read_all()"
# What `tables.text_files` reads.
_TEXT = r"(jsonl|ndjson|json|csv|tsv)(\.(gz|bz2|zst|lz4))?"
# Ending of the name, beginning of the content, and what the file then is; the first that matches counts.
_CONVERSIONS = (
    (r"json(\.gz)?", rb"\[", "JSON", "json", "pyarrow.Table.from_pylist(json.load(pyarrow.input_stream({file!r})))"),
    # Hugging Face's `datasets` write streams and polars files, under one ending.
    (r"feather|ipc|arrow", b"ARROW1|FEA1", "Arrow IPC", "pyarrow.feather", "pyarrow.feather.read_table({file!r})"),
    (r"feather|ipc|arrow", b"", *_STREAM),
    (r"orc", b"", "ORC", "pyarrow.orc", "pyarrow.orc.read_table({file!r})"),
)


def parquet_among(filesystem: fs.FileSystem, paths: Sequence[str]) -> list[str]:
    """The `paths` that are Parquet, by the ending `.parquet` or by the first four bytes."""
    named = [path for path in paths if path.endswith(".parquet")]
    others = {path: path.rpartition("/")[2].lower() for path in paths if not path.endswith(".parquet")}
    asked = [path for path, name in others.items() if not (_SET_ASIDE.search(name) or _OTHER.search(name))]
    with ThreadPoolExecutor(_LOOKERS) as lookers:
        begins = list(lookers.map(lambda path: _begins_as_parquet(filesystem, path), asked))
    return named + [path for path, is_parquet in zip(asked, begins, strict=True) if is_parquet]


def conversion(path: str) -> str | None:
    """How to convert the file to Parquet, if its name says what it is, as the end of a sentence."""
    for ending, begins, name, module, read in _CONVERSIONS:
        found = re.search(rf"\.({ending})$", path, re.IGNORECASE)
        if found and re.match(begins, _beginning(path)):
            to = path[: found.start()].rpartition("/")[2] + ".parquet"
            code = f"import {module}, pyarrow.parquet; pyarrow.parquet.write_table({read.format(file=path)}, {to!r})"
            return f"it is {name} by its name, so convert it with Python: {code}"
    return None


def looks_like_data(path: str) -> bool:
    """Whether the name is that of a data file in another format, or of a Parquet file, set aside or not."""
    endings = "|".join([_TEXT, *(ending for ending, *_ in _CONVERSIONS)])
    return re.search(rf"\.(({endings})$|(parquet|parq|pqt?)(?![a-z]))", path, re.IGNORECASE) is not None


def _beginning(path: str) -> bytes:
    """The first bytes of a local file, decompressed and without white space; none for a file in a store."""
    try:
        with pa.input_stream(path) as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (pa.ArrowException, OSError):
        return b""


def _begins_as_parquet(filesystem: fs.FileSystem, path: str) -> bool:
    try:
        with filesystem.open_input_file(path) as file:
            return file.read(4) in _MAGIC
    except (pa.ArrowException, OSError):
        return True  # do not leave it out silently: reading its footer will say what is wrong
