"""A prompt that was tuned on a chat is asked behind the same tokens, whoever asks it."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from peft import PeftModelForCausalLM
from transformers import AutoModelForCausalLM

from pipeline.bank import PromptBank, Template
from pipeline.bank.exports import export_npy, export_peft, export_vllm
from pipeline.corpus.chat import bind_chat, parse_chat
from pipeline.corpus.encoding import encode_targets
from pipeline.corpus.rows import Recipe, tokenise_rows
from pipeline.corpus.template import parse_template
from pipeline.corpus.token_set import token_set
from pipeline.errors import BackboneError, BankError, CorpusError
from pipeline.serving import PromptedModel, load_backbone
from pipeline.serving.running_batch import RunningBatch
from pipeline.tuning.evaluate import EvalRequest, answer
from tests.chats import CHATML, ENDS, TEMPLATES, make_chat_model
from tests.corpora import reviews
from tests.serving.prompts import new_prompt

MESSAGES = [("user", "Is it good? {text}")]
PAIRS = reviews(9, 0)
TEXTS, TARGETS = [text for text, _ in PAIRS], [label for _, label in PAIRS]
LABELS = ("negative", "positive")
OPTIONS = {"date_string": "1 Jan 2026"}


def chat_of(tokenizer):
    return bind_chat(parse_chat(MESSAGES, OPTIONS, ""), tokenizer, "")


def prompt_of_chat(name, tokenizer, **changes):
    chat = chat_of(tokenizer)
    prompt = new_prompt(name, 4, like="film")
    template = Template(input=chat.text, target="{label}", separator="", chat=chat.form)
    return type(prompt)(**{**vars(prompt), "template": template, **changes})


def publish(folder, template, family="llama"):
    """A model with this chat template in full precision; its bank has a prompt of a chat and one of a text."""
    served = load_backbone(str(make_chat_model(folder / "model", template, family)), weights="full")
    bank = PromptBank.open(folder / "bank", create=True)
    prompts = [prompt_of_chat("chat", served.tokenizer), new_prompt("film", 3)]
    bank.publish(prompts, served.identity, "test", {}, "latest")
    return PromptedModel(served, bank)


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def model(request, tmp_path_factory):
    return publish(tmp_path_factory.mktemp("chats"), TEMPLATES[request.param])


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("chatml"), CHATML)


def measured(model, metric):
    """What the evaluation of a run makes of the prompt on rows that were tokenised for it."""
    tokenizer, prompt = model.backbone.tokenizer, model.bank.load("chat").array
    chat = chat_of(tokenizer)
    recipe = Recipe(chat, parse_template("{label}", ""), "", 200, 16, "decoder-only")
    rows = token_set(tokenise_rows(recipe, tokenizer, {"text": TEXTS, "label": TARGETS}, len(TEXTS)))
    ids = tuple(map(tuple, encode_targets(tokenizer, "decoder-only", "", LABELS, chat)))
    request = EvalRequest(torch.tensor(prompt), rows, metric, LABELS, ids, 16)
    (given,) = answer(model.backbone.backbone, tokenizer, [request], 4096)
    texts = [tokenizer.decode(rows.input_ids(row)) for row in range(len(rows))]
    order = [next(at for at, text in enumerate(TEXTS) if text in written) for written in texts]
    return order, given


def test_served_labels_have_the_scores_of_the_evaluation(model):
    order, given = measured(model, "accuracy")
    scores = model.classify([TEXTS[at] for at in order], ["chat"] * len(order))
    served = np.array([[of_row[label] for label in LABELS] for of_row in scores])
    np.testing.assert_allclose(served, given.label_scores, rtol=1e-4, atol=1e-4)


def test_served_answers_are_the_decoded_ones_of_the_evaluation(model):
    order, given = measured(model, "exact_match")
    assert model.generate([TEXTS[at] for at in order], ["chat"] * len(order), 16) == given.texts
    assert given.wanted == [TARGETS[at] for at in order], "a target is told without the token that ends a turn"


def plain(model):
    return AutoModelForCausalLM.from_pretrained(model.backbone.identity.model).eval()


@pytest.mark.parametrize("family", ["chatml", "gemma", "llama3", "qwen3", "mistral"])
def test_scores_are_those_of_transformers_behind_the_prompt_on_the_whole_chat(family, tmp_path):
    """The prompt stands before everything, the BOS too; the answer's tokens end with the template's end of a turn."""
    model = publish(tmp_path, TEMPLATES[family])
    tokenizer, prompt = model.backbone.tokenizer, torch.tensor(model.bank.load("chat").array)
    loaded, end = plain(model), tokenizer.convert_tokens_to_ids(ENDS[family])
    for text in TEXTS[:3]:
        asked = [{"role": "user", "content": f"Is it good? {text}"}]
        given = {"enable_thinking": False, **OPTIONS}
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **given).input_ids
        (scores,) = model.classify([text], ["chat"])
        for label, score in scores.items():
            told = [*asked, {"role": "assistant", "content": label}]
            whole = tokenizer.apply_chat_template(told, **given).input_ids
            whole = whole[: len(before) + whole[len(before) :].index(end) + 1]
            assert whole[: len(before)] == before
            embeds = torch.cat([prompt, loaded.get_input_embeddings()(torch.tensor(whole))])
            with torch.no_grad():
                logits = loaded(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)
            places = range(len(prompt) + len(before), len(embeds))
            theirs = sum(float(logits[at - 1, whole[at - len(prompt)]]) for at in places)
            assert score == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_peft_behind_the_exported_prompt_answers_the_chat_as_the_service_does(chatml, tmp_path):
    tokenizer, prompt = chatml.backbone.tokenizer, chatml.bank.load("chat")
    folder = export_peft(prompt, tmp_path / "peft", chatml.backbone.identity.model)
    adapted = PeftModelForCausalLM.from_pretrained(plain(chatml), folder).eval()
    asked = [{"role": "user", "content": f"Is it good? {TEXTS[0]}"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt").input_ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    out = adapted.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=end,
        pad_token_id=2,
    )  # fmt: skip
    answered = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert answered == chatml.generate([TEXTS[0]], ["chat"], 12)[0]


def load_script(folder):
    spec = importlib.util.spec_from_file_location("ask_vllm", folder / "ask_vllm.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_script_for_vllm_renders_the_chat_as_the_service_does_and_stops_where_a_turn_ends(model, tmp_path):
    folder = export_vllm(model.bank.load("chat"), tmp_path / "vllm")
    script, tokenizer = load_script(folder), model.backbone.tokenizer
    chat = chat_of(tokenizer)
    (text,) = chat.render([[f"Is it good? {TEXTS[0]}"]])
    assert script.input_ids({"text": TEXTS[0]}, tokenizer) == tokenizer(text, add_special_tokens=False).input_ids
    assert script.ending(tokenizer) == {"stop_token_ids": [chat.end_id]}


def test_an_exported_array_comes_with_the_messages_and_what_ends_an_answer(chatml, tmp_path):
    export_npy(chatml.bank.load("chat"), tmp_path / "chat.npy")
    told = json.loads((tmp_path / "chat.prompt.json").read_text())["template"]
    assert json.loads(told["input"]) == [{"role": "user", "content": "Is it good? {text}"}]
    assert told["chat"]["end"] == "<|im_end|>" and len(told["chat"]["template"]) == 64


def test_rows_of_chats_and_texts_in_one_request_are_answered_as_alone(chatml):
    texts, tasks = TEXTS[:6], ["chat", "film", "chat", "film", "film", "chat"]
    assert chatml.generate(texts, tasks, 8) == [
        chatml.generate([text], [task], 8)[0] for text, task in zip(texts, tasks, strict=True)
    ]
    together = chatml.classify(texts, tasks)
    for text, task, scores in zip(texts, tasks, together, strict=True):
        assert scores == pytest.approx(chatml.classify([text], [task])[0], rel=1e-4)


def test_an_answer_ends_where_the_chat_template_ends_a_turn_and_a_texts_at_eos(chatml, monkeypatch):
    ends = []
    join = RunningBatch.join

    def noting(batch, rows, keys, ends_of_rows, *others):
        ends.extend(ends_of_rows)
        return join(batch, rows, keys, ends_of_rows, *others)

    monkeypatch.setattr(RunningBatch, "join", noting)
    chatml.generate(TEXTS[:2], ["chat", "film"], 2)
    tokenizer = chatml.backbone.tokenizer
    assert ends == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (CHATML.replace("Be brief.", "Be kind."), "prompt 'chat' was tuned with another chat template than"),
        (None, "prompt 'chat' was tuned on a chat, and its input: the tokenizer in"),
    ],
)
def test_a_model_with_another_chat_template_refuses_prompts_of_chats_and_no_others(chatml, tmp_path, changed, told):
    other = make_chat_model(tmp_path / "model", changed)
    served = PromptedModel(load_backbone(str(other), weights="full"), chatml.bank)
    with pytest.raises(BankError) as refused:
        served.classify(TEXTS[:1], ["chat"])
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert served.classify(TEXTS[:1], ["film"]) == chatml.classify(TEXTS[:1], ["film"])


def test_a_row_of_a_chat_that_lacks_a_column_or_has_none_is_refused_by_name(chatml):
    with pytest.raises(CorpusError, match=r"row 0 for task 'chat' needs the column\(s\) text"):
        chatml.generate([{"word": "good"}], ["chat"])


def test_a_row_that_the_chat_template_refuses_is_named(tmp_path):
    angry = CHATML.replace(
        "{{ '<|im_start|>'", "{% if 'awful' in m.content %}{{ raise_exception('No') }}{% endif %}{{ '<|im_start|>'"
    )
    model = publish(tmp_path, angry)
    with pytest.raises(
        CorpusError, match=r"row 1 for task 'chat': the model's chat template refuses the messages \(No\)"
    ):
        model.generate(["good", "awful"], ["chat"] * 2)


@pytest.mark.slow
@pytest.mark.processes
def test_the_packaged_chat_model_renders_a_chat_and_answers_it_as_its_evaluation_does(tmp_path):
    try:
        served = load_backbone("smollm2-135m")
    except BackboneError as error:
        pytest.skip(str(error))
    tokenizer = served.tokenizer
    array = served.backbone.embed(torch.arange(200, 204)).numpy()
    bank = PromptBank.open(tmp_path / "bank", create=True)
    bank.publish([prompt_of_chat("chat", tokenizer, array=array)], served.identity, "test", {}, "latest")
    model, chat = PromptedModel(served, bank), chat_of(tokenizer)
    asked = [{"role": "user", "content": f"Is it good? {TEXTS[0]}"}]
    (text,) = chat.render([[asked[0]["content"]]])
    rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == rendered and "<|im_start|>system" in text
    assert (chat.lead, chat.end_token) == ("", "<|im_end|>")
    order, given = measured(model, "accuracy")
    scores = model.classify([TEXTS[at] for at in order], ["chat"] * len(order))
    ours = np.array([[of_row[label] for label in LABELS] for of_row in scores])
    np.testing.assert_allclose(ours, given.label_scores, rtol=1e-3, atol=1e-3)
    assert "<|im_end|>" not in model.generate(TEXTS[:1], ["chat"], 8)[0]
