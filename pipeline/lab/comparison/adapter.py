"""Low-rank adapters (Hu et al. 2021) on the model in float, made by PEFT and trained as prompts are.

They see the same rows in the same order, the same loss on target tokens and the same evaluator. Each is trained in one
process with the whole model; nothing here talks to other ranks.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers.pytorch_utils import Conv1D

from pipeline.backbone import prompted
from pipeline.backbone.host import Backbone
from pipeline.corpus.reader import open_split
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.corpus.token_set import TokenSet
from pipeline.errors import SettingsError
from pipeline.settings import LoraSettings
from pipeline.tuning.batches import RowCost, plan_rows
from pipeline.tuning.evaluate import EvalRequest, Score, eval_request, evaluate
from pipeline.tuning.optimise import update
from pipeline.tuning.ranks import alone
from pipeline.tuning.state import Evaluation
from pipeline.tuning.step import TrialStep, batch_of_step
from pipeline.tuning.trials import Trial

_ADAPTER = "default"


@dataclass
class TrainedAdapter:
    """An adapter at its best evaluation on dev, with the course of its training."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    """By PEFT's names."""
    history: list[Evaluation] = field(default_factory=list)
    best_at: int = 0
    losses: list[float] = field(default_factory=list)
    """Training loss of every step, in nats a target token."""
    seconds: float = 0.0
    failed: str | None = None

    @property
    def best(self) -> Evaluation:
        return self.history[self.best_at]


def add_adapter(model: nn.Module, settings: LoraSettings) -> list[nn.Parameter]:
    """Put an adapter on the model's layers, in place; returns its parameters, in float32 whatever the model's type is.

    Raises: SettingsError where no layer fits.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds, and not every comparison needs it
    from peft.tuners.tuners_utils import cast_adapter_dtype

    targets = settings.targets
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        lora_dropout=0.0,
    )
    ends = "".join(f".{name}\n" for name, _ in model.named_modules())
    missing = [target for target in targets if f".{target}\n" not in ends] if isinstance(targets, tuple) else []
    if missing:  # PEFT takes a layer's name or the end of one
        raise SettingsError(
            f"compare.lora.targets: the model has no layer {', '.join(missing)}; name layers such as "
            f"{_some_layers(model)}, or give 'all-linear'"
        )
    try:
        inject_adapter_in_model(config, model, _ADAPTER)
    except ValueError as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        raise SettingsError(
            f"compare.lora.targets: {reason}; name layers of the model, such as {_some_layers(model)}, or 'all-linear'"
        ) from error
    cast_adapter_dtype(model, _ADAPTER)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def reset_adapter(model: nn.Module, seed: int) -> None:
    """Reset the adapter to a new one with this seed, with which the model's outputs are those of the model alone."""
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.reset_lora_parameters(_ADAPTER, True)


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's weights, on the CPU."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    return {name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}


def load_adapter_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """The inverse of `adapter_weights`."""
    own = {name.replace(f".{_ADAPTER}", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert set(own) == set(weights), "an adapter of other layers"
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def train_adapter(
    backbone: Backbone,
    tokenizer: Any,
    trial: Trial,
    corpus: TaskCorpus,
    parameters: Sequence[nn.Parameter],
    token_budget: int,
    told_to_stop: Callable[[], bool] = lambda: False,
) -> TrainedAdapter | None:
    """Train a new adapter to the trial's last step, or until its patience ends; None if told to stop."""
    settings, model = trial.settings, _model(backbone)
    reset_adapter(model, trial.seed)
    optimizer = AdamW(parameters, lr=settings.optimizer.rate, weight_decay=settings.optimizer.weight_decay)
    train, dev = open_split(corpus.splits["train"]), open_split(corpus.splits["dev"], settings.eval_rows)
    request = eval_request(settings, backbone.no_prompt(), dev, corpus)
    trained, begun = TrainedAdapter(), time.monotonic()
    for step in range(settings.max_steps + 1):
        if told_to_stop():
            return None
        if step % settings.eval_every == 0 or step == settings.max_steps:
            _record_evaluation(
                trained, trial, step, score_alone(backbone, tokenizer, [request], token_budget)[0], model
            )
            stale = len(trained.history) - 1 - trained.best_at
            if trained.failed or (settings.patience is not None and stale >= settings.patience):
                break
        if step < settings.max_steps:
            loss = loss_and_gradients(backbone, trial, train, step, token_budget)
            trained.losses.append(loss)
            if not np.isfinite(loss):
                trained.failed = f"the loss was {loss} at step {step}; lower compare.lora.lr"
                break
            update(optimizer, settings.optimizer, step, settings.max_steps)
    trained.seconds = time.monotonic() - begun
    return trained


def loss_and_gradients(backbone: Backbone, trial: Trial, train: TokenSet, step: int, token_budget: int) -> float:
    """The loss of a step's rows, in nats a target token; the adapter's parameters keep the gradients."""
    empty = backbone.no_prompt()
    rows = batch_of_step([TrialStep(trial, empty, step, train)])
    for parameter in _model(backbone).parameters():
        parameter.grad = None
    total = 0.0
    for (share,) in plan_rows([RowCost(0, 0, row.length) for row in rows], 1, token_budget, backbone.pads_rows):
        own = [rows[place] for place in share]
        run = prompted.Rows([empty], [0] * len(own), [train.input_ids(row.number) for row in own])
        nll = backbone.run(prompted.target_nll, run, [train.target_ids(row.number) for row in own])  # [B]
        loss = (nll * torch.tensor([row.weight for row in own], device=nll.device)).sum()
        loss.backward()
        total += float(loss.detach())
    return total


def score_alone(backbone: Backbone, tokenizer: Any, requests: Sequence[EvalRequest], token_budget: int) -> list[Score]:
    """Scores computed by this rank alone, while other ranks do other work."""
    with alone():
        return evaluate(backbone, tokenizer, requests, token_budget)


def _some_layers(model: nn.Module) -> str:
    """A few names of layers, for a message."""
    matrices = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    return ", ".join(list(dict.fromkeys(name.rpartition(".")[2] for name in matrices))[:4])


def _record_evaluation(trained: TrainedAdapter, trial: Trial, step: int, score: Score, model: nn.Module) -> None:
    trained.history.append(Evaluation(step, score.value, score.loss))
    if len(trained.history) == 1 or trained.history[-1].better(trial.settings.metric, trained.best):
        trained.best_at, trained.weights = len(trained.history) - 1, adapter_weights(model)
    if not np.isfinite(score.loss):
        trained.failed = f"the dev loss was {score.loss} at step {step}; lower compare.lora.lr"


def _model(backbone: Backbone) -> nn.Module:
    model = backbone.hosted.model
    assert isinstance(model, nn.Module)
    return model
