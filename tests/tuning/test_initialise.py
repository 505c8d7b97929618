"""Starting points of a prompt, each against what the paper says of it."""

import numpy as np
import pytest
import torch

from pipeline.tuning.initialise import fit_length, initial_prompt
from pipeline.tuning.trials import make_trial
from tests.corpora import make_task


def start(model, name="a", seed=0, labels=("good", "bad"), warm_starts=None, **prompt) -> torch.Tensor:
    backbone, tokenizer, _ = model
    trial = make_trial(name, make_task(prompt=prompt), seed, "corpus", "backbone")
    return initial_prompt(trial, backbone, tokenizer, labels, warm_starts or {})


def vocabulary(model) -> torch.Tensor:
    backbone, tokenizer, _ = model
    return backbone.embed(torch.arange(len(tokenizer)))


def rows_in(prompt: torch.Tensor, table: torch.Tensor) -> list[int]:
    """For each row the place in the table that it equals."""
    equal = (prompt[:, None] == table[None]).all(-1)
    assert bool(equal.any(1).all())
    return equal.float().argmax(1).tolist()


def rms(vectors: torch.Tensor) -> float:
    return float(vectors.pow(2).mean().sqrt())


def test_random_is_uniform_and_as_large_as_the_models_embeddings(model):
    prompt, common = start(model, length=200, init="random"), vocabulary(model)[3:]
    assert prompt.shape == (200, 32) and abs(prompt.mean()) < 0.02 * rms(common)
    assert rms(prompt) == pytest.approx(rms(common), rel=0.03)
    assert rms(common) * 3**0.5 * 0.99 < float(prompt.abs().max()) < rms(common) * 3**0.5 * 1.06


def test_sampled_vocab_takes_different_ordinary_tokens(model):
    special = set(model[1].all_special_ids)
    places = rows_in(start(model, length=20, init="sampled_vocab"), vocabulary(model))
    assert len(set(places)) == 20 and not special & set(places)


def test_class_labels_come_first_and_sampled_tokens_fill_the_rest(model):
    ids = model[1].convert_tokens_to_ids(["good", "bad"])
    prompt = start(model, length=6, init="class_labels")
    assert rows_in(prompt, vocabulary(model))[:2] == ids and len(prompt) == 6
    assert rows_in(start(model, length=1, init="class_labels"), vocabulary(model)) == ids[:1]


def test_a_label_of_many_tokens_is_their_mean(model):
    table = vocabulary(model)
    good, film = model[1].convert_tokens_to_ids(["good", "film"])
    prompt = start(model, length=1, init="class_labels", labels=("good film",))
    torch.testing.assert_close(prompt[0], (table[good] + table[film]) / 2)


def test_text_is_repeated_to_the_prompts_length(model):
    ids = model[1].convert_tokens_to_ids(["is", "it", "good"])
    places = rows_in(start(model, length=5, init="text", text="is it good"), vocabulary(model))
    assert places == [*ids, *ids[:2]]


@pytest.mark.parametrize(("length", "rows"), [(2, [0, 1]), (3, [0, 1, 2]), (5, [0, 1, 2, 0, 1])])
def test_a_prompt_of_the_bank_is_cut_or_repeated_to_length(model, length, rows):
    stored = np.arange(96, dtype=np.float32).reshape(3, 32)
    prompt = start(model, length=length, init="bank", source="a", warm_starts={"a": stored})
    np.testing.assert_array_equal(prompt, stored[rows])
    np.testing.assert_array_equal(fit_length(stored, length), stored[rows])


@pytest.mark.parametrize("init", ["random", "sampled_vocab"])
def test_name_and_seed_decide_the_start_and_nothing_else_does(model, init):
    first = start(model, length=8, init=init)
    torch.testing.assert_close(first, start(model, length=8, init=init), rtol=0, atol=0)
    assert not torch.equal(first, start(model, length=8, init=init, seed=1))
    assert not torch.equal(first, start(model, length=8, init=init, name="b"))
