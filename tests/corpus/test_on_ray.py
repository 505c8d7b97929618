"""The corpus room as the job uses it, on a real Ray: Parquet in, splits out."""

import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.data

from pipeline.corpus import (
    SplitRef,
    TaskCorpus,
    TokenizerSpec,
    TokenSet,
    check_task,
    open_split,
    prepare_task,
    prepare_tasks,
)
from pipeline.corpus.shards import shard_key
from pipeline.corpus.task_corpus import task_recipe
from pipeline.errors import CorpusError
from pipeline.settings import TaskSettings
from tests.tiny import make_tokenizer

from .conftest import save_tokenizer

Write = Callable[..., Path]
MakeTask = Callable[..., TaskSettings]
Row = dict[str, Any]

GOOD: list[Row] = [{"text": f"a good film number {i}", "label": i % 3} for i in range(120)]
BAD: list[Row] = [
    {"text": None, "label": 0},
    {"text": "null label", "label": None},
    {"text": "  ", "label": 1},
    {"text": "long " * 300, "label": 1},
]
DEV: list[Row] = [{"text": f"a bad film number {i}", "label": i % 3} for i in range(30)]


@pytest.fixture(scope="module", autouse=True)
def running_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def spec(tokenizer_dir: Path) -> TokenizerSpec:
    return TokenizerSpec(str(tokenizer_dir), "digest of the tokenizer", "decoder-only")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, write: Write) -> Path:
    """One storage for the whole module, so that equal corpora are tokenised once."""
    folder = tmp_path_factory.mktemp("place")
    write(folder / "train.parquet", GOOD + BAD)
    write(folder / "dev.parquet", DEV)
    return folder


@pytest.fixture(scope="module")
def corpus(place: Path, make_task: MakeTask, spec: TokenizerSpec) -> TaskCorpus:
    task = make_task(place / "train.parquet", dev=place / "dev.parquet")
    return prepare_task("x", task, spec, place / "storage")


def content(tokens: TokenSet) -> list[tuple[int, list[int], list[int], str]]:
    return [
        (int(tokens.row_ids[row]), tokens.input_ids(row).tolist(), tokens.target_ids(row).tolist(), tokens.target(row))
        for row in range(len(tokens))
    ]


def built(place: Path) -> dict[str, int]:
    """Shard folders that count, with the time of their manifest."""
    folder = place / "storage" / "token_shards"
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*/manifest.json")}


def test_rows_become_token_rows_and_unusable_ones_are_counted_by_reason(
    corpus: TaskCorpus, tokenizer_dir: Path
) -> None:
    from pipeline.corpus import encode_inputs, encode_targets, load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_dir))
    pairs = [(row["text"], str(row["label"])) for row in GOOD]
    inputs = encode_inputs(tokenizer, "decoder-only", [text for text, _ in pairs])
    targets = encode_targets(tokenizer, "decoder-only", " ", [target for _, target in pairs])
    expected = sorted(zip(inputs, targets, [target for _, target in pairs], strict=True))
    train = open_split(corpus.splits["train"])
    assert sorted(row[1:] for row in content(train)) == expected
    assert corpus.counts == {
        "train": {"ok": 120, "null": 2, "empty": 1, "input_long": 1, "target_long": 0},
        "dev": {"ok": 30, "null": 0, "empty": 0, "input_long": 0, "target_long": 0},
    }
    assert corpus.labels == ("0", "1", "2")
    assert corpus.label_ids == tuple(tuple(ids) for ids in encode_targets(tokenizer, "decoder-only", " ", "012"))
    manifest = json.loads((Path(corpus.splits["train"].dir) / "manifest.json").read_text())
    assert (manifest["rows"], manifest["distinct_targets"]) == (124, ["0", "1", "2"])
    assert manifest["input_tokens"] == sum(map(len, inputs)) == train.input_lengths.sum()
    assert manifest["longest_input"] == max(map(len, inputs))


