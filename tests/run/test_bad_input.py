"""A user's mistake: one clear sentence that names the place and the fix, and nothing published."""

import json
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from rich.console import Console

from pipeline.backbone.files import find_model, read_tokenizer
from pipeline.errors import BackboneError, BankError, CorpusError, PromptBankError, SettingsError, StorageError
from pipeline.run.checks import check_maps, check_run
from pipeline.run.job import run_job
from pipeline.run.stages import make_run_folder
from pipeline.run.terminal import ending_in_a_sentence
from pipeline.settings import parse_settings
from tests.bank.test_object_store import Visit, serving
from tests.jobs_data import write_parquet
from tests.seq2seq_families import make_seq2seq
from tests.tiny import make_model

pytestmark = pytest.mark.usefixtures("local_ray")

pytest_plugins = ["tests.bank.s3_server"]


def run(project, *overrides):
    return run_job(check_run(parse_settings(project, overrides)), Console(quiet=True))


def refused(project, kind, *wanted, overrides=()):
    with pytest.raises(kind) as caught:
        run(project, *overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence and "Traceback" not in sentence
    for part in wanted:
        assert part in sentence, sentence
    assert not list(Path(project["bank"]["uri"]).glob("versions/*")), "something was published"


PLACES = [
    ("run.storage", "/proc/x", 5),
    ("run.storage", "/etc/passwd", 2),
    ("run.storage", "/etc/passwd/x", 2),
    ("run.storage", "s3://bucket/runs", 2),
    ("bank.uri", "/proc/x", 5),
    ("bank.uri", "/etc/passwd", 2),
    ("bank.uri", "/etc/passwd/x", 2),
]


@pytest.mark.parametrize(("key", "place", "code"), PLACES)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_done_and_retried_only_where_that_may_help(
    project, capsys, key, place, code
):
    with pytest.raises(typer.Exit) as ended, ending_in_a_sentence("run"):
        check_run(parse_settings(project, [f"{key}={place}"]))
    assert ended.value.exit_code == code
    assert f"{key} {place}: " in capsys.readouterr().err


def test_more_files_than_a_process_may_map_are_refused_by_the_plan(project, tmp_path):
    plans = check_run(parse_settings(project, [])).plans
    limit = tmp_path / "max_map_count"
    limit.write_text("65530\n")
    check_maps(plans.values(), limit)
    limit.write_text("4097\n")
    with pytest.raises(SettingsError, match=r"lie in \d+ files, .* 4097 maps; compact the corpora .*max_map_count"):
        check_maps(plans.values(), limit)
    check_maps(plans.values(), tmp_path / "of no Linux")


@pytest.mark.parametrize("place", ["s3://bucket/runs", "/etc/passwd"])
def test_so_is_it_where_a_night_makes_its_folder_first(project, place):
    with pytest.raises(SettingsError, match=f"run.storage {place}: "):
        make_run_folder(parse_settings(project, [f"run.storage={place}"]))


def test_a_store_that_overwrites_is_refused_before_anything_is_trained_and_a_check_writes_nothing_to_it(
    project, s3, monkeypatch
):
    monkeypatch.setattr("pipeline.run.job.launch", lambda *rest: pytest.fail("ranks were started"))
    written = []

    def forget_the_condition(visit: Visit) -> None:
        if visit.command == "PUT":
            written.append(visit.path)
        del visit.headers["If-None-Match"]
        visit.forward(s3.endpoint)()

    with serving(forget_the_condition) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        checked = check_run(parse_settings(project, [f"bank.uri={s3.new_uri()}"]))
        assert not written
        with pytest.raises(BankError, match="its store overwrites"):
            run_job(checked, Console(quiet=True))
    assert all("/probes/" in path for path in written)


def test_a_missing_file_is_named(project):
    project["tasks"]["film"]["train"] = "nowhere/train.parquet"
    refused(project, CorpusError, "task 'film'", "nowhere/train.parquet")


def test_a_template_naming_an_unknown_column_suggests_the_one_meant(project):
    project["tasks"]["film"]["input"] = "review: {txt}"
    refused(project, CorpusError, "task 'film'", "'txt'", "did you mean {text}")


def test_a_missing_target_column_names_the_file(project, tmp_path):
    project["tasks"]["film"]["target"] = "{sentiment}"
    refused(project, CorpusError, "task 'film'", "'sentiment'", "train.parquet")


@pytest.mark.slow
def test_an_empty_split_is_refused(project, tmp_path):
    write_parquet(tmp_path / "corpora/film/dev.parquet", [("", "positive")])
    refused(project, CorpusError, "task 'film'", "dev", overrides=["defaults.max_bad_rows=1"])


def test_a_label_outside_the_label_set_is_named(project, tmp_path):
    write_parquet(tmp_path / "corpora/film/dev.parquet", [("good film", "positive"), ("fine film", "neutral")])
    refused(project, CorpusError, "task 'film'", "dev", "neutral")


def test_a_label_that_the_tokenizer_cannot_say_is_refused_before_anything_is_done(project):
    name = next(iter(project["tasks"]))
    project["tasks"][name]["labels"] = ["yes", "{no}"]
    with pytest.raises(CorpusError, match=r"the tokenizer cannot encode the label '\{no\}'"):
        check_run(parse_settings(project, []))


def test_a_corrupt_parquet_file_is_named(project, tmp_path):
    path = tmp_path / "corpora/film/train.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    refused(project, CorpusError, "task 'film'", "train.parquet")


def test_damaged_pages_behind_a_whole_footer_are_named(project, tmp_path):
    path = tmp_path / "corpora/film/train.parquet"
    data = bytearray(path.read_bytes())
    data[8:80] = bytes(72)
    path.write_bytes(data)
    refused(project, CorpusError, "task 'film'", "train.parquet")


def test_a_model_folder_without_weights_is_refused(project, tmp_path):
    (tmp_path / "model/model.safetensors").unlink()
    refused(project, BackboneError, "model.path", "no weights")


def test_a_prompt_longer_than_the_context_is_refused_with_the_sum(project):
    refused(project, SettingsError, "task 'film'", "context of 256", overrides=["tasks.film.prompt.length=300"])


def test_a_teacher_that_does_not_fit_the_context_is_refused_with_the_sum_before_and_after_there_is_a_corpus(
    project, tmp_path
):
    (tmp_path / "manual.txt").write_text("good film " * 110)
    film = project["tasks"]["film"]
    film |= {"max_input_tokens": 32, "max_target_tokens": 8, "max_bad_rows": 1.0}
    film["teacher"] = {"text_file": str(tmp_path / "manual.txt")}
    wanted = (
        "task 'film'",
        "a teacher of 220 tokens + max_input_tokens 32 + max_target_tokens 8 = 260",
        "context of 256",
    )
    with pytest.raises(SettingsError) as caught:
        check_run(parse_settings(project))
    assert all(part in str(caught.value) for part in wanted)
    film["teacher"] = {"examples": 40, "text": "good film"}
    check_run(parse_settings(project))
    refused(project, CorpusError, "task 'film'", "a teacher of ", "lower teacher.examples")
    film["teacher"] = {"examples": 100_000}
    refused(project, CorpusError, "task 'film'", "teacher.examples 100000 are all", "lower it")


@pytest.mark.parametrize(
    ("teacher", "wanted"),
    [
        ({}, "'tasks.film.teacher': a teacher needs 'text', 'text_file' or 'examples'"),
        ({"text": "a", "text_file": "b"}, "'tasks.film.teacher': give either 'text' or 'text_file'"),
        ({"text_file": "nowhere.txt"}, "'tasks.film.teacher': text_file nowhere.txt: cannot be read: No such file"),
        ({"text": "a", "weight": 0}, "'tasks.film.teacher.weight': "),
        ({"text": " "}, "teacher.text ' ' holds no token"),
    ],
)
def test_a_teacher_without_words_or_with_too_many_kinds_of_them_is_refused(project, teacher, wanted):
    project["tasks"]["film"]["teacher"] = teacher
    refused(project, SettingsError, "film", wanted)


def test_unlabelled_rows_of_a_task_without_labels_in_a_step_of_one_row_and_without_the_inputs_columns_are_refused(
    project, tmp_path
):
    film = project["tasks"]["film"]
    film["teacher"] = {"text": "good", "unlabelled": str(tmp_path / "more.parquet")}
    refused(project, CorpusError, "task 'film', teacher.unlabelled: ", "more.parquet")
    pq.write_table(pa.table({"body": ["good film"]}), tmp_path / "more.parquet")
    refused(
        project, CorpusError, "task 'film', teacher.unlabelled: ", "the column 'text'", "more.parquet does not have"
    )
    refused(project, SettingsError, "film", "set batch_size to 2 or more", overrides=["tasks.film.batch_size=1"])
    open_targets = ["tasks.film.metric=rouge_l"]
    refused(project, SettingsError, "film", "the teacher is asked at a label", overrides=open_targets)


def test_a_teacher_before_a_chat_and_a_sweep_of_no_teacher_are_refused(project):
    film = project["tasks"]["film"]
    film["sweep"] = {"teacher.weight": [0.5, 1.0]}
    refused(project, SettingsError, "film", "sweep: teacher.weight: there is no teacher")
    film |= {"sweep": None, "teacher": {"text": "good"}, "input": [{"role": "user", "content": "{text}"}]}
    refused(project, SettingsError, "film", "teacher: its words stand before a text")


def test_an_encoder_decoders_context_holds_for_what_its_encoder_reads_and_for_the_target(project, tmp_path):
    project["model"]["path"] = str(make_seq2seq(tmp_path / "bart", "bart", max_position_embeddings=64))
    lengths = "tasks.film.prompt.length={} tasks.film.max_input_tokens=40 tasks.film.max_target_tokens={}"
    check_run(parse_settings(project, lengths.format(20, 60).split()))
    refused(project, SettingsError, "length 30 + max_input_tokens 40 = 70", overrides=lengths.format(30, 60).split())
    refused(project, SettingsError, "max_target_tokens 65", overrides=lengths.format(20, 65).split())


def test_a_forced_first_token_that_targets_do_not_begin_with_is_refused(project, tmp_path):
    folder = make_seq2seq(tmp_path / "bart", "bart")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "forced_bos_token_id": 2}))
    project["model"]["path"] = str(folder)
    refused(project, BackboneError, "has to begin with '<unk>'", "begins targets with")


