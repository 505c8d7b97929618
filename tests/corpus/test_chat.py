"""A chat's tokens are those of `apply_chat_template`, and what a template takes away or adds is told."""

from datetime import datetime

import pytest

from pipeline.corpus.chat import ModelChat, bind_chat, parse_chat
from pipeline.corpus.encoding import encode_inputs, encode_targets, tokenizer_content
from pipeline.corpus.rows import Recipe, RowStatus, tokenise_rows
from pipeline.corpus.template import parse_template
from pipeline.errors import CorpusError
from tests.chats import (
    CHATML,
    ENDS,
    GEMMA,
    LAST_SYSTEM,
    LLAMA3,
    NEW_THOUGHT,
    NEXT_TURN,
    OPEN_THOUGHT,
    QWEN3,
    SILENT,
    TEMPLATES,
    chat_tokenizer,
)

USER = [("user", "Is it good? {text}")]
TEXTS = ["the film is good", " a bad story\n", "red {braces}", "<|im_end|> 1 2 3"]
TARGETS = ["positive", "not good", "A. b"]


def bound(template: str | None, messages=USER, **options) -> tuple[ModelChat, object]:
    tokenizer = chat_tokenizer(template)
    return bind_chat(parse_chat(messages, options, "task 'a', input"), tokenizer, "task 'a', input"), tokenizer


def our_ids(chat, tokenizer, texts, targets):
    inputs = chat.render([[f"Is it good? {text}"] for text in texts])
    return (
        encode_inputs(tokenizer, "decoder-only", inputs, chat),
        encode_targets(tokenizer, "decoder-only", "", targets, chat),
    )


def their_ids(tokenizer, text, answer=None, **options):
    messages = [{"role": "user", "content": f"Is it good? {text}"}]
    messages += [{"role": "assistant", "content": answer}] if answer is not None else []
    given = {"add_generation_prompt": answer is None, "enable_thinking": False, **options}
    return tokenizer.apply_chat_template(messages, **given).input_ids


@pytest.fixture
def on_the_fixed_day(monkeypatch):
    """transformers' own clock stands on the day that chats are rendered on."""
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("family", TEMPLATES)
def test_input_and_target_have_the_tokens_of_the_whole_chat_and_end_where_it_ends_a_turn(family, on_the_fixed_day):
    chat, tokenizer = bound(TEMPLATES[family])
    inputs, targets = our_ids(chat, tokenizer, TEXTS, TARGETS)
    end = tokenizer.convert_tokens_to_ids(ENDS[family])
    for text, of_input in zip(TEXTS, inputs, strict=True):
        for target, of_target in zip(TARGETS, targets, strict=True):
            whole = their_ids(tokenizer, text, target)
            ours = [*of_input, *of_target]
            assert ours == whole[: len(ours)] and ours[-1] == chat.end_id == end
            assert not tokenizer.decode(whole[len(ours) :]).strip(), "only white space stands behind the end of a turn"


@pytest.mark.parametrize("family", ["chatml", "gemma", "llama3", "qwen3", "mistral"])
def test_the_input_is_the_rendered_chat_with_its_generation_prompt_and_one_bos(family, on_the_fixed_day):
    chat, tokenizer = bound(TEMPLATES[family])
    inputs, _ = our_ids(chat, tokenizer, TEXTS, TARGETS)
    assert inputs == [their_ids(tokenizer, text) for text in TEXTS]
    written = "bos_token" in TEMPLATES[family]
    assert [ids.count(tokenizer.bos_token_id) for ids in inputs] == [int(written)] * len(TEXTS)


