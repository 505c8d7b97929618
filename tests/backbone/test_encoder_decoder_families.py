"""Encoder-decoder families behind soft prompts, against transformers' own forward pass of each row alone, from ids.

A prompt here is the embeddings of known words, so that transformers can be given their ids: nothing of this project's
then stands between the words and the truth.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForSeq2SeqLM

from pipeline.backbone import output, prompted
from pipeline.backbone.files import context_length, find_model, read_config
from pipeline.backbone.host import host_backbone
from pipeline.backbone.memory import estimate_memory
from pipeline.errors import BackboneError
from tests.ranks import run_ranks
from tests.seq2seq_families import FACTORS, FAMILIES, make_config, make_seq2seq
from tests.tiny import VOCAB

EOS = 1
OF_ROW = [0, 1, 1, 0, 1]
REFUSED = {"prophetnet": "its decoder sees tokens that stand behind the one it predicts"}


def host(folder, sharded=False, **changes):
    files = find_model(str(folder))
    usual = {"int8": False, "dtype": torch.float32, "device": torch.device("cpu"), "sharded": sharded}
    return host_backbone(files, read_config(files), **{**usual, **changes})


def draw(lengths, eos):
    rng = np.random.default_rng(0)
    return [np.append(rng.integers(3, 39, n), [EOS] if eos else []).astype(int) for n in lengths]


PROMPTS = draw((3, 13), eos=False)
INPUTS = draw((5, 2, 29, 4, 11), eos=True)
TARGETS = draw((2, 9, 1, 3, 5), eos=True)


@pytest.fixture(scope="module", params=[family for family in FAMILIES if family not in REFUSED])
def both(request, tmp_path_factory):
    """Each family: its name, the model hosted here, transformers' own, and the folder."""
    folder = make_seq2seq(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, host(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), folder


def rows_of(ours, learn=False):
    prompts = [ours.embed(torch.tensor(words)).requires_grad_(learn) for words in PROMPTS]
    return prompted.Rows(prompts, OF_ROW, INPUTS)


def ids_of(row):
    return torch.tensor(np.concatenate([PROMPTS[OF_ROW[row]], INPUTS[row]]))[None]


def alone(reference, row):
    """A row's loss in transformers, and the gradient of what its embedding module gives for the prompt's ids."""
    given = []

    def keep(module, args, output):
        given.append(output.detach().requires_grad_())
        return given[-1]

    hook = reference.get_encoder().get_input_embeddings().register_forward_hook(keep)
    target = torch.tensor(TARGETS[row])
    logits = reference(input_ids=ids_of(row), labels=target[None]).logits[0]
    hook.remove()
    # Not the model's own loss: T5Gemma and others mean it over tokens, mixtures add to it.
    loss = torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum")
    loss.backward()
    return loss.item(), given[0].grad[0, : len(PROMPTS[OF_ROW[row]])]


def test_a_row_among_others_has_the_loss_and_gradient_that_transformers_gives_its_ids_alone(both):
    family, ours, reference, _ = both
    run = rows_of(ours, learn=True)
    nll = ours.run(prompted.target_nll, run, TARGETS)
    nll.sum().backward()
    losses, gradients = zip(*(alone(reference, row) for row in range(len(OF_ROW))), strict=True)
    np.testing.assert_allclose(nll.detach().numpy(), losses, rtol=1e-4)
    for s, prompt in enumerate(run.prompts):
        whole = sum(g for of, g in zip(OF_ROW, gradients, strict=True) if of == s) / FACTORS.get(family, 1.0)
        torch.testing.assert_close(prompt.grad, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_greedy_answers_are_those_of_transformers_generate(both):
    _, ours, reference, _ = both
    answers = ours.run(prompted.greedy_decode, rows_of(ours), 12, EOS)
    for row, answer in enumerate(answers):
        ids = ids_of(row)
        # Some families' generation settings end every answer at its longest with eos, which nobody asked for here.
        kept = {"max_new_tokens": 12, "num_beams": 1, "do_sample": False, "forced_eos_token_id": None}
        (tokens,) = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **kept)[:, 1:].tolist()
        assert list(answer) == (tokens[: tokens.index(EOS)] if EOS in tokens else tokens)


def test_a_labels_score_is_its_loss_as_a_target(both):
    _, ours, _, _ = both
    run = rows_of(ours)
    labels = [TARGETS, TARGETS[:2], TARGETS[2:], TARGETS[:1], TARGETS[1:4]]
    scores = ours.run(prompted.label_log_likelihoods, run, labels)
    for row, (score, of_row) in enumerate(zip(scores, labels, strict=True)):
        repeated = prompted.Rows(run.prompts, [OF_ROW[row]] * len(of_row), [INPUTS[row]] * len(of_row))
        with torch.no_grad():
            nll = ours.run(prompted.target_nll, repeated, of_row).numpy()
        np.testing.assert_allclose(score, -nll, rtol=1e-4)


def test_a_prompt_that_is_not_a_number_touches_no_other_row(both):
    _, ours, _, _ = both
    healthy = rows_of(ours, learn=True)
    ours.run(prompted.target_nll, healthy, TARGETS).sum().backward()
    sick = rows_of(ours, learn=True)
    sick.prompts[0].data *= float("nan")
    nll = ours.run(prompted.target_nll, sick, TARGETS)
    nll.sum().backward()
    assert [bool(row.isnan()) for row in nll] == [s == 0 for s in OF_ROW]
    torch.testing.assert_close(sick.prompts[1].grad, healthy.prompts[1].grad, rtol=1e-5, atol=1e-6)


def test_int8_weights_stay_close_to_the_full_model(both):
    family, ours, _, folder = both
    eighth = host(folder, int8=True)
    with torch.no_grad():
        exact, close = (it.run(prompted.target_nll, rows_of(it), TARGETS) for it in (ours, eighth))
    # Rounding may send a token to another of Switch's experts, of which it has one.
    torch.testing.assert_close(close, exact, rtol=0.1 if "switch" in family else 0.02, atol=0.02)
    assert len(eighth.run(prompted.greedy_decode, rows_of(eighth), 3, EOS)) == len(OF_ROW)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_its_own_forward_pass_gives_no_likelihood_is_refused_with_the_numbers(family, tmp_path):
    with pytest.raises(BackboneError, match=r"no way of running it .* \(alone: \d\.\de-0\d nats"):
        host(make_seq2seq(tmp_path, family))


def test_logits_of_a_few_places_at_a_time_give_the_same_losses_and_gradients(both, monkeypatch):
    _, ours, _, _ = both
    whole, parts = rows_of(ours, learn=True), rows_of(ours, learn=True)
    ours.run(prompted.target_nll, whole, TARGETS).sum().backward()
    monkeypatch.setattr(output, "LOGIT_BYTES", 3 * 16 * VOCAB)
    ours.run(prompted.target_nll, parts, TARGETS).sum().backward()
    for one, other in zip(whole.prompts, parts.prompts, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=5e-6)


def test_experts_that_would_drop_a_token_for_another_rows_are_refused(tmp_path):
    folder = make_seq2seq(tmp_path, "nllb_moe", moe_eval_capacity_token_fraction=0.5)
    with pytest.raises(BackboneError, match=r"moe_eval_capacity_token_fraction 0\.5"):
        host(folder)


def test_a_models_forced_first_token_begins_its_answers_as_in_generate(tmp_path):
    folder = make_seq2seq(tmp_path, "bart")
    write_generation(folder, forced_bos_token_id=7)
    ours, reference = host(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    test_greedy_answers_are_those_of_transformers_generate((None, ours, reference, folder))
    assert all(answer[0] == 7 for answer in ours.run(prompted.greedy_decode, rows_of(ours), 3, EOS))


def write_generation(folder, **changes):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_start(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder_start_token_id": None}))
    write_generation(folder, decoder_start_token_id=None, bos_token_id=None)
    return folder


def test_the_decoders_first_token_is_read_from_the_generation_settings_where_the_config_lacks_it(tmp_path):
    folder = without_start(make_seq2seq(tmp_path, "mbart"))
    write_generation(folder, decoder_start_token_id=9)
    ours, reference = host(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    test_greedy_answers_are_those_of_transformers_generate((None, ours, reference, folder))
    assert read_config(find_model(str(folder))).decoder_start_token_id == 9


def test_a_model_that_no_file_tells_the_first_token_of_is_refused(tmp_path):
    folder = without_start(make_seq2seq(tmp_path, "mbart"))
    with pytest.raises(BackboneError, match="nothing says which token its decoder begins behind"):
        read_config(find_model(str(folder)))


def test_the_context_is_that_of_the_smaller_stack_and_of_full_attention():
    assert context_length(make_config("bart")) == 256
    assert context_length(make_config("t5gemma")) == context_length(make_config("t5gemma2")) == 256
    assert context_length(make_config("t5")) is context_length(make_config("longt5_local")) is None
    # Beyond (5 + 2 * 1) blocks of 4, BigBird reads by blocks, some of them drawn at random.
    assert context_length(make_config("bigbird_pegasus_sparse")) == 28
    assert context_length(make_config("bigbird_pegasus")) == 256


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_estimated_whatever_the_shape_of_the_configuration(family):
    estimate = estimate_memory(make_config(family), True, torch.float32, 2, 1000)
    assert estimate.activations > 0 and estimate.weights < 4 * estimate.parameters


def losses_of(folder, sharded):
    """Each rank has rows of its own, and so tokens for other experts."""
    backbone = host(folder, sharded=sharded)
    own = slice(dist.get_rank(), None, dist.get_world_size()) if sharded else slice(None)
    run = rows_of(backbone, learn=True)
    nll = backbone.run(prompted.target_nll, replace(run, prompt_of_row=OF_ROW[own], inputs=INPUTS[own]), TARGETS[own])
    nll.sum().backward()
    losses = torch.zeros(len(OF_ROW))
    losses[own] = nll.detach()
    gradients = [torch.zeros_like(prompt) if prompt.grad is None else prompt.grad for prompt in run.prompts]
    for tensor in [losses, *gradients] if sharded else []:
        dist.all_reduce(tensor)
    return losses.numpy(), [gradient.numpy() for gradient in gradients]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("family", ["pegasus", "switch", "nllb_moe", "t5gemma2"])
def test_two_zero3_ranks_give_the_losses_and_gradients_of_one_process(family, tmp_path):
    folder = make_seq2seq(tmp_path, family)
    losses, gradients = losses_of(folder, False)
    for of_rank, of_gradients in run_ranks(2, losses_of, folder, True):
        np.testing.assert_allclose(of_rank, losses, rtol=1e-5)
        for own, whole in zip(of_gradients, gradients, strict=True):
            np.testing.assert_allclose(own, whole, rtol=1e-3, atol=1e-6)
