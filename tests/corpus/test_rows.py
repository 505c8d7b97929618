from pathlib import Path

import pyarrow as pa

from pipeline.corpus import load_tokenizer
from pipeline.corpus.rows import SHARD_SCHEMA, Recipe, RowStatus, row_identities, tokenise_rows
from pipeline.corpus.template import parse_template


def recipe(input: str = "film: {text}", longest_input: int = 40, longest_target: int = 12) -> Recipe:
    templates = parse_template(input, "x"), parse_template("{label}", "x")
    return Recipe(*templates, " ", longest_input, longest_target, "decoder-only")


def test_each_unusable_row_is_kept_with_its_reason_and_no_tokens(tokenizer_dir: Path) -> None:
    columns = {
        "text": ["good", None, "good", "  ", "good", "x" * 99, "good"],
        "label": ["yes", "yes", None, "yes", "\n", "yes", "x" * 99],
    }
    table = tokenise_rows(recipe(), load_tokenizer(str(tokenizer_dir)), columns, 7)
    assert table.schema == SHARD_SCHEMA
    expected = [0, 1, 1, 2, 2, 3, 4]
    assert table["status"].to_pylist() == expected
    for row in table.to_pylist():
        used = row["status"] == RowStatus.OK
        assert bool(row["input_ids"]) == bool(row["target_ids"]) == bool(row["target"]) == used


def test_a_limit_allows_exactly_that_many_tokens_separator_and_eos_included(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    columns = {"text": ["good"], "label": ["yes"]}
    row = tokenise_rows(recipe(), tokenizer, columns, 1).to_pylist()[0]
    longest = len(row["input_ids"]), len(row["target_ids"])

    def status(longest_input: int, longest_target: int) -> int:
        made = tokenise_rows(recipe("film: {text}", longest_input, longest_target), tokenizer, columns, 1)
        return int(made["status"][0].as_py())

    assert status(*longest) == RowStatus.OK
    assert status(longest[0] - 1, longest[1]) == RowStatus.INPUT_LONG
    assert status(longest[0], longest[1] - 1) == RowStatus.TARGET_LONG


def test_a_row_is_named_by_what_it_says_and_not_by_how_it_was_put_together(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    one = tokenise_rows(recipe("film: {text}"), tokenizer, {"text": ["good"], "label": ["yes"]}, 1)
    other = tokenise_rows(recipe("{a}: {b}"), tokenizer, {"a": ["film"], "b": ["good"], "label": ["yes"]}, 1)
    assert one == other
    assert one["row_id"].type == pa.uint64()
    ids = {
        int(row_identities(*zip(pair))[0])
        for pair in [("a", "b"), ("ab", ""), ("", "ab"), ('a", "b', ""), (None, "b"), ("a", None)]
    }
    assert len(ids) == 6
