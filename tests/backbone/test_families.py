"""Every family of decoders, against transformers' own model: row by row, from token ids, in float32."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from pipeline.backbone import padded, prompted
from pipeline.backbone.files import context_length, find_model, read_config
from pipeline.backbone.host import host_backbone
from pipeline.errors import BackboneError
from tests.families import DECODERS, make_decoder
from tests.tiny import VOCAB

CPU = torch.device("cpu")
OF_ROW = [0, 1, 1, 0]
EOS = 1


@pytest.fixture(scope="module", params=DECODERS)
def family(request, tmp_path_factory):
    folder = make_decoder(tmp_path_factory.mktemp("family"), DECODERS[request.param])
    return DECODERS[request.param], folder


@pytest.fixture(scope="module")
def both(family):
    """The same weights hosted here in full precision, and loaded by transformers."""
    known, folder = family
    return known, hosted(folder, int8=False), theirs(folder)


def hosted(folder, int8, dtype=torch.float32):
    files = find_model(str(folder))
    return host_backbone(files, read_config(files), int8=int8, dtype=dtype, device=CPU, sharded=False)


def theirs(folder):
    seeing = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    return (AutoModelForImageTextToText if seeing else AutoModelForCausalLM).from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def rows():
    """Prompts by their tokens, of rows longer than any window."""
    rng = np.random.default_rng(0)
    some = lambda n: rng.integers(6, VOCAB, n)  # noqa: E731
    return [some(7), some(4)], [some(n) for n in (5, 2, 9, 4)], [np.append(some(n), EOS) for n in (2, 4, 1, 3)]


def padding_of(model, prompt):
    """The tokens of a prompt as a family's layers are told them: where they ask for tokens, a prompt's are padding."""
    return np.zeros_like(prompt) if getattr(model.config, "hidden_size_per_layer_input", None) else prompt


def embedded(ours, prompts, reference):
    ids = [torch.as_tensor(padding_of(reference, prompt)) for prompt in prompts]
    return [ours.embed(of).requires_grad_() for of in ids]


def alone(reference, prompt, x, y):
    """-log P of a target behind a prompt of token ids."""
    ids = torch.as_tensor(np.concatenate([padding_of(reference, prompt), x, y[:-1]]))
    logits = reference(input_ids=ids[None], use_cache=False).logits[0, -len(y) :]
    return functional.cross_entropy(logits, torch.as_tensor(y), reduction="sum")


def test_a_mixed_batch_gives_each_row_the_loss_of_the_models_own_forward_from_ids(both, rows):
    known, ours, reference = both
    prompts, inputs, targets = rows
    assert ours.way == known.way
    with torch.no_grad():
        found = ours.run(
            prompted.target_nll, prompted.Rows(embedded(ours, prompts, reference), OF_ROW, inputs), targets
        )
        wanted = [alone(reference, prompts[s], x, y) for s, x, y in zip(OF_ROW, inputs, targets, strict=True)]
    np.testing.assert_allclose(found.numpy(), np.array(wanted), rtol=1e-5)


def test_a_prompts_gradient_is_the_sum_of_what_its_rows_give_it_alone(both, rows):
    _, ours, reference = both
    prompts, inputs, targets = rows
    of_ours = [prompt.detach().requires_grad_() for prompt in embedded(ours, prompts, reference)]
    ours.run(prompted.target_nll, prompted.Rows(of_ours, OF_ROW, inputs), targets).sum().backward()
    for s, prompt in enumerate(of_ours):
        mine = [row for row, of in enumerate(OF_ROW) if of == s]
        wanted = input_gradient(reference, prompts[s], [inputs[row] for row in mine], [targets[row] for row in mine])
        torch.testing.assert_close(prompt.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def input_gradient(reference, prompt, inputs, targets):
    """Of what enters the layers for a prompt's tokens, when the model is given ids."""
    table, caught = reference.get_input_embeddings(), []
    handle = table.register_forward_hook(lambda module, args, output: caught.append(leaf(output)) or caught[-1])
    total = 0.0
    try:
        for x, y in zip(inputs, targets, strict=True):
            caught.clear()
            alone(reference, prompt, x, y).backward()
            total = total + caught[0].grad[0, : len(prompt)]
    finally:
        handle.remove()
    # A family that scales behind its embeddings has prompts in the scaled space.
    return total / float(getattr(reference.config, "embedding_multiplier", 1.0) if is_scaled_behind(reference) else 1.0)


