"""Write corpora of any size for measurements, from real sentences in new combinations, in little memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import CorpusError

_GROUP_BYTES = 5 * 2**20
_LABELS = ("positive", "negative", "neutral")
_NEW_WORDS = 20_000


def read_sentences(data: Path) -> list[str]:
    """The texts of every `data/<task>/train.parquet`. Raises: CorpusError."""
    files = sorted(data.glob("*/train.parquet"))
    if not files:
        raise CorpusError(f"{data}: there is no <task>/train.parquet; give a folder that holds some")
    return [str(text) for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]


def write_corpus(path: Path, megabytes: float, sentences: Sequence[str], pieces: int = 3) -> int:
    """Write one uncompressed Parquet file with the columns text and label; -> its number of rows.

    A text is `pieces` half sentences with a new word between them; 3 of them are about 40 tokens.
    """
    chance = np.random.default_rng(0)
    split = [sentence.split() for sentence in sentences]
    middles = [(len(words) + 1) // 2 for words in split]
    parts_of = [(words[:middle], words[middle:]) for words, middle in zip(split, middles, strict=True)]
    halves = pa.array([" ".join(half) for both in parts_of for half in both if half])
    # New words, each made of two halves: so many that a tokenizer's cache of words does not hold them all.
    known = sorted({word for words in split for word in words})
    pairs = chance.integers(len(known), size=(_NEW_WORDS, 2))
    words = pa.array([known[a][: len(known[a]) // 2 + 1] + known[b][len(known[b]) // 2 :] for a, b in pairs])
    labels = pa.array(_LABELS)
    group_rows = max(1, int(_GROUP_BYTES / (pieces * 60)))
    rows, schema = 0, pa.schema([("text", pa.string()), ("label", pa.string())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=["label"], write_statistics=False) as file:
        while path.stat().st_size < megabytes * 1e6:
            parts = [halves.take(pa.array(chance.integers(len(halves), size=group_rows))) for _ in range(pieces)]
            word = words.take(pa.array(chance.integers(len(words), size=group_rows)))
            text = pc.binary_join_element_wise(parts[0], word, *parts[1:], " ")
            label = labels.take(pa.array(chance.integers(len(labels), size=group_rows)))
            file.write_table(pa.table([text, label], schema=schema))
            rows += group_rows
    return rows
