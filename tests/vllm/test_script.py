"""The script of an export, as it stands, in the environment of the real vLLM."""

import subprocess

import pytest

from pipeline.bank.exports import export_vllm
from tests.vllm import server
from tests.word_prompts import INSTRUCTIONS, MOST, TURN, new_prompt

pytestmark = server.MARKS


def run(folder, *words):
    done = subprocess.run(
        [server.PYTHON, folder / "ask_vllm.py", *words],
        env=server.environment() | {"VLLM_LOGGING_LEVEL": "ERROR"},  # which goes to stdout
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_the_script_prints_the_answer_of_the_prompted_model(tuned, tmp_path):
    folder = export_vllm(tuned.model.bank.load("capital"), tmp_path / "vllm", str(tuned.folder))
    assert run(folder, "text=Italy", "--max-tokens", str(MOST))[-1] == tuned.answer("capital", "Italy")


def test_the_script_prints_the_answer_of_a_prompt_that_was_tuned_on_chats(tuned, tmp_path):
    folder = export_vllm(tuned.model.bank.load("shout"), tmp_path / "vllm", str(tuned.folder))
    assert run(folder, "text=good morning", "--max-tokens", str(MOST))[-1] == tuned.answer("shout", "good morning")


def test_the_scores_of_labels_are_those_of_the_prompted_model_end_of_sequence_included(tuned, tmp_path):
    labels = ("Rome", "Paris", "a long way from here")
    array = tuned.words(TURN.format(INSTRUCTIONS["capital"]))
    offsets = (0.5, -0.25, 0.0)
    version = tuned.publish(new_prompt("scored", array, labels=labels, label_score="mean", label_offsets=offsets))
    folder = export_vllm(tuned.model.bank.load(f"scored@{version}"), tmp_path / "vllm", str(tuned.folder))
    (own,) = tuned.model.classify(["Italy"], [f"scored@{version}"])
    scores = dict(line.split("\t") for line in run(folder, "text=Italy", "--scores")[-len(labels) :])
    assert {label: float(score) for label, score in scores.items()} == pytest.approx(own, abs=1e-3)


@pytest.mark.parametrize("given", [["txt=Italy"], ["Italy"], []])
def test_the_script_without_a_column_ends_with_one_sentence(tuned, tmp_path, given):
    folder = export_vllm(tuned.model.bank.load("shout"), tmp_path / "vllm", str(tuned.folder))
    words = [server.PYTHON, folder / "ask_vllm.py", *given]
    done = subprocess.run(words, env=server.environment(), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: give every column that this prompt needs, text=TEXT (")