def test_unlabelled_rows_are_a_split_of_inputs_and_change_nothing_of_the_others(
    place: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec, corpus: TaskCorpus
) -> None:
    """Nobody reads their targets, so a column of that name may hold anything, or not be there."""
    rows: list[Row] = [{"text": row["text"], "label": None} for row in [*GOOD[:40], {"text": " "}]]
    files = [write(place / "more.parquet", rows), write(place / "odd.parquet", [{"text": "odd one", "label": 0.5}])]

    def with_more(*paths: Path, **changes: Any) -> TaskCorpus:
        teacher = {"text": "words", "unlabelled": list(map(str, paths))}
        task = make_task(place / "train.parquet", dev=place / "dev.parquet", teacher=teacher, **changes)
        return prepare_task("x", task, spec, place / "storage")

    more = with_more(*files)
    unlabelled, train = open_split(more.splits["unlabelled"]), open_split(more.splits["train"])
    inputs = {tuple(train.input_ids(row)) for row in range(len(train))}
    found = {tuple(unlabelled.input_ids(row)) for row in range(len(unlabelled))}
    assert len(unlabelled) == 41 and len(found - inputs) == 1 and not unlabelled.target_lengths.any()
    assert more.counts["unlabelled"] == {"ok": 41, "null": 0, "empty": 1, "input_long": 0, "target_long": 0}
    bare = {split: ref for split, ref in more.splits.items() if split != "unlabelled"}
    counts = {split: of_split for split, of_split in more.counts.items() if split != "unlabelled"}
    assert dataclasses.replace(more, splits=bare, counts=counts, digest=corpus.digest) == corpus
    before = built(place)
    assert len({corpus.digest, more.digest, with_more(files[0]).digest}) == 3
    assert with_more(*files, labels=["0", "1", "2"], separator=": ").splits["unlabelled"] == more.splits["unlabelled"]
    assert len(built(place)) == len(before) + 3, "one file less, and train and dev with another separator"
    with pytest.raises(CorpusError, match=r"^task 'x', teacher.unlabelled: 50.0% of 2 rows cannot be used \(1 empty\)"):
        with_more(write(place / "bad.parquet", [{"text": "good"}, {"text": ""}]))
    with pytest.raises(
        CorpusError, match=r"^task 'x', teacher.unlabelled: no usable row is left \(1 empty\); give more"
    ):
        with_more(write(place / "none.parquet", [{"text": ""}]), max_bad_rows=1)


def test_a_corpus_travels_as_json(corpus: TaskCorpus) -> None:
    assert TaskCorpus.from_dict(json.loads(json.dumps(corpus.to_dict()))) == corpus


def test_the_same_rows_in_partitions_and_another_order_are_the_same_corpus(
    place: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec, corpus: TaskCorpus
) -> None:
    rows = GOOD + BAD
    random.Random(1).shuffle(rows)
    for number, label in enumerate([0, 1, 2, None]):
        part = [{"text": row["text"]} for row in rows if row["label"] == label]
        name = "__HIVE_DEFAULT_PARTITION__" if label is None else label
        write(place / "lake" / f"label={name}" / f"{9 - number}.parquet", part, row_group_size=7)
    task = make_task(f"file://{place}/lake", dev=place / "dev.parquet")
    moved = prepare_task("x", task, spec, place / "storage")
    assert moved.splits["train"] != corpus.splits["train"]
    assert content(open_split(moved.splits["train"])) == content(open_split(corpus.splits["train"]))
    assert dataclasses.replace(moved, splits=corpus.splits) == corpus


def test_nothing_changed_is_not_built_again(
    place: Path, make_task: MakeTask, spec: TokenizerSpec, corpus: TaskCorpus
) -> None:
    before = built(place)
    task = make_task(place / "train.parquet", dev=place / "dev.parquet", batch_size=7)
    assert prepare_task("x", task, spec, place / "storage") == corpus
    assert built(place) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"input": "{text} "},
        {"target": "{label}!"},
        {"separator": "\n"},
        {"max_input_tokens": 255},
        {"max_target_tokens": 63},
        {"digest": "another"},
        {"architecture": "encoder-decoder"},
    ],
)
def test_whatever_decides_the_tokens_is_in_the_key(
    place: Path, make_task: MakeTask, spec: TokenizerSpec, changes: dict[str, str]
) -> None:
    def key(**given: Any) -> str:
        own = {name: given.pop(name) for name in ("digest", "architecture") if name in given}
        tokenizer = dataclasses.replace(spec, **own)
        task = make_task(place / "train.parquet", dev=place / "dev.parquet", **given)
        plan = check_task("x", task)
        return shard_key(plan.sources["train"], task_recipe(plan, task, tokenizer), tokenizer)[0]

    assert key() == key()
    assert key(**changes) != key()


