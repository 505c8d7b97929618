from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.bank import BackboneId, Metrics, NewPrompt, PromptBank, Template

HIDDEN = 8


def make_backbone(**changes: Any) -> BackboneId:
    fields = {
        "fingerprint": "f" * 64,
        "config": "c" * 64,
        "tokenizer": "t" * 64,
        "weights": "w" * 64,
        "quantization": "int8",
        "model": "SmolLM2-135M",
        "architecture": "decoder-only",
        "hidden_size": HIDDEN,
    }
    return BackboneId(**{**fields, **changes})


def make_prompt(name: str = "sst2", value: float = 1.0, **changes: Any) -> NewPrompt:
    array = np.arange(4 * HIDDEN, dtype=np.float32).reshape(4, HIDDEN) + np.float32(value)
    fields: dict[str, Any] = {
        "name": name,
        "array": array,
        "task": name,
        "template": Template(input="{text}\n“quoted” \\ {x}", target="{label}", separator=" "),
        "labels": ["negative", "positive"],
        "metric": "accuracy",
        "metrics": Metrics(dev_before=0.5, dev_after=0.9, dev_loss_before=1.5, dev_loss_after=0.1 + value),
        "initialisation": "sampled_vocab",
        "length": 4,
        "steps": 100,
        "seed": 0,
        "corpus_digest": "a" * 64,
        "settings_digest": "b" * 64,
    }
    return NewPrompt(**{**fields, **changes})


def publish(
    bank: PromptBank, *prompts: NewPrompt, alias: str = "latest", new_backbone: bool = False, **backbone: Any
) -> int:
    return bank.publish(
        prompts,
        make_backbone(**backbone),
        run="nightly",
        libraries={"numpy": "2"},
        alias=alias,
        new_backbone=new_backbone,
    )


@pytest.fixture
def uri(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


@pytest.fixture
def bank(uri: Path) -> PromptBank:
    """A new, empty bank."""
    return PromptBank.open(uri, create=True)


@pytest.fixture(name="new_prompt")
def _new_prompt() -> Callable[..., NewPrompt]:
    return make_prompt


@pytest.fixture(name="backbone_id")
def _backbone_id() -> Callable[..., BackboneId]:
    return make_backbone


@pytest.fixture(name="publish")
def _publish() -> Callable[..., int]:
    return publish
