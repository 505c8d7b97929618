"""Starting points of a prompt, each against what the paper says of it."""

import numpy as np
import pytest
import torch

from pipeline.corpus.reader import open_split
from pipeline.tuning.evaluate import eval_request, evaluate
from pipeline.tuning.initialise import example_rows, fit_length, initial_prompt
from pipeline.tuning.loop import tune
from pipeline.tuning.progress import TuningRun
from pipeline.tuning.step import TrialStep, batch_of_step
from pipeline.tuning.trials import make_trial
from tests.corpora import make_corpus, make_task


def start(
    model, name="a", seed=0, labels=("good", "bad"), warm_starts=None, train=None, draw=0, **prompt
) -> torch.Tensor:
    backbone, tokenizer, _ = model
    trial = make_trial(name, make_task(prompt=prompt), seed, "corpus", "backbone")
    return initial_prompt(trial, backbone, tokenizer, labels, warm_starts or {}, train, draw)


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


def test_a_text_of_more_tokens_than_the_prompt_is_there_whole_neighbours_sharing_a_vector(model):
    words = ["is", "it", "good", "or", "bad"]
    table = vocabulary(model)[model[1].convert_tokens_to_ids(words)]
    prompt = start(model, length=2, init="text", text=" ".join(words))
    torch.testing.assert_close(prompt, torch.stack([table[:3].mean(0), table[3:].mean(0)]))


def test_examples_are_solved_rows_as_the_model_reads_them_the_last_one_whole(model, tmp_path):
    backbone, tokenizer, _ = model
    corpus = make_corpus(tmp_path, tokenizer, backbone.architecture, "film")
    train = open_split(corpus.splits["train"])
    places = rows_in(start(model, train=train, length=12, init="examples"), vocabulary(model))
    solved = [[*train.input_ids(row), *train.target_ids(row)] for row in range(len(train))]
    assert any(places[-len(tokens) :] == tokens for tokens in solved)
    trial = make_trial("a", make_task(prompt={"length": 12, "init": "examples"}), 0, "corpus", "backbone")
    shown = np.concatenate([solved[row] for row in example_rows(trial, train, 0)])
    assert places == list(shown[-12:])


def test_rows_that_a_prompt_starts_from_are_not_among_those_that_it_learns_from(model, tmp_path):
    backbone, tokenizer, _ = model
    corpus = make_corpus(tmp_path, tokenizer, backbone.architecture, "film")
    train = open_split(corpus.splits["train"])
    settings = make_task(prompt={"length": 12, "init": "examples", "starts": 3}, batch_size=7)
    trial = make_trial("a", settings, 0, "corpus", "backbone")
    shown = {int(row) for draw in range(3) for row in example_rows(trial, train, draw)}
    steps = [batch_of_step([TrialStep(trial, torch.zeros(12, 32), step, train)]) for step in range(40)]
    learnt = [row.number for rows in steps for row in rows]
    assert set(learnt) == set(range(len(train))) - shown
    epoch = learnt[: len(train) - len(shown)]
    assert len(set(epoch)) == len(epoch), "within an epoch every row comes once"


def test_of_several_starts_the_one_with_the_lowest_dev_loss_is_taken(model, tmp_path):
    backbone, tokenizer, _ = model
    corpus = make_corpus(tmp_path / "corpus", tokenizer, backbone.architecture, "film")

    def first_of(folder, settings):
        trial = make_trial("film", settings, 1, corpus.digest, "backbone")
        run = TuningRun([trial], {"film": corpus}, folder, 4, 100, 256)
        (state,) = tune(run, backbone, tokenizer)
        return state.history[0].loss

    settings = make_task(prompt={"length": 3}, metric="loss", max_steps=1, eval_rows=40)
    several = first_of(tmp_path / "several", make_task(**_plain(settings), prompt={"length": 3, "starts": 8}))
    one = first_of(tmp_path / "one", settings)
    prompts = [start(model, name="film", seed=1, draw=draw, length=3) for draw in range(8)]
    dev = open_split(corpus.splits["dev"])
    requests = [eval_request(settings, prompt, dev, corpus) for prompt in prompts]
    losses = [score.loss for score in evaluate(backbone, tokenizer, requests, 256)]
    assert one == pytest.approx(losses[0], rel=1e-4) and several == pytest.approx(min(losses), rel=1e-4)
    assert min(losses) < losses[0], "or the draws tell nothing"


def _plain(settings) -> dict:
    return settings.model_dump(include={"metric", "max_steps", "eval_rows"})


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
