"""What is trained in a prompt's place: it starts at the prompt, learns by its gradient, and leaves the prompt."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers.optimization import Adafactor

from pipeline.backbone import prompted
from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.host import host_backbone
from pipeline.corpus.reader import open_split
from pipeline.settings import parse_settings
from pipeline.tuning import loop
from pipeline.tuning.checkpoint import load_checkpoint, save_checkpoint
from pipeline.tuning.evaluate import eval_request, evaluate
from pipeline.tuning.initialise import initial_prompt
from pipeline.tuning.loop import tune
from pipeline.tuning.parameters import KINDS, Superposition, initial_parameters
from pipeline.tuning.state import TrialState, from_record, start, to_record
from pipeline.tuning.step import TrialStep, batch_of_step, losses_and_gradients
from pipeline.tuning.trials import Trial, make_trial, make_trials
from tests.corpora import make_corpus, make_task
from tests.killed import killed_at_call
from tests.ranks import run_ranks
from tests.tuning import test_loop
from tests.tuning.test_loop import assert_same_prompts, prompts_of

CPU = torch.device("cpu")
CHANGES = {
    "residual": {"prompt": {"length": 4, "parameters": "residual"}, "optimizer": {"lr": 0.1, "clip_norm": 1.0}},
    "mlp": {
        "prompt": {"length": 3, "parameters": "mlp", "width": 5},
        "optimizer": {"name": "adamw", "lr": 0.05, "schedule": "linear", "weight_decay": 0.01},
        "max_steps": 13,
    },
    "superposition": {"prompt": {"length": 6, "parameters": "superposition", "init": "class_labels"}},
    "low_rank": {"prompt": {"length": 5, "parameters": "low_rank", "width": 2, "init": "random"}, "batch_size": 3},
    "direct": {"prompt": {"length": 4}},
}
assert CHANGES.keys() == {*KINDS, "direct"}


make_run = partial(test_loop.make_run, of=CHANGES)


def begun(model, kind: str, **changes) -> TrialState:
    """A trial of this kind before its first step."""
    backbone, tokenizer, _ = model
    own = make_trial("film", make_task(**{**CHANGES[kind], **changes}), 0, "corpus", "backbone")
    prompt = initial_prompt(own, backbone, tokenizer, ("good", "bad"), {})
    return start(own, prompt, initial_parameters(own, prompt, backbone, tokenizer))


def stir(state: TrialState, seed: int = 0) -> None:
    """Move what is trained away from its start, where many gradients are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for (tensor,) in (group["params"] for group in state.parameters.groups()):
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        state.prompt.copy_(state.parameters.fold())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["random", "class_labels"])
def test_every_kind_starts_exactly_at_the_prompt_that_direct_starts_at(model, kind, init):
    state = begun(model, kind, prompt={"length": 7, "init": init, "parameters": kind})
    direct = begun(model, "direct", prompt={"length": 7, "init": init})
    assert torch.equal(state.parameters.fold(), direct.prompt)
    assert torch.equal(state.prompt, direct.prompt) and torch.equal(state.best, direct.prompt)
    assert direct.parameters is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_a_model_run_with_the_folded_prompt_in_the_graph(model, kind, tmp_path):
    backbone, tokenizer, _ = model
    state = begun(model, kind)
    stir(state)
    corpus = make_corpus(tmp_path, tokenizer, backbone.architecture, "film")
    work = TrialStep(state.trial, state.prompt, 0, open_split(corpus.splits["train"]))
    losses_and_gradients(backbone, [work], 4096)
    state.parameters.pull_back(state.prompt.grad)
    trained = [tensor for group in state.parameters.groups() for tensor in group["params"]]
    ours = [tensor.grad for tensor in trained]
    assert all(bool(gradient.abs().max() > 0) for gradient in ours)

    rows = batch_of_step([work])
    inputs = prompted.Rows([state.parameters.fold()], [0] * len(rows), [work.train.input_ids(r.number) for r in rows])
    targets = [work.train.target_ids(row.number) for row in rows]
    loss = backbone.run(prompted.target_nll, inputs, targets) @ torch.tensor([row.weight for row in rows])
    for gradient, whole in zip(ours, torch.autograd.grad(loss, trained), strict=True):
        torch.testing.assert_close(gradient, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def trained_on(state: TrialState, size: float, steps: int = 6) -> torch.Tensor:
    """The prompt after steps with the same gradients, of a model whose embeddings have this size."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        state.prompt.grad = torch.randn(state.prompt.shape, generator=generator) / size
        state.update(1.0)
    return state.prompt.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_a_model_whose_embeddings_are_larger_trains_alike_at_a_rate_that_is_as_much_larger(model, kind, optimizer):
    backbone, tokenizer, folder = model
    size = 20.0
    larger = replace(backbone, hosted=Louder(backbone.hosted, size))
    prompt = {"length": 5, "parameters": kind}
    usual = {"name": optimizer, "lr": 0.01, "weight_decay": 0}
    small = begun(model, kind, prompt=prompt, optimizer=usual)
    large = begun((larger, tokenizer, folder), kind, prompt=prompt, optimizer={**usual, "lr": 0.01 * size})
    torch.testing.assert_close(large.prompt.detach(), size * small.prompt.detach())
    start = small.prompt.detach().clone()
    one, other = trained_on(small, 1.0), trained_on(large, size)
    torch.testing.assert_close(other, size * one, rtol=1e-3, atol=1e-4 * size)
    assert not torch.allclose(one, start, rtol=1e-2)


class Louder(torch.nn.Module):
    """A hosted model whose embeddings are larger."""

    def __init__(self, hosted: torch.nn.Module, by: float) -> None:
        super().__init__()
        self.hosted, self.by = hosted, by

    def forward(self, function, *args):
        return self.by * self.hosted(function, *args)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_moves_the_prompt_about_as_far_as_it_moves_one_that_is_trained_itself(model, kind):
    optimizer = {"name": "adamw", "lr": 0.003}
    moved = {}
    for each in (kind, "direct"):
        state = begun(model, each, prompt={"length": 5, "parameters": each}, optimizer=optimizer)
        before = state.prompt.detach().clone()
        moved[each] = float((trained_on(state, 1.0, steps=3) - before).norm())
    assert 0.25 < moved[kind] / moved["direct"] < 4


def test_clip_norm_is_of_the_prompts_own_gradient(model):
    clipped = begun(model, "residual", optimizer={"name": "adamw", "lr": 0.1, "clip_norm": 0.5})
    stir(clipped)
    gradient = torch.ones_like(clipped.prompt)
    clipped.prompt.grad = gradient.clone()
    wanted = begun(model, "residual")
    stir(wanted)
    wanted.parameters.pull_back(gradient * 0.5 / gradient.norm())
    clipped.update(1.0)
    for (ours,), (theirs,) in zip(
        *([g["params"] for g in s.parameters.groups()] for s in (clipped, wanted)), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_trial_alone_ends_with_the_prompt_that_it_reaches_among_others_and_learns(model, tmp_path):
    backbone, tokenizer, _ = model
    together = tune(make_run(tmp_path / "all", tokenizer, backbone.architecture), backbone, tokenizer)
    for state in together:
        name = state.trial.name
        run = make_run(tmp_path / name, tokenizer, backbone.architecture, (name,))
        (alone,) = tune(run, backbone, tokenizer)
        assert_same_prompts(prompts_of([alone]), prompts_of(together))
        assert [e.value for e in alone.history] == [e.value for e in state.history]
        assert state.history[state.best_at].loss < state.history[0].loss


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 9, 14])
def test_a_run_killed_at_any_step_and_started_again_ends_with_the_same_prompts_bit_by_bit(model, tmp_path, at):
    backbone, tokenizer, _ = model
    run = make_run(tmp_path / "killed", tokenizer, backbone.architecture)
    with killed_at_call(loop, "losses_and_gradients", at):
        tune(run, backbone, tokenizer)
    resumed = prompts_of(tune(run, backbone, tokenizer))
    undisturbed = prompts_of(tune(make_run(tmp_path / "whole", tokenizer, backbone.architecture), backbone, tokenizer))
    for name, prompt in resumed.items():
        np.testing.assert_array_equal(prompt, undisturbed[name])


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
@pytest.mark.parametrize("kind", [*KINDS, "direct"])
def test_a_checkpoint_holds_all_that_the_next_steps_depend_on(model, tmp_path, kind, optimizer):
    state = begun(model, kind, optimizer={"name": optimizer, "lr": 0.1, "clip_norm": 1.0})
    trained_on(state, 1.0, steps=3)
    save_checkpoint(tmp_path, 3, [state])
    kept = load_checkpoint(tmp_path).state_of(state.trial, CPU)
    assert kept.step == 3 and torch.equal(kept.prompt, state.prompt) and torch.equal(kept.best, state.best)
    assert torch.equal(trained_on(kept, 1.0), trained_on(state, 1.0))


def test_the_record_of_a_prompt_that_is_trained_itself_is_laid_out_as_before_there_were_parameters(model):
    state = begun(model, "direct", optimizer={"name": "adamw", "lr": 0.1})
    trained_on(state, 1.0)
    record, tensors = to_record(state)
    assert tensors.keys() == {"prompt", "best", "optimizer/step", "optimizer/exp_avg", "optimizer/exp_avg_sq"}
    assert record["optimizer"] == {}


def test_of_an_ended_trial_only_its_prompts_are_kept(model):
    state = begun(model, "superposition")
    trained_on(state, 1.0)
    state.status = "tuned"
    record, tensors = to_record(state)
    assert tensors.keys() == {"prompt", "best"} and not record["optimizer"]
    kept = from_record(state.trial, record, tensors, CPU)
    assert torch.equal(kept.prompt, state.prompt) and kept.ended


def test_what_an_evaluation_measures_and_the_bank_gets_is_the_folded_prompt(model, tmp_path):
    backbone, tokenizer, _ = model
    run = make_run(tmp_path, tokenizer, backbone.architecture, tuple(KINDS))
    for state in tune(run, backbone, tokenizer):
        corpus, length = run.corpora[state.trial.task], state.trial.settings.prompt.length
        assert state.best.shape == (length, 32) and not state.best.requires_grad
        dev = open_split(corpus.splits["dev"], state.trial.settings.eval_rows)
        request = eval_request(state.trial.settings, state.best, dev, corpus)
        (score,) = evaluate(backbone, tokenizer, [request], 256)
        assert score.loss == pytest.approx(state.history[state.best_at].loss, rel=1e-5)
        assert torch.equal(state.parameters.fold(), state.prompt)


def test_a_record_begun_with_every_matrix_factored_goes_on_so(model):
    """As checkpoints of before T5X's rule was kept."""
    state = begun(model, "direct", optimizer={"lr": 0.1, "weight_decay": 0.01, "schedule": "constant"})
    prompt = torch.nn.Parameter(state.prompt.detach().clone())
    before = Adafactor([prompt], lr=0.1, scale_parameter=False, relative_step=False, weight_decay=0.01)

    def go_on(first: int, last: int) -> None:
        for step in range(first, last):
            prompt.grad = torch.randn(prompt.shape, generator=torch.Generator().manual_seed(step))
            before.step()

    go_on(0, 3)
    record, _ = to_record(state)
    kept = before.state_dict()["state"][0]
    tensors = {f"optimizer/{key}": kept[key].clone() for key in ("exp_avg_sq_row", "exp_avg_sq_col", "RMS")}
    now = prompt.detach().clone()
    resumed = from_record(
        state.trial, {**record, "step": 3, "optimizer": {"step": 3}}, {"prompt": now, "best": now, **tensors}, CPU
    )
    go_on(3, 6)
    for step in range(3, 6):
        resumed.prompt.grad = torch.randn(prompt.shape, generator=torch.Generator().manual_seed(step))
        resumed.update(1.0)
    torch.testing.assert_close(resumed.prompt, prompt, rtol=0, atol=0)
    _, tensors = to_record(resumed)
    assert "optimizer/exp_avg_sq_row" in tensors and "optimizer/exp_avg_sq" not in tensors


def test_a_sweep_over_kinds_has_a_trial_of_each_and_that_of_direct_is_as_it_was_without_the_key():
    def trials(**task) -> list[Trial]:
        settings = parse_settings({"model": {"path": "x"}, "tasks": {"film": {"train": "t", "dev": "d", **task}}})
        return make_trials(settings, {"film": "corpus"}, "backbone", {})

    kinds = ["direct", *KINDS]
    swept = trials(sweep={"prompt.parameters": kinds, "prompt.width": [4, None]})
    assert [one.name for one in swept[:2]] == ["film.parameters-direct.width-4", "film.parameters-direct.width-none"]
    assert len({one.digest for one in swept}) == 2 * len(kinds) - 1, "a direct prompt has no width"
    (plain,) = trials()
    assert plain.digest == swept[1].digest
    for kind, one in zip(kinds, swept[1::2], strict=True):
        (alone,) = trials(prompt={"parameters": kind})
        assert alone.digest == one.digest


def test_the_basis_of_a_superposition_is_the_prompts_own_vectors_and_ordinary_tokens(model):
    backbone, tokenizer, _ = model
    state = begun(model, "superposition", prompt={"length": 6, "parameters": "superposition", "width": 20})
    assert isinstance(state.parameters, Superposition)
    basis = state.parameters.basis
    assert basis.shape == (26, 32) and torch.equal(basis[:6], state.prompt)
    vocabulary = backbone.embed(torch.arange(len(tokenizer)))
    taken = (basis[6:, None] == vocabulary[None]).all(-1).float().argmax(1).tolist()
    assert len(set(taken)) == 20 and not set(taken) & set(tokenizer.all_special_ids)


def tune_on_rank(folder, model_folder):
    files = find_model(str(model_folder))
    backbone = host_backbone(files, read_config(files), int8=True, dtype=torch.float32, device=CPU, sharded=True)
    tokenizer = read_tokenizer(files)
    run = make_run(folder / f"rank{dist.get_rank()}", tokenizer, backbone.architecture)
    return prompts_of(tune(replace(run, folder=folder / "run"), backbone, tokenizer))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_two_ranks_reach_the_prompts_of_one_process_and_both_the_same_bit_by_bit(model, tmp_path):
    backbone, tokenizer, folder = model
    alone = tune(make_run(tmp_path / "one", tokenizer, backbone.architecture), backbone, tokenizer)
    one, other = run_ranks(2, tune_on_rank, tmp_path / "two", folder)
    assert_same_prompts(one, prompts_of(alone))
    for name, prompt in one.items():
        np.testing.assert_array_equal(prompt, other[name])
