"""Trials: what makes two of them the same."""

from pipeline.settings import parse_settings
from pipeline.tuning.trials import make_trials


def test_a_trial_begun_with_other_products_is_not_taken_up_again():
    task = {"train": "in memory", "dev": "in memory"}
    made = {
        products: make_trials(
            parse_settings({"model": {"path": "x", "products": products}, "tasks": {"film": task}}),
            {"film": "corpus"},
            "backbone",
            {},
        )[0]
        for products in ("auto", "int8", "exact")
    }
    assert len({trial.digest for trial in made.values()}) == 3
