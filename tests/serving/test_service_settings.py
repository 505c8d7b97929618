"""Settings of a service, as they come from a command line."""

import pytest

from pipeline.errors import SettingsError
from pipeline.serving import app
from pipeline.serving.service_settings import make_settings


def test_trusted_keys_can_be_given_on_a_command_line():
    given = {"bank": "b", "model": "m", "trusted_keys": "a.pub,b.pub"}
    assert make_settings(given).trusted_keys == ("a.pub", "b.pub")
    assert make_settings({**given, "trusted_keys": ["a.pub"]}).trusted_keys == ("a.pub",)


def test_a_setting_that_is_wrong_is_named():
    with pytest.raises(SettingsError, match=r"^max_rows: input should be"):
        make_settings({"bank": "b", "model": "m", "max_rows": "many"})


def test_a_cluster_that_others_use_gets_neither_our_front_nor_the_token_that_ends_it(monkeypatch):
    """Its proxy would take both from the environment that is given to `ray.init`."""
    given = []
    monkeypatch.setattr(app.ray, "init", lambda **options: given.append(options["runtime_env"]["env_vars"]))
    for address in ("ray://cluster:10001", None):
        app._start_ray(make_settings({"bank": "bank", "model": "model"}), address, "secret-token")
    cluster, own = given
    assert set(cluster) == {"PYTHONPATH"} and "secret-token" in own.values()
