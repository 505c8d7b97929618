"""A search over instructions with the real GEPA, in this process and on two ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.host import host_backbone
from pipeline.corpus.reader import open_split
from pipeline.errors import SettingsError
from pipeline.lab.comparison import instruction_search
from pipeline.lab.comparison.hard_prompts import instructed_request
from pipeline.lab.comparison.instruction_search import Search, _check_room, _propose, find_instruction
from pipeline.settings import InstructionSearchSettings, parse_settings
from pipeline.tuning.evaluate import answer, score_texts
from tests.corpora import make_corpus, make_task
from tests.ranks import run_ranks
from tests.tiny import WORDS, make_model

# Of three rows answered at a time, the instruction that learns and the one that it makes; of eight, what was kept.
SEARCH = {"rows": 8, "answers": 120, "shown": 3, "max_tokens": 6}


@pytest.fixture(scope="module", params=["llama_untied", "t5"])
def hosted(request, tmp_path_factory):
    """A tiny model whose context is long enough for GEPA's request."""
    longer = {"max_position_embeddings": 2048} if request.param == "llama_untied" else {}
    files = find_model(str(make_model(tmp_path_factory.mktemp(request.param), request.param, scale=1.0, **longer)))
    cpu = torch.device("cpu")
    backbone = host_backbone(files, read_config(files), int8=True, dtype=torch.float32, device=cpu, sharded=False)
    return backbone, read_tokenizer(files)


def settings_of(text, **task):
    tasks = {"a": {"train": "t", "dev": "d", "max_target_tokens": 6, **task}}
    hard = {"text": {"a": text}, "search": SEARCH}
    return parse_settings({"model": {"path": "m"}, "tasks": tasks, "compare": {"hard_prompts": hard}})


def search_by_words(monkeypatch, hosted, settings, corpus, seed=0, **more):
    """A search in which one word after another is proposed, since a random model's own words say nothing."""
    words, shown = iter(WORDS), []

    def proposed(backbone, tokenizer, max_tokens, budget, prompt):
        shown.append(prompt)
        return f"```\n{next(words)}\n```"

    monkeypatch.setattr(instruction_search, "_propose", proposed)
    return find_instruction(settings, corpus, Search("a", seed, "file"), *hosted, **more), shown


def measured(hosted, settings, corpus, text, rows):
    backbone, tokenizer = hosted
    request = instructed_request(settings.tasks["a"], text + "\n\n", rows, corpus, backbone, tokenizer)
    (given,) = answer(backbone, tokenizer, [request], 1000)
    if given.texts is None:
        return -float((given.nll / rows.target_lengths).mean())
    return score_texts("accuracy", given.texts, given.wanted)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_what_is_found_is_as_good_as_told_and_no_worse_than_what_the_search_began_with(
    monkeypatch, hosted, tmp_path, metric
):
    backbone, tokenizer = hosted
    settings = settings_of("is it good", metric=metric)
    corpus = make_corpus(tmp_path, tokenizer, backbone.architecture, "a", rows=40)
    taken = []
    real = instruction_search._Program.evaluate

    def spied(program, batch, *more, **by_name):
        taken.append(list(batch))
        return real(program, batch, *more, **by_name)

    monkeypatch.setattr(instruction_search._Program, "evaluate", spied)
    found, shown = search_by_words(monkeypatch, hosted, settings, corpus)
    judged = open_split(corpus.splits["train"]).take(np.array(taken[0]))
    assert len(judged) == 8, "the first of all is judged before anything is proposed"
    assert found.value == pytest.approx(measured(hosted, settings, corpus, found.text, judged), abs=1e-9)
    assert found.value >= measured(hosted, settings, corpus, "is it good", judged)
    assert found.text in {"is it good", *WORDS}
    assert found.tried > 1 or metric == "accuracy", "losses differ, so one word or another is kept"
    learnt_from = {row for batch in taken[1:] for row in batch if len(batch) == 3}
    assert not learnt_from & set(taken[0]), "an instruction is judged on rows that it was not made from"
    # GEPA looks at the bound before a round, which takes two lots of rows and, for what is kept, those that judge.
    assert sum(map(len, taken)) < SEARCH["answers"] + 2 * SEARCH["shown"] + SEARCH["rows"]
    told = "\n".join(shown)
    assert "The right answer is: positive" in told or "The right answer is: negative" in told


