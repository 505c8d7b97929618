"""A prompt's record in the bank, made up."""

from typing import Any

from pipeline.bank import Metrics, PromptRecord, Template


def make_record(name: str = "film", **changes: Any) -> PromptRecord:
    fields: dict[str, Any] = {
        "name": name,
        "status": "tuned",
        "reason": None,
        "digest": "a" * 64,
        "shape": (4, 8),
        "dtype": "float32",
        "tuned_in": 1,
        "task": name,
        "template": Template(input="{text}", target="{label}", separator=" "),
        "labels": None,
        "metric": "accuracy",
        "metrics": Metrics(),
        "metrics_previous": None,
        "initialisation": "sampled_vocab",
        "length": 4,
        "steps": 10,
        "seed": 0,
        "corpus_digest": "corpus",
        "settings_digest": "settings",
        "inputs_digest": "inputs",
    }
    return PromptRecord(**{**fields, **changes})


def failed_record(name: str = "film") -> PromptRecord:
    none = dict.fromkeys(("digest", "shape", "dtype", "tuned_in"))
    return make_record(name, status="failed", reason="NaN", **none)
