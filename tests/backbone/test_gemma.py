"""The second real model, where its packages are installed: Gemma 3 270M, read and run as transformers does it."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.host import host_backbone
from pipeline.backbone.prompted import Rows, greedy_decode, label_log_likelihoods, target_nll
from pipeline.errors import BackboneError

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(1800)]
TEXTS = [
    "The capital of France is",
    "  two spaces,\ttabs\n\nand naïve 日本語 😀 12345",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "",
    " don't stop…",
]
LABELS = [" positive", " negative", " neither of them"]


@pytest.fixture(scope="module")
def files():
    try:
        return find_model("gemma3-270m")
    except BackboneError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def theirs(files):
    return AutoModelForCausalLM.from_pretrained(files.folder, gguf_file=files.gguf, dtype=torch.float32).eval()


def hosted(files, int8):
    config = read_config(files)
    return host_backbone(files, config, int8=int8, dtype=torch.float32, device=torch.device("cpu"), sharded=False)


@pytest.fixture(scope="module")
def full(files):
    return hosted(files, int8=False)


def rows_of(tokenizer, backbone):
    """Rows of two prompts, made of known tokens, and their targets."""
    encode = lambda text: np.array(tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    texts = [encode(f"<bos>Review number {n}.") for n in (1, 2)]
    prompts = [backbone.embed(torch.as_tensor(text)).requires_grad_() for text in texts]
    inputs = [encode(text) for text in (" I loved it, it was", " The food was cold, and the film", " Not bad:")]
    return texts, Rows(prompts, [0, 1, 1], inputs), [encode(text) for text in LABELS]


def test_every_weight_and_logit_is_that_of_transformers(full, theirs):
    model = full.hosted.model
    mine = dict(model.named_parameters())
    assert mine.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(mine[name], parameter), name
    ids = torch.randint(0, 262_144, (1, 700), generator=torch.Generator().manual_seed(0))  # longer than its windows
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=2e-3)


def test_text_becomes_the_tokens_of_transformers_tokenizer(files):
    mine, usual = read_tokenizer(files), AutoTokenizer.from_pretrained(files.folder, gguf_file=files.gguf)
    assert [mine(text).input_ids for text in TEXTS] == [usual(text).input_ids for text in TEXTS]
    assert mine(TEXTS[0]).input_ids == [2, 818, 5279, 529, 7001, 563]
    assert [mine.decode(mine(text).input_ids, skip_special_tokens=False) for text in TEXTS] == [
        f"<bos>{text}" for text in TEXTS
    ]


def test_packed_rows_give_losses_gradients_labels_and_texts_of_each_row_alone(full, theirs, files):
    tokenizer = read_tokenizer(files)
    texts, rows, targets = rows_of(tokenizer, full)
    assert full.way == "packed"
    losses = full.run(target_nll, rows, targets)
    gradients = torch.autograd.grad(losses.sum(), rows.prompts)
    prompts = [prompt.detach().clone().requires_grad_() for prompt in rows.prompts]
    alone = []
    for of, x, y in zip(rows.prompt_of_row, rows.inputs, targets, strict=True):
        words = theirs.get_input_embeddings()(torch.as_tensor(np.concatenate([x, y[:-1]])))
        logits = theirs(inputs_embeds=torch.cat([prompts[of], words])[None]).logits[0, -len(y) :]
        alone.append(torch.nn.functional.cross_entropy(logits, torch.as_tensor(y), reduction="sum"))
    torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-4, atol=1e-4)
    for mine, usual in zip(gradients, torch.autograd.grad(sum(alone), prompts), strict=True):
        torch.testing.assert_close(mine, usual, rtol=0, atol=1e-3 * float(usual.abs().max()))

    scores = full.run(label_log_likelihoods, rows, [targets] * 3)
    assert [score[n] for n, score in enumerate(scores)] == pytest.approx([-loss.item() for loss in alone], rel=1e-4)
    decoded = full.run(greedy_decode, rows, 8, tokenizer.eos_token_id)
    for of, x, mine in zip(rows.prompt_of_row, rows.inputs, decoded, strict=True):
        ids = torch.as_tensor(np.concatenate([texts[of], x]))[None]
        usual = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert mine.tolist() == usual[0, ids.shape[1] :].tolist()[: len(mine)]


def test_int8_weights_move_losses_by_less_than_two_percent(full, files):
    tokenizer = read_tokenizer(files)
    int8 = hosted(files, int8=True)
    _, rows, targets = rows_of(tokenizer, full)
    with torch.no_grad():
        expected, found = (float(backbone.run(target_nll, rows, targets).sum()) for backbone in (full, int8))
    assert found == pytest.approx(expected, rel=0.02)
