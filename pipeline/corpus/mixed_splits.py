"""Refuse a path that leads to files of several splits, as in a folder of the Hugging Face hub. File names tell them."""

import re
from collections.abc import Sequence

from pipeline.corpus.paths import as_written, matches, parts_below
from pipeline.errors import CorpusError

# The words and their separators are those of `datasets.data_files`.
_WORDS = {
    "train": ("train", "training"),
    "dev": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_ANY_WORD = "|".join(sorted(SPLIT_OF, key=len, reverse=True))
_WORD = re.compile(rf"(?:^|[-._ 0-9])({_ANY_WORD})(?=[-._ 0-9]|$)", re.IGNORECASE)
_HIVE = re.compile(rf"split=({_ANY_WORD})", re.IGNORECASE)


def check_one_split(path: str, root: str, files: Sequence[str], where: str) -> None:
    """Raises: CorpusError when `files`, all found below `root` by the one `path`, are named after several splits."""
    below = [parts_below(file, root) for file in files]
    found: dict[str, list[list[str]]] = {}
    for parts in below:
        place = _split_word(parts)
        if place is not None:
            found.setdefault(SPLIT_OF[place[1].lower()], []).append(parts)
    if len(found) > 1:
        splits = [split for split in _WORDS if split in found]
        held = ", ".join(f"{len(found[split])} of {split}" for split in splits)
        fixes = ", ".join(f"{split}: {as_written(path, _glob(found[split], below))}" for split in splits)
        raise CorpusError(
            f"{where}: {path} mixes the files of several splits ({held}); give each its own: {fixes}; or list these "
            "paths to mean them together"
        )


def named_split(parts: Sequence[str]) -> str | None:
    """The split, `train`, `dev` or `test`, that a file's name or the nearest of its folders tells; None for none."""
    place = _split_word(parts)
    return None if place is None else SPLIT_OF[place[1].lower()]


def _split_word(parts: Sequence[str]) -> tuple[int, str, str] | None:
    """-> (index of the part, word, part up to the word's end) in a file's name, or in the nearest of its folders."""
    for place in reversed(range(len(parts))):
        part = parts[place]
        if place == len(parts) - 1:
            part = re.split(r"\.(?:parq|pq)", part, maxsplit=1, flags=re.IGNORECASE)[0]
        if "=" in part and not _HIVE.fullmatch(part):  # a Hive column of something else
            continue
        if found := _HIVE.fullmatch(part) or _WORD.search(part):
            return place, found[1], part[: found.end(1)]
    return None


def _glob(mine: Sequence[Sequence[str]], everything: Sequence[Sequence[str]]) -> str:
    """A glob for the files `mine` and no others; the name of the first file where no glob is exact."""
    first = mine[0]
    placed = _split_word(first)
    assert placed is not None
    place, word, begin = placed
    above = "".join(f"{part}/" for part in first[:place])
    if place == len(first) - 1:
        globs = [f"{above}{begin}*", f"**/{begin}*", f"**/*{word}*"]
    else:
        globs = [above + first[place], f"**/{first[place]}/**/*.parquet", f"**/*{word}*/**/*.parquet"]

    def fits(parts: Sequence[str], glob: str) -> bool:
        # A glob that matches a folder takes all that is in it.
        return any(matches(parts[:length], glob.split("/")) for length in range(1, len(parts) + 1))

    exact = (glob for glob in globs if [parts for parts in everything if fits(parts, glob)] == list(mine))
    return next(exact, "/".join(first))
