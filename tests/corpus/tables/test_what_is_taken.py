"""`where`, `columns` and `limit` of a split, over every kind of corpus; and what is told when one is wrong."""

import datetime
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus import check_task
from pipeline.corpus.encoding import TokenizerSpec
from pipeline.corpus.rows import Recipe
from pipeline.corpus.shards import shard_key
from pipeline.corpus.source_files import ParquetSource
from pipeline.corpus.template import parse_template
from pipeline.errors import CorpusError, SettingsError
from pipeline.settings import TaskSettings, parse_settings
from tests.corpus.tables.rows import HERE, Rows, library_rows, open_rows, read_rows
from tests.corpus.tables.test_iceberg import catalog_in, new_table

COLUMNS = ["text", "lang", "stars", "share", "ok", "day"]
ROWS = pa.table(
    {
        "text": [f"text {i}" for i in range(40)],
        "lang": pa.array([("en", "de", "it's", None)[i % 4] for i in range(40)], pa.string()),
        "stars": pa.array([i % 5 if i % 7 else None for i in range(40)], pa.int32()),
        "share": [i / 8 for i in range(40)],
        "ok": [i % 3 == 0 for i in range(40)],
        "day": [datetime.date(2024, 1, 1 + i % 28) for i in range(40)],
    }
)
# The filter, and which of ROWS it takes, by SQL's rule that nothing is true of null.
FILTERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "lang = 'en'": lambda row: row["lang"] == "en",
    "lang != 'en'": lambda row: row["lang"] not in ("en", None),
    "not (lang = 'en' or stars > 2)": lambda row: None not in (row["lang"], row["stars"])
    and row["lang"] != "en" and row["stars"] <= 2,
    "lang in ('en', 'de') and stars >= 3": lambda row: row["lang"] in ("en", "de") and (row["stars"] or 0) >= 3,
    "lang not in ('en', 'de')": lambda row: row["lang"] not in ("en", "de", None),
    "lang is null": lambda row: row["lang"] is None,
    "stars is not null and share < 2.5": lambda row: row["stars"] is not None and row["share"] < 2.5,
    "stars between 1 and 2": lambda row: row["stars"] in (1, 2),
    "text like 'text 1%'": lambda row: row["text"].startswith("text 1"),
    "text not like 'text 1%'": lambda row: not row["text"].startswith("text 1"),
    "ok = true": lambda row: row["ok"],
    "day >= '2024-01-20'": lambda row: row["day"] >= datetime.date(2024, 1, 20),
    "share > 100": lambda row: False,
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same rows in every kind of corpus whose filters are of one language, in four files each."""
    folder = tmp_path_factory.mktemp("places")
    table = new_table(folder / "iceberg", ROWS.schema)
    for part in range(4):
        rows = ROWS.slice(part * 10, 10)
        (folder / "parquet").mkdir(exist_ok=True)
        pq.write_table(rows, folder / "parquet" / f"{part}.parquet", row_group_size=4)
        deltalake.write_deltalake(folder / "delta", rows, mode="append")
        deltalake.write_deltalake(folder / "by lang", rows, mode="append", partition_by=["lang"])
        mapped = {"delta.columnMapping.mode": "name"}
        deltalake.write_deltalake(folder / "mapped", rows, mode="append", configuration=None if part else mapped)
        table.append(rows)
    dictionaries = ROWS.set_column(1, "lang", ROWS["lang"].dictionary_encode())
    pq.write_table(dictionaries, folder / "dictionaries.parquet")
    return {
        "parquet": f"{folder}/parquet",
        "dictionaries": f"{folder}/dictionaries.parquet",
        "delta": f"delta://{folder}/delta",
        "partitioned delta": f"delta://{folder}/by lang",
        "mapped delta": f"delta://{folder}/mapped",
        "iceberg": "iceberg://prod/sales.reviews",
        "catalogs": str(folder / "iceberg"),
    }


KINDS = ["parquet", "dictionaries", "delta", "partitioned delta", "mapped delta", "iceberg"]
SHOWN = ["text", "lang", "stars", "share", "ok"]


def _open(places: dict[str, str], kind: str, **taken: Any) -> Any:
    return open_rows({"path": places[kind], **taken}, catalog_in(Path(places["catalogs"])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", FILTERS)
def test_a_filter_takes_exactly_its_rows(places: dict[str, str], kind: str, text: str) -> None:
    expected = pa.Table.from_pylist([row for row in ROWS.to_pylist() if FILTERS[text](row)], ROWS.schema)
    if kind == "iceberg" and text.startswith("lang not in"):  # pyiceberg takes null for no member
        expected = pa.concat_tables([expected, ROWS.filter(pa.compute.is_null(ROWS["lang"]))])
    assert read_rows(_open(places, kind, where=text), SHOWN) == library_rows(expected, SHOWN)


@pytest.mark.parametrize("text", FILTERS)
def test_the_tables_own_libraries_take_the_same_rows(places: dict[str, str], text: str) -> None:
    from pyiceberg.catalog import load_catalog

    delta = pa.table(deltalake.DeltaTable(places["delta"].removeprefix("delta://")).scan(predicate=text).read_all())
    assert read_rows(_open(places, "delta", where=text), SHOWN) == library_rows(delta, SHOWN)
    table = load_catalog("prod", **catalog_in(Path(places["catalogs"]))["prod"]).load_table("sales.reviews")
    iceberg = table.scan(row_filter=text).to_arrow()
    assert read_rows(_open(places, "iceberg", where=text), SHOWN) == library_rows(iceberg, SHOWN)


@pytest.mark.parametrize("kind", ["parquet", "delta", "iceberg"])
def test_files_and_row_groups_that_cannot_hold_such_rows_are_not_read(places: dict[str, str], kind: str) -> None:
    source = _open(places, kind, where="share >= 4.5")  # rows 36 to 39
    read = [file for file in source.files if file.chosen_groups]
    assert len(read) == 1 and source.rows <= 10 and not source.exact
    if kind == "parquet":
        assert len(read[0].chosen_groups) == 2 and source.rows == 6
    assert read_rows(source, ["text"]).total() == 4


@pytest.mark.parametrize("kind", KINDS)
def test_columns_give_a_column_the_name_that_templates_use(places: dict[str, str], kind: str) -> None:
    source = _open(places, kind, columns={"text": "lang", "label": "text"}, where="lang = 'en'")
    expected = Rows(("en", f"text {i}") for i in range(0, 40, 4))
    assert read_rows(source, ["text", "label"]) == expected
    assert {"text", "label", "stars"} <= set(source.files[0].column_names)
    with pytest.raises(CorpusError, match=f"^{HERE}: 'columns' takes 'text' from the column 'no', which .*fix"):
        _open(places, kind, columns={"text": "no"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [None, "lang = 'en'"])
def test_a_limit_takes_the_first_rows_and_always_the_same(places: dict[str, str], kind: str, where: str | None) -> None:
    whole = read_rows(_open(places, kind, where=where), ["text"])
    before = Rows()
    for limit in (1, 3, 10, 11, 39, 40, 99):
        source = _open(places, kind, where=where, limit=limit)
        rows = read_rows(source, ["text"])
        assert source.exact and rows.total() == source.rows == min(limit, whole.total())
        assert before <= rows <= whole and read_rows(_open(places, kind, where=where, limit=limit), ["text"]) == rows
        before = rows


def test_tables_and_files_may_stand_in_one_list(places: dict[str, str]) -> None:
    source = open_rows({"path": [places["delta"], places["parquet"]], "where": "lang = 'en'", "limit": 15})
    assert len(source.tables) == 1 and read_rows(source, ["text"]).total() == source.rows == 15
    whole = open_rows({"path": [places["delta"], places["parquet"]]})
    assert read_rows(whole, ["text"]) == Rows({(f"text {i}",): 2 for i in range(40)})


def test_hive_folders_and_class_names_can_be_filtered_and_renamed(tmp_path: Path) -> None:
    import json

    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["no", "yes"]}}}}
    rows = pa.table({"text": ["a", "b"], "label": [0, 1]}).replace_schema_metadata(
        {"huggingface": json.dumps(features)}
    )
    for year in ("2023", "2024"):
        (tmp_path / f"year={year}").mkdir()
        pq.write_table(rows, tmp_path / f"year={year}" / "a.parquet")
    split = {"path": str(tmp_path), "where": "year = '2024'", "columns": {"answer": "label", "when": "year"}}
    read = read_rows(open_rows(split), ["text", "answer", "when"])
    assert read == Rows([("a", "no", "2024"), ("b", "yes", "2024")])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lang =", "cannot be read"),
        ("upper(lang) = 'EN'", "cannot be read"),
        ("nothing = 'en'", "names the column 'nothing', which is not there"),
        ("stars = 'many'", "does not fit the columns' types"),
        ("text like '%1'", "cannot be read"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "delta", "iceberg"])
def test_a_filter_that_is_none_is_one_sentence(places: dict[str, str], kind: str, text: str, reason: str) -> None:
    with pytest.raises(CorpusError, match=f"^{HERE}: .*{reason}.*fix 'where'") as refused:
        _open(places, kind, where=text)
    assert "\n" not in str(refused.value)


UNUSUAL = {
    "number": pa.array([2**64 - 1, 3], pa.uint64()),
    "time": pa.array([1, 2], pa.time32("s")),
    "name": pa.array(["x", "y"]).dictionary_encode(),
    "half": pa.array([1.5, 2.5], pa.float32()).cast(pa.float16()),
    "span": pa.array([1, 2], pa.duration("s")),
    "price": pa.array([Decimal(1), Decimal(2)], pa.decimal256(60, 2)),
    "list": pa.array([[1], [2]]),
}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("number > 5", ["a"]),
        (f"number = {2**64 - 1}", ["a"]),
        ("number != 3", ["a"]),
        ("time = '00:00:02'", ["b"]),
        ("name = 'x'", ["a"]),
    ],
)
def test_a_filter_takes_its_rows_also_of_types_that_iceberg_lacks(tmp_path: Path, text: str, rows: list[str]) -> None:
    column = text.split()[0]
    pq.write_table(pa.table({"text": ["a", "b"], column: UNUSUAL[column]}), tmp_path / "a.parquet")
    found = read_rows(open_rows({"path": str(tmp_path / "a.parquet"), "where": text}), ["text"])
    assert [row for (row,) in found.elements()] == rows


@pytest.mark.parametrize("text", ["half > 2", "span > 1", "price > 1", "list = 1"])
def test_a_filter_that_cannot_be_applied_to_a_column_is_one_sentence_about_the_filter(
    tmp_path: Path, text: str
) -> None:
    column = text.split()[0]
    pq.write_table(pa.table({"text": ["a", "b"], column: UNUSUAL[column]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=f"^{HERE}: .*the filter {text!r} .*; fix 'where'$") as refused:
        read_rows(open_rows({"path": str(tmp_path / "a.parquet"), "where": text}), ["text"])
    assert "\n" not in str(refused.value)


def test_a_filter_enters_the_key_and_a_split_without_one_keeps_its_own(places: dict[str, str]) -> None:
    assert all(file.view is None for file in open_rows(places["parquet"]).files)
    keys = [
        str([file.view.key() for file in _open(places, "parquet", **taken).files])
        for taken in ({"where": "ok = true"}, {"where": "ok = false"}, {"limit": 5}, {"limit": 6},
                      {"columns": {"label": "lang"}})
    ]  # fmt: skip
    assert len(set(keys)) == 5


def test_a_filter_that_no_row_passes_is_told(places: dict[str, str]) -> None:
    task = TaskSettings(
        train={"path": places["parquet"], "where": "share > 100"}, dev=places["parquet"], target="{lang}"
    )
    with pytest.raises(CorpusError, match=f"^{HERE}: .*no row"):
        check_task("x", task)


def _settings(train: Any, **more: Any) -> Any:
    return parse_settings({"model": {"path": "m"}, "tasks": {"x": {"train": train, "dev_fraction": 0.1}}, **more})


def test_a_split_is_a_path_a_list_or_a_mapping_and_a_mistake_in_it_is_named() -> None:
    assert _settings({"path": ["a", "b"], "limit": 3}).tasks["x"].train.limit == 3
    assert _settings(["a", "b"]).tasks["x"].train == ["a", "b"]
    for train, reason in [
        ({"limit": 3}, "'tasks.x.train.path' is missing"),
        ({"path": "a", "limt": 3}, "unknown key 'tasks.x.train.limt'; did you mean 'limit'"),
        ({"path": "a", "limit": 0}, "'tasks.x.train.limit': input should be greater than or equal to 1"),
        ({"path": "a", "types": {"n": "int"}}, "'tasks.x.train.types.n': "),
        (3, "'tasks.x.train'"),
        ({"path": "s3://key:secret@host/bucket"}, "'tasks.x.train.path': the address holds a password"),
    ]:
        with pytest.raises(SettingsError) as refused:
            _settings(train)
        assert reason in str(refused.value) and "\n" not in str(refused.value), str(refused.value)


@pytest.fixture(scope="module")
def with_nan(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Any]]:
    """(path, catalogs) of the same rows, one of them NaN, in one file or two, and in row groups of each size."""
    folder = tmp_path_factory.mktemp("nan")
    rows = pa.table({"text": ["a", "b", "c", "d"], "share": [3.0, float("nan"), 3.0, 5.0]})
    places: list[tuple[str, Any]] = []
    for size in (1, 2, 3, 4):
        pq.write_table(rows, folder / f"{size}.parquet", row_group_size=size)
        places.append((str(folder / f"{size}.parquet"), None))
    for name, parts in [("one", [rows]), ("two", [rows.slice(0, 3), rows.slice(3)])]:
        table = new_table(folder / f"iceberg {name}", rows.schema)
        for part in parts:
            deltalake.write_deltalake(folder / f"delta {name}", part, mode="append")
            table.append(part)
        places.append((f"delta://{folder}/delta {name}", None))
        places.append(("iceberg://prod/sales.reviews", catalog_in(folder / f"iceberg {name}")))
    return places


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        ("share != 3.0", "bd"),
        ("not (share = 3.0)", "bd"),
        ("share not in (3.0, 4.0)", "bd"),
        ("share is nan", "b"),
        ("not (share is not nan)", "b"),
        ("share is nan or share > 4", "bd"),
        ("share is not nan", "acd"),
        ("share > 4", "d"),
    ],
)
def test_a_filter_takes_the_same_rows_however_they_lie_in_files_and_row_groups_nan_among_them(
    with_nan: list[tuple[str, Any]], wanted: str, taken: str
) -> None:
    for path, catalogs in with_nan:
        found = read_rows(open_rows({"path": path, "where": wanted}, catalogs), ["text"])
        assert found == Rows((text,) for text in taken), path


def test_columns_that_trade_names_keep_the_types_that_the_table_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1.5, 2.5], "body": ["1", "x"]}), tmp_path / "t.parquet")
    traded = {"path": str(tmp_path / "t.parquet"), "columns": {"text": "body", "body": "text"}}
    assert read_rows(open_rows(traded), ["text", "body"]) == Rows([("1", "1.5"), ("x", "2.5")])
    hidden = {"path": str(tmp_path / "t.parquet"), "columns": {"text": "body"}, "where": "text > 2"}
    assert read_rows(open_rows(hidden), ["text"]) == Rows([("x",)])


def test_types_of_columns_that_only_the_filter_reads_decide_the_shards(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,score\na,10\nb,9\n")
    split = {"path": str(tmp_path / "t.csv"), "where": "score > '8'"}
    texts, numbers = open_rows(split), open_rows({**split, "types": {"score": "integer"}})
    assert read_rows(texts, ["text"]) == Rows([("b",)])
    assert read_rows(numbers, ["text"]) == Rows([("a",), ("b",)])
    assert key_of(texts) != key_of(numbers)


def test_a_table_that_widens_a_column_of_the_filter_has_other_shards_of_the_same_file(tmp_path: Path) -> None:
    from pyiceberg.types import DoubleType

    rows = pa.table({"text": ["a", "b"], "score": pa.array([0.1, 0.5], pa.float32())})
    table = new_table(tmp_path, rows.schema)
    table.append(rows)
    split = {"path": "iceberg://prod/sales.reviews", "where": "score > 0.1"}
    before = open_rows(split, catalog_in(tmp_path))
    with table.update_schema() as change:
        change.update_column("score", DoubleType())
    after = open_rows(split, catalog_in(tmp_path))
    assert [file.path for file in before.files] == [file.path for file in after.files]
    assert read_rows(before, ["text"]) == Rows([("b",)])
    assert read_rows(after, ["text"]) == Rows([("a",), ("b",)])  # 0.1 of 32 bits is more than 0.1 of 64
    assert key_of(before) != key_of(after)


def key_of(source: ParquetSource) -> str:
    recipe = Recipe(parse_template("{text}", ""), parse_template("{text}", ""), " ", 64, 8, "decoder-only")
    return shard_key(source, recipe, TokenizerSpec("", "digest", "decoder-only"))[0]


@pytest.mark.parametrize(
    "address",
    [
        "delta+ftp://host/t",
        "lance+ftp://host/t",
        "delta+s3:///t",
        "delta:///nowhere@99999999999999999999",
        "iceberg://prod/a.b@2026-13-45",
    ],
)
def test_an_address_that_cannot_be_is_refused_in_one_sentence(address: str, tmp_path: Path) -> None:
    catalog = {"prod": {"type": "sql", "uri": f"sqlite:///{tmp_path}/catalog.db"}}
    with pytest.raises(CorpusError) as refused:
        open_rows(address, catalog)
    assert str(refused.value).startswith(f"{HERE}: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "credential",
        "s3.secret-access-key",
        "s3.access-key-id",
        "gcs.oauth2.token",
        "TOKEN",
        "header.X-Api-Key",
    ],
)
def test_a_catalogs_secret_in_the_settings_is_refused(key: str) -> None:
    with pytest.raises(SettingsError, match="PYICEBERG_CATALOG__PROD__") as refused:
        _settings("a", catalogs={"prod": {"type": "rest", "uri": "https://catalog", key: "hunter2"}})
    assert "hunter2" not in str(refused.value)
    with pytest.raises(SettingsError, match="PYICEBERG_CATALOG__PROD__") as refused:
        _settings("a", catalogs={"prod": {"type": "sql", "uri": "postgresql://me:hunter2@host/db"}})
    assert "hunter2" not in str(refused.value)
    with pytest.raises(SettingsError, match="auth is no single value") as refused:
        _settings("a", catalogs={"prod": {"type": "rest", "auth": {"type": "basic", "basic": {"password": "hunter2"}}}})
    assert "hunter2" not in str(refused.value)
    harmless = {"oauth2-server-uri": "https://login", "header.X-Iceberg-Access-Delegation": "vended-credentials"}
    named = {"prod": {"type": "rest", "uri": "https://catalog", **harmless}}
    assert _settings("a", catalogs=named).catalogs["prod"].properties == named["prod"]
