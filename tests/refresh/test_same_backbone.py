"""A night with a model that the bank states to be the one that its prompts were tuned on."""

from pipeline.bank import PromptBank
from pipeline.refresh.inputs import read_bank_state
from pipeline.settings import Settings
from tests.bank.conftest import make_prompt, publish
from tests.bank.test_same_backbone import GGUF, OTHER, stated


def test_a_night_on_the_same_backbone_reuses_what_the_bank_has(tmp_path):
    bank = PromptBank.open(tmp_path, create=True)
    publish(bank, make_prompt())
    task = {"train": "t.parquet", "dev": "d.parquet", "input": "{text}", "target": "{label}"}
    settings = Settings.model_validate(
        {
            "run": {"name": "n", "storage": "r"},
            "model": {"path": "m"},
            "tasks": {"sst2": task},
            "bank": {"uri": str(tmp_path)},
        }
    )
    assert not read_bank_state(settings, GGUF).same_backbone
    stated(bank)
    assert read_bank_state(settings, GGUF).same_backbone and not read_bank_state(settings, OTHER).same_backbone
