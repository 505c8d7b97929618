from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.backbone.model_folder import write_model_folder
from pipeline.bank import PromptBank
from pipeline.serving.backbone_comparison import compare_models
from tests.word_prompts import MODEL, WordBank, make_bank


@dataclass(frozen=True)
class Tuned(WordBank):
    """A bank of the packaged model in int8, and the folder that is stated to be the same model."""

    folder: Path


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    place = tmp_path_factory.mktemp("tuned")
    folder = place / "smollm2"
    write_model_folder(MODEL, folder, int8=True)
    bank = make_bank(place, "int8")
    same = compare_models(MODEL, str(folder), "int8", ["A fine film.", "Was ist das?"])
    PromptBank.open(bank.uri).state_same_backbone(
        same.first, same.second, rows=same.rows, largest_difference=same.largest_difference, by="test"
    )
    return Tuned(bank.model, bank.uri, folder)