def test_a_search_is_the_same_each_time_and_another_one_with_another_seed(monkeypatch, hosted, tmp_path):
    backbone, tokenizer = hosted
    settings = settings_of("is it good")
    corpus = make_corpus(tmp_path, tokenizer, backbone.architecture, "a", rows=40)
    (first, shown), (again, shown_again) = (search_by_words(monkeypatch, hosted, settings, corpus) for _ in range(2))
    assert (first.text, first.value, first.tried) == (again.text, again.value, again.tried) and shown == shown_again
    _, otherwise = search_by_words(monkeypatch, hosted, settings, corpus, seed=1)
    assert otherwise != shown


def test_a_search_ends_when_it_is_told_to_stop_and_leaves_nothing(monkeypatch, hosted, tmp_path):
    backbone, tokenizer = hosted
    corpus = make_corpus(tmp_path, tokenizer, backbone.architecture, "a", rows=40)
    asked = []
    stops = lambda: asked.append(True) or len(asked) > 2  # noqa: E731
    found, shown = search_by_words(monkeypatch, hosted, settings_of("is it good"), corpus, stops=stops)
    assert found is None and len(shown) <= 2


def test_without_a_text_a_search_begins_with_the_labels(monkeypatch, hosted, tmp_path):
    backbone, tokenizer = hosted
    settings = settings_of("")
    corpus = make_corpus(tmp_path, tokenizer, backbone.architecture, "a", rows=40)
    _, shown = search_by_words(monkeypatch, hosted, settings, corpus)
    assert "Answer with one of: negative, positive." in shown[0]


def test_the_model_that_answers_writes_the_instructions_too(hosted):
    backbone, tokenizer = hosted
    lengths = []
    for word in WORDS:
        written = _propose(backbone, tokenizer, 6, 4000, f"is it {word}")
        body = written.removeprefix("```\n").removesuffix("\n```")
        assert written == f"```\n{body}\n```", "GEPA looks for an instruction in a block of code"
        lengths.append(len(tokenizer(body, add_special_tokens=False).input_ids))
    assert max(lengths) <= 6, lengths


def test_rows_too_long_to_be_shown_are_refused_with_what_to_lower():
    search = InstructionSearchSettings(shown=8)
    with pytest.raises(SettingsError, match=r"compare\.hard_prompts\.search: 8 solved rows of 'a'.*; lower shown"):
        _check_room("a", make_task(max_input_tokens=512), search, 9, 2048)
    with pytest.raises(SettingsError, match="its text of 1500 tokens"):
        _check_room("a", make_task(max_input_tokens=8), search, 1500, 2048)
    _check_room("a", make_task(max_input_tokens=512), search, 9, None)


def search_on_rank(folder, model_folder):
    """A search on one of several ranks of a partitioned model, which writes its own instructions."""
    files = find_model(str(model_folder))
    cpu = torch.device("cpu")
    backbone = host_backbone(files, read_config(files), int8=True, dtype=torch.float32, device=cpu, sharded=True)
    tokenizer = read_tokenizer(files)
    corpus = make_corpus(folder / f"rank{dist.get_rank()}", tokenizer, backbone.architecture, "a", rows=40)
    taken = []
    real = instruction_search._Program.evaluate

    def spied(program, batch, *more, **by_name):
        taken.append(list(batch))
        return real(program, batch, *more, **by_name)

    instruction_search._Program.evaluate = spied  # in this process, which ends with the search
    found = find_instruction(settings_of("is it good", metric="loss"), corpus, Search("a", 0, "f"), backbone, tokenizer)
    return found.text, found.value, found.tried, taken


@pytest.mark.processes
def test_two_ranks_of_a_partitioned_model_search_in_step(tmp_path):
    folder = make_model(tmp_path / "model", "llama_untied", scale=1.0, max_position_embeddings=2048)
    first, second = run_ranks(2, search_on_rank, tmp_path, folder)
    assert first == second and len(first[-1]) > 3
