"""Addresses of corpora: a bank's schemes, Hadoop's names for them, and a clear sentence for any other."""

import pytest
from pyarrow import fs

from pipeline.corpus.files import inspect_files
from pipeline.corpus.paths import locate
from pipeline.errors import CorpusError, UnreachableError

HERE = "task 'x', train"


@pytest.mark.parametrize(
    ("path", "kind", "inside", "pattern"),
    [
        ("s3a://bucket/folder/a.parquet?region=us-east-1", "s3", "bucket/folder/a.parquet", None),
        ("S3://bucket/folder/*.parquet?region=us-east-1", "s3", "bucket/folder", "*.parquet"),
        ("gcs://bucket/folder", "gcs", "bucket/folder", None),
        ("az://container/folder/*/a.parquet", "abfs", "container/folder", "*/a.parquet"),
        ("abfs://container@account/folder", "abfs", "container/folder", None),
        ("abfss://container@account.dfs.core.windows.net/folder", "abfs", "container/folder", None),
        ("file:///data/*.parquet", "local", "/data", "*.parquet"),
    ],
)
def test_an_address_is_read_as_banks_and_hadoop_write_it(
    monkeypatch: pytest.MonkeyPatch, path: str, kind: str, inside: str, pattern: str | None
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    filesystem, fixed, below = locate(path)
    assert (filesystem.type_name, fixed, below) == (kind, inside, pattern)
    if kind == "abfs":
        assert filesystem == fs.AzureFileSystem("account", account_key="a2V5")


@pytest.mark.parametrize("scheme", ["az", "azure", "adl", "abfs", "abfss"])
@pytest.mark.parametrize(
    "rest", ["account.blob.core.windows.net/container/a", "container@account.dfs.core.windows.net/a?enable_tls=false"]
)
def test_every_name_of_azure_has_arrows_own_forms(scheme: str, rest: str) -> None:
    filesystem, inside, _ = locate(f"{scheme}://{rest}")
    assert (filesystem, inside) == fs.FileSystem.from_uri(f"{scheme if scheme == 'abfss' else 'abfs'}://{rest}")
    assert inside == "container/a"


@pytest.mark.parametrize("path", ["http://host/a.parquet", "ftp://host/a", "s4://bucket/a", "az://container/a"])
def test_another_address_is_one_sentence_that_lists_what_can_be(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(CorpusError, match=r"cannot look up") as refused:
        inspect_files(path, HERE)
    fixes = ["AZURE_STORAGE_ACCOUNT_NAME"] if path.startswith("az") else ["s3://", "gs://", "az://", "abfs://", "hf://"]
    assert all(fix in str(refused.value) for fix in fixes) and "\n" not in str(refused.value)


@pytest.mark.parametrize("path", ["s3://*/a.parquet", "s3://", "gs://", "hf://", "az://", "abfs://", "file://", "://x"])
def test_half_an_address_is_one_sentence(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    with pytest.raises((CorpusError, UnreachableError)) as refused:
        inspect_files(path, HERE)
    assert "\n" not in str(refused.value)


def test_the_hub_without_a_network_is_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def nothing_answers(*_: object, **__: object) -> None:
        raise type("ConnectError", (Exception,), {})("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", nothing_answers)
    for path in ("hf://datasets/owner/name/a.parquet", "hf://datasets/owner/name/data/train-*"):
        with pytest.raises(UnreachableError, match=r"cannot look up .*Name or service not known.*try again later"):
            inspect_files(path, HERE)
