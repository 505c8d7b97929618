"""A split of a dataset on the Hugging Face hub -> its files at one commit, by its card or by their names."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.corpus.files import Listed, describe_files
from pipeline.corpus.mixed_splits import SPLIT_OF, named_split
from pipeline.corpus.paths import locate, matches
from pipeline.corpus.source_files import ParquetSource, SourceFile, TableVersion, one_line
from pipeline.corpus.tables.libraries import Lake, lake_library
from pipeline.corpus.tables.text_files import has_text_name
from pipeline.errors import CorpusError, UnreachableError

_ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/(?:convert/\w+|pr/\d+)|[^/@]+))?/(\w+(?:\.\w+)*)")


@dataclass(frozen=True)
class HubSplit:
    """`hf://datasets/owner/name@revision/split`, taken apart."""

    repo: str
    revision: str | None
    split: str

    @property
    def written(self) -> str:
        """Without the revision."""
        return f"hf://datasets/{self.repo}/{self.split}"


def hub_split(path: str) -> HubSplit | None:
    """The split that `path` may name; None for other paths, and below folders."""
    found = _ADDRESS.fullmatch(path.rstrip("/"))
    return None if found is None else HubSplit(found[1], found[2], found[3])


def open_hub_split(asked: HubSplit, lake: Lake, where: str, types: Mapping[str, str]) -> ParquetSource | None:
    """The rows of a split at the newest commit, or that of the revision; None where the path names a file or a folder.

    Raises: CorpusError when there is no such dataset, revision or split; UnreachableError.
    """
    info = lake.once((asked.repo, asked.revision), lambda: _look_up(asked, where))
    files = {file.rfilename: file for file in info.siblings or ()}
    if any(name == asked.split or name.startswith(f"{asked.split}/") for name in files):
        return None
    card = info.card_data.to_dict() if info.card_data is not None else {}
    chosen = sorted(_by_card(asked.split, card, list(files)) or _by_name(asked.split, list(files)))
    if not chosen:
        known = sorted({split for name in files if (split := named_split(name.split("/"))) is not None})
        raise CorpusError(
            f"{where}: {asked.written} is neither a folder of the dataset nor a split that its card or its files' "
            f"names tell (they tell {', '.join(known) or 'none'}); fix the split, or name the files"
        )
    filesystem, root, _ = locate(f"hf://datasets/{asked.repo}@{info.sha}")
    listed = [
        Listed(f"{root}/{name}", files[name].size or 0, None, f"{root}/{name}".rpartition("/")[0]) for name in chosen
    ]
    source = describe_files(filesystem, listed, where, types)
    time = info.last_modified.isoformat(timespec="milliseconds") if info.last_modified else None
    named = tuple(_with_class_names(file, card) for file in source.files)
    return replace(source, files=named, tables=(TableVersion(asked.written, str(info.sha), None, time),))


def _look_up(asked: HubSplit, where: str) -> Any:
    lake_library("huggingface_hub", asked.written, where)
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().dataset_info(asked.repo, revision=asked.revision, files_metadata=True)
    except errors.GatedRepoError as error:
        raise CorpusError(
            f"{where}: {asked.written} asks who reads it; accept its terms on the hub, and set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CorpusError(f"{where}: {asked.written} has no revision {asked.revision!r}; fix it") from error
    except errors.RepositoryNotFoundError as error:
        raise CorpusError(
            f"{where}: there is no dataset {asked.repo} on the hub, or it is private; fix the name, or set HF_TOKEN"
        ) from error
    except Exception as error:  # httpx's errors have no common class that all of the library's versions export
        status = getattr(getattr(error, "response", None), "status_code", 500)
        if isinstance(error, CorpusError) or (status < 500 and status != 429):
            raise CorpusError(
                f"{where}: the hub refuses {asked.written} ({one_line(error)}); fix the address"
            ) from error
        raise UnreachableError(
            f"{where}: the hub does not answer for {asked.written} ({one_line(error)}); try again later"
        ) from error


def _by_card(split: str, card: Mapping[str, Any], files: Sequence[str]) -> list[str]:
    """The files that the card's default configuration gives the split."""
    configs = card.get("configs") or []
    chosen = next((one for one in configs if one.get("default") or one.get("config_name") == "default"), None)
    given = (chosen or (configs[0] if len(configs) == 1 else {})).get("data_files")
    parts = [one for one in given if one.get("split") == split] if isinstance(given, list) else []
    paths = [one["path"] if isinstance(one["path"], list) else [one["path"]] for one in parts]
    patterns = [pattern for listed in paths for pattern in listed]
    return [name for name in files if any(matches(name.split("/"), pattern.split("/")) for pattern in patterns)]


def _by_name(split: str, files: Sequence[str]) -> list[str]:
    """The data files that are named after the split, as `datasets` finds them."""
    data = [name for name in files if name.endswith(".parquet") or has_text_name(name)]
    if split in SPLIT_OF:
        found = [name for name in data if named_split(name.split("/")) == SPLIT_OF[split]]
    else:
        word = re.compile(rf"(^|[-._ 0-9/]){re.escape(split)}([-._ 0-9/]|$)")
        found = [name for name in data if word.search(name)]
    # A dataset may have the same rows twice, for people in another format.
    return [name for name in found if name.endswith(".parquet")] or found


def _with_class_names(file: SourceFile, card: Mapping[str, Any]) -> SourceFile:
    """The file with the class names of the card, where its own footer has none."""
    known = {name for name, _ in file.class_names}
    numbers = {name for name, kind in file.columns if pa.types.is_integer(kind)}
    added = [(name, names) for name, names in _card_classes(card) if name in numbers - known]
    return replace(file, class_names=(*file.class_names, *added)) if added else file


def _card_classes(card: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    told = card.get("dataset_info") or {}
    alone = told if isinstance(told, Mapping) else told[0] if len(told) == 1 else {}
    for feature in alone.get("features") or ():
        kind = feature.get("dtype")
        names = kind.get("class_label", {}).get("names") if isinstance(kind, Mapping) else None
        if isinstance(names, Mapping):
            yield feature["name"], tuple(str(names[number]) for number in sorted(names, key=int))
