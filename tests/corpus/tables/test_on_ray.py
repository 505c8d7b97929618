"""Tables the whole way to token shards: the same rows anywhere are the same corpus, and only changed rows change it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from deltalake import DeltaTable, write_deltalake

from pipeline.corpus import TaskCorpus, TokenizerSpec, check_task, prepare_task, prepare_tasks
from pipeline.corpus.source_files import TableVersion
from pipeline.corpus.tables.libraries import Lake
from pipeline.errors import CorpusError
from pipeline.settings import CatalogSettings, TaskSettings
from tests.corpus.tables.delta_log import delete_by_vector
from tests.corpus.tables.test_iceberg import catalog_in, new_table

NUMBERS = range(60)
LABELS = [("no", "yes")[i % 2] for i in NUMBERS]
ROWS = pa.table({"text": [f"a good film number {i}" for i in NUMBERS], "label": LABELS})


@pytest.fixture(scope="module", autouse=True)
def running_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def prepared(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TaskCorpus]:
    spec = TokenizerSpec(str(tokenizer_dir), "digest of the tokenizer", "decoder-only")
    storage = tmp_path_factory.mktemp("storage")

    def prepare(train: Any, catalogs: Any = None, **task: Any) -> TaskCorpus:
        settings = TaskSettings(train=train, dev_fraction=0.3, **task)
        return prepare_task("x", settings, spec, storage, lake=Lake(catalogs or {}))

    prepare.folders = lambda: {path.name for path in (storage / "token_shards").glob("[!.]*")}  # type: ignore[attr-defined]
    return prepare


def test_the_same_rows_are_the_same_corpus_wherever_they_are_kept(
    tmp_path: Path, prepared: Callable[..., TaskCorpus]
) -> None:
    pq.write_table(ROWS, tmp_path / "a.parquet")
    shuffled = ROWS.take(list(range(59, -1, -1)))
    write_deltalake(tmp_path / "delta", shuffled, partition_by=["label"])
    table = new_table(tmp_path / "iceberg", ROWS.schema)
    table.append(ROWS.slice(20))
    table.append(ROWS.slice(0, 20))
    lance.write_dataset(shuffled, str(tmp_path / "lance"), max_rows_per_file=9)
    lines = [json.dumps({"body": row["text"], "label": row["label"]}) for row in ROWS.to_pylist()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in ROWS.to_pylist()))
    plain = prepared(str(tmp_path / "a.parquet"))
    catalogs = {name: CatalogSettings(**own) for name, own in catalog_in(tmp_path / "iceberg").items()}
    kept = {
        "delta": prepared(f"delta://{tmp_path}/delta"),
        "iceberg": prepared("iceberg://prod/sales.reviews", catalogs),
        "lance": prepared(f"lance://{tmp_path}/lance"),
        "lines": prepared({"path": f"{tmp_path}/a.jsonl", "columns": {"text": "body"}}),
        "csv": prepared(f"{tmp_path}/a.csv"),
    }
    for kind, corpus in kept.items():
        assert (corpus.digest, corpus.counts) == (plain.digest, plain.counts), kind
    (delta,) = kept["delta"].tables["train"]
    assert (delta.address, delta.version, delta.table is not None) == (f"delta://{tmp_path}/delta", "0", True)
    assert kept["iceberg"].tables["train"][0].version == str(table.current_snapshot().snapshot_id)
    assert kept["lance"].tables["train"][0].version == "1" and plain.tables == {}
    assert TaskCorpus.from_dict(json.loads(json.dumps(kept["delta"].to_dict()))) == kept["delta"]


def test_only_changed_rows_are_another_corpus(tmp_path: Path, prepared: Callable[..., Any]) -> None:
    path = tmp_path / "delta"
    for part in range(3):
        write_deltalake(
            path, ROWS.slice(part * 20, 20), mode="append", configuration={"delta.enableDeletionVectors": "true"}
        )
    address = f"delta://{path}"
    first = prepared(address)
    before = prepared.folders()
    assert prepared(address) == first and prepared.folders() == before
    table = DeltaTable(path)
    table.alter.set_table_description("a new version without a changed file")
    described = prepared(address)
    assert described.digest == first.digest and prepared.folders() == before
    assert described.tables["train"] != first.tables["train"]
    for rewrite in (
        lambda: DeltaTable(path).optimize.compact(),
        lambda: DeltaTable(path).vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False),
        lambda: DeltaTable(path).optimize.z_order(["text"]),
        lambda: write_deltalake(path, ROWS, mode="overwrite"),
    ):
        rewrite()
        assert prepared(address).digest == first.digest
    (file,) = pa.table(DeltaTable(path).get_add_actions())["path"].to_pylist()
    delete_by_vector(path, file, [7], inline=True)
    without_one = prepared(address)
    assert without_one.digest != first.digest
    assert sum(counts["ok"] for counts in without_one.counts.values()) == 59
    DeltaTable(path).update({"label": "'yes'"}, predicate="text = 'a good film number 8'")
    assert prepared(address).digest not in (first.digest, without_one.digest)


def test_a_filter_that_leaves_no_row_is_one_sentence(tmp_path: Path, prepared: Callable[..., TaskCorpus]) -> None:
    write_deltalake(tmp_path / "delta", ROWS)
    train = {"path": f"delta://{tmp_path}/delta", "where": "label = 'off'"}  # between no and yes
    with pytest.raises(CorpusError, match="task 'x', train: no row of the corpus is one that 'where' asks") as refused:
        prepared(train, metric="exact_match")
    assert "\n" not in str(refused.value)
    some = prepared({**train, "where": "text like 'a good film number 1%'"})
    assert sum(counts["ok"] for counts in some.counts.values()) == 11
    first = prepared({**train, "where": "text like 'a good film number 1%'", "limit": 5})
    assert sum(counts["ok"] for counts in first.counts.values()) == 5


def test_a_run_reads_one_version_of_a_table_though_others_write_to_it(tmp_path: Path, tokenizer_dir: Path) -> None:
    spec = TokenizerSpec(str(tokenizer_dir), "digest of the tokenizer", "decoder-only")
    write_deltalake(tmp_path / "delta", ROWS)
    train = {"path": f"delta://{tmp_path}/delta", "where": "text < 'a good film number 3'"}
    dev = {"path": f"delta://{tmp_path}/delta", "where": "text >= 'a good film number 3'"}
    lake = Lake()
    tasks = {name: TaskSettings(train=train, dev=dev) for name in ("first", "second")}
    plans = {}
    for name, task in tasks.items():
        plans[name] = check_task(name, task, lake)
        write_deltalake(tmp_path / "delta", ROWS, mode="append")
    prepared = prepare_tasks(tasks, plans, spec, tmp_path / "storage")
    for corpus in prepared.values():
        assert isinstance(corpus, TaskCorpus)
        assert {table.version for tables in corpus.tables.values() for table in tables} == {"0"}
        assert sum(counts["ok"] for counts in corpus.counts.values()) == len(ROWS)
    assert check_task("next night", tasks["first"], Lake()).sources["train"].tables[0].version == "2"


def test_a_table_that_is_replaced_while_workers_read_is_one_sentence(
    tmp_path: Path, prepared: Callable[..., TaskCorpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from pipeline.corpus import task_corpus

    write_deltalake(tmp_path / "delta", ROWS)
    look = task_corpus.check_task

    def then_replace(*args: Any) -> Any:
        plan = look(*args)
        shutil.rmtree(tmp_path / "delta")
        write_deltalake(tmp_path / "delta", ROWS.slice(0, 7))
        return plan

    monkeypatch.setattr(task_corpus, "check_task", then_replace)
    with pytest.raises(
        CorpusError, match=r"task 'x', train: .* is gone, so it was removed, or its table vacuumed"
    ) as refused:
        prepared(f"delta://{tmp_path}/delta")
    assert "\n" not in str(refused.value)


def test_a_version_travels_as_plain_values() -> None:
    version = TableVersion("delta:///t", "3", "id", "2026-11-01T00:00:00.000+00:00")
    corpus = TaskCorpus("x", {}, None, None, {}, "d", tables={"train": (version,)})
    assert TaskCorpus.from_dict(json.loads(json.dumps(corpus.to_dict()))) == corpus
    assert TaskCorpus.from_dict({**corpus.to_dict(), "tables": {}}).tables == {}