def test_a_prompt_to_start_from_that_is_not_in_the_bank_is_refused(project):
    there_is_none = ["tasks.film.prompt={init: bank, source: film@latest}"]
    refused(project, SettingsError, "task 'film'", "there is no bank", overrides=there_is_none)


def test_a_text_without_tokens_is_refused(project):
    refused(project, SettingsError, "task 'film'", "no token", overrides=["tasks.film.prompt={init: text, text: ' '}"])


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_refused(project, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    refused(project, SettingsError, "cluster.address", "nowhere", overrides=["cluster.address=ray-nowhere:1"])


@pytest.mark.slow
def test_a_row_with_a_token_that_has_no_embedding_is_left_out_and_the_others_train(project, tmp_path):
    folder = Path(project["model"]["path"])
    tokenizer = read_tokenizer(find_model(str(folder)))
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(folder)
    train = Path(project["tasks"]["film"]["train"])
    pairs = [(row["text"], row["label"]) for row in pq.read_table(train).to_pylist()]
    text, label = pairs[0]
    write_parquet(train, [*pairs, (f"{text} <beyond>", label)])
    counted = "1 with a token that the model has no embedding for"
    refused(project, CorpusError, counted, "max_bad_rows", overrides=["tasks.film.max_bad_rows=0"])
    assert run(project).version == 1


def test_every_bad_task_is_named_at_once(project):
    project["tasks"]["film"]["train"] = "nowhere.parquet"
    project["tasks"]["book"]["input"] = "{txt}"
    with pytest.raises(PromptBankError) as caught:
        run(project)
    first, second = str(caught.value).splitlines()
    assert "film" in first and "book" in second


@pytest.mark.slow
def test_a_bank_that_belongs_to_another_backbone_is_refused_before_any_training(project, tmp_path):
    assert run(project).version == 1
    make_model(tmp_path / "model", seed=1, scale=1.0)
    with pytest.raises(BankError, match="weights"):
        run(project, "run.name=other")
    assert not (tmp_path / "runs/other").exists()
    assert len(list((tmp_path / "bank/versions").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "told"),
    [({"train": "nowhere.parquet"}, "nowhere.parquet"), ({"teacher": {"examples": 100_000}}, "leave none to learn")],
    ids=["no corpus", "no rows beside its teacher's"],
)
def test_a_bad_task_can_be_left_out_while_the_others_are_published(project, mistake, told):
    project["tasks"]["film"] |= mistake
    outcome = run(project, "run.on_bad_task=skip")
    assert outcome.version == 1 and outcome.exit == 3
    assert [result.trial for result in outcome.results].count("film") == 1
    by_name = {result.trial: result for result in outcome.results}
    assert by_name["film"].status == "failed" and told in by_name["film"].reason
    assert by_name["book"].status != "failed"


@pytest.mark.slow
def test_a_run_whose_trials_all_fail_publishes_nothing_and_says_so(project, tmp_path):
    outcome = run(project, "defaults.optimizer.lr=1e30")
    assert outcome.version is None and outcome.exit == 4
    assert all("lower optimizer.lr" in result.reason for result in outcome.results)
    assert not list(tmp_path.glob("bank/versions/*"))


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of a given size somewhere in the project."""
    mounted = []

    def mount(place: str, size: str) -> Path:
        folder = tmp_path / place
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "size"), [("runs", "16k"), ("bank", "4k")])
def test_a_full_disk_is_named_and_leaves_nothing_half_published(project, tmp_path, small_disk, place, size):
    small = small_disk(place, size)
    refused(project, StorageError, str(small))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
    assert run(project).version == 1, "with room again the same run goes through"


@pytest.mark.slow
def test_a_disk_that_fills_while_ranks_tune_is_named_by_the_rank_that_met_it(project, tmp_path, small_disk):
    small = small_disk("runs", "8m")
    events = small / "small" / "events.jsonl"

    def fill() -> None:
        while not (events.exists() and '"step"' in events.read_text()):
            time.sleep(0.01)
        with suppress(OSError), open(small / "filler", "wb") as filler:
            while True:
                filler.write(bytes(4096))
                filler.flush()

    threading.Thread(target=fill, daemon=True).start()
    longer = ["defaults.max_steps=3000", "run.max_failures=0", "cluster.num_workers=2"]
    refused(project, StorageError, str(small), overrides=longer)
    (small / "filler").unlink()
    assert run(project, *longer, "defaults.max_steps=20").version == 1
