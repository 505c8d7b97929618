"""A night with a model that the bank states to be the one that its prompts were tuned on."""

from pipeline.bank import PromptBank
from pipeline.refresh.look import see_bank
from pipeline.settings import Settings
from tests.bank.conftest import make_prompt, publish
from tests.bank.test_sameness import GGUF, OTHER, stated


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
    assert not see_bank(settings, GGUF).same_backbone
    stated(bank)
    assert see_bank(settings, GGUF).same_backbone and not see_bank(settings, OTHER).same_backbone
