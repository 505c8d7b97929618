"""What `import promptbank` promises: its names, that it is cheap, and that types and errors are the code's own."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import promptbank
from pipeline import errors
from tests.serving.prompts import new_prompt

ROOT = Path(__file__).resolve().parents[1]
BANK = """
    AliasMove BackboneId CarriedPrompt CollectedFiles Manifest ManifestHeader Metrics NewPrompt Prompt PromptBank
    PromptRecord SameBackbone Snapshot Template Verification WatchEvent Watcher
"""
ERRORS = """
    BackboneError BankError CorpusError DivergedError LeaseError MissingFileError NoLabelsError OverloadedError
    PromptBankError RowTooLongError SettingsError StorageError TuningError UnknownNameError UnknownTaskError
    UnreachableError
"""
SERVING = """
    BankTasks BatchAnswers Completion PromptedModel Request ServedBackbone Service ServiceMetrics ServiceSettings
    VersionedAnswers classify_ensemble generate_ensemble load_backbone make_api
"""

# Opens, reads and publishes; then tells which heavy packages were imported.
USE = """
import json, sys
import numpy, promptbank
bank = promptbank.PromptBank.open(sys.argv[1])
prompt = bank.load("film")
fields = {key: getattr(prompt.record, key) for key in (
    "task", "template", "labels", "metric", "metrics", "initialisation", "length", "steps", "seed",
    "corpus_digest", "settings_digest")}
new = promptbank.NewPrompt(name="again", array=prompt.array + 1, **fields)
version = bank.publish([new], prompt.backbone, "test", {}, "latest")
try:
    bank.load("flim")
except promptbank.UnknownNameError as error:
    sentence = str(error)
heavy = {"torch", "transformers", "ray", "fastapi", "yaml", "typer", "rich"}
print(json.dumps({"version": version, "sentence": sentence, "heavy": sorted(heavy & set(sys.modules))}))
"""


def test_these_names_are_the_interface():
    assert sorted(promptbank.__all__) == sorted((BANK + ERRORS + SERVING).split())
    assert promptbank.__all__ == sorted(promptbank.__all__, key=lambda name: (not name[0].isupper(), name))
    assert dir(promptbank) == sorted(promptbank.__all__)
    missing = [name for name in promptbank.__all__ if getattr(promptbank, name, None) is None]
    assert not missing


def test_every_error_that_a_user_can_fix_is_among_them():
    tree = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.PromptBankError)
    }
    assert tree == set(ERRORS.split())
    defined = [
        f"{path}: {node.name}"
        for path in (ROOT / "pipeline").rglob("*.py")
        if path.name != "errors.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and tree & {getattr(base, "id", None) for base in node.bases}
    ]
    assert not defined, "errors for users live in pipeline/errors.py, which needs no torch"


def test_a_name_that_is_not_there_says_so():
    with pytest.raises(AttributeError, match="module 'promptbank' has no attribute 'PromptBnak'"):
        promptbank.PromptBnak  # noqa: B018


@pytest.mark.processes
def test_using_a_bank_imports_neither_torch_nor_ray(tmp_path):
    backbone = promptbank.BackboneId(
        fingerprint="f", config="c", tokenizer="t", weights="w", quantization="int8", model="tiny",
        architecture="decoder-only", hidden_size=32,
    )  # fmt: skip
    bank = promptbank.PromptBank.open(tmp_path / "bank", create=True)
    bank.publish([new_prompt("film", 4)], backbone, "test", {}, "latest")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{USE}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "bank")], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["heavy"] == [] and found["version"] == 2
    assert "did you mean 'film'" in found["sentence"]


def test_lazy_names_are_the_codes_own():
    from pipeline.serving.prompted_model import PromptedModel
    from pipeline.serving.service_settings import ServiceSettings

    assert promptbank.PromptedModel is PromptedModel and promptbank.ServiceSettings is ServiceSettings