def test_a_changed_file_or_a_lost_shard_is_built_again(
    place: Path, tmp_path: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec
) -> None:
    task = make_task(write(tmp_path / "a.parquet", DEV), dev=place / "dev.parquet")
    first = prepare_task("x", task, spec, place / "storage")
    write(tmp_path / "a.parquet", [*DEV, {"text": "one more", "label": 0}])
    second = prepare_task("x", task, spec, place / "storage")
    assert (first.counts["train"]["ok"], second.counts["train"]["ok"]) == (30, 31)
    assert first.digest != second.digest
    next(Path(second.splits["train"].dir).glob("*.arrow")).unlink()
    assert prepare_task("x", task, spec, place / "storage") == second
    assert len(open_split(second.splits["train"])) == 31


@pytest.mark.parametrize("name", ["*.arrow", "rows.index", "manifest.json"])
def test_a_shard_folder_with_a_flipped_bit_is_refused_by_readers_and_built_again(
    place: Path, tmp_path: Path, make_task: MakeTask, spec: TokenizerSpec, name: str
) -> None:
    task = make_task(place / "train.parquet", dev=place / "dev.parquet")
    whole = prepare_task("x", task, spec, tmp_path / "storage")
    rows = content(open_split(whole.splits["train"]))
    damaged = next(Path(whole.splits["train"].dir).glob(name))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3] ^= 4
    damaged.write_bytes(data)
    with pytest.raises(CorpusError, match="run the job again"):
        open_split(whole.splits["train"])
    assert prepare_task("x", task, spec, tmp_path / "storage") == whole
    assert content(open_split(whole.splits["train"])) == rows


def test_the_dev_split_depends_on_row_content_only_and_shares_no_row_with_train(
    place: Path, tmp_path: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec
) -> None:
    def split(paths: list[str]) -> tuple[list[Any], list[Any], TaskCorpus]:
        made = prepare_task("x", make_task(paths, dev_fraction=0.3), spec, place / "storage")
        return content(open_split(made.splits["train"])), content(open_split(made.splits["dev"])), made

    base = str(place / "train.parquet")
    twice_and_more = str(write(tmp_path / "more.parquet", GOOD[50:] + DEV))
    train, dev, made = split([base])
    more_train, more_dev, _ = split([twice_and_more, base])
    whole = open_split(SplitRef(made.splits["dev"].dir))
    assert dev + train == content(whole) and 20 < len(dev) < 55
    assert sum(sum(counts.values()) for counts in made.counts.values()) == 124
    ids = {row[0] for row in more_train}
    assert not ids & {row[0] for row in more_dev}
    assert {row[0] for row in train} < ids and {row[0] for row in dev} < {row[0] for row in more_dev}


def test_rows_beyond_the_allowed_share_refuse_the_task_with_counts_by_reason(
    place: Path, make_task: MakeTask, spec: TokenizerSpec, corpus: TaskCorpus
) -> None:
    task = make_task(place / "train.parquet", dev=place / "dev.parquet", max_bad_rows=0.03)
    with pytest.raises(CorpusError, match=r"^task 'x', train: 3\.2% of 124 rows .*2 null, 1 empty, 1 input over-long"):
        prepare_task("x", task, spec, place / "storage")


