"""A task whose input is a chat goes the whole way: planned, tokenised, tuned, published, served, refused."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.backbone.files import find_model
from pipeline.bank import PromptBank
from pipeline.errors import BackboneError, CorpusError
from pipeline.run.checks import check_run
from pipeline.run.job import run_job
from pipeline.serving import PromptedModel, load_backbone
from pipeline.settings import parse_settings
from pipeline.tuning.evaluate import score_texts
from tests.chats import CHATML, GEMMA, OPEN_THOUGHT, QWEN3, chat_tokenizer, make_chat_model
from tests.corpora import reviews
from tests.jobs_data import make_project, write_parquet

pytestmark = pytest.mark.usefixtures("local_ray")

MESSAGES = [{"role": "user", "content": "Is it good? {text}"}]


def run(project, *overrides):
    return run_job(check_run(parse_settings(project, overrides)), Console(quiet=True))


@pytest.fixture
def chats(tmp_path):
    """Two tasks of chats, one measured by labels and one by what is decoded."""
    settings = make_project(tmp_path, input=MESSAGES, max_input_tokens=160)
    settings["cluster"]["num_workers"] = 1
    make_chat_model(tmp_path / "model", QWEN3, scale=1.0)
    settings["tasks"]["book"]["test"] = settings["tasks"]["film"]["test"]
    return settings


def test_a_prompt_tuned_on_chats_is_served_with_the_scores_that_it_was_published_with(chats, tmp_path):
    assert run(chats).exit == 0
    bank = PromptBank.open(tmp_path / "bank")
    record = bank.load("film").record
    assert json.loads(record.template.input) == MESSAGES and record.template.separator == ""
    assert record.template.chat is not None and record.template.chat.end == "<|im_end|>"
    assert record.template.chat.options == {"enable_thinking": False}
    served = PromptedModel(load_backbone(str(tmp_path / "model")), bank)
    texts, labels = (
        pq.read_table(tmp_path / "corpora/film/test.parquet")[name].to_pylist() for name in ("text", "label")
    )
    chosen = [max(scores, key=scores.get) for scores in served.classify(texts, ["film"] * len(texts))]
    answered = served.generate(texts, ["book"] * len(texts), 8)
    # A run multiplies in int8, and the service exactly: a row in between may fall to either side.
    assert score_texts("accuracy", chosen, labels) == pytest.approx(record.metrics.test, abs=0.05)
    of_book = bank.load("book").record.metrics.test
    assert score_texts("rouge_l", answered, labels) == pytest.approx(of_book, abs=0.05) and of_book > 0.2
    assert run(chats).version == 1, "started again, it publishes nothing new"


def test_another_chat_template_is_another_corpus(chats, tmp_path):
    assert run(chats).version == 1
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "model")
    assert run(chats, "run.name=again").version == 2
    bank = PromptBank.open(tmp_path / "bank")
    one, two = (bank.load(f"film@{number}").record for number in (1, 2))
    assert one.corpus_digest != two.corpus_digest and one.template.chat != two.template.chat
    assert len(list((tmp_path / "runs/token_shards").glob("[!.]*"))) == 8


@pytest.mark.parametrize(
    ("template", "changes", "told"),
    [
        (None, {}, "has no chat template"),
        (GEMMA, {"input": [{"role": "system", "content": "Judge."}, *MESSAGES]}, "(System role not supported)"),
        (CHATML, {"input": [{"role": "user", "content": "{txt}"}]}, "names the column 'txt', which"),
        (CHATML, {"input": [{"role": "user", "content": "Hello"}]}, "names no column; write one such as {text}"),
        (OPEN_THOUGHT, {}, "writes no answer behind its generation prompt, which ends with"),
        (GEMMA, {"labels": ["positive", "negative "]}, "does not write the label 'negative ' as it stands"),
    ],
)
def test_a_chat_that_the_model_cannot_take_is_refused_in_one_sentence_before_anything_is_done(
    chats, tmp_path, template, changes, told
):
    chat_tokenizer(template).save_pretrained(tmp_path / "model")
    if template is None:
        (tmp_path / "model/chat_template.jinja").unlink()
    del chats["tasks"]["book"]
    chats["tasks"]["film"] |= changes
    with pytest.raises(CorpusError) as refused:
        check_run(parse_settings(chats))
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).startswith("task 'film'")


def test_an_encoder_decoder_takes_no_chat(tmp_path):
    project = make_project(tmp_path, "t5", input=MESSAGES)
    with pytest.raises(CorpusError, match="task 'film', input: messages are for decoder-only models"):
        check_run(parse_settings(project))


def test_rows_whose_target_the_template_changes_are_counted_and_refused_above_the_bound(chats, tmp_path):
    tokenizer = chat_tokenizer(GEMMA)
    tokenizer.save_pretrained(tmp_path / "model")
    del chats["tasks"]["book"]
    pairs = [(text, label + " " * (row % 10 == 0)) for row, (text, label) in enumerate(reviews(60, 0))]
    write_parquet(tmp_path / "corpora/film/train.parquet", pairs)
    told = "6 with a target that the chat template does not write as it stands, such as '(posi|nega)tive '"
    with pytest.raises(CorpusError, match=told):
        run(chats)
    assert run(chats, "defaults.max_bad_rows=0.2").exit == 0


def test_the_packaged_chat_model_renders_tunes_and_answers_a_chat(tmp_path):
    try:
        find_model("smollm2-135m")
    except BackboneError as error:
        pytest.skip(str(error))
    task = {"input": [{"role": "system", "content": "Answer in one word."}, *MESSAGES], "prompt": {"length": 2}}
    short = {"batch_size": 2, "max_steps": 1, "eval_every": 1, "eval_rows": 4, "max_target_tokens": 4}
    for number, split in enumerate(("train", "dev")):
        write_parquet(tmp_path / f"{split}.parquet", reviews(8, number))
        task[split] = str(tmp_path / f"{split}.parquet")
    project = {
        "run": {"name": "chat", "storage": str(tmp_path / "runs")},
        "model": {"path": "smollm2-135m"},
        "defaults": short,
        "tasks": {"film": task},
        "bank": {"uri": str(tmp_path / "bank")},
    }
    assert run(project).version == 1
    served = PromptedModel(load_backbone("smollm2-135m"), PromptBank.open(tmp_path / "bank"))
    form = served.bank.load("film").record.template.chat
    assert form is not None and (form.lead, form.end) == ("", "<|im_end|>")
    (scores,) = served.classify(["a good film"], ["film"])
    assert set(scores) == {"positive", "negative"} and all(np.isfinite(list(scores.values())))
    assert "<|im_end|>" not in served.generate(["a good film"], ["film"], 4)[0]
