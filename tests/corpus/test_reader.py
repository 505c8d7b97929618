import collections
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus import SplitRef, TokenSet, open_split, row_index, writing
from pipeline.corpus.reader import count_targets, summarise_split, target_tokens, unique_targets
from pipeline.corpus.rows import SHARD_SCHEMA
from pipeline.corpus.tally import EMPTY_TALLY, LISTED_TARGETS, ShardTally, manifest_figures, tally_table
from pipeline.corpus.writing import MANIFEST
from pipeline.errors import CorpusError
from pipeline.sealed_files import file_digest

Row = tuple[int, int]
rows_of_ids = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.sampled_from([0, 0, 0, 1, 3])), max_size=40)


def shards(folder: Path, files: list[list[Row]]) -> SplitRef:
    """A shard folder as a build leaves it; what a row holds follows from its id, as in a real one."""
    digests, total = {}, EMPTY_TALLY
    for number, rows in enumerate(files):
        table = [
            {
                "row_id": row_id,
                "status": status,
                "input_ids": [] if status else [row_id % 7] * (row_id % 5),
                "target_ids": [] if status else [row_id % 11, 1],
                "target": "" if status else f"t{row_id % 11}",
            }
            for row_id, status in rows
        ]
        path = folder / f"{number}.arrow"
        few = [pa.Table.from_pylist(table[start : start + 3], SHARD_SCHEMA) for start in range(0, len(table), 3)]
        with mock.patch.object(writing, "_BATCH_BYTES", 1):  # a batch of three rows each
            total += writing.write_shard(path, few)
        digests[path.name] = file_digest(path)
    with mock.patch.object(row_index, "_CHUNK_ROWS", 5):
        writing.complete_folder(folder, digests, total, {})
    return SplitRef(str(folder))


def content(tokens: TokenSet) -> list[tuple[int, list[int], list[int], str]]:
    return [
        (int(tokens.row_ids[row]), tokens.input_ids(row).tolist(), tokens.target_ids(row).tolist(), tokens.target(row))
        for row in range(len(tokens))
    ]


@given(rows_of_ids, st.randoms(), st.integers(1, 4))
def test_the_same_rows_in_other_files_and_another_order_are_the_same_set(rows: list[Row], chance, files: int) -> None:
    shuffled = chance.sample(rows, len(rows))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        first = shards(Path(one), [rows])
        second = shards(Path(other), [shuffled[start::files] for start in range(files)])
        assert content(open_split(first)) == content(open_split(second))
        assert summarise_split(first) == summarise_split(second)
        assert set(unique_targets(first)) == set(unique_targets(second))


@given(rows_of_ids, st.floats(0, 1), st.integers(0, 50))
def test_two_parts_make_the_whole_and_a_limit_keeps_its_beginning(rows: list[Row], cut: float, limit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ref = shards(Path(folder), [rows[::2], rows[1::2]])
        whole = open_split(ref)
        below, above = SplitRef(ref.dir, 0.0, cut), SplitRef(ref.dir, cut, 1.0)
        assert content(open_split(below)) + content(open_split(above)) == content(whole)
        counts = [summarise_split(part).counts for part in (below, above, ref)]
        assert all(counts[0][status] + counts[1][status] == counts[2][status] for status in counts[2])
        assert content(open_split(ref, limit)) == content(whole)[:limit]
        assert content(open_split(above, limit)) == content(open_split(above))[:limit]
        usable = sorted(row_id for row_id, status in rows if status == 0)
        assert whole.row_ids.tolist() == usable
        assert whole.input_lengths.tolist() == [row_id % 5 for row_id in usable]
        assert whole.input_lengths.dtype == np.int32


@given(rows_of_ids, st.floats(0, 1), st.integers(1, 4))
def test_counts_and_targets_of_any_part_are_those_of_its_rows(rows: list[Row], cut: float, files: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = shards(Path(folder), [rows[start::files] for start in range(files)])
        for fractions in [(0.0, 1.0), (0.0, cut), (cut, 1.0), (cut / 2, cut)]:
            ref = SplitRef(whole.dir, *fractions)
            low, high = ref.id_range
            inside = [(row_id, status) for row_id, status in rows if low <= row_id < high]
            used = [row_id for row_id, status in inside if not status]
            counts = summarise_split(ref).counts
            assert (sum(counts.values()), counts["ok"]) == (len(inside), len(used))
            targets = collections.Counter(f"t{row_id % 11}" for row_id in used)
            assert sorted(unique_targets(ref)) == sorted(targets)
            counted = collections.Counter[str]()
            for target, number in count_targets(ref):
                counted[target] += number
            assert counted == targets
            split = open_split(ref)
            assert {target: len(numbers) for target, numbers in split.rows_by_target.items()} == targets
            assert all(split.target(n) == target for target, ns in split.rows_by_target.items() for n in ns)
            assert all(target_tokens(ref, target) == [int(target[1:]), 1] for target in targets)


@given(rows_of_ids, rows_of_ids)
def test_the_digest_tells_different_rows_apart_duplicates_included(rows: list[Row], more: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        first, second = shards(Path(one), [rows]), shards(Path(other), [rows, more])
        assert (summarise_split(first).digest == summarise_split(second).digest) == (not more)


def test_a_folder_that_misses_a_shard_or_its_manifest_is_not_read(tmp_path: Path) -> None:
    ref = shards(tmp_path, [[(1, 0)], [(2, 0)]])
    (tmp_path / "1.arrow").unlink()
    with pytest.raises(CorpusError, match="missing or incomplete"):
        open_split(ref)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(CorpusError, match="missing or incomplete"):
        open_split(ref)


def test_targets_are_listed_up_to_a_number_and_then_read_from_the_shards() -> None:
    def tally(first: int, end: int) -> ShardTally:
        columns = {"row_id": range(first, end), "status": [0] * (end - first), "input_ids": [[1]] * (end - first)}
        columns |= {"target_ids": [[1]] * (end - first), "target": [f"t{row}" for row in range(first, end)]}
        return tally_table(pa.table(columns, schema=SHARD_SCHEMA))

    listed = tally(0, LISTED_TARGETS)
    assert len(manifest_figures(listed)["distinct_targets"]) == LISTED_TARGETS
    assert (listed + tally(5, 9)).targets == listed.targets
    for more in (tally(0, LISTED_TARGETS + 1), listed + tally(LISTED_TARGETS, LISTED_TARGETS + 1)):
        assert manifest_figures(more)["distinct_targets"] is manifest_figures(more)["target_ids"] is None