def test_targets_must_lie_in_the_label_set(
    place: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec, corpus: TaskCorpus
) -> None:
    strange = write(place / "strange.parquet", [{"text": "what is it", "label": 7}, *DEV[:3]])
    many = write(place / "many.parquet", [{"text": f"row {i}", "label": i} for i in range(65)])
    train, dev = place / "train.parquet", place / "dev.parquet"
    open_ended = prepare_task("x", make_task(many, dev=dev, metric="exact_match"), spec, place / "storage")
    assert (open_ended.labels, open_ended.label_ids) == (None, None)
    for task, parts in [
        (make_task(train, dev=strange), ["dev", "'7'", "'0', '1', '2'"]),
        (make_task(train, dev=dev, test=strange, metric="f1"), ["test", "'7'", "'0', '1', '2'"]),
        (make_task(train, dev=dev, labels=["0", "1"]), ["train", "'2'", "'0', '1'"]),
        (make_task(many, dev=dev), ["train", "'accuracy'", "64", "set 'labels'", "another metric"]),
        (
            make_task(many, dev=dev, metric="loss", prompt={"init": "class_labels"}),
            ["train", "'class_labels'", "set 'labels'", "another prompt init"],
        ),
    ]:
        with pytest.raises(CorpusError, match=r"^task 'x', ") as refused:
            prepare_task("x", task, spec, place / "storage")
        assert all(part in str(refused.value) for part in parts), str(refused.value)
    given = prepare_task("x", make_task(train, dev=strange, labels=list("7210")), spec, place / "storage")
    assert given.labels == ("7", "2", "1", "0")


def test_labels_that_the_tokenizer_cannot_say_are_refused_and_open_targets_counted(
    place: Path, tmp_path: Path, write: Write, make_task: MakeTask
) -> None:
    make_tokenizer(eos_template=True).save_pretrained(tmp_path / "words")
    spec = TokenizerSpec(str(tmp_path / "words"), "words", "encoder-decoder")
    rows = [{"text": f"good film {'it ' * n}", "label": "yes" if n % 10 else "{no}"} for n in range(40)]
    train = write(tmp_path / "rows.parquet", rows)
    labelled = [{"metric": "accuracy"}, {"metric": "exact_match", "labels": ["yes", "{no}"]}]
    for settings in labelled:
        task = make_task(train, dev_fraction=0.5, max_bad_rows=0.5, **settings)
        with pytest.raises(CorpusError, match=r"^task 'x': the tokenizer cannot encode the label '{no}' \(its "):
            prepare_task("x", task, spec, place / "storage")
    opened = make_task(train, dev_fraction=0.5, metric="exact_match", max_bad_rows=0.05)
    with pytest.raises(CorpusError, match=r"10\.0% .* .4 with a target that the tokenizer cannot encode, such as "):
        prepare_task("x", opened, spec, place / "storage")
    allowed = prepare_task("x", opened.model_copy(update={"max_bad_rows": 0.1}), spec, place / "storage")
    assert sum(counts.get("target_unsayable", 0) for counts in allowed.counts.values()) == 4
    assert sum(counts["ok"] for counts in allowed.counts.values()) == 36


def test_huge_cells_are_counted_over_long_through_the_whole_of_it(
    place: Path, tmp_path: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec
) -> None:
    rows = [{"text": f"good {n}", "label": "0"} for n in range(60)] + [{"text": "x" * 2**21, "label": "1"}] * 2
    train = write(tmp_path / "rows.parquet", [*rows, {"text": "x" * (17 * 2**20), "label": "1"}], compression="zstd")
    corpus = prepare_task("x", make_task(train, dev_fraction=0.5), spec, place / "storage")
    assert sum(counts["input_long"] for counts in corpus.counts.values()) == 3
    assert sum(counts["ok"] for counts in corpus.counts.values()) == 60


def test_integers_in_one_file_and_whole_floats_in_another_are_one_label_set(
    place: Path, tmp_path: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec
) -> None:
    write(tmp_path / "a" / "1.parquet", [{"text": f"good {n}", "label": n % 2} for n in range(20)])
    write(tmp_path / "a" / "2.parquet", [{"text": f"bad {n}", "label": float(n % 2)} for n in range(20)])
    corpus = prepare_task("x", make_task(tmp_path / "a", dev_fraction=0.5), spec, place / "storage")
    assert corpus.labels == ("0", "1")
    write(tmp_path / "a" / "3.parquet", [{"text": "odd", "label": 0.5}])
    with pytest.raises(CorpusError, match=r"3.parquet holds 0.5, while .*1.parquet holds integers there"):
        prepare_task("x", make_task(tmp_path / "a", dev_fraction=0.5), spec, place / "storage")