def is_scaled_behind(reference):
    return reference.config.model_type == "falcon_h1"


def leaf(output):
    return output.detach().requires_grad_()


def test_labels_score_as_they_do_as_targets(both, rows):
    _, ours, reference = both
    prompts, inputs, targets = rows
    behind = [prompt.detach() for prompt in embedded(ours, prompts, reference)]
    labels = [targets, targets[:2], targets[2:], targets[:1]]
    scores = ours.run(prompted.label_log_likelihoods, prompted.Rows(behind, OF_ROW, inputs), labels)
    for row, (score, of_row) in enumerate(zip(scores, labels, strict=True)):
        repeated = prompted.Rows(behind, [OF_ROW[row]] * len(of_row), [inputs[row]] * len(of_row))
        with torch.no_grad():
            nll = ours.run(prompted.target_nll, repeated, of_row).numpy()
        np.testing.assert_allclose(score, -nll, rtol=1e-4)


def test_greedy_decoding_of_a_mixed_batch_gives_the_tokens_of_each_row_alone(both, rows):
    _, ours, reference = both
    prompts, inputs, _ = rows
    behind = [prompt.detach() for prompt in embedded(ours, prompts, reference)]
    answers = ours.run(prompted.greedy_decode, prompted.Rows(behind, OF_ROW, inputs), 6, EOS)
    for s, x, answer in zip(OF_ROW, inputs, answers, strict=True):
        text = np.concatenate([padding_of(reference, prompts[s]), x])
        for token in [*answer, *([EOS] if len(answer) < 6 else [])]:
            with torch.no_grad():
                logits = reference(input_ids=torch.as_tensor(text)[None], use_cache=False).logits[0, -1]
            assert float(logits[token]) >= float(logits.max()) - 1e-4
            text = np.append(text, token)


def test_a_prompt_that_is_not_a_number_touches_no_other_row(both, rows):
    _, ours, reference = both
    prompts, inputs, targets = rows
    healthy, sick = embedded(ours, prompts, reference), embedded(ours, prompts, reference)
    sick[0] = sick[0].detach() * float("nan")
    with torch.no_grad():
        wanted, found = (
            ours.run(prompted.target_nll, prompted.Rows(of, OF_ROW, inputs), targets) for of in (healthy, sick)
        )
    assert [bool(loss.isnan()) for loss in found] == [s == 0 for s in OF_ROW]
    torch.testing.assert_close(found[1:3], wanted[1:3], rtol=1e-5, atol=1e-6)


def test_rows_longer_than_any_chunk_go_on_from_a_prompts_state_as_they_run_behind_it(both):
    _, ours, _ = both
    if not ours.proof.keeps_prompts:
        pytest.skip("its prompts run again with every row, or once a batch where rows are packed")
    rng = np.random.default_rng(1)
    prompts = [ours.embed(torch.as_tensor(rng.integers(6, VOCAB, n))) for n in (70, 5)]
    rows = [rng.integers(6, VOCAB, n) for n in (150, 3, 90)]
    with torch.no_grad():
        again, kept = (ours.run(padded.hidden_states, prompts, [0, 0, 1], rows, kept) for kept in (False, True))
    for row, (text, prompt) in enumerate(zip(rows, (70, 70, 5), strict=True)):
        places = slice(prompt, prompt + len(text))
        torch.testing.assert_close(kept[row, places], again[row, places], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlnet"])
def test_a_model_that_looks_ahead_is_refused_with_the_numbers(tmp_path, kind, dtype):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "d_model": 32}
    config = AutoConfig.for_model(kind, **sizes, n_layer=2, n_head=4, d_inner=64, intermediate_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"no way of running it .* nats by what must not be seen.* is refused"):
        hosted(tmp_path, int8=False, dtype=dtype)


def test_in_16_bits_a_state_that_is_not_exact_is_not_kept_either(tmp_path):
    folder = make_decoder(tmp_path, DECODERS["jamba"])
    assert not any(hosted(folder, int8=False, dtype=of).proof.keeps_prompts for of in (torch.float32, torch.bfloat16))


def test_rotations_that_change_with_the_longest_row_end_the_context(tmp_path):
    # transformers picks the long factors for a whole pass, so a short row would change beside a longer one.
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = AutoConfig.for_model(
        "phi3",
        max_position_embeddings=4096,
        original_max_position_embeddings=64,
        rope_parameters=rope,
        hidden_size=32,
        num_attention_heads=4,
    )
    assert context_length(config) == 64
