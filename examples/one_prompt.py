#!/usr/bin/env python
"""Tune one soft prompt on a frozen 8-bit model and publish it: the whole method, top to bottom, in one process.

    python examples/one_prompt.py      # the quickstart's task `sentiment`, on the model that `make setup` installs
    python examples/one_prompt.py --task topic --train train.parquet --dev dev.parquet --input '{text}' --max-steps 50

jobs/tune_prompts.py on one rank ends with the same prompt, bit by bit. It tunes many in the same batches, over many
ranks, and can be killed.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import typer
from torch.nn import Parameter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.make_quickstart_corpora import make_corpora
from pipeline.corpus.encoding import encode_targets
from pipeline.corpus.rows import Recipe, RowStatus, tokenise_rows
from pipeline.corpus.template import parse_template
from pipeline.corpus.token_set import TokenSet, token_set
from pipeline.settings import TaskSettings
from pipeline.tuning.evaluate import EvalRequest, evaluate
from pipeline.tuning.hosting import agreed_products
from pipeline.tuning.initialise import initial_prompt
from pipeline.tuning.metrics import goodness
from pipeline.tuning.optimise import make_optimizer, update
from pipeline.tuning.state import Evaluation
from pipeline.tuning.step import TrialStep, losses_and_gradients
from pipeline.tuning.trials import make_trial
from promptbank import Metrics, NewPrompt, PromptBank, Template, load_backbone

QUICKSTART = Path("quickstart/corpora")


def main(
    task: str = "sentiment", input: str = "{word}", target: str = "{label}",
    train: Path = QUICKSTART / "sentiment/train.parquet", dev: Path = QUICKSTART / "sentiment/dev.parquet",
    model: str = "smollm2-135m", bank: Path = Path("quickstart/one_prompt_bank"),
    length: int = 16, lr: float = 0.03, batch_size: int = 24, max_steps: int = 120,
    eval_every: int = 40, eval_rows: int = 200, seed: int = 0, token_budget: int = 2048,
) -> None:  # fmt: skip
    """Tune a prompt of LENGTH tokens to answer TARGET to INPUT, and publish the one that is best on DEV."""
    if not train.exists() and train.is_relative_to(QUICKSTART):
        make_corpora(QUICKSTART)
    settings = TaskSettings.model_validate(
        {
            "train": str(train), "dev": str(dev), "input": input, "target": target, "metric": "accuracy",
            "prompt": {"length": length}, "optimizer": {"lr": lr, "schedule": "linear"},
            "batch_size": batch_size, "max_steps": max_steps, "eval_every": eval_every,
        }
    )  # fmt: skip

    # The model: its matrices are int8, all of it is frozen, and only embeddings [P, H] before the input are learnt.
    # As in the job, its products run in int8 too where the processor does that fast.
    hosted = load_backbone(model, products=agreed_products("auto", torch.device("cpu")))
    backbone, tokenizer = hosted.backbone, hosted.tokenizer

    # The rows: texts by the task's templates, then tokens. Rows that are empty or too long are left out.
    templates = parse_template(input, "input"), parse_template(target, "target")
    lengths = settings.max_input_tokens, settings.max_target_tokens
    recipe = Recipe(*templates, settings.separator, *lengths, backbone.architecture, backbone.embedding_rows)

    def read(path: Path, limit: int | None = None) -> TokenSet:
        table = pq.read_table(path, columns=list(recipe.columns))
        texts = {name: table[name].cast("string").to_pylist() for name in recipe.columns}
        rows = tokenise_rows(recipe, tokenizer, texts, len(table))
        return token_set(rows.filter(pc.equal(rows["status"], RowStatus.OK)), limit)

    train_rows, dev_rows = read(train), read(dev, eval_rows)
    labels = tuple(sorted({train_rows.target(row) for row in range(len(train_rows))}))
    label_ids = tuple(map(tuple, encode_targets(tokenizer, backbone.architecture, recipe.separator, labels)))

    # The trial decides all that is random: where the prompt starts, and which rows each step takes.
    corpus_digest = hashlib.sha256(train.read_bytes() + dev.read_bytes()).hexdigest()
    trial = make_trial(task, settings, seed, corpus_digest, hosted.identity.fingerprint)
    prompt = Parameter(initial_prompt(trial, backbone, tokenizer, labels, warm_starts={}))  # [P, H] float32
    optimizer = make_optimizer(prompt, settings.optimizer)

    measured: list[tuple[Evaluation, np.ndarray]] = []
    for step in range(max_steps + 1):
        # Evaluate: the accuracy of the most likely label, and the loss.
        if step % eval_every == 0 or step == max_steps:
            request = EvalRequest(prompt, dev_rows, settings.metric, labels, label_ids, settings.max_target_tokens)
            (score,) = evaluate(backbone, tokenizer, [request], token_budget)
            measured.append((Evaluation(step, score.value, score.loss), prompt.detach().cpu().numpy().copy()))
            print(f"step {step}: dev accuracy {score.value:.3f}, dev loss {score.loss:.4f}")
        # Learn: a batch of rows behind the prompt, the mean loss of their target tokens, its gradient, one update.
        if step < max_steps:
            losses_and_gradients(backbone, [TrialStep(trial, prompt, step, train_rows)], token_budget)
            update(optimizer, settings.optimizer, step, max_steps)

    # Keep the best: the highest accuracy; of equal ones, that with the lowest loss.
    start = measured[0][0]
    best, array = max(measured, key=lambda one: goodness(settings.metric, one[0].value, one[0].loss))

    # Publish: the prompt, and what tells a reader where it comes from and which model it belongs to.
    new = NewPrompt(
        name=task, array=array, task=task, labels=labels, metric=settings.metric, steps=best.step, seed=seed,
        template=Template(input=input, target=target, separator=settings.separator),
        metrics=Metrics(
            dev_before=start.value, dev_loss_before=start.loss, dev_after=best.value, dev_loss_after=best.loss
        ),
        initialisation=settings.prompt.init, length=length,
        corpus_digest=corpus_digest, settings_digest=trial.digest,
    )  # fmt: skip
    opened = PromptBank.open(bank, create=True)
    number = opened.publish([new], hosted.identity, run="one_prompt", libraries={}, alias="latest")
    print(f"Version {number} of the bank {bank} has the prompt '{task}': dev {settings.metric} {best.value:.3f}.")


if __name__ == "__main__":
    typer.run(main)
