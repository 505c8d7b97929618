"""The example of serving prints what each of its rows gets when it is asked alone."""

import runpy
from pathlib import Path

import pytest

from promptbank import PromptBank, PromptedModel, load_backbone
from tests.serving.prompts import new_prompt
from tests.tiny import make_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serve_one.py"
ROWS = (("sentiment", "good film"), ("language", "red"), ("sentiment", "bad"), ("language", "the plot is fine"))
KINDS = {"sentiment": "film", "language": "colour", "punctuation": "open"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model, and a bank with the quickstart's tasks, whose prompts have different lengths."""
    folder = tmp_path_factory.mktemp("serve_one")
    backbone = load_backbone(str(make_model(folder / "model", seed=1, scale=2.0)))
    bank = PromptBank.open(folder / "bank", create=True)
    prompts = [new_prompt(task, 3 + i, like=kind) for i, (task, kind) in enumerate(KINDS.items())]
    bank.publish(prompts, backbone.identity, "test", {}, "latest")
    return PromptedModel(backbone, bank)


def test_the_example_prints_what_each_row_gets_alone(model, capsys):
    example = runpy.run_path(str(EXAMPLE))
    main = example["main"]
    main.__globals__["ROWS"] = ROWS  # words that the tiny model knows
    main.__globals__["BARE"] = "good movie"
    folder = Path(model.bank.uri).parent
    main(["--bank", str(folder / "bank"), "--model", str(folder / "model")])
    expected = [f"version 1 of {model.bank.uri} holds language, punctuation, sentiment"]
    labels = set()
    for task, text in ROWS:
        (scores,) = model.classify([text], [task])
        label, score = max(scores.items(), key=lambda item: item[1])
        expected.append(f"{task}: {text} -> {label} ({score:.3f} nats)")
        labels.add(label)
    expected.append(f"punctuation: good movie -> {model.generate(['good movie'], ['punctuation'], 32)[0]}")
    assert capsys.readouterr().out.splitlines() == expected
    assert len(labels) > 1, "a model that always says the same would show nothing"


def test_its_rows_are_of_the_tasks_that_the_quickstart_tunes():
    example = runpy.run_path(str(EXAMPLE))
    settings = (EXAMPLE.parents[1] / "jobs" / "configs" / "quickstart.yaml").read_text()
    for task, _ in (*example["ROWS"], ("punctuation", "")):
        assert f"\n  {task}: " in settings
