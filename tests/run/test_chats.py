"""A task whose input is a chat goes the whole way: planned, tokenised, tuned, published, served, refused."""

import json

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.bank import PromptBank
from pipeline.corpus.encoding import TokenizerSpec, load_tokenizer
from pipeline.corpus.task_corpus import TaskCorpus, prepare_task
from pipeline.errors import CorpusError
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
    return settings


@pytest.mark.slow
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
    # A run multiplies in int8, and the service exactly: a row in between may fall to either side.
    assert score_texts("accuracy", chosen, labels) == pytest.approx(record.metrics.test, abs=0.05)
    assert run(chats).version == 1, "started again, it publishes nothing new"


def prepared(project, folder, *overrides):
    """The corpus of the task `film`, tokenised by Ray as a run does it."""
    settings = parse_settings(project, overrides)
    spec = TokenizerSpec(str(folder / "model"), "digest of the tokenizer", "decoder-only")
    load_tokenizer.cache_clear()  # a run's own folder is written once
    return prepare_task("film", settings.tasks["film"], spec, folder / "runs")


@pytest.mark.slow
def test_another_chat_template_or_option_is_another_corpus_and_the_same_one_is_tokenised_once(chats, tmp_path):
    def folders():
        return len(list((tmp_path / "runs/token_shards").glob("[!.]*/manifest.json")))

    one = prepared(chats, tmp_path)
    assert prepared(chats, tmp_path) == one and folders() == 3
    option = prepared(chats, tmp_path, "tasks.film.chat_options={tone: dry}")
    chat_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    other = prepared(chats, tmp_path)
    assert len({one.digest, option.digest, other.digest}) == 3 and folders() == 9
    assert one.chat["template"] == option.chat["template"] != other.chat["template"]
    assert TaskCorpus.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.parametrize(
    ("template", "changes", "told"),
    [
        (None, {}, "has no chat template"),
        (GEMMA, {"input": [{"role": "system", "content": "Judge."}, *MESSAGES]}, "(System role not supported)"),
        (CHATML, {"input": [{"role": "user", "content": "{txt}"}]}, "names the column 'txt', which"),
        (CHATML, {"input": [{"role": "user", "content": "Hello"}]}, "names no column; write one such as {text}"),
        (OPEN_THOUGHT, {}, "writes no answer at once behind its generation prompt, which ends with"),
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
    chat_tokenizer(GEMMA).save_pretrained(tmp_path / "model")
    pairs = [(text, label + " " * (row % 10 == 0)) for row, (text, label) in enumerate(reviews(60, 0))]
    write_parquet(tmp_path / "corpora/film/train.parquet", pairs)
    told = "6 with a target that the chat template does not write as it stands, such as '(posi|nega)tive '"
    with pytest.raises(CorpusError, match=told):
        prepared(chats, tmp_path)
    corpus = prepared(chats, tmp_path, "defaults.max_bad_rows=0.2")
    assert corpus.labels == ("negative", "positive") and corpus.counts["train"]["target_changed"] == 6
