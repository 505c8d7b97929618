"""The adaptation's settings file: mistakes are refused with a suggestion, and overrides work as in the main job."""

import pytest
import yaml

from pipeline.errors import SettingsError
from pipeline.settings import load_adaptation

RAW = {"model": {"path": "t5"}, "corpus": {"train": "text.parquet"}, "steps": 100}


def load(tmp_path, *overrides, **changes):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({**RAW, **changes}))
    return load_adaptation(path, overrides)


def test_the_last_step_is_always_kept_and_the_rate_is_that_of_whole_models(tmp_path):
    settings = load(tmp_path, "steps=50", save_at=[0, 20])
    assert settings.kept_steps == (0, 20, 50)
    assert settings.objective.name == "prefix_lm" and settings.optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective": {"nmae": "prefix_lm"}}, r"unknown key 'objective.nmae'; did you mean 'name'\?"),
        ({"save_at": [0, True]}, "true .* is not a number"),
        ({"save_at": [0, 101]}, "save_at: step 101 is not within 0 to 100"),
        ({"model": {}}, "give either 'path' .* or 'config'"),
        ({"model": {"config": {"model_type": "t5"}}}, "'config' and 'tokenizer' .* go together"),
        ({"steps": 0}, "'steps': input should be greater than or equal to 1"),
        (
            {"model": {"path": "t5", "fresh": True, "sentinels": 5}, "objective": {"name": "span_corruption"}},
            "512 tokens have 26 corrupted spans, more than model.sentinels 5",
        ),
    ],
)
def test_a_mistake_gets_a_sentence(tmp_path, changes, sentence):
    with pytest.raises(SettingsError, match=sentence):
        load(tmp_path, **changes)
