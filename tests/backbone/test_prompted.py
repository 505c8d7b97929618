"""The model behind soft prompts, against transformers' own forward pass, row by row."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pipeline.backbone import prompted
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import host_backbone
from pipeline.backbone.rows import common_beginnings
from tests.tiny import FAMILIES, VOCAB, make_model

EOS = 1
OF_ROW = [0, 1, 1, 0]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """The same weights hosted here in full precision, and loaded by transformers."""
    scale = 1.0 if "t5" in request.param else 3.0
    folder = make_model(tmp_path_factory.mktemp(request.param), request.param, scale=scale)
    files = find_model(str(folder))
    ours = host_backbone(
        files, read_config(files), int8=False, dtype=torch.float32, device=torch.device("cpu"), sharded=False
    )
    auto = AutoModelForSeq2SeqLM if ours.architecture == "encoder-decoder" else AutoModelForCausalLM
    return ours, auto.from_pretrained(folder).eval()


def make_rows(lengths):
    rng = np.random.default_rng(0)
    prompts = [torch.randn(p, 32, generator=torch.Generator().manual_seed(p)) for p in lengths]
    inputs = [rng.integers(3, VOCAB, n) for n in (5, 2, 9, 4)]
    targets = [np.append(rng.integers(3, VOCAB, n), EOS) for n in (2, 4, 1, 3)]
    return prompted.Rows(prompts, OF_ROW, inputs), targets


@pytest.fixture(scope="module")
def rows():
    return make_rows((3, 7))


def with_beginnings(rows, tokens):
    """The rows behind what all rows of their prompt begin with, so many tokens for each prompt."""
    rng = np.random.default_rng(1)
    beginnings = [rng.integers(3, VOCAB, n) for n in tokens]
    inputs = [np.concatenate([beginnings[s], x]) for s, x in zip(OF_ROW, rows.inputs, strict=True)]
    shared = common_beginnings(inputs, OF_ROW, len(tokens))
    assert all(found >= wanted for found, wanted in zip(shared, tokens, strict=True))
    return replace(rows, inputs=inputs, shared=shared)


KINDS = {"prompts": (3, 7), "prompt-and-none": (0, 4), "no-prompts": (0, 0)}


@pytest.fixture(scope="module", params=[*KINDS, "prompts, rows that begin alike", "no-prompts, rows that begin alike"])
def any_rows(request):
    """Rows behind soft prompts, or behind none: a model that was fine-tuned needs none."""
    kind, _, alike = request.param.partition(", ")
    rows, targets = make_rows(KINDS[kind])
    return (with_beginnings(rows, (20, 9)) if alike else rows), targets


def embedded(reference, prompt, ids):
    return torch.cat([prompt, reference.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))])[None]


def reference_nll(reference, prompt, x, y):
    if reference.config.is_encoder_decoder:
        loss = reference(inputs_embeds=embedded(reference, prompt, x), labels=torch.tensor(y)[None]).loss
    else:
        ignored = np.full(len(prompt) + len(x), -100)
        labels = torch.tensor(np.concatenate([ignored, y]))[None]
        loss = reference(inputs_embeds=embedded(reference, prompt, np.concatenate([x, y])), labels=labels).loss
    return loss.item() * len(y)


def test_a_mixed_batch_gives_each_row_the_loss_that_transformers_gives_it_alone(both, any_rows):
    (ours, reference), (run, targets) = both, any_rows
    nll = ours.run(prompted.target_nll, run, targets).detach().numpy()
    alone = [
        reference_nll(reference, run.prompts[s], x, y) for s, x, y in zip(OF_ROW, run.inputs, targets, strict=True)
    ]
    np.testing.assert_allclose(nll, alone, rtol=1e-5)


@pytest.mark.parametrize("tokens", [(20, 9), (0, 12)])
def test_what_rows_begin_with_alike_runs_once_and_changes_no_loss_and_no_gradient(both, rows, tokens):
    (ours, _), (run, targets) = both, rows
    once = with_beginnings(run, tokens)
    found = []
    for each in (once, replace(once, shared=())):
        prompts = [prompt.clone().requires_grad_() for prompt in each.prompts]
        nll = ours.run(prompted.target_nll, replace(each, prompts=prompts), targets)
        nll.sum().backward()
        found.append((nll.detach(), *(prompt.grad for prompt in prompts)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_beginning_is_the_longest_that_leaves_each_row_a_token_of_its_own():
    one = np.arange(30)
    assert common_beginnings([one, one[:20], one[:25]], [0, 0, 0], 1) == [19]
    assert common_beginnings([one, np.append(one[:12], 99)], [0, 0], 1) == [12]
    assert common_beginnings([one, np.append(one[:12], 99), one], [0, 1, 0], 3) == [29, 12, 0]
    assert common_beginnings([one, np.append(one[:3], 99)], [0, 0], 1) == [0], "three tokens are not worth a segment"
    assert common_beginnings([one, one[:0]], [0, 0], 1) == [0]


def test_label_log_likelihoods_are_those_of_the_labels_as_targets(both, any_rows):
    (ours, _), (run, targets) = both, any_rows
    labels = [targets, targets[:2], targets[2:], targets[:1]]
    scores = ours.run(prompted.label_log_likelihoods, run, labels)
    for row, (score, of_row) in enumerate(zip(scores, labels, strict=True)):
        repeated = prompted.Rows(run.prompts, [OF_ROW[row]] * len(of_row), [run.inputs[row]] * len(of_row))
        with torch.no_grad():
            nll = ours.run(prompted.target_nll, repeated, of_row).numpy()
        np.testing.assert_allclose(score, -nll, rtol=1e-4)


def test_greedy_decoding_of_a_mixed_batch_gives_transformers_tokens(both, any_rows):
    (ours, reference), (run, _) = both, any_rows
    answers = ours.run(prompted.greedy_decode, run, 8, EOS)
    for s, x, answer in zip(OF_ROW, run.inputs, answers, strict=True):
        tokens: list[int] = []
        while len(tokens) < 8:
            if reference.config.is_encoder_decoder:
                decoder = torch.tensor([[reference.config.decoder_start_token_id, *tokens]])
                output = reference(inputs_embeds=embedded(reference, run.prompts[s], x), decoder_input_ids=decoder)
            else:
                output = reference(inputs_embeds=embedded(reference, run.prompts[s], [*x, *tokens]))
            tokens.append(int(output.logits[0, -1].argmax()))
            if tokens[-1] == EOS:
                tokens.pop()
                break
        assert list(answer) == tokens


def test_a_prompt_that_is_not_a_number_touches_no_other_row(both, rows):
    (ours, _), (run, targets) = both, rows
    healthy = [prompt.clone().requires_grad_() for prompt in run.prompts]
    ours.run(prompted.target_nll, prompted.Rows(healthy, OF_ROW, run.inputs), targets).sum().backward()
    poisoned = [(run.prompts[0] * float("nan")).requires_grad_(), run.prompts[1].clone().requires_grad_()]
    nll = ours.run(prompted.target_nll, prompted.Rows(poisoned, OF_ROW, run.inputs), targets)
    nll.sum().backward()
    assert [bool(row.isnan()) for row in nll] == [s == 0 for s in OF_ROW]
    torch.testing.assert_close(poisoned[1].grad, healthy[1].grad, rtol=1e-5, atol=1e-6)


def kept(ours, run):
    """The same rows behind prompts that ran before, each with what its rows begin with."""
    shared = run.shared or [0] * len(run.prompts)
    of_prompt = [run.inputs[OF_ROW.index(s)][:tokens] for s, tokens in enumerate(shared)]
    states = [ours.run(prompted.prompt_state, *both) for both in zip(run.prompts, of_prompt, strict=True)]
    return prompted.Rows(states, OF_ROW, [x[shared[s] :] for s, x in zip(OF_ROW, run.inputs, strict=True)])


@pytest.mark.parametrize("beginnings", [(0, 0), (20, 0), (20, 9)])
def test_what_ran_before_gives_what_runs_now_gives(both, rows, beginnings):
    (ours, _), (run, targets) = both, rows
    if ours.architecture == "encoder-decoder":
        pytest.skip("a prompt before an encoder has no state of its own")
    run = with_beginnings(run, beginnings)
    again = kept(ours, run)
    with torch.no_grad():
        nll = [ours.run(prompted.target_nll, r, targets) for r in (again, run)]
    torch.testing.assert_close(*nll, rtol=1e-5, atol=1e-5)
    scores = [ours.run(prompted.label_log_likelihoods, r, [targets] * 4) for r in (again, run)]
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)
    answers = [ours.run(prompted.greedy_decode, r, 8, EOS) for r in (again, run)]
    assert [list(answer) for answer in answers[0]] == [list(answer) for answer in answers[1]]


def test_each_row_may_have_its_own_longest_answer(both, rows):
    (ours, _), (run, _) = both, rows
    whole = ours.run(prompted.greedy_decode, run, 8, EOS)
    limits = [3, 8, 1, 2]
    cut = ours.run(prompted.greedy_decode, run, limits, EOS)
    assert [list(answer) for answer in cut] == [list(row[:most]) for row, most in zip(whole, limits, strict=True)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_int8_in_bfloat16_as_on_a_gpu_stays_close_to_the_full_model(family, any_rows, tmp_path):
    run, targets = any_rows
    folder = make_model(tmp_path / family, family, scale=1.0)
    files = find_model(str(folder))
    config = read_config(files)
    full, half = (
        host_backbone(files, config, int8=int8, dtype=dtype, device=torch.device("cpu"), sharded=False)
        for int8, dtype in ((False, torch.float32), (True, torch.bfloat16))
    )
    with torch.no_grad():
        exact = full.run(prompted.target_nll, run, targets)
        close = half.run(prompted.target_nll, run, targets)
    assert close.dtype == torch.float32
    torch.testing.assert_close(close, exact, rtol=0.03, atol=0.05)
    assert len(half.run(prompted.greedy_decode, run, 4, EOS)) == len(OF_ROW)
    assert [len(s) for s in half.run(prompted.label_log_likelihoods, run, [targets] * 4)] == [4] * 4


def test_threads_that_share_a_model_leave_its_attention_as_it_was(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    files = find_model(str(folder))
    ours = host_backbone(
        files, read_config(files), int8=False, dtype=torch.float32, device=torch.device("cpu"), sharded=False
    )
    usual = ours.hosted.model.config._attn_implementation
    run, targets = make_rows((3, 7))
    wanted = ours.run(prompted.target_nll, run, targets).detach()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ours.run(prompted.target_nll, run, targets).detach(), range(40)))
    assert ours.hosted.model.config._attn_implementation == usual
    assert all(torch.equal(of_thread, wanted) for of_thread in found)
