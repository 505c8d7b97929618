"""Exports: what other tools find on disk, whole or not at all. Whether they load it: tests/serving."""

import errno
import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.bank.exports import export_llama_cpp, export_npy, export_peft, export_sglang, export_vllm
from pipeline.bank.imports import import_npy, import_peft
from pipeline.errors import BankError, StorageError

EXPORTS = {
    "peft": lambda prompt, place: export_peft(prompt, place / "sst2", "gpt2"),
    "npy": lambda prompt, place: export_npy(prompt, place / "sst2.npy"),
    "vllm": lambda prompt, place: export_vllm(prompt, place / "sst2"),
    "llama-cpp": lambda prompt, place: export_llama_cpp(prompt, place / "sst2"),
    "sglang": lambda prompt, place: export_sglang(prompt, place / "sst2"),
}


@pytest.fixture
def prompt(bank, publish, new_prompt):
    """A prompt whose numbers are as uneven as tuning makes them."""
    array = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    publish(bank, new_prompt("other"))
    publish(bank, new_prompt("sst2", array=array))
    return bank.load("sst2")


@pytest.fixture(params=EXPORTS)
def export(request):
    return EXPORTS[request.param]


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_prompt_exported_and_imported_again_is_equal_bit_by_bit(prompt, tmp_path):
    for array in (
        import_peft(export_peft(prompt, tmp_path / "peft", "gpt2")),
        import_npy(export_npy(prompt, tmp_path / "sst2.npy")),
        load_file(export_vllm(prompt, tmp_path / "vllm") / "prompt_embeds.safetensors")["prompt_embeds"],
    ):
        assert array.dtype == np.float32 and array.shape == (4, 8)
        assert array.tobytes() == prompt.array.tobytes()


def test_the_numpy_file_is_read_with_numpy_alone(prompt, tmp_path):
    array = np.load(export_npy(prompt, tmp_path / "deep" / "er" / "sst2.npy"), allow_pickle=False)
    assert array.dtype == np.float32 and array.flags.c_contiguous
    np.testing.assert_array_equal(array, prompt.array)


def test_every_export_tells_what_the_prompt_was_tuned_with_and_for(export, prompt, tmp_path):
    made = export(prompt, tmp_path)
    description = made / "prompt.json" if made.is_dir() else made.with_suffix(".prompt.json")
    told = json.loads(description.read_bytes())
    assert (told["name"], told["version"], told["shape"]) == ("sst2", 2, [4, 8])
    assert told["template"] == {"input": "{text}\n“quoted” \\ {x}", "target": "{label}", "separator": " "}
    assert told["labels"] == ["negative", "positive"]
    assert told["metric"] == "accuracy" and told["metrics"]["dev_after"] == 0.9
    assert told["backbone"]["fingerprint"] == "f" * 64 and told["backbone"]["model"] == "SmolLM2-135M"
    assert told["backbone"]["quantization"] == "int8"


def test_an_encoder_decoder_prompt_is_exported_before_the_encoder_alone(bank, publish, new_prompt, tmp_path):
    publish(bank, new_prompt(), architecture="encoder-decoder", model="t5")
    prompt = bank.load("sst2")
    config = json.loads((export_peft(prompt, tmp_path / "peft", "t5") / "adapter_config.json").read_bytes())
    assert (config["task_type"], config["num_transformer_submodules"]) == ("SEQ_2_SEQ_LM", 1)
    for export in (export_vllm, export_llama_cpp, export_sglang):
        with pytest.raises(BankError, match=r"model t5, for which .* takes no .*; export it for PEFT"):
            export(prompt, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_nothing_is_overwritten(export, prompt, tmp_path):
    made = export(prompt, tmp_path)
    (made / "notes" if made.is_dir() else made).write_bytes(b"mine")
    before = files_below(tmp_path)
    with pytest.raises(BankError, match=r"sst2.* is there already, and nothing is overwritten: remove it"):
        export(prompt, tmp_path)
    assert files_below(tmp_path) == before


def test_nothing_is_overwritten_by_half_of_an_export(prompt, tmp_path):
    (tmp_path / "sst2.npy").write_bytes(b"mine")
    with pytest.raises(BankError, match=r"sst2\.npy is there already"):
        export_npy(prompt, tmp_path / "sst2.npy")
    assert (tmp_path / "sst2.npy").read_bytes() == b"mine" and not (tmp_path / "sst2.prompt.json").exists()
    (tmp_path / "taken").write_bytes(b"mine")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(BankError, match=r"taken.* is there already"):
            export_peft(prompt, folder, "gpt2")
    assert (tmp_path / "taken").read_bytes() == b"mine"


@pytest.mark.parametrize("step", ["fsync", "rename or link"])
def test_a_full_disk_leaves_nothing_behind(export, prompt, step, tmp_path, monkeypatch):
    before = files_below(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ["fsync"] if step == "fsync" else ["rename", "link"]:
        monkeypatch.setattr(os, name, full)
    with pytest.raises(StorageError, match=r"cannot write .*sst2.*: the disk is full; free some space") as caught:
        export(prompt, tmp_path)
    assert "\n" not in str(caught.value)
    assert files_below(tmp_path) == before
    assert not list(tmp_path.glob(".*")), "a temporary was left"


def test_the_second_of_two_files_failing_takes_the_first_away(prompt, tmp_path, monkeypatch):
    link = os.link

    def fails_at_the_array(source, target):
        if str(target).endswith(".npy"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        link(source, target)

    monkeypatch.setattr(os, "link", fails_at_the_array)
    with pytest.raises(StorageError, match="permission denied"):
        export_npy(prompt, tmp_path / "sst2.npy")
    assert not list(tmp_path.glob("*sst2*"))


def test_others_may_read_an_export_as_any_new_file(export, prompt, tmp_path):
    before = os.umask(0o022)
    try:
        made = export(prompt, tmp_path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [made, *made.parent.rglob("*sst2*/*")]}
    assert modes <= {0o644, 0o755}


def test_a_file_name_that_numpy_would_change_is_refused(prompt, tmp_path):
    with pytest.raises(BankError, match=r"sst2\.bin: the name of a NumPy file must end in \.npy"):
        export_npy(prompt, tmp_path / "sst2.bin")


def test_a_template_of_any_characters_survives_in_the_script(bank, publish, new_prompt, tmp_path):
    from pipeline.bank import Template

    template = Template(
        input="CONSTANTS INPUT_IDS '\"\"\"{text}'''\\\n{{x}}\u2028é", target="{label}", separator="\n\t'"
    )
    publish(bank, new_prompt(template=template), model="it's \\ here")
    prompt = bank.load("sst2")
    for export, name in (
        (export_vllm, "ask_vllm.py"),
        (export_llama_cpp, "ask_llama_cpp.py"),
        (export_sglang, "ask_sglang.py"),
    ):
        folder = export(prompt, tmp_path / name, "it's \\ here")
        script = compile((folder / name).read_bytes(), name, "exec")
        assert {template.input, template.separator, "it's \\ here"} <= set(script.co_consts)


@pytest.mark.processes
def test_neither_torch_nor_transformers_is_needed():
    code = (
        "import sys, pipeline.bank.exports, pipeline.bank.imports;"
        "sys.exit(bool({'torch', 'transformers', 'peft', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
