"""Flags of vLLM's command that would make its model another one are refused by name. See also tests/vllm."""

from argparse import Namespace

import pytest

from pipeline.errors import SettingsError
from pipeline.serving.in_vllm.checks import check_flags, check_names, hidden_tasks

PLAIN = {
    "revision": None, "code_revision": None, "tokenizer_revision": None, "tokenizer": None, "hf_config_path": None,
    "hf_overrides": {}, "model_class_overrides": {}, "config_format": "auto", "tokenizer_mode": "auto",
    "load_format": "auto", "dtype": "auto", "quantization": None,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"load_format": "safetensors"},
        {"load_format": "runai_streamer"},
        {"dtype": "bfloat16", "quantization": "fp8"},
        {"tokenizer_mode": "hf"},
        {"revision": "main", "tokenizer_revision": "main"},  # a folder has but one
    ],
)
def test_what_leaves_the_model_as_it_is_passes(model, given):
    check_flags(Namespace(**PLAIN | given), model)
    check_flags(Namespace(**given), model)  # a vLLM that does not have the other flags


def test_the_models_own_tokenizer_passes_by_whatever_path(model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    for path in (model, f"{model}/", f"{model}/../model", tmp_path / "link"):
        check_flags(Namespace(**PLAIN | {"tokenizer": str(path), "hf_config_path": str(path)}), model)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("tokenizer", "other/tokenizer", "leave it out"),
        ("hf_config_path", "other", "leave it out"),
        ("hf_overrides", {"rope_theta": 1}, "leave it out"),
        ("hf_overrides", lambda config: config, "leave it out"),
        ("model_class_overrides", {"LlamaForCausalLM": "mine:Model"}, "leave it out"),
        ("load_format", "dummy", "leave it out, or give auto, hf, safetensors"),
        ("load_format", "mistral", "leave it out, or give auto, hf, safetensors"),
        ("load_format", "pt", "leave it out, or give auto, hf, safetensors"),
        ("load_format", "a-plugins-own", "leave it out, or give auto, hf, safetensors"),
        ("config_format", "mistral", "leave it out, or give auto or hf"),
        ("tokenizer_mode", "mistral", "leave it out, or give auto, hf or slow"),
    ],
)
def test_what_makes_it_another_model_is_refused_by_its_flag(model, name, value, remedy):
    with pytest.raises(SettingsError) as refused:
        check_flags(Namespace(**PLAIN | {name: value}), model)
    said = str(refused.value)
    assert said.startswith(f"--{name.replace('_', '-')} ") and remedy in said and "\n" not in said


@pytest.mark.parametrize("name", ["revision", "tokenizer_revision", "code_revision"])
def test_a_revision_of_a_model_of_a_hub_is_refused(name):
    with pytest.raises(SettingsError, match=f"^--{name.replace('_', '-')} v2: .*download that revision"):
        check_flags(Namespace(**PLAIN | {name: "v2"}), "organisation/model-that-is-no-folder")


@pytest.mark.parametrize(
    ("served", "hidden"),
    [
        (["base"], ()),
        (["film"], ("film",)),
        (["base", "open"], ("open",)),
        (["film@prod"], ("film",)),
        (["Film", "films", "fil"], ()),
    ],
)
def test_a_task_with_the_name_of_a_model_of_vllm_is_found_and_refused(served, hidden):
    tasks = ("colour", "film", "open")
    assert hidden_tasks(tasks, served) == hidden
    if hidden:
        with pytest.raises(SettingsError, match=f"'{hidden[0]}' would answer in place of .*--served-model-n"):
            check_names(tasks, served)
    else:
        check_names(tasks, served)