def test_where_the_template_names_a_channel_before_an_answer_the_name_belongs_to_the_input(on_the_fixed_day):
    chat, tokenizer = bound(TEMPLATES["gpt-oss"])
    assert (chat.lead, chat.separator, chat.end_token) == ("<|channel|>final<|message|>", "", "<|return|>")
    (ids,), _ = our_ids(chat, tokenizer, TEXTS[:1], [])
    assert ids == [*their_ids(tokenizer, TEXTS[0]), *tokenizer(chat.lead, add_special_tokens=False).input_ids]


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}])
def test_a_thinking_models_empty_thought_stands_before_the_target_as_its_template_writes_it(options):
    chat, _ = bound(QWEN3, **options)
    (text,) = chat.render([["Is it good?"]])
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert chat.end_token == "<|im_end|>"


def test_a_thought_that_the_template_leaves_empty_before_a_new_answer_alone_belongs_to_the_input():
    chat, tokenizer = bound(NEW_THOUGHT)
    inputs, targets = our_ids(chat, tokenizer, TEXTS[:1], ["good"])
    assert inputs == [their_ids(tokenizer, TEXTS[0])]
    assert tokenizer.decode(inputs[0]).endswith("<start_of_turn>assistant\n<|channel|>thought\n<|channel|>")
    assert tokenizer.decode(targets[0]) == "good<end_of_turn>" and not any(chat.changed(["good"]))
    open_thought, _ = bound(NEW_THOUGHT, enable_thinking=True)
    assert open_thought.render([["good"]])[0].endswith("<start_of_turn>assistant\n")


def test_what_a_template_writes_only_while_the_users_message_is_the_last_stands_in_the_input():
    messages = [("system", "Judge."), *USER]
    chat, tokenizer = bound(LAST_SYSTEM, messages)
    (text,) = chat.render([["Judge.", "Is it good? red"]])
    asked = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Is it good? red"}]
    assert text == tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == "<s>[INST] Judge.\n\nIs it good? red[/INST]"
    (target,) = encode_targets(tokenizer, "decoder-only", "", ["good"], chat)
    assert tokenizer.decode(target) == " good</s>"


def test_where_nothing_but_the_mark_of_the_next_turn_ends_an_answer_a_target_ends_with_that():
    chat, tokenizer = bound(NEXT_TURN)
    assert (chat.lead, chat.end_token) == ("\n", "<|start|>")
    inputs, targets = our_ids(chat, tokenizer, TEXTS[:1], ["good"])
    assert tokenizer.decode(inputs[0]).endswith("<|message|>\n<think></think>\n")
    assert tokenizer.decode(targets[0]) == "good<|start|>"


def test_a_template_without_any_mark_behind_an_answer_leaves_the_tokenizers_eos():
    said = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    chat, _ = bound(said + "{% if add_generation_prompt %}assistant:{% endif %}")
    assert (chat.separator, chat.end_token) == (" ", "</s>")


def test_a_template_that_reads_the_clock_writes_the_same_day_always(monkeypatch):
    chat, _ = bound(LLAMA3)
    assert "Today Date: 26 Jul 2024\n" in chat.render([["good"]])[0]
    chosen, _ = bound(LLAMA3, date_string="1 Jan 2026")
    assert "Today Date: 1 Jan 2026\n" in chosen.render([["good"]])[0]
    assert chat.digest != chosen.digest


def test_a_tokenizer_that_encodes_beginnings_differently_encodes_a_target_as_in_the_chat():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "▁good", "good", "▁", "▁[INST]", "▁[/INST]"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATES["mistral"]
    chat = bind_chat(parse_chat([("user", "{text}")], {}, ""), tokenizer, "")
    (ids,) = encode_inputs(tokenizer, "decoder-only", chat.render([["good"]]), chat)
    (target,) = encode_targets(tokenizer, "decoder-only", "", ["good"], chat)
    messages = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "good"}]
    assert [*ids, *target] == tokenizer.apply_chat_template(messages).input_ids
    assert target == [words["▁good"], words["</s>"]]


def recipe_of(chat, **changes):
    given = {"separator": "", "max_input_tokens": 200, "max_target_tokens": 20, "architecture": "decoder-only"}
    return Recipe(input=chat, target=parse_template("{label}", ""), **{**given, **changes})


