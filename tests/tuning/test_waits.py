"""Where a step makes the host wait for a GPU: once, to read its losses. No GPU is needed (`tests.device_reads`)."""

import numpy as np
import pytest
import torch

from pipeline.backbone import gpu, prompted
from pipeline.backbone.output import layers_of
from pipeline.corpus.reader import open_split
from pipeline.tuning.state import start
from pipeline.tuning.step import TrialStep, losses_and_gradients
from pipeline.tuning.teaching import Teacher
from tests.corpora import make_corpus, trial
from tests.device_reads import DEVICE, a_backbone, trials, waits_of_a_step
from tests.families import DECODERS, make_decoder
from tests.tiny import CONFIGS, make_model

ONE_READ = {"read: pipeline/tuning/step.py": 1}
FAMILIES = ["llama", "qwen3", "t5", "mistral, window", "gemma3_text", "gemma2, caps"]


@pytest.fixture(autouse=True)
def by_operators(monkeypatch):
    """Without Triton's kernels, which are counted in `tests/backbone/gpu`."""
    monkeypatch.setattr(gpu, "runs_on", lambda device: False)


def tiny(folder, family, products="int8"):
    made = make_model(folder, family) if family in CONFIGS else make_decoder(folder, DECODERS[family])
    return a_backbone(made, products)


def by_file(waits):
    """The counts without the number and the text of the line."""
    found = {}
    for place, count in waits.items():
        name = place.rsplit(":", 1)[0]
        found[name] = found.get(name, 0) + count
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_for_its_losses_alone_however_many_micro_batches_it_has(tmp_path, family):
    backbone, tokenizer = tiny(tmp_path / "model", family)
    assert backbone.way == "packed"
    # Partitioned, too: there is no other rank here that could be asked for its number of blocks.
    backbone.hosted.model.partitioned = True
    for budget in (10_000, 100):
        waits = waits_of_a_step(backbone, *trials(tmp_path, backbone, tokenizer), budget)
        assert by_file(waits) == ONE_READ, waits


def test_a_step_with_teachers_and_exact_products_waits_for_its_losses_alone(tmp_path):
    backbone, tokenizer = tiny(tmp_path / "model", "llama", "exact")
    corpus = make_corpus(tmp_path, tokenizer, backbone.architecture, "film")
    own = trial("film", corpus, teacher={"text": "the film is good", "between": " ", "weight": 0.5})
    state = start(own, torch.zeros(4, 32, device=DEVICE))
    teacher = Teacher(torch.zeros(6, 32, device=DEVICE), frozenset(), 0)
    work = TrialStep(own, state.prompt, 0, open_split(corpus.splits["train"]), teacher)
    waits = waits_of_a_step(backbone, [state], [work], 100)
    assert by_file(waits) == ONE_READ, waits


ASKING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.isfinite().all()),
    "tolist": lambda x: x.sum(0).tolist(),
    "cpu": lambda x: x.cpu(),
    "mask": lambda x: x[x > 0],
    "index of the host": lambda x: x[torch.arange(1)],
    "unequal": lambda x: torch.equal(x, x + 1),
    "new tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "tensor of an array": lambda x: torch.as_tensor(np.ones(2), device=x.device),
    "copy from the host": lambda x: torch.ones(2).to(x.device),
}


@pytest.mark.parametrize("asks", ASKING.values(), ids=ASKING)
def test_a_layer_that_asks_the_device_for_something_is_found(tmp_path, asks):
    backbone, tokenizer = tiny(tmp_path / "model", "llama")

    def ask(_layer, _given, made):
        asks(made[0] if isinstance(made, tuple) else made)

    for layer in layers_of(backbone.hosted.model).layers:
        layer.register_forward_hook(ask)
    waits = by_file(waits_of_a_step(backbone, *trials(tmp_path, backbone, tokenizer), 10_000))
    assert waits.pop("read: pipeline/tuning/step.py") == 1
    assert sum(waits.values()) == 2, waits  # once in each of two layers


def test_a_gradient_that_is_not_finite_ends_its_own_trial_though_its_loss_is_finite(model, tmp_path):
    backbone, tokenizer, _ = model
    corpus = make_corpus(tmp_path, tokenizer, backbone.architecture, "film")
    states = [start(trial("film", corpus), torch.randn(4, 32)) for _ in range(2)]
    train = open_split(corpus.splits["train"])
    work = [TrialStep(state.trial, state.prompt, 0, train) for state in states]

    def with_a_bend(model, rows, targets):
        bend = (rows.prompts[0].sum() * 0.0).abs().sqrt()  # 0, and without a slope there
        return prompted.target_nll(model, rows, targets) + bend

    losses, _ = losses_and_gradients(backbone, work, 10_000, with_a_bend)
    assert np.isnan(losses[0]) and np.isfinite(losses[1])
    assert not states[0].prompt.grad.isfinite().all() and states[1].prompt.grad.isfinite().all()
    states[1].update(float(losses[1]))
    assert states[1].step == 1 and states[1].status == "live"
