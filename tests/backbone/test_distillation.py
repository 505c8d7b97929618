"""What a teacher adds to a row's loss, against transformers' own distributions over the whole vocabulary."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pipeline.backbone import prompted
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import host_backbone
from tests.families import DECODERS, make_decoder
from tests.tiny import CONFIGS, VOCAB, make_model

EOS = 1
FAMILIES = {
    **{"llama": "packed", "gpt2": "packed", "gemma2, caps": "packed", "falcon, rotary": "shared"},
    **{"mamba2": "padded", "granitemoehybrid": "padded", "t5": "encoder-decoder", "t5_tied": "encoder-decoder"},
}
OF_ROW, OF_TEACHER = [0, 1, 1, 0], [1, 0, 1, 1]
SHARES = [1.0, 0.25, 0.5, 0.0]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """The same weights hosted here in full precision, and loaded by transformers."""
    name, folder = request.param, tmp_path_factory.mktemp("family")
    if name in CONFIGS:
        make_model(folder, name, scale=1.0 if name.startswith("t5") else 3.0)
    else:
        make_decoder(folder, DECODERS[name])
    files = find_model(str(folder))
    ours = host_backbone(
        files, read_config(files), int8=False, dtype=torch.float32, device=torch.device("cpu"), sharded=False
    )
    seq2seq = ours.architecture == "encoder-decoder"
    assert seq2seq or ours.way == FAMILIES[name]
    return ours, (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(folder).eval()


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


@pytest.fixture(scope="module")
def rows():
    """Rows behind two prompts; behind two teachers' words; and their targets."""
    rng = np.random.default_rng(0)
    inputs = [rng.integers(3, VOCAB, n) for n in (5, 2, 9, 4)]
    targets = [np.append(rng.integers(3, VOCAB, n), EOS) for n in (2, 4, 1, 3)]
    # Without the row's first token, as behind words that have one already.
    behind_words = [ids[1:] for ids in inputs]
    words = [drawn(11, 32), drawn(6, 32)]
    return [drawn(3, 32), drawn(7, 32)], inputs, prompted.Rows(words, OF_TEACHER, behind_words), targets


def log_probabilities(reference, prompt, x, y):
    """`[len(y), V]`: transformers' distributions at a target's tokens, teacher-forced."""
    table = reference.get_input_embeddings()
    if reference.config.is_encoder_decoder:
        before = torch.cat([prompt, table(torch.as_tensor(x))])[None]
        logits = reference(inputs_embeds=before, labels=torch.as_tensor(y)[None]).logits[0]
    else:
        whole = torch.cat([prompt, table(torch.as_tensor(np.concatenate([x, y[:-1]])))])[None]
        logits = reference(inputs_embeds=whole, use_cache=False).logits[0, -len(y) :]
    return logits.log_softmax(-1)


def expected(reference, prompts, inputs, teacher, targets, shares):
    losses = []
    for b, y in enumerate(targets):
        student = log_probabilities(reference, prompts[OF_ROW[b]], inputs[b], y)
        taught = log_probabilities(reference, teacher.prompts[OF_TEACHER[b]], teacher.inputs[b], y)
        kl = functional.kl_div(student, taught, log_target=True, reduction="sum")
        nll = functional.nll_loss(student, torch.as_tensor(y), reduction="sum")
        losses.append((1 - shares[b]) * nll + shares[b] * kl)
    return torch.stack(losses)


def distilled(ours, prompts, inputs, teacher, targets, shares):
    return ours.run(prompted.target_distillation, prompted.Rows(prompts, OF_ROW, inputs), targets, teacher, shares)


@pytest.mark.parametrize("shares", [[1.0] * 4, SHARES], ids=["teacher-alone", "shares"])
def test_each_rows_loss_is_made_of_the_divergence_that_transformers_distributions_have(both, rows, shares):
    (ours, reference), (prompts, inputs, teacher, targets) = both, rows
    with torch.no_grad():
        wanted = expected(reference, prompts, inputs, teacher, targets, shares)
        without_gradients = distilled(ours, prompts, inputs, teacher, targets, shares)
    assert wanted.min() > 1e-4, "teacher and student differ"
    torch.testing.assert_close(without_gradients, wanted, rtol=1e-3, atol=1e-6)
    leaves = [prompt.clone().requires_grad_() for prompt in prompts]
    torch.testing.assert_close(distilled(ours, leaves, inputs, teacher, targets, shares), without_gradients)


def test_its_gradient_is_autograds_through_a_whole_forward_and_the_teacher_gets_none(both, rows):
    (ours, reference), (prompts, inputs, teacher, targets) = both, rows
    factors = torch.tensor([1.0, 2.0, 3.0, 4.0])
    mine, theirs = ([prompt.clone().requires_grad_() for prompt in prompts] for _ in range(2))
    words = [word.clone().requires_grad_() for word in teacher.prompts]
    behind = prompted.Rows(words, teacher.prompt_of_row, teacher.inputs)
    (distilled(ours, mine, inputs, behind, targets, SHARES) * factors).sum().backward()
    with torch.no_grad():
        constant = [
            log_probabilities(reference, teacher.prompts[s], x, y)
            for s, x, y in zip(OF_TEACHER, teacher.inputs, targets, strict=True)
        ]
    loss = torch.zeros(())
    for b, (taught, y) in enumerate(zip(constant, targets, strict=True)):
        student = log_probabilities(reference, theirs[OF_ROW[b]], inputs[b], y)
        kl = (taught.exp() * (taught - student)).sum()
        nll = -student[torch.arange(len(y)), torch.as_tensor(y)].sum()
        loss = loss + factors[b] * ((1 - SHARES[b]) * nll + SHARES[b] * kl)
    loss.backward()
    for ours_of, theirs_of in zip(mine, theirs, strict=True):
        scale = float(theirs_of.grad.abs().max())
        torch.testing.assert_close(ours_of.grad, theirs_of.grad, rtol=1e-3, atol=1e-4 * scale)
    assert all(word.grad is None for word in words)


def test_a_share_of_nothing_is_the_loss_of_the_labels(both, rows):
    (ours, _), (prompts, inputs, teacher, targets) = both, rows
    with torch.no_grad():
        wanted = ours.run(prompted.target_nll, prompted.Rows(prompts, OF_ROW, inputs), targets)
        found = distilled(ours, prompts, inputs, teacher, targets, [0.0] * 4)
    torch.testing.assert_close(found, wanted)


def test_who_is_the_teacher_learns_nothing(both, rows):
    (ours, _), (prompts, inputs, _, targets) = both, rows
    leaves = [prompt.clone().requires_grad_() for prompt in prompts]
    itself = prompted.Rows(prompts, OF_ROW, inputs)
    kl = distilled(ours, leaves, inputs, itself, targets, [1.0] * 4)
    kl.sum().backward()
    # A teacher runs without gradients, which may be by another kernel: equal up to rounding.
    assert kl.abs().max() < 1e-6
    assert max(float(leaf.grad.abs().max()) for leaf in leaves) < 1e-4


def test_a_prompt_that_is_not_a_number_touches_no_row_of_another(both, rows):
    (ours, _), (prompts, inputs, teacher, targets) = both, rows
    sick = [prompts[0] * float("nan"), prompts[1].clone().requires_grad_()]
    losses = distilled(ours, sick, inputs, teacher, targets, [0.5] * 4)
    losses.sum().backward()
    assert [bool(loss.isnan()) for loss in losses] == [s == 0 for s in OF_ROW]
    assert bool(sick[1].grad.isfinite().all())
