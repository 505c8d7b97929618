"""One model, prompts of a bank: rows of different tasks in one batch, answered as one by one."""

import numpy as np
import pytest
import torch

from pipeline.backbone import prompted
from pipeline.bank import PromptBank
from pipeline.errors import BankError, CorpusError, RowTooLongError, UnknownTaskError
from pipeline.serving import PromptedModel, load_backbone
from pipeline.serving.prompted_model import split_by_budget
from pipeline.serving.requests import Request
from tests.corpora import reviews
from tests.serving.prompts import LABELS, new_prompt
from tests.tiny import make_model

EOS = 1


@pytest.fixture(scope="module", params=["llama", "llama_untied", "gpt2", "t5"])
def served(request, tmp_path_factory):
    """A model, and a bank with one prompt for each task, of different lengths."""
    folder = tmp_path_factory.mktemp(request.param)
    backbone = load_backbone(str(make_model(folder / "model", request.param, seed=1, scale=2.0)))
    bank = PromptBank.open(folder / "bank", create=True)
    bank.publish([new_prompt(n, 3 + i) for i, n in enumerate(LABELS)], backbone.identity, "test", {}, "latest")
    return PromptedModel(backbone, bank)


@pytest.fixture
def decoder_only(served):
    if served.backbone.architecture == "encoder-decoder":
        pytest.skip("a prompt before an encoder runs with every text")
    return served


@pytest.fixture(scope="module")
def batch():
    texts = [text for text, _ in reviews(12, 0)]
    return texts, [list(LABELS)[i % 3] for i in range(len(texts))]


@pytest.fixture(scope="module")
def labelled(batch):
    pairs = [(text, task) for text, task in zip(*batch, strict=True) if LABELS[task]]
    return [text for text, _ in pairs], [task for _, task in pairs]


def as_array(scores):
    return np.array([value for row in scores for value in row.values()])


def test_a_mixed_batch_generates_what_each_row_generates_alone(served, batch):
    texts, tasks = batch
    together = served.generate(texts, tasks, max_new_tokens=6)
    assert together == [served.generate([text], [task], 6)[0] for text, task in zip(texts, tasks, strict=True)]
    assert len(set(together)) > 6


def test_a_mixed_batch_scores_the_labels_of_each_row_as_alone(served, labelled):
    texts, tasks = labelled
    together = served.classify(texts, tasks)
    alone = [served.classify([text], [task])[0] for text, task in zip(texts, tasks, strict=True)]
    assert [tuple(scores) for scores in together] == [LABELS[task] for task in tasks]
    np.testing.assert_allclose(as_array(together), as_array(alone), rtol=1e-4)


def test_a_text_alone_is_its_tasks_only_column(served, batch):
    texts, tasks = batch
    assert served.generate(texts, tasks, 4) == served.generate([{"text": text} for text in texts], tasks, 4)


def test_a_call_split_by_the_token_budget_answers_the_same_in_order(served, batch, labelled):
    small = PromptedModel(served.backbone, served.bank, token_budget=40)
    assert small.generate(*batch, 6) == served.generate(*batch, 6)
    np.testing.assert_allclose(as_array(small.classify(*labelled)), as_array(served.classify(*labelled)), rtol=1e-4)


def test_a_thousand_rows_run_in_batches_that_stay_within_the_budget():
    lengths = np.random.default_rng(0).integers(5, 60, 1000).tolist()
    batches = list(split_by_budget([*lengths, 5000], 512))
    assert batches[0] == [1000]  # longer than the budget, so alone
    assert sorted(i for batch in batches for i in batch) == list(range(1001))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 512 for batch in batches[1:])
    assert len(batches) < 1.1 * sum(lengths) / 512 + 2


