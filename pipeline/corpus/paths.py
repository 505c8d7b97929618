"""A corpus path as a user writes it -> a file system, the path's fixed part in it, and a glob below that."""

import fnmatch
import os
import re
from collections.abc import Sequence

from pyarrow import fs

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# Hadoop's names for schemes that Arrow knows by another name.
_SAME = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
_AZURE = ("az", "abfs", "abfss", "azure", "adl")
_ARROWS = ("file", "s3", "gs", "abfs", "abfss", "hdfs", "viewfs", "hf", "mock")
_SCHEMES = (
    "a path or file://, s3:// or s3a://, gs://, az://container/… or abfs://container@account/…, hdfs://, "
    "hf://datasets/owner/name/…"
)


def locate(path: str) -> tuple[fs.FileSystem, str, str | None]:
    """-> file system, the path's fixed part in it, and the glob pattern below that (None without wildcards).

    Raises: ValueError, OSError or Arrow's own errors for an impossible address.
    """
    address = _SCHEME.fullmatch(path)
    if address:
        return _open(address[1].lower(), address[2])
    local = os.path.abspath(os.path.expanduser(path))
    if os.path.exists(local):  # a name may hold brackets without being a pattern
        return fs.LocalFileSystem(), local, None
    return fs.LocalFileSystem(), *_split_glob(local, "*[?")


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Glob match part by part; `**` stands for any number of folders, none included.

    A `*` at a part's beginning skips names that begin with `.` or `_`, as reading a folder does; `?` and `[…]` do not.
    """
    if not pattern:
        return not parts
    if pattern[0] == "**":
        shown = next((at for at, part in enumerate(parts) if part[:1] in "._"), len(parts))
        return any(matches(parts[skip:], pattern[1:]) for skip in range(shown + 1))
    if not parts or (parts[0][:1] in "._" and pattern[0][:1] == "*"):
        return False
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def as_written(path: str, below: str) -> str:
    """The file or glob `below` the fixed part of a user's `path`, as the user would write it."""
    address, question, query = path.partition("?") if "://" in path else (path, "", "")
    first = min((address.index(mark) for mark in "*[?" if mark in address), default=None)
    fixed = address if first is None or os.path.exists(os.path.expanduser(path)) else address[:first].rpartition("/")[0]
    return f"{fixed.rstrip('/')}/{below}{question}{query}"


def _open(scheme: str, rest: str) -> tuple[fs.FileSystem, str, str | None]:
    scheme = _SAME.get(scheme, scheme)
    if scheme not in (*_ARROWS, *_AZURE):
        raise ValueError(f"{scheme}:// is none of the addresses that corpora are read from: {_SCHEMES}")
    named, question, query = rest.partition("?")
    if scheme != "file" and not named.strip("/"):
        raise ValueError("the address names no bucket, container or host")
    fixed, pattern = _split_glob(named, "*[")
    if scheme in _AZURE and not question:
        azure = _azure(scheme, fixed)
        if azure is not None:
            return *azure, pattern
    arrows = "abfs" if scheme in _AZURE and scheme != "abfss" else scheme
    filesystem, inside = fs.FileSystem.from_uri(f"{arrows}://{fixed}{question}{query}")
    return filesystem, inside, pattern


def _azure(scheme: str, address: str) -> tuple[fs.FileSystem, str] | None:
    """An address in a bank's form, `az://container/folder` or `abfs://container@account/folder`; None for Arrow's own.

    The account's key comes from the environment variables that the bank reads, too.
    """
    head, slash, folder = address.partition("/")
    container, at, host = head.partition("@")
    if not at and "." in container:  # Arrow's own form, host first
        return None
    account = host.partition(".")[0] or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    if not account:
        raise ValueError(f"{scheme}://{container} names no account; set AZURE_STORAGE_ACCOUNT_NAME")
    if "." in host and not re.fullmatch(r"[^.]+\.(dfs|blob)\.core\.windows\.net", host):
        return None
    key, token = os.environ.get("AZURE_STORAGE_ACCOUNT_KEY"), os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    secret = {"account_key": key} if key else {"sas_token": token} if token else {}
    return fs.AzureFileSystem(account, **secret), f"{container}{slash}{folder}".rstrip("/")


def _split_glob(path: str, wildcards: str) -> tuple[str, str | None]:
    first = min((path.index(mark) for mark in wildcards if mark in path), default=None)
    if first is None:
        return path, None
    cut = path.rfind("/", 0, first)
    if cut < 0:
        raise ValueError("a wildcard stands where the bucket or host must be; name that in full")
    return path[:cut] or "/", path[cut + 1 :]


def parts_below(path: str, root: str) -> list[str]:
    """The parts of a path below `root`, which is one of the folders above it."""
    return path[len(root) :].strip("/").split("/")