def test_a_split_without_a_usable_row_is_refused(
    place: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec, corpus: TaskCorpus
) -> None:
    blank = write(place / "blank.parquet", [{"text": " ", "label": 1}, {"text": None, "label": 1}])
    task = make_task(place / "train.parquet", dev=blank, max_bad_rows=1)
    with pytest.raises(CorpusError, match=r"^task 'x', dev: no usable row is left \(1 null, 1 empty\)"):
        prepare_task("x", task, spec, place / "storage")
    tiny = make_task(place / "train.parquet", dev_fraction=1e-9)
    with pytest.raises(CorpusError, match=r"^task 'x', dev: no usable row is left .* fix dev_fraction 1e-09"):
        prepare_task("x", tiny, spec, place / "storage")


def test_a_tokenizer_without_eos_is_refused_before_any_work(place: Path, tmp_path: Path, make_task: MakeTask) -> None:
    endless = TokenizerSpec(str(save_tokenizer(tmp_path, has_eos=False)), "endless", "decoder-only")
    before = built(place)
    with pytest.raises(CorpusError, match="has no eos token"):
        prepare_task("x", make_task(place / "train.parquet", dev=place / "dev.parquet"), endless, place / "storage")
    assert built(place) == before


def damage_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)


def damage_text(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(b"good film number 9") > 0
    path.write_bytes(content.replace(b"good film number 9", b"\xff\xfe\xff\xfe film number 9"))


@pytest.mark.parametrize(
    ("damage", "options", "reason"),
    [
        (damage_pages, {"compression": "zstd"}, "is damaged"),
        (damage_pages, {"compression": "none", "write_page_checksum": True}, "is damaged"),
        (damage_text, {"compression": "none"}, "not UTF-8"),
    ],
)
def test_a_damaged_file_is_one_sentence_with_its_name_and_leaves_nothing(
    place: Path,
    tmp_path: Path,
    write: Write,
    make_task: MakeTask,
    spec: TokenizerSpec,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    options: dict[str, Any],
    reason: str,
) -> None:
    write(tmp_path / "good.parquet", DEV)
    chance = random.Random(0)
    rows = [{"text": f"a good film number {i} {chance.random()}", "label": 0} for i in range(2000)]
    bad = write(tmp_path / "bad.parquet", rows, use_dictionary=False, **options)
    damage(bad)
    settings, levels = str(ray.data.DataContext.get_current()), console_levels()
    before = built(place)
    with pytest.raises(CorpusError, match=f"^task 'x', train: {bad} .*{reason}") as refused:
        prepare_task("x", make_task(tmp_path, dev=place / "dev.parquet"), spec, place / "storage")
    assert "\n" not in str(refused.value)
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert built(place) == before
    assert (str(ray.data.DataContext.get_current()), console_levels()) == (settings, levels)


def console_levels() -> list[int]:
    return [handler.level for handler in logging.getLogger("ray.data").handlers]


KILLED = """
import json, sys, ray
from pathlib import Path
from pipeline.corpus import TokenizerSpec, prepare_task
from pipeline.settings import TaskSettings
address, task, spec, storage = sys.argv[1:]
ray.init(address)
prepare_task("x", TaskSettings(**json.loads(task)), TokenizerSpec(*json.loads(spec)), Path(storage))
"""


def test_a_build_killed_half_way_leaves_nothing_that_counts_and_is_swept_by_the_next(
    place: Path, tmp_path: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec, corpus: TaskCorpus
) -> None:
    write(tmp_path / "a.parquet", [{"text": f"row {i}", "label": i % 3} for i in range(500)])
    task = make_task(tmp_path / "a.parquet", dev=place / "dev.parquet")
    before = built(place)
    address = ray.get_runtime_context().gcs_address
    arguments = [address, task.model_dump_json(), json.dumps(dataclasses.astuple(spec)), str(place / "storage")]
    job = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stdout=subprocess.DEVNULL)
    halves: list[Path] = []
    while job.poll() is None and not halves:
        time.sleep(0.01)
        halves = list((place / "storage" / "token_shards").glob(".*"))
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert len(halves) == 1 and halves[0].exists()
    assert built(place) == before
    finished = prepare_task("x", task, spec, place / "storage")
    assert finished.counts["train"]["ok"] == len(open_split(finished.splits["train"])) == 500
    assert not halves[0].exists()


