"""Chats: messages over a row's columns, which the model's own chat template turns into its input.

What stands where is the same in tuning, evaluation, serving and exports, and as for every other task:

    soft prompt [P, H] | messages and generation prompt, as the chat template writes them, lead | separator, target, end

The soft prompt stands before everything, before the BOS too that a template writes: a prompt is always the first P
positions. `tokenizer.apply_chat_template(messages, add_generation_prompt=True)` has the input's tokens. Behind it, the
target stands where the template puts what an assistant says, and ends with the token that the template ends it with.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from typing import Any

from pipeline.bank import ChatForm, Template
from pipeline.bank.manifest import FIXED_DAY
from pipeline.corpus.template import RenderedRows, TextTemplate, parse_template, render_row, render_rows
from pipeline.errors import CorpusError

ASSISTANT = "assistant"
# Words for a column and an answer that no chat template and no message holds.
_COLUMN, _ANSWER = "qxcolumnxq", "qxanswerxq"
# Templates of thinking models write an empty thought, or none, so that the answer follows at once.
_DEFAULTS = {"enable_thinking": False}


@dataclass(frozen=True)
class Message:
    role: str
    content: TextTemplate


@dataclass(frozen=True)
class ChatInput:
    """A task's input as the settings and a prompt's record have it."""

    messages: tuple[Message, ...]
    options: Mapping[str, Any]
    """What the chat template is given besides the messages."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns used, each once, in the order of their first use."""
        return tuple(dict.fromkeys(column for message in self.messages for column in message.content.columns))

    @property
    def text(self) -> str:
        """The messages as JSON, as a prompt's record has them."""
        messages = [{"role": message.role, "content": message.content.text} for message in self.messages]
        return json.dumps(messages, ensure_ascii=False)


