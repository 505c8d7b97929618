"""The other side: PEFT's `PromptTuningConfig` with transformers' `Trainer`, one task after another."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pipeline.lab.benchmark.side_by_side import Side
from pipeline.lab.benchmark.work import TaskWork
from pipeline.tuning.machine import peak_bytes
from pipeline.tuning.optimise import make_optimizer


@dataclass(frozen=True)
class PeerOptions:
    int8: bool = False
    bf16: bool = False
    by_length: bool = False
    """Group rows of like length, which changes the order of rows."""


def load_peer_model(folder: Path, options: PeerOptions) -> Any:
    """The model for PEFT, without dropout, so that both sides compute the same."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.update({key: 0.0 for key in config.to_dict() if key.endswith(("dropout", "dropout_rate", "pdrop"))})
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    quantization = BitsAndBytesConfig(load_in_8bit=True) if options.int8 else None
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    return kind.from_pretrained(
        folder, config=config, quantization_config=quantization, dtype=dtype, trust_remote_code=False
    )


def tune_one_by_one(
    model: Any, tasks: Sequence[TaskWork], prompts: Sequence[np.ndarray], steps: int, options: PeerOptions, folder: Path
) -> Side:
    """Tune each task's prompt `[P, H]` in a run of its own."""
    runs = [_tune(model, task, prompt, steps, options, folder) for task, prompt in zip(tasks, prompts, strict=True)]
    # Summed step by step, as if the runs had taken place side by side.
    return Side(
        [sum(run.tokens[step] for run in runs) for step in range(steps)],
        [sum(run.seconds[step] for run in runs) for step in range(steps)],
        [[run.losses[step][0] for run in runs] for step in range(steps)],
        [prompt for run in runs for prompt in run.prompts],
        peak_bytes(),
    )


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def _tune(model: Any, task: TaskWork, prompt: np.ndarray, steps: int, options: PeerOptions, folder: Path) -> Side:
    settings = task.trial.settings
    seq2seq = bool(model.config.is_encoder_decoder)
    config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM,
        num_virtual_tokens=len(prompt),
        num_transformer_submodules=1,  # before the encoder's input alone, as in Lester et al. (2021)
    )
    peft: Any = get_peft_model(model, config)
    weight = peft.prompt_encoder["default"].embedding.weight
    weight.data.copy_(torch.from_numpy(prompt))
    optimizer = make_optimizer(weight, settings.optimizer)

    def example(row: int) -> dict[str, list[int]]:
        x, y = task.train.input_ids(row).tolist(), task.train.target_ids(row).tolist()
        if seq2seq:
            return {"input_ids": x, "labels": y}
        return {"input_ids": [*x, *y], "labels": [*([-100] * len(x)), *y]}  # -100: no loss on the input

    rows = [example(row) for step in range(steps) for row in task.rows(step)]
    clock, counted = _Clock(), _Collator(seq2seq)
    trainer = Trainer(
        peft,
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=settings.batch_size,
            max_steps=steps,
            max_grad_norm=0.0,
            train_sampling_strategy="group_by_length" if options.by_length else "sequential",
            bf16=options.bf16,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        data_collator=counted,
        train_dataset=rows,
        optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
        callbacks=[clock],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Side(counted.tokens[:steps], clock.seconds, [[loss] for loss in losses], [weight.detach().cpu().numpy()])


class _Collator:
    """Pads on the right, and counts text tokens a batch."""

    def __init__(self, seq2seq: bool) -> None:
        self.tokens: list[int] = []
        self._counted = ("input_ids", "labels") if seq2seq else ("input_ids",)

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        self.tokens.append(sum(len(row[key]) for row in rows for key in self._counted))

        def pad(key: str, value: int) -> Tensor:
            longest = max(len(row[key]) for row in rows)
            return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

        longest = max(len(row["input_ids"]) for row in rows)
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": torch.tensor(mask)}