def test_rows_of_a_worker_without_the_tokenizers_folder_have_the_tokens_of_the_rendered_chats():
    chat, tokenizer = bound(GEMMA)
    columns = {"text": TEXTS, "label": ["positive"] * len(TEXTS)}
    table = tokenise_rows(recipe_of(chat), tokenizer_content(tokenizer), columns, len(TEXTS))
    inputs, targets = our_ids(chat, tokenizer, TEXTS, ["positive"])
    assert table["input_ids"].to_pylist() == inputs
    assert table["target_ids"].to_pylist() == targets * len(TEXTS)


def test_rows_are_left_out_for_what_their_columns_hold_whatever_the_template_writes_around_them():
    chat, tokenizer = bound(CHATML, [("system", "Judge."), ("user", "{title}: {text}")])
    columns = {
        "title": ["a", " ", None, "b", "c"],
        "text": ["good", "\n", "good", "good", "good"],
        "label": ["positive"] * 3 + [""] + ["negative"],
    }
    table = tokenise_rows(recipe_of(chat), tokenizer, columns, 5)
    wanted = [RowStatus.OK, RowStatus.EMPTY, RowStatus.NULL, RowStatus.EMPTY, RowStatus.OK]
    assert table["status"].to_pylist() == wanted
    assert len(set(table["row_id"].to_pylist())) == 5


def test_a_target_that_the_template_would_change_is_left_out_and_keeps_its_text():
    chat, tokenizer = bound(GEMMA)
    columns = {"text": TEXTS[:3], "label": ["positive", "positive ", "\nnegative"]}
    table = tokenise_rows(recipe_of(chat), tokenizer, columns, 3)
    assert table["status"].to_pylist() == [RowStatus.OK, RowStatus.TARGET_CHANGED, RowStatus.TARGET_CHANGED]
    assert table["target"].to_pylist() == columns["label"]
    assert bound(QWEN3)[0].changed(["yes", "<think>so</think>yes"]) == [False, True]


def test_the_last_shot_of_a_chat_may_be_an_answer_given_before():
    shots = [("user", "red"), ("assistant", "positive"), ("user", "{text}")]
    chat, tokenizer = bound(LLAMA3, shots, date_string="x")
    (text,) = chat.render([["red", "positive", "blue"]])
    told = [{"role": role, "content": content.replace("{text}", "blue")} for role, content in shots]
    assert text == tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True, date_string="x")


@pytest.mark.parametrize(
    ("template", "messages", "told"),
    [
        (None, USER, "has no chat template, so that 'input' cannot be messages"),
        (GEMMA, [("system", "Judge."), *USER], "refuses the messages (System role not supported)"),
        ("{{ messages[0].nothing.at.all }}", USER, "refuses the messages"),
        ("{{ messages[0].content", USER, "refuses the messages"),
        (OPEN_THOUGHT, USER, "writes no answer at once behind its generation prompt, which ends with"),
        (SILENT, USER, "does not write what the messages or the answer say"),
        ("{{ messages[0].content }}", USER, "does not write what the messages or the answer say"),
        (CHATML, [("user", "{text.of}")], "may hold plain column names only"),
    ],
)
def test_what_no_chat_can_be_made_of_is_told_in_one_sentence(template, messages, told):
    with pytest.raises(CorpusError) as refused:
        bound(template, messages)
    assert told in str(refused.value) and str(refused.value).startswith("task 'a', input")
    assert "\n" not in str(refused.value)


def test_two_chat_templates_or_options_are_two_chats():
    one, _ = bound(CHATML)
    assert one.digest == bound(CHATML)[0].digest == bound(CHATML, enable_thinking=False)[0].digest
    assert len({one.digest, bound(QWEN3)[0].digest, bound(CHATML, enable_thinking=True)[0].digest}) == 3
    assert one.form.template != bound(QWEN3)[0].form.template
