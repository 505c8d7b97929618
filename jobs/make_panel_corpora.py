#!/usr/bin/env python
"""Make what the panels of docs/comparison.md need: plain text for small encoder-decoders, a tokenizer, and a task.

    python jobs/make_panel_corpora.py ../shared/data runs/panels/text

Writes, from the inputs of labelled corpora,

- `text.parquet`: each input of each train split once, without inputs that are in a test split, whatever their label;
- `tokenizer/`: a unigram tokenizer, trained on that text;
- `origin/train.parquet`, `origin/test.parquet`: a task that frozen models of a few million weights can do, namely which
  corpus a text comes from (ORIGINS); each label has equally many rows.

A folder that is there already is left as it is.
"""

import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.whole_files import put_in_place

# The corpora that `origin` tells apart, with the labels that it gives them.
ORIGINS = {"trec": "question", "sst2": "movie", "cr": "product", "mpqa": "phrase"}


def main(
    data: Annotated[Path, typer.Argument(help="A folder of tasks, each with train.parquet and test.parquet.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    vocabulary: Annotated[int, typer.Option(min=300, help="Pieces of the tokenizer.")] = 4000,
    column: Annotated[str, typer.Option(help="The column of the inputs.")] = "text",
) -> None:
    """Write plain text, its tokenizer and a task, from the inputs of labelled corpora."""
    if out.exists():
        return
    train, test = (dict.fromkeys(_column(data, split, column)) for split in ("train", "test"))
    texts = [text for text in train if text not in test]
    origins = _origins(data, column)
    put_in_place(out, lambda folder: _write(folder, texts, origins, vocabulary))


def _origins(data: Path, column: str) -> dict[str, list[tuple[str, str]]]:
    """(text, label) of each split, without texts that several corpora hold."""
    train, test = ({name: set(_column(data, split, column, name)) for name in ORIGINS} for split in ("train", "test"))
    tested = set().union(*test.values())
    return {"train": _drawn({name: texts - tested for name, texts in train.items()}), "test": _drawn(test)}


def _drawn(held: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Equally many rows of each corpus, in a fixed random order, without texts that another corpus holds, too."""
    times = Counter(text for texts in held.values() for text in texts)
    alone = {name: sorted(text for text in texts if times[text] == 1) for name, texts in held.items()}
    drawn = random.Random(0)
    each = min(len(texts) for texts in alone.values())
    rows = [(text, ORIGINS[name]) for name, texts in alone.items() for text in drawn.sample(texts, each)]
    drawn.shuffle(rows)
    return rows


def _column(data: Path, split: str, column: str, task: str = "*") -> Iterator[str]:
    files = sorted(data.glob(f"{task}/{split}.parquet"))
    if not files:
        raise typer.BadParameter(f"{data}/{task}/{split}.parquet: there is no such file")
    for file in files:
        yield from pq.read_table(file, columns=[column]).column(0).to_pylist()


def _write(folder: Path, texts: list[str], origins: dict[str, list[tuple[str, str]]], vocabulary: int) -> None:
    (folder / "origin").mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), folder / "text.parquet")
    for split, rows in origins.items():
        table = pa.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
        pq.write_table(table, folder / "origin" / f"{split}.parquet")
    _fit(texts, vocabulary).save_pretrained(folder / "tokenizer")


def _fit(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """T5's kind of tokenizer: unigram over words with their space, `<pad>`, `</s>` (behind every text) and `<unk>`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=vocabulary, special_tokens=special, unk_token="<unk>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


if __name__ == "__main__":
    typer.run(main)
