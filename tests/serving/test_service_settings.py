"""Settings of a service, as they come from a command line."""

import pytest

from pipeline.errors import SettingsError
from pipeline.serving.service_settings import make_settings


def test_trusted_keys_can_be_given_on_a_command_line():
    given = {"bank": "b", "model": "m", "trusted_keys": "a.pub,b.pub"}
    assert make_settings(given).trusted_keys == ("a.pub", "b.pub")
    assert make_settings({**given, "trusted_keys": ["a.pub"]}).trusted_keys == ("a.pub",)


def test_a_setting_that_is_wrong_is_named():
    with pytest.raises(SettingsError, match=r"^max_rows: input should be"):
        make_settings({"bank": "b", "model": "m", "max_rows": "many"})
