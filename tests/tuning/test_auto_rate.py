"""`optimizer.lr: auto`: one number for a model, and a trial at that number ends with the same prompt."""

import numpy as np
import pytest
import torch

from pipeline.tuning.loop import tune
from pipeline.tuning.optimise import AUTO_RATE
from pipeline.tuning.progress import TuningRun
from tests.corpora import make_corpus, trial


def tuned(model, folder, corpus, lr, **changes):
    backbone, tokenizer, _ = model
    one = trial("film", corpus, optimizer={"lr": lr}, **changes)
    (state,) = tune(TuningRun([one], {"film": corpus}, folder, 4, 100, 256), backbone, tokenizer)
    return state


@pytest.mark.parametrize("parameters", ["direct", "residual"])
def test_a_trial_at_auto_ends_as_one_that_is_given_its_rate_as_a_number(model, tmp_path, parameters):
    backbone, tokenizer, _ = model
    corpus = make_corpus(tmp_path / "corpora", tokenizer, backbone.architecture, "film")
    prompt = {"length": 3, "parameters": parameters}
    auto = tuned(model, tmp_path / "auto", corpus, "auto", prompt=prompt)
    number = tuned(model, tmp_path / "number", corpus, auto.rate, prompt=prompt)
    np.testing.assert_array_equal(auto.prompt.detach(), number.prompt.detach())
    assert f"film: rate {auto.rate:.3g} (optimizer.lr auto)" in (tmp_path / "auto/events.jsonl").read_text()


def test_auto_is_a_share_of_the_size_of_the_models_embeddings(model, tmp_path):
    backbone, tokenizer, _ = model
    corpus = make_corpus(tmp_path / "corpora", tokenizer, backbone.architecture, "film")
    words = [token for token in range(len(tokenizer)) if token not in set(tokenizer.all_special_ids)]
    size = float(backbone.embed(torch.tensor(words)).pow(2).mean().sqrt())
    assert tuned(model, tmp_path / "run", corpus, "auto").rate == pytest.approx(AUTO_RATE * size, rel=0.1)
