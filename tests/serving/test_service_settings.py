"""Settings of a service, as they come from a command line."""

import pytest

from pipeline.errors import SettingsError
from pipeline.serving import app
from pipeline.serving.service_settings import ServiceSettings, make_settings

NUMBERS = [name for name, field in ServiceSettings.model_fields.items() if field.annotation in (int, float)]


def test_trusted_keys_can_be_given_on_a_command_line():
    given = {"bank": "b", "model": "m", "trusted_keys": "a.pub,b.pub"}
    assert make_settings(given).trusted_keys == ("a.pub", "b.pub")
    assert make_settings({**given, "trusted_keys": ["a.pub"]}).trusted_keys == ("a.pub",)


def test_a_setting_that_is_wrong_is_named():
    with pytest.raises(SettingsError, match=r"^max_rows: input should be"):
        make_settings({"bank": "b", "model": "m", "max_rows": "many"})


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e30", "9" * 5000, "", True])
@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_takes_what_is_none_or_beyond_all_bounds(name, value):
    with pytest.raises(SettingsError) as caught:
        make_settings({"bank": "b", "model": "m", name: value})
    assert str(caught.value).startswith(f"{name}: ") and "value error" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("bank", "s3://key:secret@bucket", "holds a password"),
        ("model", "x" * 300, "longer than any file's name"),
        ("cpus_per_replica", "0.00015", "more than four decimals"),
        ("max_row", "3", "the service has no such setting; it has bank, model, "),
    ],
)
def test_what_no_service_could_have_is_refused_in_one_sentence(name, value, told):
    with pytest.raises(SettingsError) as caught:
        make_settings({"bank": "b", "model": "m", name: value})
    said = str(caught.value)
    assert said.startswith(f"{name}: ") and told in said and "secret" not in said and "\n" not in said


def test_a_cluster_that_others_use_gets_neither_our_front_nor_the_token_that_ends_it(monkeypatch):
    """Its proxy would take both from the environment that is given to `ray.init`."""
    given = []
    monkeypatch.setattr(app.ray, "init", lambda **options: given.append(options["runtime_env"]["env_vars"]))
    for address in ("ray://cluster:10001", None):
        app._start_ray(make_settings({"bank": "bank", "model": "model"}), address, "secret-token")
    cluster, own = given
    assert set(cluster) == {"PYTHONPATH"} and "secret-token" in own.values()
