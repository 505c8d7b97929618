"""Counts and sizes as people read them."""

import pytest

from pipeline.reporting.words import millions


@pytest.mark.parametrize(
    ("count", "written"), [(562_000, "0.6 M"), (2_900_000, "2.9 M"), (134_515_008, "135 M"), (6_738_415_616, "6,738 M")]
)
def test_parameters_of_small_models_are_told_apart(count: int, written: str) -> None:
    assert millions(count) == written