def test_prompts_kept_from_another_call_give_what_prompts_that_run_give(decoder_only, labelled):
    texts, tasks = labelled
    fresh = PromptedModel(decoder_only.backbone, decoder_only.bank, cache_bytes=0)
    decoder_only.classify(texts, tasks)
    kept = as_array(decoder_only.classify(texts, tasks))
    np.testing.assert_allclose(kept, as_array(fresh.classify(texts, tasks)), rtol=1e-5)
    assert decoder_only.generate(texts, tasks, 6) == fresh.generate(texts, tasks, 6)
    backbone, tokenizer = decoder_only.backbone.backbone, decoder_only.backbone.tokenizer
    names = sorted(set(tasks))
    arrays = [torch.tensor(decoder_only.bank.load(name).array) for name in names]
    inputs = [np.array(tokenizer(text)["input_ids"]) for text in texts]
    rows = prompted.Rows(arrays, [names.index(task) for task in tasks], inputs)
    labels = [[np.array([*tokenizer(label)["input_ids"], EOS]) for label in LABELS[task]] for task in tasks]
    without = np.concatenate(backbone.run(prompted.label_log_likelihoods, rows, labels))
    np.testing.assert_allclose(kept, without, rtol=1e-5)


def test_a_prompt_runs_once_for_all_calls(decoder_only):
    model = PromptedModel(decoder_only.backbone, decoder_only.bank)
    run: list[int] = []
    layers = next(m for m in model.backbone.backbone.hosted.modules() if isinstance(m, torch.nn.ModuleList))
    hook = layers[0].register_forward_hook(lambda layer, args, output: run.append(args[0].shape[:2].numel()))
    text, length = "good film", len(model.bank.load("film").array)
    try:
        model.classify([text], ["film"])
        labels = sum(run) - length - 2
        for call, tokens in (
            (lambda: model.classify([text], ["film"]), 2 + labels),
            (lambda: model.generate([text], ["film"], 1), 2),
            (lambda: model.generate([text] * 2, ["film", "open"], 1), 4 + len(model.bank.load("open").array)),
        ):
            run.clear()
            call()
            assert sum(run) == tokens
    finally:
        hook.remove()


INSTRUCTION = "is this film one that you would tell your friends to see or not: "


def test_what_a_template_begins_with_runs_once_for_all_calls_and_changes_no_answer(decoder_only, tmp_path):
    backbone = decoder_only.backbone
    bank = PromptBank.open(tmp_path / "bank", create=True)
    prompts = [new_prompt("film", 3, template=INSTRUCTION + "{text}"), new_prompt("colour", 4)]
    bank.publish(prompts, backbone.identity, "one", {}, "latest")
    model = PromptedModel(backbone, bank)
    rows = ["good film", "bad", "good film"], ["film", "film", "colour"]
    answers = model.classify(*rows)
    plain = [
        prompted.Rows([torch.tensor(model.bank.load(task).array)], [0], [ids])
        for task, ids in zip(
            rows[1],
            [
                backbone.tokenizer((INSTRUCTION if task == "film" else "") + text)["input_ids"]
                for text, task in zip(*rows, strict=True)
            ],
            strict=True,
        )
    ]
    for run, task, answer in zip(plain, rows[1], answers, strict=True):
        labels = [np.array([*backbone.tokenizer(label)["input_ids"], EOS]) for label in LABELS[task]]
        (wanted,) = backbone.backbone.run(prompted.label_log_likelihoods, run, [labels])
        np.testing.assert_allclose(list(answer.values()), wanted, rtol=1e-4)
    run: list[int] = []
    layers = next(m for m in backbone.backbone.hosted.modules() if isinstance(m, torch.nn.ModuleList))
    hook = layers[0].register_forward_hook(lambda layer, args, output: run.append(args[0].shape[:2].numel()))
    try:
        model.generate(["good film"], ["film"], 1)
        assert sum(run) == 2, "prompt and instruction ran before"
    finally:
        hook.remove()


