"""The package without extras, in an environment of its own, as a service that only loads prompts installs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from promptbank import PromptBank

pytestmark = [pytest.mark.processes, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pipeline", "promptbank", "pyproject.toml", "README.md", "LICENSE")

LOAD = """
import importlib.util, json, sys, time
start = time.perf_counter()
from promptbank import PromptBank
bank = PromptBank.open(sys.argv[1])
prompt = bank.load("sst2")
first = time.perf_counter() - start
print(json.dumps({
    "sum": float(prompt.array.sum()),
    "template": prompt.record.template.input,
    "problems": bank.verify().problems,
    "there": [name for name in ("torch", "transformers", "ray", "typer", "obstore") if importlib.util.find_spec(name)],
    "imported": sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "ray", "typer"}),
    "seconds": first,
}))
"""


def run(*command: object, **more) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd="/", **more)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    source = folder / "source"  # a copy, for building leaves files in its folder
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    environment = folder / "venv"
    assert run(sys.executable, "-m", "venv", environment).returncode == 0
    python = environment / "bin/python"
    done = run(python, "-m", "pip", "install", "-q", source, "-c", ROOT / "constraints.txt")
    assert done.returncode == 0, done.stderr
    return python


def test_the_package_without_extras_opens_verifies_and_loads_a_bank(python, bank, uri, new_prompt, publish):
    publish(bank, new_prompt())
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = run(python, "-c", LOAD, uri, env=clean)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"import, open and first load: {found.pop('seconds'):.2f} s")
    assert found == {
        "sum": float(new_prompt().array.sum()),
        "template": new_prompt().template.input,
        "problems": [],
        "there": [],
        "imported": [],
    }


def test_what_an_extra_is_needed_for_says_which(python, uri, bank, tmp_path):
    for code, extra in (
        ("from promptbank import PromptBank; PromptBank.open('s3://prompts/bank')", "cloud"),
        (f"from promptbank import PromptBank; PromptBank.open({str(uri)!r}, trusted_keys=['x'])", "signing"),
    ):
        done = run(python, "-c", code)
        assert f"pip install 'promptbank[{extra}]'" in done.stderr.splitlines()[-1]
    done = run(python.with_name("promptbank"), "ls")
    assert done.returncode == 2 and done.stderr.splitlines()[0].endswith("pip install 'promptbank[cli]'")


def test_a_bank_in_the_present_environment_imports_neither_torch_nor_ray(bank, uri, new_prompt, publish):
    publish(bank, new_prompt())
    assert PromptBank.open(uri).load("sst2").version == 1
    done = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LOAD}", uri)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["imported"] == []
