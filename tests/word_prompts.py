"""Prompts for a real model without tuning: the embeddings of words, as a chat with the model begins.

Answers behind them are words and end, as those of tuned prompts do. The packaged model is SmolLM2-135M.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.bank import Metrics, NewPrompt, PromptBank, Template
from pipeline.corpus.chat import bind_chat, parse_chat
from pipeline.serving import PromptedModel, load_backbone

MODEL = "smollm2-135m"
END = "<|im_end|>\n<|im_start|>assistant\n"
TURN = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"
INSTRUCTIONS = {
    "capital": "Name the capital of the country. Answer with one word.",
    "opposite": "Answer with one word, the opposite of the word that you are given.",
    "pair": "Say in one short sentence which of the two is larger.",
}
ROWS = {
    "capital": ["France", "Italy", "Japan", "Spain", "Egypt", "Kenya", "Peru", "Norway"],
    "opposite": ["hot", "up", "early", "full", "happy", "new", "open", "rich"],
    "pair": [json.dumps({"one": one, "other": "a mouse"}) for one in ("a cat", "a bee", "the sun", "a car")]
    + [json.dumps({"one": "a house", "other": other}) for other in ("a hut", "a town", "a door", "the sea")],
}
EVERY_ROW = [(task, row) for task, rows in ROWS.items() for row in rows]
MOST = 24


def new_prompt(name, array, template=None, **changes):
    fields = dict(
        name=name,
        array=array,
        task=name,
        template=template or Template(input="{text}" + END, target="{label}", separator=""),
        labels=None,
        metric="exact_match",
        metrics=Metrics(),
        initialisation="words",
        length=len(array),
        steps=0,
        seed=0,
        corpus_digest="0" * 64,
        settings_digest="0" * 64,
    )
    return NewPrompt(**{**fields, **changes})


@dataclass(frozen=True)
class WordBank:
    """A bank of such prompts, and the packaged model that answers for them."""

    model: PromptedModel
    uri: Path

    def words(self, text):
        """`[P, H]`: the embeddings of a text's tokens."""
        ids = self.model.backbone.tokenizer(text, add_special_tokens=False).input_ids
        table = self.model.backbone.backbone.hosted.model.get_input_embeddings()
        with torch.no_grad():
            return table(torch.tensor(ids)).float().numpy()

    def publish(self, *prompts, alias="latest"):
        return PromptBank.open(self.uri, create=True).publish(prompts, self.model.backbone.identity, "t", {}, alias)

    def answer(self, task, row):
        return self.model.generate([columns_of(row)], [task], MOST)[0]


def columns_of(row):
    """A row of several columns is written as JSON in ROWS."""
    return json.loads(row) if row.startswith("{") else row


def make_bank(place, weights):
    """Version 1 holds the tasks of INSTRUCTIONS and `shout`, which is a chat."""
    model = PromptedModel(load_backbone(MODEL, weights), PromptBank.open(place / "bank", create=True))
    bank = WordBank(model, place / "bank")
    own = {"pair": Template(input="{one} or {other}?" + END, target="{label}", separator="")}
    prompts = [new_prompt(name, bank.words(TURN.format(text)), own.get(name)) for name, text in INSTRUCTIONS.items()]
    messages = parse_chat([("user", "Say {text} in capital letters.")], {}, "")
    chat = bind_chat(messages, model.backbone.tokenizer, "")
    template = Template(input=chat.text, target="{label}", separator=chat.separator, chat=chat.form)
    bank.publish(*prompts, new_prompt("shout", bank.words("You are brief. Do what you are told."), template))
    model.bank.refresh()
    return bank