@pytest.mark.slow
def test_a_worker_killed_while_tokenising_changes_nothing(
    place: Path, tmp_path: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec, corpus: TaskCorpus
) -> None:
    chance = random.Random(0)
    words = [f"w{number}" for number in range(5000)]
    rows = [{"text": " ".join(chance.choices(words, k=60)), "label": i % 3} for i in range(40_000)]
    task = make_task(write(tmp_path / "a.parquet", rows), dev=place / "dev.parquet", max_input_tokens=10_000)
    undisturbed = prepare_task("x", task, spec, tmp_path / "undisturbed")
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            time.sleep(0.02)
            if any((tmp_path / "disturbed").glob("token_shards/.*/*/*.arrow")):
                with suppress(psutil.Error):  # of processes that end meanwhile
                    workers = psutil.Process().children(recursive=True)
                    killed.extend(worker.pid for worker in workers if "_tokenise_units" in "".join(worker.cmdline()))
                for pid in killed[:1]:
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    disturbed = prepare_task("x", task, spec, tmp_path / "disturbed")
    killer.join(1)
    assert killed and not killer.is_alive()
    assert (disturbed.counts, disturbed.digest) == (undisturbed.counts, undisturbed.digest)
    train = Path(disturbed.splits["train"].dir)
    assert set(json.loads((train / "manifest.json").read_text())["files"]) == {
        f.name for f in train.iterdir() if f.name != "manifest.json"
    }
    assert content(open_split(disturbed.splits["train"])) == content(open_split(undisturbed.splits["train"]))


def test_a_storage_that_cannot_be_written_is_one_sentence(
    place: Path, tmp_path: Path, make_task: MakeTask, spec: TokenizerSpec
) -> None:
    from pipeline.errors import StorageError

    (tmp_path / "file").touch()
    task = make_task(place / "train.parquet", dev=place / "dev.parquet")
    with pytest.raises(StorageError, match=r"^cannot write token shards to ") as refused:
        prepare_task("x", task, spec, tmp_path / "file")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("seed", range(4))
def test_a_corpus_that_came_in_nights_has_the_rows_order_splits_and_digest_of_one_built_at_once(
    tmp_path: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec, seed: int
) -> None:
    """Files are added, written anew and removed; equal rows are in several files, unusable ones in some."""
    chance = random.Random(seed)

    def rows() -> list[Row]:
        texts = [{"text": f"film number {chance.randrange(60)}", "label": chance.randrange(3)} for _ in range(30)]
        return [*texts, *chance.sample(BAD, chance.randrange(3))]

    task, storage = make_task(tmp_path / "files", dev_fraction=0.3, max_bad_rows=0.5), tmp_path / "storage"
    for night in range(4):
        for _ in range(chance.randint(1, 3)):
            write(tmp_path / "files" / f"{chance.randrange(8)}.parquet", rows(), row_group_size=chance.choice([7, 100]))
        files = sorted((tmp_path / "files").iterdir())
        if night and len(files) > 2:
            chance.choice(files).unlink()
        came = prepare_task("x", task, spec, storage)
        at_once = prepare_task("x", task, spec, tmp_path / f"anew-{night}")
        for split in ("train", "dev"):
            assert content(open_split(came.splits[split])) == content(open_split(at_once.splits[split]))
            few = open_split(came.splits[split], 5)
            assert content(few) == content(open_split(at_once.splits[split]))[:5]
        assert dataclasses.replace(came, splits=at_once.splits) == at_once


