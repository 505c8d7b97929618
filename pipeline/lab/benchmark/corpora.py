"""Corpora as token shards, written without Ray: what the tuning loop reads."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.corpus.encoding import encode_targets
from pipeline.corpus.reader import MANIFEST, SplitRef
from pipeline.corpus.rows import Recipe, tokenise_rows
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.corpus.template import parse_template
from pipeline.lab.benchmark.work import read_rows

_ROWS = 1_000
_SEPARATOR = " "


def write_token_shards(
    folder: Path, data: Path, name: str, tokenizer: Any, architecture: Any, dev_rows: int, rows: int = _ROWS
) -> TaskCorpus:
    """The first rows of `data/<name>/{train,dev}.parquet`, columns text and label. Raises: CorpusError."""
    recipe = Recipe(parse_template("{text}", ""), parse_template("{label}", ""), _SEPARATOR, 256, 16, architecture)
    splits, counts, labels = {}, {}, set()
    for split, most in (("train", rows), ("dev", dev_rows)):
        texts, found = read_rows(data / name / f"{split}.parquet", most)
        labels |= set(found)
        place = folder / name / split
        place.mkdir(parents=True)
        pq.write_table(
            tokenise_rows(recipe, tokenizer, {"text": texts, "label": found}, len(texts)), place / "part.parquet"
        )
        (place / MANIFEST).write_text(json.dumps({"files": {"part.parquet": (place / "part.parquet").stat().st_size}}))
        splits[split], counts[split] = SplitRef(str(place)), {"ok": len(texts)}
    ordered = tuple(sorted(labels))
    ids = encode_targets(tokenizer, architecture, _SEPARATOR, ordered)
    return TaskCorpus(name, splits, ordered, tuple(map(tuple, ids)), counts, f"benchmark {name}")
