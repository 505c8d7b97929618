"""Rows behind a hard prompt have the tokenizer's tokens for the whole text, and score accordingly."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline.backbone import prompted
from pipeline.backbone.label_scores import label_offsets
from pipeline.corpus.encoding import encode_inputs
from pipeline.corpus.reader import open_split
from pipeline.errors import SettingsError
from pipeline.lab.comparison.candidates import Candidate
from pipeline.lab.comparison.eval_job import _eval_request
from pipeline.lab.comparison.hard_prompts import (
    HardPrompt,
    check_hard_prompt,
    drawn_rows,
    hard_prompts,
    with_shared_prefix,
)
from pipeline.lab.comparison.questions import SplitQuestion
from pipeline.settings import HardPromptSettings, parse_settings
from pipeline.tuning.evaluate import answer, eval_request
from pipeline.tuning.teaching import joined, solved_rows
from tests.corpora import make_corpus, make_task, reviews, task_corpus
from tests.tiny import make_tokenizer


def byte_level(begins: bool) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as GPT-2's or SmolLM2's, trained here; as Llama's, it may put a token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text for text, _ in reviews(200, 0)] + ["Was it good or bad?\n\n"] * 20, trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def word_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer that marks the beginnings of words, as SentencePiece does: text before a row changes its tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"])
    tokenizer.train_from_iterator([text for text, _ in reviews(200, 0)] + ["Was it good or bad?"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {
    "words": (make_tokenizer(eos_template=False), "decoder-only"),
    "words, eos behind": (make_tokenizer(eos_template=True), "encoder-decoder"),
    "bytes": (byte_level(begins=False), "decoder-only"),
    "bytes, bos before": (byte_level(begins=True), "decoder-only"),
    "word pieces": (word_pieces(), "decoder-only"),
}
TEXTS = ["Was it good or bad?\n\n", "good film positive\n\nbad food negative\n\n", "no space behind", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_rows_behind_a_text_have_the_tokens_of_the_whole(tmp_path, kind, text):
    tokenizer, architecture = TOKENIZERS[kind]
    pairs = reviews(25, 3)
    corpus = task_corpus(tmp_path, tokenizer, architecture, "a", dict.fromkeys(("train", "dev"), pairs))
    split = open_split(corpus.splits["dev"])
    prompt, (behind,) = with_shared_prefix(text, [split], tokenizer, architecture)
    (whole,) = {tuple(row) for row in [prompt.tolist()]}
    ours = sorted((*whole, *behind.input_ids(row).tolist()) for row in range(len(behind)))
    theirs = sorted(tuple(ids) for ids in encode_inputs(tokenizer, architecture, [text + own for own, _ in pairs]))
    assert ours == theirs
    assert [behind.target(row) for row in range(len(behind))] == [split.target(row) for row in range(len(split))]
    assert bool(text) or not len(prompt)
    if len(text) > 20:
        assert len(prompt) > 2, "what all rows share runs once"


def test_shots_are_train_rows_solved_in_the_task_s_own_format(tmp_path):
    tokenizer, architecture = TOKENIZERS["bytes"]
    pairs = reviews(25, 3)
    corpus = task_corpus(tmp_path, tokenizer, architecture, "a", {"train": pairs, "dev": reviews(5, 4)})
    train = open_split(corpus.splits["train"])
    rows = drawn_rows("a", 0, 3, train)
    solved = solved_rows(train, rows, " ", tokenizer, architecture)
    assert set(solved) <= {f"{text} {label}" for text, label in pairs} and len(set(rows.tolist())) == 3
    assert joined(["Say it.", *solved], "\n") == "Say it.\n" + "\n".join(solved) + "\n"


def split_of(folder, pairs):
    tokenizer, architecture = TOKENIZERS["words"]
    return open_split(task_corpus(folder, tokenizer, architecture, "a", {"train": pairs}).splits["train"])


@pytest.mark.parametrize("draw", ["random", "balanced"])
def test_shots_depend_on_the_seed_alone_and_fewer_are_the_first_of_more(tmp_path, draw):
    train = split_of(tmp_path, reviews(100, 3))
    assert drawn_rows("a", 0, 8, train, draw)[:3].tolist() == drawn_rows("a", 0, 3, train, draw).tolist()
    assert drawn_rows("a", 0, 8, train, draw).tolist() != drawn_rows("a", 1, 8, train, draw).tolist()


def test_balanced_shots_take_targets_in_turn_as_long_as_they_have_rows(tmp_path):
    pairs = [(f"{text} {place}", label) for place, (text, label) in enumerate([("good", "positive")] * 20)]
    train = split_of(tmp_path, [*pairs, ("bad film", "negative"), ("poor film", "negative"), ("so so", "mixed")])
    drawn = drawn_rows("a", 0, 23, train, "balanced")
    targets = [train.target(row) for row in drawn]
    assert sorted(drawn) == list(range(23)) and sorted(targets[:3]) == ["mixed", "negative", "positive"]
    assert sorted(targets[3:5]) == ["negative", "positive"] and set(targets[5:]) == {"positive"}


def test_each_of_several_texts_is_a_choice(tmp_path):
    tokenizer, architecture = TOKENIZERS["words"]
    corpora = {"a": make_corpus(tmp_path, tokenizer, architecture, "a")}
    settings = HardPromptSettings(shots=(1,), text={"a": ["is it good", "good or bad"]}, between=" ; ")
    made = list(hard_prompts(settings, {"a": make_task()}, corpora, 2, tokenizer, architecture))
    assert [p.candidate.choice for p in made] == [
        {"text": text, "shots": shots} for text in (1, 2) for shots in (0, 1, 1)
    ]
    assert len({p.candidate.name for p in made}) == 6
    for prompt in made:
        assert prompt.text.startswith(("is it good ; ", "good or bad ; ")[prompt.candidate.choice["text"] - 1])


def test_every_task_has_its_text_and_every_number_of_shots_every_seed(tmp_path):
    tokenizer, architecture = TOKENIZERS["words"]
    corpora = {name: make_corpus(tmp_path, tokenizer, architecture, name) for name in ("a", "b")}
    settings = HardPromptSettings(shots=(1, 2), text={"a": "is it good"}, between=" ; ")
    made = list(hard_prompts(settings, dict.fromkeys("ab", make_task()), corpora, 2, tokenizer, architecture))
    assert [(p.candidate.task, p.candidate.choice["shots"], p.candidate.seed) for p in made] == [
        (task, shots, seed) for task in "ab" for shots, seed in ((0, None), (1, 0), (1, 1), (2, 0), (2, 1))
    ]
    texts = {p.candidate.name: p.text for p in made}
    assert texts["hard.a.shots-0"] == "is it good ; " and texts["hard.b.shots-0"] == ""
    assert all(text.startswith("is it good ; ") for name, text in texts.items() if ".a." in name)
    assert texts["hard.b.shots-2.seed-0"].startswith(texts["hard.b.shots-1.seed-0"])


def test_a_text_too_long_for_the_model_is_refused_with_what_to_lower():
    tokenizer, architecture = TOKENIZERS["words"]
    prompt = HardPrompt(Candidate("hard.a.shots-9", "hard prompt", "a", {}, 0), "good " * 50)
    assert check_hard_prompt(prompt, make_task(), tokenizer, architecture, None) == 50
    with pytest.raises(SettingsError, match=r"task 'a': a hard prompt of 50 tokens .* lower compare.hard"):
        check_hard_prompt(prompt, make_task(max_input_tokens=40), tokenizer, architecture, 80)


@pytest.mark.parametrize("text", TEXTS)
def test_rows_that_calibrate_stand_behind_the_same_text_as_those_that_are_measured(tmp_path, text):
    tokenizer, architecture = TOKENIZERS["bytes"]
    pairs = {"train": reviews(9, 1), "dev": reviews(25, 3)}
    corpus = task_corpus(tmp_path, tokenizer, architecture, "a", pairs)
    splits = [open_split(corpus.splits[name]) for name in ("train", "dev")]
    prompt, behind = with_shared_prefix(text, splits, tokenizer, architecture)
    for name, split in zip(("train", "dev"), behind, strict=True):
        ours = sorted((*prompt.tolist(), *split.input_ids(row).tolist()) for row in range(len(split)))
        whole = encode_inputs(tokenizer, architecture, [text + own for own, _ in pairs[name]])
        assert ours == sorted(map(tuple, whole))


@pytest.mark.parametrize("text", ["is it good or bad ", ""])
def test_a_hard_prompt_scores_as_the_whole_text_does_in_transformers(model, tmp_path, text):
    backbone, tokenizer, folder = model
    if backbone.architecture == "encoder-decoder":
        pytest.skip("the tokens are the same; that its rows score as transformers' is tested for prompts")
    corpus = make_corpus(tmp_path, tokenizer, backbone.architecture, "a", rows=12)
    split = open_split(corpus.splits["dev"])
    ids, (behind,) = with_shared_prefix(text, [split], tokenizer, backbone.architecture)
    prompt = backbone.embed(torch.as_tensor(ids, dtype=torch.long))
    (given,) = answer(backbone, tokenizer, [eval_request(make_task(), prompt, behind, corpus)], 500)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row in range(len(split)):
        own = tokenizer.decode(split.input_ids(row))
        tokens = tokenizer(text + own, add_special_tokens=False).input_ids
        for label, score in zip(corpus.label_ids, given.label_scores[row], strict=True):
            whole = torch.tensor([[*tokens, *label]])
            with torch.no_grad():
                log_p = reference(whole).logits[0].log_softmax(-1)
            wanted = sum(log_p[len(tokens) + i - 1, token].item() for i, token in enumerate(label))
            assert score == pytest.approx(wanted, rel=0.05, abs=0.05)  # int8 against float


@pytest.mark.parametrize("label_score", ["sum", "mean"])
def test_a_hard_prompt_is_calibrated_behind_its_own_text(model, tmp_path, label_score):
    backbone, tokenizer, _ = model
    corpus, text = make_corpus(tmp_path, tokenizer, backbone.architecture, "a", rows=12), "is it good or bad "
    given = {"model": {"path": "m"}, "tasks": {"a": {"train": "t", "dev": "d", "label_score": label_score}}}
    asked = []
    for calibrate in (True, False):
        given["tasks"]["a"]["calibrate"] = calibrate
        for split in ("dev", "train"):
            question = SplitQuestion("a", split, None, text=text)
            asked.append(_eval_request(None, parse_settings(given), {"a": corpus}, question, backbone, tokenizer))
    calibrated, _, dev, train = answer(backbone, tokenizer, asked, 1000)
    assert asked[0].unlabelled is not None and asked[2].unlabelled is None
    offsets = label_offsets(train.label_scores)
    np.testing.assert_allclose(calibrated.label_offsets, offsets, rtol=1e-3)
    np.testing.assert_allclose(calibrated.label_scores, dev.label_scores - np.array(offsets), rtol=1e-3, atol=1e-3)


def test_answers_tell_each_label_s_log_likelihood(model, tmp_path):
    backbone, tokenizer, _ = model
    corpora = [make_corpus(tmp_path, tokenizer, backbone.architecture, name, seed) for seed, name in enumerate("ab")]
    requests = [
        eval_request(make_task(), torch.randn(3, 32), open_split(corpus.splits["dev"]), corpus) for corpus in corpora
    ]
    for request, given in zip(requests, answer(backbone, tokenizer, requests, 300), strict=True):
        assert given.label_scores.shape == (len(request.split), 2)
        chosen = [request.labels[place] for place in given.label_scores.argmax(axis=1)]
        assert chosen == given.texts
        own = [
            given.label_scores[row, request.labels.index(request.split.target(row))]
            for row in range(len(request.split))
        ]
        np.testing.assert_allclose(-given.nll, own)


def test_the_empty_prompt_is_the_model_alone(model):
    backbone, *_ = model
    rows = prompted.Rows([torch.zeros(0, 32)], [0, 0], [np.array([5, 6, 7]), np.array([8])])
    nll = backbone.run(prompted.target_nll, rows, [np.array([9, 1]), np.array([10, 1])])
    assert nll.shape == (2,) and bool(nll.isfinite().all())
