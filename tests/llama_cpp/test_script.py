"""The script of an export for llama.cpp, as it stands, in an environment of the real one."""

import json
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest

from pipeline.backbone.packaged import find_packaged
from pipeline.bank.exports import export_llama_cpp
from pipeline.errors import BankError
from tests.word_prompts import EVERY_ROW, INSTRUCTIONS, MODEL, MOST, columns_of, make_bank

PYTHON = Path(__file__).parents[2] / ".venv-llama-cpp/bin/python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON.exists(), reason="llama.cpp has an environment of its own: make test-llama-cpp"),
]

# One process for all rows: it imports the script, and calls what `main` calls.
ASK = """
import importlib.util, json, sys
model, folders, rows = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
scripts = {}
for task, folder in folders.items():
    spec = importlib.util.spec_from_file_location(task, folder + "/ask_llama_cpp.py")
    scripts[task] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scripts[task])
llm = scripts[rows[0][0]].open_model(model, 512, 1)
print(json.dumps([[scripts[task].input_ids(row, llm), scripts[task].answer(row, llm, MOST)] for task, row in rows]))
"""


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return make_bank(tmp_path_factory.mktemp("tuned"), "full")


@pytest.fixture(scope="module")
def folders(bank, tmp_path_factory):
    place = tmp_path_factory.mktemp("exported")
    return {task: str(export_llama_cpp(bank.model.bank.load(task), place / task)) for task in INSTRUCTIONS}


def in_floats(packed, path):
    """The same GGUF file with float32 tensors."""
    reader = gguf.GGUFReader(packed)
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            of_list = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of_list)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ask(model, folders, rows):
    """-> for each row its token ids and its answer."""
    named = [(task, {"text": row} if isinstance(columns_of(row), str) else columns_of(row)) for task, row in rows]
    code = ASK.replace("MOST", str(MOST))
    words = [PYTHON, "-c", code, model, json.dumps(folders), json.dumps(named)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_answers_on_the_same_weights_in_floats_are_those_of_the_prompted_model(bank, folders, tmp_path):
    model = str(in_floats(find_packaged(MODEL), tmp_path / "floats.gguf"))
    found = ask(model, folders, EVERY_ROW)
    assert [answer for _, answer in found] == [bank.answer(task, row) for task, row in EVERY_ROW]


def test_on_the_quantised_file_rows_have_the_same_tokens_and_most_the_same_answers(bank, folders):
    """llama.cpp rounds activations for its products with Q4_1, so that close calls fall otherwise."""
    found = ask(str(find_packaged(MODEL)), folders, EVERY_ROW)
    tokenizer = bank.model.backbone.tokenizer
    for (task, row), (ids, _) in zip(EVERY_ROW, found, strict=True):
        columns = columns_of(row) if task == "pair" else {"text": row}
        text = bank.model.bank.load(task).record.template.input.format(**columns)
        assert ids == tokenizer(text).input_ids
    same = [answer == bank.answer(*asked) for asked, (_, answer) in zip(EVERY_ROW, found, strict=True)]
    assert sum(same) >= 18


def test_the_script_runs_as_it_stands(bank, folders):
    words = [PYTHON, f"{folders['capital']}/ask_llama_cpp.py", "--model", find_packaged(MODEL), "text=Italy"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, bank.answer("capital", "Italy") + "\n"), done.stderr[-2000:]


def test_a_prompt_that_was_tuned_on_a_chat_is_refused_with_what_takes_it(bank, tmp_path):
    with pytest.raises(BankError, match=r"'shout' was tuned on a chat, .* export it for vLLM"):
        export_llama_cpp(bank.model.bank.load("shout"), tmp_path / "shout")


@pytest.mark.parametrize("given", [["txt=Italy"], ["Italy"], []])
def test_the_script_without_a_column_ends_with_one_sentence(folders, given):
    words = [PYTHON, f"{folders['capital']}/ask_llama_cpp.py", "--model", find_packaged(MODEL), *given]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert done.stderr.startswith("error: give every column that this prompt needs, text=TEXT (")