def test_states_are_kept_up_to_a_limit_and_the_longest_unused_goes_first(decoder_only):
    model = PromptedModel(decoder_only.backbone, decoder_only.bank)
    for task in LABELS:
        model.generate(["good"], [task], 1)
    each = {task: model.states.get(model.bank.load(task).record.digest, pytest.fail).nbytes for task in LABELS}
    assert model.states.nbytes == sum(each.values())
    model.states.limit = each["film"] + each["open"]
    model.generate(["good"], ["open"], 1)  # `film` is now the longest unused, then `colour`
    assert model.states.nbytes == each["open"]
    model.generate(["good"], ["film"], 1)
    assert model.states.nbytes == each["film"] + each["open"]
    model.states.limit = 1
    assert model.generate(["good"], ["film"], 1)
    assert model.states.nbytes == 0


def test_versions_share_what_did_not_change_and_a_call_sees_one_version(decoder_only, tmp_path):
    backbone = decoder_only.backbone
    bank = PromptBank.open(tmp_path / "bank", create=True)
    bank.publish([new_prompt("film", 3), new_prompt("colour", 4)], backbone.identity, "one", {}, "latest")
    model = PromptedModel(backbone, bank)
    before = model.classify(["good film"], ["film"])
    model.classify(["good film"], ["colour"])
    held = model.states.nbytes
    bank.publish([new_prompt("film", 6)], backbone.identity, "two", {}, "latest")
    replies = model.classify_each([Request(["good film"], ["colour"])])
    assert replies.version == 2 and model.states.nbytes == held
    after = model.classify(["good film"], ["film"])
    assert after != before and model.states.nbytes > held
    for earlier in ("film@1", "film@2", "film@latest"):
        (scores,) = model.classify(["good film"], [earlier])
        np.testing.assert_allclose(as_array([scores]), as_array(before if earlier == "film@1" else after), rtol=1e-5)


def test_a_bad_request_is_refused_alone(served):
    good = Request(["good film", "bad food"], ["film", "colour"], 4)
    bad = [Request(["good"], ["flim"]), Request(["good", " "], ["film", "film"]), Request([{"x": "y"}], ["film"])]
    replies = served.generate_each([bad[0], good, *bad[1:]]).of_request
    assert replies[1] == served.generate(good.texts, good.tasks, 4)
    kinds = [type(reply) for i, reply in enumerate(replies) if i != 1]
    empty = list if served.backbone.architecture == "encoder-decoder" else CorpusError  # T5 ends with eos
    assert kinds == [UnknownTaskError, empty, CorpusError]


def test_a_prompt_of_another_backbone_is_refused(served, tmp_path):
    other = load_backbone(str(make_model(tmp_path / "other", "llama", seed=7)))
    model = PromptedModel(other, PromptBank.open(served.bank.uri))
    with pytest.raises(BankError, match="they differ in"):
        model.generate(["good"], ["film"])


def test_no_rows_are_no_answers(served):
    assert served.generate([], []) == [] and served.classify([], []) == []


@pytest.mark.parametrize(
    ("text", "task", "error", "sentence"),
    [
        ({"words": "good"}, "film", CorpusError, r"row 0 for task 'film' needs the column.* text"),
        ({"text": None}, "film", CorpusError, r"row 0 for task 'film' needs the column.* text"),
        ("good", "flim", UnknownTaskError, "did you mean 'film'"),
        ("good", "film@7", UnknownTaskError, "7"),
        ("good", "film@prod", UnknownTaskError, "no alias 'prod'"),
        ("good", "../film", UnknownTaskError, "refused"),
        ("good", "open", BankError, "without a label set"),
        ("half a \ud800 character", "film", CorpusError, "lone surrogate"),
        ("good " * 300, "film", RowTooLongError, "is too long"),
    ],
)
def test_rows_and_tasks_that_do_not_fit_get_one_sentence(served, text, task, error, sentence):
    model = PromptedModel(served.backbone, served.bank, token_budget=256)
    with pytest.raises(error, match=sentence) as raised:
        model.classify([text], [task])
    assert "\n" not in str(raised.value)
