"""Training of all weights: as plain PyTorch does it, the same on one rank and two, killed or not."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
from transformers.optimization import Adafactor

from pipeline.errors import DivergedError
from pipeline.lab.full_weights import model_folder
from pipeline.settings import OptimizerSettings
from pipeline.tuning.optimise import schedule_factor
from tests.backbone.test_buffers import with_stored_buffers
from tests.lab.full_weights.training_plan import ADAFACTOR, ADAMW, STEPS, examples, make_plan, trained
from tests.ranks import run_ranks
from tests.seq2seq_families import CONFIGS, make_seq2seq
from tests.tiny import make_model

pytestmark = pytest.mark.slow

FAMILIES = ["llama", "llama_untied", "qwen3", "gpt2", "t5", "t5_tied"]


def of_transformers(folder: Path, settings: OptimizerSettings) -> tuple[dict[str, np.ndarray], list[float]]:
    """A plain loop of torch and transformers, row by row: the weights and the losses."""
    torch.manual_seed(0)
    seq2seq = folder.name in CONFIGS
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(folder).eval()
    if settings.name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    else:
        plain = {"scale_parameter": True, "relative_step": False}
        optimizer = Adafactor(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, **plain)
    losses = []
    for step in range(STEPS):
        batch = examples(step)
        count = sum(map(len, batch.targets))
        optimizer.zero_grad()
        total = 0.0
        for x, y in zip(batch.inputs, batch.targets, strict=True):
            if seq2seq:
                loss = model(input_ids=torch.tensor(x)[None], labels=torch.tensor(y)[None]).loss
            else:
                labels = torch.tensor(np.concatenate([np.full(len(x), -100), y]))[None]
                loss = model(input_ids=torch.tensor(np.concatenate([x, y]))[None], labels=labels).loss
            part = loss * len(y) / count
            part.backward()
            total += part.item()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * schedule_factor(settings, step, STEPS)
        optimizer.step()
        losses.append(total)
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}, losses


def assert_close(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray], tolerance: float) -> None:
    assert set(ours) == set(reference)
    for name, weight in ours.items():
        if tolerance and name.endswith("attn.c_attn.bias"):  # of GPT-2's keys: its gradient is noise
            continue
        distance = np.linalg.norm(weight - reference[name]) / np.linalg.norm(reference[name])
        assert distance <= tolerance, f"{name} differs by {distance}"


@pytest.mark.parametrize("settings", [ADAFACTOR, ADAMW], ids=["adafactor", "adamw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_weights_are_those_of_a_plain_loop_of_transformers(family, settings, tmp_path):
    folder = make_model(tmp_path / family, family, scale=1.0)
    weights, losses, _ = trained(folder, make_plan(tmp_path / "run", settings))
    reference, plain = of_transformers(folder, settings)
    np.testing.assert_allclose(losses, plain, rtol=1e-4)
    assert_close(weights, reference, 1e-3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["bart", "pegasus"])
def test_an_encoder_decoder_with_scales_and_a_forced_first_token_trains_as_in_transformers(family, tmp_path):
    folder = make_seq2seq(tmp_path / family, family)
    known = GenerationConfig.from_pretrained(folder)
    known.forced_bos_token_id = 7
    known.save_pretrained(folder)
    weights, losses, _ = trained(folder, make_plan(tmp_path / "run", ADAMW), save=tmp_path / "saved")
    reference, plain = of_transformers(folder, ADAMW)
    np.testing.assert_allclose(losses, plain, rtol=1e-4)
    learned = {name: weight for name, weight in weights.items() if "k_proj.bias" not in name}  # its gradient is noise
    assert_close(learned, {name: reference[name] for name in learned}, 1e-3)
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved").generation_config.forced_bos_token_id == 7


def on_rank(folder, run, settings, dtype, save):
    weights, losses, _ = trained(folder, make_plan(run, settings), dtype=dtype, save=save)
    return weights, losses, dist.get_world_size()


@pytest.mark.parametrize("settings", [ADAFACTOR, ADAMW], ids=["adafactor", "adamw"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.processes
def test_two_ranks_reach_the_weights_of_one_process_and_save_the_same_folder(family, settings, tmp_path):
    folder = make_model(tmp_path / family, family, scale=1.0)
    alone, losses, _ = trained(folder, make_plan(tmp_path / "one", settings), save=tmp_path / "saved")
    both = run_ranks(2, on_rank, folder, tmp_path / "two", settings, torch.float32, tmp_path / "saved_by_two")
    for weights, of_rank, ranks in both:
        assert ranks == 2
        np.testing.assert_allclose(of_rank, losses, rtol=1e-4)
        assert_close(weights, alone, 1e-3)
    assert_close(load_file(tmp_path / "saved_by_two/model.safetensors"), both[0][0], 0.0)
    assert_close(load_file(tmp_path / "saved/model.safetensors"), alone, 0.0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.processes
def test_bfloat16_keeps_float32_weights_for_the_optimizer_and_learns(ranks, tmp_path):
    # Steps so small that weights kept in bfloat16 would stay where they are; larger ones make this model's losses jump.
    calm = OptimizerSettings(lr=1e-3, weight_decay=1e-3)
    folder = make_model(tmp_path / "t5", "t5", scale=1.0)
    _, exact, _ = trained(folder, make_plan(tmp_path / "exact", calm))
    for _, losses, _ in run_ranks(ranks, on_rank, folder, tmp_path / "run", calm, torch.bfloat16, None):
        np.testing.assert_allclose(losses, exact, rtol=0.05)


class _Killed(BaseException):
    pass


def killed_at(step):
    def pause(progress):
        if progress.step == step:
            raise _Killed
        return True

    return pause


def kill_on_rank(folder, run, settings, at):
    try:
        trained(folder, make_plan(run, settings), killed_at(at))
    except _Killed:
        return "killed"


def step_taken_up(folder, run, settings):
    steps = []

    def note(progress):
        steps.append(progress.step)
        raise _Killed

    try:
        trained(folder, make_plan(run, settings), note)
    except _Killed:
        return steps[0]


@pytest.mark.parametrize("at", [2, 4, 7, 11])
@pytest.mark.parametrize("settings", [ADAFACTOR, ADAMW], ids=["adafactor", "adamw"])
def test_a_training_killed_at_any_step_and_started_again_ends_with_the_same_weights_bit_by_bit(settings, at, tmp_path):
    folder = make_model(tmp_path / "t5", "t5", scale=1.0)
    undisturbed, losses, _ = trained(folder, make_plan(tmp_path / "whole", settings))
    with pytest.raises(_Killed):
        trained(folder, make_plan(tmp_path / "killed", settings), killed_at(at))
    weights, again, _ = trained(folder, make_plan(tmp_path / "killed", settings))
    assert_close(weights, undisturbed, 0.0)
    assert again == losses


@pytest.mark.parametrize("settings", [pytest.param(ADAFACTOR, id="adafactor"), pytest.param(ADAMW, id="adamw")])
@pytest.mark.processes
def test_two_ranks_killed_end_bit_by_bit_as_two_undisturbed_and_may_go_on_as_another_number(settings, tmp_path):
    folder = make_model(tmp_path / "llama", "llama", scale=1.0)
    (undisturbed, losses, _), _ = run_ranks(2, on_rank, folder, tmp_path / "whole", settings, torch.float32, None)
    for again in (2, 1, 3):
        run = tmp_path / f"killed-{again}"
        assert run_ranks(2, kill_on_rank, folder, run, settings, 7) == ["killed", "killed"]
        for weights, of_rank, _ in run_ranks(again, on_rank, folder, run, settings, torch.float32, None):
            assert_close(weights, undisturbed, 0.0 if again == 2 else 1e-3)
            np.testing.assert_allclose(of_rank, losses, rtol=0 if again == 2 else 1e-4)


def test_the_two_newest_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    folder, run = make_model(tmp_path / "gpt2", "gpt2", scale=1.0), tmp_path / "run"
    what = make_plan(run, checkpoint_every=3)
    with pytest.raises(_Killed):
        trained(folder, what, killed_at(10))
    before, newest = sorted((run / "checkpoints").iterdir())
    assert (before.name, newest.name) == ("step-000000006", "step-000000009")
    file = newest / "rank-0-of-1.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    starts = []
    trained(folder, what, lambda progress: starts.append(progress.step) or True)
    assert starts[0] == 6


@pytest.mark.processes
def test_a_flipped_bit_of_any_file_of_a_checkpoint_is_found_by_every_rank(tmp_path):
    folder, run = make_model(tmp_path / "gpt2", "gpt2", scale=1.0), tmp_path / "run"
    assert run_ranks(2, kill_on_rank, folder, run, ADAMW, 10) == ["killed", "killed"]
    before, newest = sorted((run / "checkpoints").iterdir())
    draw = random.Random(2)
    for name in ("rank-0-of-2.safetensors", "rank-1-of-2.safetensors", "whole.json"):
        data = bytearray((newest / name).read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        shutil.copytree(run / "checkpoints", tmp_path / name / "checkpoints")
        (tmp_path / name / "checkpoints" / newest.name / name).write_bytes(data)
        assert run_ranks(2, step_taken_up, folder, tmp_path / name, ADAMW) == [int(before.name[5:])] * 2


def test_a_checkpoint_of_something_else_is_not_taken_up(tmp_path):
    folder, run = make_model(tmp_path / "gpt2", "gpt2", scale=1.0), tmp_path / "run"
    trained(folder, make_plan(run))
    starts = []
    trained(folder, make_plan(run, digest="another"), lambda progress: starts.append(progress.step) or True)
    assert starts[0] == 0


def test_a_loss_that_is_no_number_ends_the_training(tmp_path):
    folder = make_model(tmp_path / "t5", "t5", scale=1.0)
    with pytest.raises(DivergedError, match=r"^the loss was (nan|inf) at step \d+$"):
        trained(folder, make_plan(tmp_path / "run", OptimizerSettings(lr=1e30, weight_decay=0)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_is_what_transformers_loads(family, tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "_FILE_BYTES", 20_000)  # several files
    folder = make_model(tmp_path / family, family, scale=1.0)
    weights, *_ = trained(folder, make_plan(tmp_path / "run"), save=tmp_path / "saved")
    auto = AutoModelForSeq2SeqLM if "t5" in family else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "saved", dtype="auto")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert_close({name: weight.detach().numpy() for name, weight in loaded.named_parameters()}, weights, 0.0)


def test_a_stored_buffer_is_saved_with_the_trained_weights(tmp_path, monkeypatch):
    folder = with_stored_buffers(tmp_path, monkeypatch)
    trained(folder, make_plan(tmp_path / "run"), save=tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert float(saved["model.embed_tokens.offset"]) == 1.5 and set(saved["model.embed_tokens.factor"]) == {2.0}
    assert set(saved) == set(load_file(folder / "model.safetensors"))