@dataclass(frozen=True)
class ModelChat:
    """A chat as one model writes it; plain data, so that it travels to workers without the tokenizer."""

    chat: ChatInput
    jinja: str
    """The model's chat template."""
    names: Mapping[str, Any]
    """Special tokens that the template may name, such as `bos_token`."""
    asked: str = ""
    """An input with a fixed word in each column's place."""
    start: str = ""
    """All that the template writes before an answer, in the chat that has one: nearly always the same."""
    rest: str = ""
    """All that it writes behind one."""
    lead: str = ""
    """What it writes between its generation prompt and an answer; it goes with the input. gpt-oss names a channel."""
    separator: str = ""
    """Spaces at the end of that, which go with the target: tokenizers join them to its first word."""
    closing: str = ""
    """White space between an answer and its end."""
    end_token: str = ""
    """The token that ends an answer: the first that the template writes behind one, else the tokenizer's eos."""
    end_id: int = -1

    @property
    def columns(self) -> tuple[str, ...]:
        return self.chat.columns

    @property
    def text(self) -> str:
        return self.chat.text

    @property
    def before(self) -> str:
        """What stands before every target, back to the last column."""
        return self.asked.rpartition(_COLUMN)[2]

    @property
    def literals(self) -> list[str]:
        """What the template and the messages write before, between and behind the columns of an input."""
        return self.asked.split(_COLUMN)

    @property
    def digest(self) -> str:
        """Digest of all that decides tokens, besides the messages and the tokenizer."""
        parts = [self.jinja, dict(self.names), self.separator, self.closing, self.form.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def form(self) -> ChatForm:
        """What a prompt's record tells of the chat."""
        template = hashlib.sha256(self.jinja.encode()).hexdigest()
        options = {**_DEFAULTS, **self.chat.options}
        return ChatForm(template=template, options=options, lead=self.lead, end=self.end_token)

    def render(self, contents: Sequence[Sequence[str]]) -> list[str]:
        """[B][messages] contents -> [B] inputs. Raises: CorpusError when the chat template refuses them."""
        rendered = self._written([self._with_roles(of_row) for of_row in contents], generation=True)
        return [text + self.lead for text in rendered]

    def changed(self, targets: Sequence[str]) -> list[bool]:
        """[B] whether the template writes another text for a target, as one that strips white space does."""
        return [
            text != self.start + target + self.rest
            for text, target in zip(self.answered(targets), targets, strict=True)
        ]

    def answered(self, targets: Sequence[str], answered_by: str | None = None) -> list[str]:
        """[B] the whole chat with each target as the assistant's answer, and a fixed word in each column's place.

        answered_by: who then has a last word.
        """
        asked = self._with_roles(self.sample)
        more = [] if answered_by is None else [{"role": answered_by, "content": _COLUMN}]
        chats = [[*asked, {"role": ASSISTANT, "content": target}, *more] for target in targets]
        return self._written(chats, generation=False)

    @property
    def sample(self) -> list[str]:
        """[messages] contents with a fixed word in each column's place."""
        words = dict.fromkeys(self.columns, _COLUMN)
        return [render_row(message.content, words) for message in self.chat.messages]

    def _with_roles(self, contents: Sequence[str]) -> list[dict[str, str]]:
        pairs = zip(self.chat.messages, contents, strict=True)
        return [{"role": message.role, "content": content} for message, content in pairs]

    def _written(self, chats: list[list[dict[str, str]]], generation: bool) -> list[str]:
        from transformers.utils.chat_template_utils import render_jinja_template  # most corpora are no chats

        dated = FIXED_DAY + self.jinja if "strftime_now" in self.jinja else self.jinja
        given = {**self.names, **_DEFAULTS, **self.chat.options}
        try:
            rendered: list[str]
            rendered, _ = render_jinja_template(
                conversations=chats, chat_template=dated, add_generation_prompt=generation, **given
            )
        except Exception as error:  # jinja2's errors, and whatever a template's own expressions raise
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise CorpusError(
                f"the model's chat template refuses the messages ({reason}); write them as it takes them, for example "
                "the system's text at the beginning of the user's"
            ) from error
        return rendered


def parse_chat(messages: Sequence[tuple[str, str]], options: Mapping[str, Any], where: str) -> ChatInput:
    """(role, content) pairs as a chat. Raises: CorpusError for a content that is no template."""
    parsed = [
        Message(role, parse_template(content, f"{where}, message {number}"))
        for number, (role, content) in enumerate(messages, 1)
    ]
    return ChatInput(tuple(parsed), options)


def recorded_input(template: Template, where: str) -> TextTemplate | ChatInput:
    """The input of a prompt's record. Raises: CorpusError when it cannot be read."""
    if template.chat is None:
        return parse_template(template.input, where)
    try:
        messages = [(str(message["role"]), str(message["content"])) for message in json.loads(template.input)]
    except (ValueError, TypeError, KeyError) as error:
        raise CorpusError(f"{where}: its input is no list of messages; take another version") from error
    return parse_chat(messages, template.chat.options, where)


def bind_chat(chat: ChatInput, tokenizer: Any, where: str) -> ModelChat:
    """A chat as the model of this tokenizer writes it.

    Raises: CorpusError for a tokenizer without a chat template, and for a template that refuses the messages, does not
    write what they or an answer say, or opens a thought that nothing closes.
    """
    try:
        jinja = tokenizer.get_chat_template()
    except ValueError as error:
        raise CorpusError(
            f"{where}: the tokenizer in {tokenizer.name_or_path} has no chat template, so that 'input' cannot be "
            "messages; write it as one text, or take a model that was trained for chats"
        ) from error
    bare = ModelChat(chat, jinja, _plain(tokenizer.special_tokens_map))
    try:
        (asked,), (whole,) = bare.render([bare.sample]), bare.answered([_ANSWER])
    except CorpusError as error:
        raise CorpusError(f"{where}: {error}") from error
    start, found, rest = whole.partition(_ANSWER)
    if asked.count(_COLUMN) != "".join(bare.sample).count(_COLUMN) or not found:
        raise CorpusError(
            f"{where}: the model's chat template does not write what the messages or the answer say; write them as it "
            "takes them, or write 'input' as one text"
        )
    lead = _lead(asked, start, where)
    separator = lead[len(lead.rstrip(" ")) :]
    lead = lead.removesuffix(separator)
    closing, end = _end(bare, rest, tokenizer, where)
    return ModelChat(
        chat=chat,
        jinja=jinja,
        names=bare.names,
        asked=asked + lead,
        start=start,
        rest=rest,
        lead=lead,
        separator=separator,
        closing=closing,
        end_token=end,
        end_id=tokenizer.convert_tokens_to_ids(end),
    )


@lru_cache(maxsize=256)
def recorded_chat(tokenizer: Any, messages: str, options: str) -> ModelChat:
    """`bind_chat` of a prompt's record: its messages and options as JSON."""
    pairs = [(message["role"], message["content"]) for message in json.loads(messages)]
    return bind_chat(parse_chat(pairs, json.loads(options), "its input"), tokenizer, "its input")


def render_chats(chat: ModelChat, columns: Mapping[str, Sequence[str | None]], rows: int) -> RenderedRows:
    """Fill in the values of `rows` rows, as `template.render_rows`, and render each row's chat."""
    contents = [render_rows(message.content, columns, rows) for message in chat.chat.messages]
    whole = [None not in of_row for of_row in zip(*(of_message.texts for of_message in contents), strict=True)]
    filled = ([text or "" for text in of_row] for of_row in zip(*(one.texts for one in contents), strict=True))
    rendered = iter(chat.render(list(compress(filled, whole))))
    texts = [next(rendered) if is_whole else None for is_whole in whole]
    # A message without columns says nothing about the row.
    named = [one for one, message in zip(contents, chat.chat.messages, strict=True) if message.content.columns]
    blank = [
        is_whole and all(of_row)
        for is_whole, of_row in zip(whole, zip(*(one.blank for one in named), strict=True), strict=True)
    ]
    return RenderedRows(texts, blank)


def _plain(special_tokens: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(token) for name, token in special_tokens.items() if not isinstance(token, list | tuple)}


def _lead(asked: str, start: str, where: str) -> str:
    """What the template writes between its generation prompt and an answer, from the last column on.

    Before that it may write a chat otherwise that has an answer: Mistral's puts the system's text to the last user's
    message, and only while that is the last.
    """
    prompt, answered = (text.rpartition(_COLUMN)[2] for text in (asked, start))
    if answered.startswith(prompt):
        return answered[len(prompt) :]
    thought = prompt.removeprefix(answered)
    if thought != prompt and thought.count("<think>") <= thought.count("</think>"):
        return ""  # an empty thought that is written before a new answer alone, as Gemma 4's template does
    raise CorpusError(
        f"{where}: the model's chat template writes no answer at once behind its generation prompt, which ends with "
        f"{prompt[-40:]!r}; give it chat_options with which it does, or write 'input' as one text"
    )


def _end(bare: ModelChat, rest: str, tokenizer: Any, where: str) -> tuple[str, str]:
    """-> white space, and the token behind it that ends an answer, of all that the template writes behind one."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    tokens = {token for token in added if token.strip() and token != tokenizer.bos_token}
    behind = [rest]
    with suppress(CorpusError):  # GLM's template ends an answer with the mark of the next turn alone
        behind.append(bare.answered([_ANSWER], answered_by="user")[0].partition(_ANSWER)[2])
    for text in behind:
        found = [(text.index(token), -len(token), token) for token in tokens if token in text]
        if found:
            place, _, token = min(found)
            if not text[:place].strip():
                return text[:place], token
    if tokenizer.eos_token is None:
        raise CorpusError(
            f"{where}: neither the chat template nor the tokenizer in {tokenizer.name_or_path} has a token that ends "
            "an answer; set its eos_token"
        )
    return "", tokenizer.eos_token
