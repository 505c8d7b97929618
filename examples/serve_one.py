#!/usr/bin/env python
"""Answer rows of several tasks with one frozen model, each row behind its own task's soft prompt.

    make quickstart  # once: tunes three prompts into quickstart/bank
    python examples/serve_one.py

The same over HTTP is `jobs/serve_prompts.py`. Another bank and another model: `--bank` and `--model`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from promptbank import PromptBank, PromptedModel, load_backbone

# (task, text): rows of different tasks, in any order, are one batch.
ROWS = (
    ("sentiment", "wonderful"),
    ("language", "Was ist Geschichte?"),
    ("sentiment", "horrible"),
    ("language", "¿Qué es la historia?"),
    ("sentiment", "thankful"),
    ("language", "What is history?"),
)
BARE = "who invented computers"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", default="quickstart/bank", help="the bank: a folder, or s3://bucket/prompts")
    parser.add_argument("--model", default="smollm2-135m", help="the backbone that its prompts were tuned on")
    options = parser.parse_args(arguments)

    # 1. The bank, at the version that its alias `latest` names. Nothing here needs torch yet.
    bank = PromptBank.open(options.bank)
    print(f"version {bank.version} of {bank.uri} holds {', '.join(bank.names())}")

    # 2. The frozen model, its linear layers in int8 as they were while the prompts were tuned.
    #    A prompt of another model is refused by its fingerprint when it is first used.
    model = PromptedModel(load_backbone(options.model), bank)

    # 3. Classify: log P(label | prompt, text) in nats for every label of the row's own task.
    tasks, texts = zip(*ROWS, strict=True)
    for (task, text), scores in zip(ROWS, model.classify(texts, tasks), strict=True):
        label = max(scores, key=lambda each: scores[each])
        print(f"{task}: {text} -> {label} ({scores[label]:.3f} nats)")

    # 4. Generate: a task without labels writes its answer, token by token, always the most likely one.
    (answer,) = model.generate([BARE], ["punctuation"], max_new_tokens=32)
    print(f"punctuation: {BARE} -> {answer}")


if __name__ == "__main__":
    main()
