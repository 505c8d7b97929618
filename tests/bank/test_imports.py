"""Imports: files of other tools become prompts, or one clear sentence. Adapters by the real PEFT: tests/serving."""

import json
import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.bank import Template
from pipeline.bank.exports import export_peft
from pipeline.bank.imports import import_npy, import_peft, imported_prompt
from pipeline.errors import BankError

ARRAY = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
TEMPLATE = Template(input="{text}", target="{label}", separator=" ")


@pytest.fixture
def adapter(tmp_path):
    """Writes a PEFT folder: the config's changed fields, the tensors, and what else there is."""

    def write(tensors=None, **changes):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, **changes}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file({"prompt_embeddings": ARRAY} if tensors is None else tensors, folder / "adapter_model.safetensors")
        return folder

    return write


@pytest.fixture
def npy(tmp_path):
    def write(array, **options):
        np.save(tmp_path / "p.npy", array, **options)
        return tmp_path / "p.npy"

    return write


def refused(match, function, *args, **options):
    with pytest.raises(BankError, match=match) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_floats_of_any_width_and_order_become_float32(npy, dtype, order):
    stored = np.asarray(ARRAY, dtype=dtype, order=order)
    array = import_npy(npy(stored))
    assert type(array) is np.ndarray and array.dtype == np.float32 and array.flags.c_contiguous
    assert array.flags.writeable
    np.testing.assert_array_equal(array, stored.astype(np.float32))


def test_bfloat16_is_widened_exactly(npy, adapter):
    halves = (ARRAY.view(np.uint32) >> 16).astype("<u2")
    widened = (halves.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(import_npy(npy(halves.view("V2"))), widened)
    folder = adapter({"prompt_embeddings": halves})
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"U16"', b'"BF16"').replace(b"}}  ", b"}} "))
    np.testing.assert_array_equal(import_peft(folder), widened)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (ARRAY[0], r"its shape is \[8\] where a prompt's is \[P, H\]"),
        (ARRAY[None], r"its shape is \[1, 4, 8\]"),
        (ARRAY[:0], "damaged|its shape is"),
        (ARRAY.astype(np.int64), "its numbers are int64"),
        (ARRAY.astype(np.longdouble), "its numbers are float128"),
        (ARRAY * np.float32(np.nan), "not finite"),
        (ARRAY.astype(np.float64) * 1e300, "not finite in float32"),
    ],
)
def test_an_array_that_is_no_prompt_is_refused(npy, array, match):
    path = npy(array)
    refused(rf"p\.npy.*({match})", import_npy, path)


def test_nothing_is_unpickled(tmp_path, npy):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    refused("not a NumPy file", import_npy, npy(np.array([[Bomb()]], dtype=object), allow_pickle=True))
    (tmp_path / "q.npy").write_bytes(pickle.dumps(Bomb()))
    refused("not a NumPy file", import_npy, tmp_path / "q.npy")
    assert not (tmp_path / "exploded").exists()


def test_a_numpy_file_damaged_at_any_byte_is_read_or_refused_and_nothing_else(npy):
    path = npy(ARRAY)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        refused("damaged", import_npy, path)
    for at in range(160):
        for byte in (b"\0", b"9", b"(", b"'", b"\xff"):
            path.write_bytes(whole[:at] + byte + whole[at + 1 :])
            try:
                assert import_npy(path).ndim == 2
            except BankError as error:
                assert "\n" not in str(error)


def test_a_file_that_claims_to_be_huge_costs_no_memory(npy):
    path = npy(ARRAY)
    path.write_bytes(path.read_bytes().replace(b"(4, 8), }" + b" " * 12, b"(4000000000, 8000), }"))
    refused("damaged", import_npy, path)


def test_missing_and_oversized_files_are_refused_before_they_are_read(tmp_path, npy, adapter):
    refused(r"nowhere\.npy is missing; fix the path", import_npy, tmp_path / "nowhere.npy")
    refused(r"adapter_config\.json is missing", import_peft, tmp_path / "nowhere")
    refused("is not a file", import_npy, tmp_path)
    path, folder = npy(ARRAY), adapter()
    for file in (path, folder / "adapter_model.safetensors"):
        os.truncate(file, 2**30 + 1)  # a hole: it takes no room
    refused("above the limit of 1,073,741,824", import_npy, path)
    refused("above the limit of 1,073,741,824", import_peft, folder)


