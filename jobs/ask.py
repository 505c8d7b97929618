#!/usr/bin/env python
"""Ask a prompt of the bank: the frozen model answers texts behind the task's soft prompt.

python jobs/ask.py --bank quickstart/bank --model smollm2-135m --task sentiment 'wonderful'
"""

import os
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer
from rich.console import Console

from promptbank import PromptBank, PromptBankError


def main(
    texts: Annotated[list[str], typer.Argument(help="Texts for the prompt to answer.")],
    task: Annotated[str, typer.Option(help="The prompt: name, name@version or name@alias.")],
    bank: Annotated[str, typer.Option(help="The bank's folder.")],
    alias: Annotated[str, typer.Option(help="The alias that a bare name is looked up by.")] = "latest",
    model: Annotated[str, typer.Option(help="The backbone that the prompt was tuned on.")] = "smollm2-135m",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 32,
) -> None:
    """Answer texts with a prompt of the bank: its most likely label, or generated text."""
    console = Console(soft_wrap=True, highlight=False)
    try:
        for text, answer in zip(
            texts, _answers(texts, task, PromptBank.open(bank, alias), model, max_new_tokens), strict=True
        ):
            console.print(f"{text} -> {answer}", markup=False)
    except PromptBankError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        raise typer.Exit(2) from error


def _answers(texts: list[str], task: str, bank: PromptBank, model: str, max_new_tokens: int) -> list[str]:
    from pipeline.backbone.fingerprint import weights_setting
    from pipeline.corpus.chat import recorded_input
    from promptbank import PromptedModel, load_backbone

    prompt = bank.load(task)
    record = prompt.record
    columns = recorded_input(record.template, f"prompt '{task}'").columns
    rows = [dict.fromkeys(columns, text) for text in texts]
    served = PromptedModel(load_backbone(model, weights_setting(prompt.backbone)), bank)
    if not record.labels or record.metric not in ("accuracy", "f1"):
        return served.generate(rows, [task] * len(rows), max_new_tokens)
    return [max(scores, key=lambda label: scores[label]) for scores in served.classify(rows, [task] * len(rows))]


if __name__ == "__main__":
    typer.run(main)
