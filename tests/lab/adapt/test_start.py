"""A model that cannot be adapted is refused with advice, before anything is trained."""

import pytest

from pipeline.errors import BackboneError, SettingsError
from pipeline.lab.adapt.start import markers_of, open_start_model
from pipeline.settings import AdaptationSettings
from tests.lab.adapt.conftest import CONFIG
from tests.tiny import make_model, make_tokenizer


def settings(**changes) -> AdaptationSettings:
    return AdaptationSettings.model_validate({"corpus": {"train": "unused"}, "steps": 1, "tokens": 20, **changes})


def test_a_decoder_only_model_is_refused(tmp_path):
    make_model(tmp_path / "llama", "llama")
    with pytest.raises(BackboneError, match="'llama' is decoder-only; adaptation is for encoder-decoders"):
        open_start_model(settings(model={"path": str(tmp_path / "llama")}), None)


def test_span_corruption_without_sentinels_is_refused_and_prefix_lm_is_not(tmp_path):
    model = {"path": str(make_model(tmp_path / "t5", "t5"))}
    open_start_model(settings(model=model), None)
    with pytest.raises(SettingsError, match=r"has 0 sentinels .* where 20 tokens have 1 corrupted spans"):
        open_start_model(settings(model=model, objective={"name": "span_corruption"}), None)


def test_sentinels_are_those_that_the_tokenizer_names_in_their_order():
    tokenizer = make_tokenizer(eos_template=True)
    assert markers_of(tokenizer).sentinels == []
    tokenizer.add_tokens(["<extra_id_1>", "<extra_id_0>", "<extra_id_3>"], special_tokens=True)
    one, none = tokenizer.convert_tokens_to_ids(["<extra_id_1>", "<extra_id_0>"])
    assert markers_of(tokenizer).sentinels == [none, one] and markers_of(tokenizer).eos == 1


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "llama"}, "'llama' is no encoder-decoder; give one, such as t5"),
        ({"d_model": 8}, "None is no encoder-decoder"),
    ],
)
def test_a_config_of_no_encoder_decoder_is_refused(tmp_path, config, sentence):
    make_tokenizer(eos_template=True).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=sentence):
        open_start_model(settings(model={"config": config, "tokenizer": str(tmp_path)}), None)


def test_a_check_writes_nothing(tmp_path):
    make_tokenizer(eos_template=True).save_pretrained(tmp_path / "tokenizer")
    start = open_start_model(settings(model={"config": CONFIG, "tokenizer": str(tmp_path / "tokenizer")}), None)
    assert start.config.vocab_size == len(start.tokenizer) and len(start.markers.sentinels) == 100
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