def test_of_a_corpus_that_grew_only_new_files_are_tokenised_and_of_one_that_shrank_none(
    tmp_path: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec
) -> None:
    def night(connect: Callable[[], None] = lambda: None) -> dict[str, int]:
        made = prepare_task("x", make_task(tmp_path / "files", dev_fraction=0.3), spec, tmp_path / "storage", connect)
        return {path.name: path.stat().st_ino for path in Path(made.splits["train"].dir).glob("*.arrow")}

    def no_ray() -> None:
        raise AssertionError("nothing is tokenised")

    for number in range(5):
        write(tmp_path / "files" / f"{number}.parquet", GOOD[number * 20 : number * 20 + 20])
    first = night()
    write(tmp_path / "files" / "1a.parquet", DEV)
    second = night()
    assert len(first) == 5 and len(second) == 6 and first.items() < second.items(), "the same files, by hard links"
    (tmp_path / "files" / "0.parquet").unlink()
    third = night(no_ray)
    assert len(third) == 5 and third.items() < second.items()
    # A folder is complete by itself, and what no folder has any more is removed by the next build.
    for folder in (tmp_path / "storage" / "token_shards").glob("*-*"):
        shutil.rmtree(folder)
    kept = tmp_path / "storage" / "token_shards" / "by_file"
    assert len(list(kept.glob("*.arrow"))) == 6
    write(tmp_path / "files" / "2.parquet", DEV)
    assert len(night()) == 5 and len(list(kept.glob("*.arrow"))) == len(list(kept.glob("*.json"))) == 5


def test_a_kept_shard_that_is_damaged_is_made_anew(
    tmp_path: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec
) -> None:
    for number in range(3):
        write(tmp_path / "files" / f"{number}.parquet", GOOD[number * 20 : number * 20 + 20])
    task = make_task(tmp_path / "files", dev_fraction=0.3)
    prepare_task("x", task, spec, tmp_path / "storage")
    damaged = next((tmp_path / "storage" / "token_shards" / "by_file").glob("*.arrow"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    write(tmp_path / "files" / "3.parquet", DEV)
    grown = prepare_task("x", task, spec, tmp_path / "storage")
    anew = prepare_task("x", task, spec, tmp_path / "anew")
    assert content(open_split(grown.splits["train"])) == content(open_split(anew.splits["train"]))


def test_where_no_hard_link_can_be_made_a_corpus_that_grew_is_tokenised_as_a_whole(
    tmp_path: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Any) -> None:
        raise PermissionError("this file system has no hard links")

    monkeypatch.setattr("pipeline.corpus.kept_shards.os.link", refuse)
    task = make_task(tmp_path / "files", dev_fraction=0.3)
    for number in range(2):
        write(tmp_path / "files" / f"{number}.parquet", GOOD[number * 50 : number * 50 + 50])
        made = prepare_task("x", task, spec, tmp_path / "storage")
        assert len(open_split(SplitRef(made.splits["train"].dir))) == 50 * number + 50


def test_many_tasks_are_one_job_and_a_broken_corpus_refuses_its_own_task_alone(
    tmp_path: Path, write: Write, make_task: MakeTask, spec: TokenizerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[int] = []
    counted = ray.data.range
    monkeypatch.setattr(ray.data, "range", lambda *args, **options: jobs.append(1) or counted(*args, **options))
    files = {name: write(tmp_path / f"{name}.parquet", GOOD[:40] + [{"text": name, "label": 0}] * 3) for name in "abcd"}
    tasks = {name: make_task(file, dev_fraction=0.3) for name, file in files.items()}
    tasks["e"] = make_task(files["a"], dev_fraction=0.3)
    tasks["f"] = make_task(files["b"], dev_fraction=0.3)
    plans = {name: check_task(name, task) for name, task in tasks.items()}
    damage_pages(files["b"])
    prepared = prepare_tasks(tasks, plans, spec, tmp_path / "storage")
    assert list(prepared) == list("abcdef") and len(jobs) == 1
    refused = {name: str(outcome) for name, outcome in prepared.items() if not isinstance(outcome, TaskCorpus)}
    assert sorted(refused) == ["b", "f"]
    assert all(refused[name].startswith(f"task '{name}', train: {files['b']}") for name in "bf")
    alone = prepare_task("a", tasks["a"], spec, tmp_path / "alone")
    assert isinstance(prepared["a"], TaskCorpus) and prepared["a"].digest == alone.digest
    assert content(open_split(prepared["a"].splits["train"])) == content(open_split(alone.splits["train"]))
