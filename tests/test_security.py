"""What SECURITY.md promises and a test can show."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.addresses import hide_credentials, holds_credentials
from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.bank import PromptBank
from pipeline.corpus.template import parse_template
from pipeline.errors import BackboneError, BankError, CorpusError, PromptBankError, SettingsError
from pipeline.settings import load_settings, parse_settings
from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("pipeline", "promptbank", "jobs", "examples")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
SECRET = "hunter2/very+secret"

# What runs code that it finds in data. (Ray pickles between its own processes; SECURITY.md says so.)
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
RUNS_DATA = {
    *("torch.load", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "…"


def offences(tree: ast.AST) -> Iterator[str]:
    """What in a module could run code that came with data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: imports {name}" for name in names if name.partition(".")[0] in UNPICKLERS)
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if name in RUNS_DATA:
            yield f"{node.lineno}: calls {name}"
        for option in ("allow_pickle", "trust_remote_code", "shell"):
            value = given.get(option)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                yield f"{node.lineno}: {option} of {name} is not False"
        auto = re.search(r"\b(Auto\w+|auto)\.(from_pretrained|from_config)$", name)
        if auto and "trust_remote_code" not in given:
            yield f"{node.lineno}: {name} leaves trust_remote_code open, and transformers then asks whoever is there"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_code_that_it_finds_in_data(path):
    assert not list(offences(ast.parse(path.read_text())))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "np.load(path)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "eval(text)",
        "np.save(path, array, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "AutoConfig.from_pretrained(folder)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=setting)",
    ],
)
def test_such_a_source_would_be_found(line):
    assert len(list(offences(ast.parse(line)))) == 1


def test_a_settings_file_cannot_run_code(tmp_path):
    bomb, path = tmp_path / "ran", tmp_path / "settings.yaml"
    path.write_text(f"run: !!python/object/apply:os.mknod ['{bomb}']\n")
    with pytest.raises(SettingsError, match="not valid YAML"):
        load_settings(path)
    with pytest.raises(SettingsError, match="not valid YAML"):
        parse_settings({}, [f"run=!!python/object/apply:os.mknod ['{bomb}']"])
    assert not bomb.exists()
    assert yaml.unsafe_load(path.read_text()) and bomb.exists(), "the bomb is none"


@pytest.mark.parametrize("template", ["{text.__class__}", "{text[0]}", "{0!r}", "{text:>{width}}"])
def test_a_template_reaches_nothing_but_columns(template):
    with pytest.raises(CorpusError, match="plain column names only"):
        parse_template(template, "task 'sst2'")


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_a_model_that_brings_code_of_its_own_is_refused_and_its_code_never_run(part, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")  # somebody at the terminal who says yes to everything
    folder, bomb = make_model(tmp_path / "model"), tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(bomb)!r}, 'w')\n")
    name, key, value = {
        "config": ("config.json", "AutoConfig", "own.Config"),
        "tokenizer": ("tokenizer_config.json", "AutoTokenizer", [None, "own.Tokenizer"]),
    }[part]
    described = json.loads((folder / name).read_text())
    described |= {"auto_map": {key: value}, "tokenizer_class": "Own", "model_type": "own"}
    (folder / name).write_text(json.dumps(described))
    with pytest.raises(BackboneError, match="needs code of its own, which is never run here") as refused:
        files = find_model(str(folder))
        read_config(files)
        read_tokenizer(files)
    assert "trust_remote_code" not in str(refused.value)
    assert not bomb.exists()


ADDRESSES = [
    f"s3://AKIA:{SECRET}@bucket/prompts",
    f"abfs://:{SECRET}@account.blob.core.windows.net/prompts",
    f"az://container/prompts?sig={SECRET}",
    f"s3://bucket/prompts?aws_secret_access_key={SECRET}&region=eu",
    *(f"az://container/prompts?{key}={SECRET}" for key in ("api_key", "apikey", "key", "auth", "jwt", "X-Api-Key")),
    f"s3://bucket/prompts;AccountKey={SECRET}",
    "https://hunter2@host/prompts",
    "s3a://hunter2@bucket/prompts",
    "gcs://hunter2@bucket/prompts",
    "gs://anonymous:hunter2@bucket/prompts",
    "s3://anonymous-hunter2@bucket/prompts",
]


CONNECTIONS = [
    f"AccountKey={SECRET}",
    f"SharedAccessSignature=sv=1&sig={SECRET}",
    f"token={SECRET};AccountName=me",
]


@pytest.mark.parametrize("address", [*ADDRESSES, *CONNECTIONS])
@pytest.mark.parametrize(
    "key",
    [
        "bank.uri",
        "run.storage",
        "model.path",
        "cluster.address",
        "tasks.sst2.train",
        "tasks.sst2.test",
        "tracking.mlflow",
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(address, key):
    task = {"train": "train.parquet", "dev": "dev.parquet"}
    with pytest.raises(SettingsError, match=rf"'{key}': the address holds a password") as refused:
        parse_settings({"model": {"path": "m"}, "tasks": {"sst2": task}}, [f"{key}={address}"])
    with pytest.raises(SettingsError, match="the address holds a password"):
        parse_settings({"model": {"path": "m"}, "tasks": {"sst2": {**task, "train": ["a.parquet", address]}}})
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_bank_refuses_an_address_with_a_password_without_repeating_it(address):
    with pytest.raises(BankError) as refused:
        PromptBank.open(address)
    assert "hunter2" not in str(refused.value) and "***" in str(refused.value)


def test_a_password_in_an_endpoint_stays_out_of_the_sentence_that_names_it(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    for endpoint in ("http://user:hunter2@127.0.0.1:9", "ftp://user:hunter2@127.0.0.1"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(PromptBankError) as refused:
            PromptBank.open("s3://bucket/prompts")
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/a:b@c/x.parquet",
        "abfs://container@account/x",
        "gs://b/day=12:00/x?region=eu",
        "/data/x@y:z",
        "/data/token=3/key=4/x.parquet",
        "hdfs://user@node/x",
        "gs://anonymous@bucket/x",
        "gcs://anonymous@bucket/x/*.parquet",
        "tokenizer=llama/data/*.parquet",
        "api_key=3/a;b/x.parquet",
        "tokens=5 per second",
        "postgresql://user@host/runs",
        "./bank",
    ],
)
def test_an_ordinary_address_is_left_alone(address):
    assert not holds_credentials(address) and hide_credentials(address) == address
