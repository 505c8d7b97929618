"""The libraries of the extra `[lake]`, and what an address says before any of them is asked."""

import importlib
import re
import urllib.parse
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

from pipeline.addresses import hide_credentials
from pipeline.corpus.source_files import unreadable
from pipeline.errors import CorpusError, PromptBankError
from pipeline.settings import CatalogSettings

_ADDRESS = re.compile(r"(delta|lance|iceberg)(?:\+([A-Za-z0-9]+))?://(.+)", re.DOTALL)
_NUMBER = re.compile(r"\d+")
_TIME = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?")


@dataclass(frozen=True)
class TableAddress:
    """`delta+s3://bucket/reviews@12`, taken apart."""

    kind: str
    """delta | lance | iceberg"""
    place: str
    """A path or an object store's address; for Iceberg `catalog/namespace.table`."""
    version: str | None
    """What stands behind the `@`: a number, or a time; None for the newest."""
    written: str
    """The address without its version."""

    @property
    def number(self) -> int | None:
        """The version where it is a number."""
        return int(self.version) if self.version is not None and _NUMBER.fullmatch(self.version) else None

    @property
    def moment(self) -> datetime:
        """The version where it is a time; without a zone, it is UTC."""
        return utc_moment(self.version or "")


@dataclass(frozen=True)
class Lake:
    """Iceberg's catalogs by name, and the open tables: each is opened once, so that all splits read one version.

    A table holds its log in memory; a run drops its lake when every task is planned.
    """

    catalogs: Mapping[str, CatalogSettings] = field(default_factory=dict)
    _opened: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, address: Hashable, load: Callable[[], Any]) -> Any:
        """What `load` gave for the address first. Raises: what it raises, and then the next one tries again."""
        if address not in self._opened:
            self._opened[address] = load()
        return self._opened[address]


def table_address(path: str) -> TableAddress | None:
    """The table that `path` names; None for a path of files."""
    found = _ADDRESS.fullmatch(path)
    if found is None:
        return None
    kind, store, rest = found[1], found[2], found[3]
    before, query = rest.partition("?")[::2]
    place, at, version = before.rpartition("@")
    if not at or not (_NUMBER.fullmatch(version) or _TIME.fullmatch(version)):  # a name may hold an @
        place, version = before, ""
    asked = f"?{query}" if query else ""
    prefix = f"{store}://" if store and store != "file" else ""
    written = f"{kind}{'+' + store if store else ''}://{place}{asked}"
    return TableAddress(kind, f"{prefix}{place}{asked}", version or None, written)


def utc_moment(text: str) -> datetime:
    """A time of ISO 8601; without a zone, it is UTC. Raises: ValueError."""
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def lake_library(module: str, path: str, where: str) -> ModuleType:
    """Import a library of the extra `[lake]`. Raises: CorpusError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CorpusError(
            f"{where}: {path} needs a library that is missing ({error.name or module}); install it: "
            "pip install 'promptbank[lake]'"
        ) from error


@contextmanager
def reading(address: TableAddress, where: str) -> Iterator[None]:
    """Turns what a table's library raises, of whatever kind, into our own errors."""
    try:
        yield
    except PromptBankError:
        raise
    except Exception as error:
        what = f"{where}: {address.written}{f'@{address.version}' if address.version else ''} cannot be read"
        raise unreadable(
            Exception(hide_credentials(str(error))), what, "fix the address, or name another version"
        ) from error


def storage_options(place: str) -> dict[str, str] | None:
    """What an address of pyarrow's form says behind its `?`, in the words of deltalake's and Lance's stores."""
    query = dict(urllib.parse.parse_qsl(place.partition("?")[2]))
    options = {}
    if "endpoint_override" in query:
        scheme = query.get("scheme", "https")
        options["AWS_ENDPOINT_URL"] = f"{scheme}://{query['endpoint_override']}"
        options["AWS_ALLOW_HTTP"] = str(scheme == "http").lower()
    if "region" in query:
        options["AWS_REGION"] = query["region"]
    return options or None