def test_adapters_of_other_kinds_are_refused_by_name(adapter):
    for kind in ("LORA", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", None):
        refused(f"an adapter of the type {kind} cannot be imported", import_peft, adapter(peft_type=kind))


@pytest.mark.parametrize("changes", [{"num_transformer_submodules": 2}, {"task_type": "SEQ_2_SEQ_LM"}])
def test_of_a_prompt_for_encoder_and_decoder_only_the_encoders_half_and_only_on_request(adapter, changes):
    folder = adapter({"prompt_embeddings": np.concatenate([ARRAY, ARRAY + 1])}, **changes)
    refused("only the encoder's can be imported: ask for it with half='encoder'", import_peft, folder)
    np.testing.assert_array_equal(import_peft(folder, half="encoder"), ARRAY)


def test_an_encoder_only_adapter_is_its_own_half(adapter):
    folder = adapter(task_type="SEQ_2_SEQ_LM", num_transformer_submodules=1)
    np.testing.assert_array_equal(import_peft(folder), ARRAY)
    np.testing.assert_array_equal(import_peft(folder, half="encoder"), ARRAY)


def test_damaged_and_contradictory_adapters_are_refused(adapter):
    refused("holds 4 rows where adapter_config.json says 5 × 1", import_peft, adapter(num_virtual_tokens=5))
    for fields in ({"num_virtual_tokens": "4"}, {"num_virtual_tokens": True}, {"num_transformer_submodules": 3}):
        refused("num_virtual_tokens .* must be a number above 0", import_peft, adapter(**fields))
    more = {"prompt_embeddings": ARRAY, "base_model.embed": ARRAY}
    refused("must hold the one tensor 'prompt_embeddings'", import_peft, adapter(more))
    refused("its numbers are I32", import_peft, adapter({"prompt_embeddings": ARRAY.view(np.int32)}))
    refused("not finite", import_peft, adapter({"prompt_embeddings": ARRAY * np.float32(np.inf)}))
    weights = adapter() / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for end in (0, 7, 40, len(whole) - 1):
        weights.write_bytes(whole[:end])
        refused("not a valid safetensors file", import_peft, weights.parent)
    for text in ("", "{", "[" * 100_000, "\xff\xfe"):
        (weights.parent / "adapter_config.json").write_text(text, encoding="latin-1")
        refused("not valid JSON", import_peft, weights.parent)
    (weights.parent / "adapter_config.json").write_text("[1]")
    refused("of the type None", import_peft, weights.parent)


def test_pickled_adapters_are_refused_with_the_mend(adapter):
    folder = adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(r"only pickled weights \(adapter_model.bin\): save the adapter again as safetensors", import_peft, folder)


def test_an_imported_prompt_is_published_and_exported_like_any_other(bank, backbone_id, adapter, tmp_path):
    array = import_peft(adapter())
    new = imported_prompt(
        "sst2", array, task="sst2", template=TEMPLATE, labels=["a", "b"], metric="accuracy", source="PEFT"
    )
    bank.publish([new], backbone_id(), run="import", libraries={}, alias="latest")
    prompt = bank.load("sst2")
    assert prompt.array.tobytes() == ARRAY.tobytes()
    assert prompt.record.initialisation == "imported from PEFT" and prompt.record.steps == 0
    assert prompt.record.template == TEMPLATE and prompt.record.metrics.dev_after is None
    np.testing.assert_array_equal(import_peft(export_peft(prompt, tmp_path / "out", "m")), ARRAY)


def test_other_numbers_are_another_import_and_the_same_numbers_the_same():
    def new(array):
        return imported_prompt("a", array, task="a", template=TEMPLATE, labels=None, metric="loss", source="x")

    assert new(ARRAY).settings_digest == new(ARRAY.astype(np.float64)).settings_digest
    assert new(ARRAY).settings_digest != new(ARRAY + 1).settings_digest
    refused("prompt 'a' is refused: its shape", new, ARRAY[0])
    with pytest.raises(BankError, match=r"the prompt name '\.\./a' is refused"):
        imported_prompt("../a", ARRAY, task="a", template=TEMPLATE, labels=None, metric="loss", source="x")
