#!/usr/bin/env python
"""Plain text to pre-train small encoder-decoders on, and a small tokenizer of it, from the inputs of labelled corpora.

    python jobs/make_panel_text.py ../shared/data runs/panels/text

Writes `text.parquet` (each input of each train split once; one that stands in a test split is left out, whatever its
label) and `tokenizer/` (unigram, fit on the same text). What is there already is left as it is.
"""

import sys
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


def main(
    data: Annotated[Path, typer.Argument(help="A folder of tasks, each with train.parquet and test.parquet.")],
    out: Annotated[Path, typer.Argument(help="Where text.parquet and tokenizer/ go.")],
    vocabulary: Annotated[int, typer.Option(min=300, help="Pieces of the tokenizer.")] = 4000,
    column: Annotated[str, typer.Option(help="The column of the inputs.")] = "text",
) -> None:
    """Write plain text and a tokenizer, from the inputs of labelled corpora."""
    if out.exists():
        return
    texts = _texts(data, column)
    put_in_place(out, lambda folder: _write(folder, texts, vocabulary))


def _texts(data: Path, column: str) -> list[str]:
    train, test = (dict.fromkeys(_column(data, split, column)) for split in ("train", "test"))
    return [text for text in train if text not in test]


def _column(data: Path, split: str, column: str) -> Iterator[str]:
    files = sorted(data.glob(f"*/{split}.parquet"))
    if not files:
        raise typer.BadParameter(f"{data}/*/{split}.parquet: there is no such file")
    for file in files:
        yield from pq.read_table(file, columns=[column]).column(0).to_pylist()


def _write(folder: Path, texts: list[str], vocabulary: int) -> None:
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), folder / "text.parquet")
    _fit(texts, vocabulary).save_pretrained(folder / "tokenizer")


def _fit(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """T5's kind: unigram over words with their space, `<pad>`, `</s>` (behind every text) and `<unk>`."""
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
