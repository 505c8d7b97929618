"""A model that answers for every task of a bank: each row runs behind its own task's prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.backbone import prompted
from pipeline.backbone.files import context_length, find_model, read_config, read_tokenizer
from pipeline.backbone.fingerprint import identify
from pipeline.backbone.host import Backbone, compute_dtype, host_backbone
from pipeline.backbone.loading import build_skeleton
from pipeline.backbone.weights import open_weights
from pipeline.bank import BackboneId, Prompt, PromptBank
from pipeline.corpus.encoding import encode_inputs, encode_targets
from pipeline.corpus.template import parse_template, render
from pipeline.errors import BankError, CorpusError


@dataclass(frozen=True)
class PromptedModel:
    """One frozen model in this process, and the prompts that were used so far."""

    backbone: Backbone
    tokenizer: Any
    identity: BackboneId
    bank: PromptBank
    _loaded: dict[str, Prompt] = field(default_factory=dict)

    @classmethod
    def open(
        cls, model: str, bank: PromptBank, weights: str = "int8", device: str = "cpu", dtype: str = "auto"
    ) -> "PromptedModel":
        """Load a model (a folder, hub name, .gguf file or packaged name) whole, to serve a bank's prompts.

        Raises: BackboneError when the model cannot be loaded.
        """
        files = find_model(model)
        config, tokenizer = read_config(files), read_tokenizer(files)
        identity = identify(model, config, tokenizer, open_weights(files, build_skeleton(config, False)), weights)
        place = torch.device(device)
        backbone = host_backbone(
            files, config, int8=weights == "int8", dtype=compute_dtype(dtype, place), device=place, sharded=False
        )
        return cls(backbone, tokenizer, identity, bank)

    def prompt(self, task: str) -> Prompt:
        """A task's prompt, loaded once. Raises: BankError when unknown, damaged or of another backbone."""
        if task not in self._loaded:
            self._loaded[task] = self.bank.load(task, backbone=self.identity)
        return self._loaded[task]

    def generate(self, rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """Greedy answers; each row holds the columns that its task's template names.

        Raises: BankError for an unknown task; CorpusError for a row without a needed column, empty or too long.
        """
        if not rows:
            return []
        ids = self.backbone.run(
            prompted.greedy_decode, self._rows(rows, tasks, max_new_tokens), max_new_tokens, self.tokenizer.eos_token_id
        )
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]

    def classify(self, rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[dict[str, float]]:
        """For each row, log P(label | prompt, input) in nats of every label of its task.

        Raises: BankError for an unknown task or one without labels; CorpusError as `generate`.
        """
        if not rows:
            return []
        labels = [self._labels(task) for task in tasks]
        ids = [self._label_ids(task, of_task) for task, of_task in zip(tasks, labels, strict=True)]
        longest = max(len(label) for of_task in ids for label in of_task)
        scores = self.backbone.run(prompted.label_log_likelihoods, self._rows(rows, tasks, longest), ids)
        return [dict(zip(names, map(float, values), strict=True)) for names, values in zip(labels, scores, strict=True)]

    def _labels(self, task: str) -> list[str]:
        labels = self.prompt(task).record.labels
        if not labels:
            raise BankError(f"prompt '{task}' was tuned without a label set; use generate")
        return list(labels)

    def _label_ids(self, task: str, labels: list[str]) -> list[np.ndarray]:
        separator = self.prompt(task).record.template.separator
        return [np.array(ids) for ids in encode_targets(self.tokenizer, self.backbone.architecture, separator, labels)]

    def _rows(self, rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], more: int) -> prompted.Rows:
        """Rows to run, each with room for `more` tokens behind it."""
        names = list(dict.fromkeys(tasks))
        prompts = [torch.from_numpy(self.prompt(name).array.copy()).to(self.backbone.device) for name in names]
        texts = [self._text(row, task) for row, task in zip(rows, tasks, strict=True)]
        inputs = [np.array(ids) for ids in encode_inputs(self.tokenizer, self.backbone.architecture, texts)]
        context = context_length(self.backbone.config)
        for number, (ids, task) in enumerate(zip(inputs, tasks, strict=True)):
            length = len(prompts[names.index(task)]) + len(ids) + more
            if len(ids) == 0:
                raise CorpusError(f"row {number} for task '{task}' is empty; give it some text")
            if context is not None and length > context:
                raise CorpusError(
                    f"row {number} for task '{task}' is too long: prompt, input and answer may be {length} tokens "
                    f"where the model's context is {context}; shorten the text"
                )
        return prompted.Rows(prompts, [names.index(task) for task in tasks], inputs)

    def _text(self, row: Mapping[str, Any], task: str) -> str:
        template = parse_template(self.prompt(task).record.template.input, f"prompt '{task}'")
        missing = [column for column in template.columns if column not in row]
        if missing:
            raise CorpusError(f"task '{task}' needs the column(s) {', '.join(missing)} in every row")
        return render(template, {column: str(row[column]) for column in template.columns})
