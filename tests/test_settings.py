"""Settings: inherited key by key, overridden, refused with a suggestion, and described by a schema."""

import json
import re
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from pipeline.errors import SettingsError
from pipeline.settings import (
    Settings,
    load_adaptation,
    load_joined,
    load_settings,
    parse_settings,
    settings_schema,
)

CONFIGS = sorted((Path(__file__).parents[1] / "jobs" / "configs").glob("*.yaml"))


@pytest.fixture
def raw():
    return {
        "model": {"path": "somewhere"},
        "defaults": {"prompt": {"length": 16, "init": "random"}, "batch_size": 8, "dev_fraction": 0.1},
        "tasks": {"a": {"train": "a.parquet"}, "b": {"train": ["b1", "b2"], "dev": "b", "prompt": {"length": 3}}},
    }


def test_a_task_inherits_every_key_that_it_does_not_name(raw):
    settings = parse_settings(raw)
    a, b = settings.tasks["a"], settings.tasks["b"]
    assert (a.prompt.length, a.batch_size, a.dev_fraction) == (16, 8, 0.1)
    assert (b.prompt.length, b.prompt.init, b.batch_size) == (3, "random", 8)


def test_a_tasks_own_dev_split_replaces_the_inherited_fraction(raw):
    assert parse_settings(raw).tasks["b"].dev_fraction is None


def test_settings_travel_to_workers_and_back_unchanged(raw):
    settings = parse_settings(raw)
    assert Settings.model_validate(json.loads(json.dumps(settings.model_dump(mode="json")))) == settings


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("tasks.a.max_steps=50", lambda s: s.tasks["a"].max_steps == 50),
        ("tasks.a.prompt.length=2", lambda s: s.tasks["a"].prompt.length == 2 and s.tasks["b"].prompt.length == 3),
        ("defaults.batch_size=5", lambda s: {task.batch_size for task in s.tasks.values()} == {5}),
        ("tasks.c={train: x, dev: y}", lambda s: s.tasks["c"].dev == "y"),
        ("run.seed=7", lambda s: s.run.seed == 7),
        ("defaults.labels=[yes it is, 'no']", lambda s: s.tasks["a"].labels == ["yes it is", "no"]),
    ],
)
def test_overrides_change_one_setting_and_leave_the_file_alone(raw, override, read):
    before = json.dumps(raw)
    assert read(parse_settings(raw, [override]))
    assert json.dumps(raw) == before


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tasks.a.max_step=1", "unknown key 'tasks.a.max_step'; did you mean 'max_steps'?"),
        ("defaults.optimiser={lr: 1}", "unknown key 'defaults.optimiser'; did you mean 'optimizer'?"),
        ("run.colour=red", "unknown key 'run.colour'; known keys here: name, storage"),
        ("model.path=", "'model.path': input should be a valid string"),
        ("tasks.a.prompt.length=0", "'tasks.a.prompt.length': input should be greater than or equal to 1"),
        ("tasks.b.dev_fraction=0.5", "give either 'dev' (a path) or 'dev_fraction'"),
        ("tasks.a.prompt.init=text", "init 'text' needs the setting 'text'"),
        ("tasks.a.prompt.init=bank", "init 'bank' needs the setting 'source'"),
        ("tasks.a={train: x, metric: rouge_l, calibrate: true}", "calibrate: the metric 'rouge_l' compares no labels"),
        ("tasks.a={train: x, metric: rouge_l, balance: true}", "with the metric 'rouge_l' targets are open texts"),
        ("tasks.a.label_score=median", "'tasks.a.label_score': input should be 'sum' or 'mean'"),
        ("tasks.a.metric=accurracy", "'tasks.a.metric': input should be 'accuracy'"),
        ("model.offload=nvme", "offload 'nvme' and 'offload_folder' (a folder on a local disk) go together"),
        ("model.offload=cpu", "model.offload 'cpu' is for GPUs"),
        ("run.name=../up", "may hold only letters, digits"),
        ("tasks={}", "at least 1"),
        ("compare.lora={lr: [0.001, 1e-3]}", "'compare.lora.lr': 0.001 is there twice; give each value once"),
        ("compare.hard_prompts={shots: [4, 4]}", "'compare.hard_prompts.shots': 4 is there twice"),
        ("compare.transfer={starts: {a: [b, b]}}", "'compare.transfer.starts.a': b is there twice"),
        ("compare.domain_shift={a: [b, b]}", "'compare.domain_shift.a': b is there twice"),
        ("compare.domain_shift={a: [b, a]}", "domain_shift.a: name other tasks"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(raw, override, sentence):
    with pytest.raises(SettingsError) as caught:
        parse_settings(raw, [override], origin="my.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith("my.yaml: ") and sentence in line


@pytest.fixture
def swept(raw):
    raw["defaults"] |= {
        "max_steps": 100,
        "eval_every": 10,
        "sweep": {"optimizer.lr": [0.1, 1], "prompt.length": [4, 8]},
    }
    raw["tasks"]["b"] |= {"sweep": {"seed": [0, 1, 2], "optimizer.lr": [0.3]}, "halving": {"first": 2}}
    del raw["tasks"]["b"]["prompt"]
    return raw


def test_a_sweep_has_a_trial_for_every_combination_and_its_lists_are_inherited_one_by_one(swept):
    settings = parse_settings(swept)
    a, b = (settings.tasks[name].trials(name) for name in "ab")
    assert list(a) == ["a.length-4.lr-0.1", "a.length-4.lr-1.0", "a.length-8.lr-0.1", "a.length-8.lr-1.0"]
    assert {(t.prompt.length, t.prompt.init, t.optimizer.lr, t.sweep) for t in a.values()} == {
        (length, "random", lr, None) for length in (4, 8) for lr in (0.1, 1.0)
    }
    assert len(b) == 6 and b["b.length-8.lr-0.3.seed-2"].seed == 2
    swept["tasks"]["b"]["sweep"] = dict(reversed(swept["tasks"]["b"]["sweep"].items()))
    assert list(parse_settings(swept).tasks["b"].trials("b")) == list(b), (
        "the order of keys in the file decides nothing"
    )


def chosen_by(task) -> tuple:
    prompt, optimizer = task.prompt, task.optimizer
    of_prompt = prompt.length, prompt.init, prompt.parameters
    of_optimizer = optimizer.name, optimizer.lr, optimizer.weight_decay, optimizer.schedule
    return (*of_prompt, *of_optimizer, optimizer.warmup_steps, optimizer.clip_norm, task.batch_size, task.max_steps)


LESTER = (100, "class_labels", "direct", "adafactor", 0.3, 1e-5, "constant", 0, None, 32, 30_000)


@pytest.mark.parametrize("overrides", [["defaults.recipe=lester2021"], ["tasks.a.recipe=lester2021"]])
def test_one_word_in_the_defaults_or_a_task_stands_for_all_that_a_paper_chose(overrides):
    tasks = {"a": {"train": "a.parquet", "dev": "d"}}
    assert chosen_by(parse_settings({"model": {"path": "x"}, "tasks": tasks}, overrides).tasks["a"]) == LESTER


def test_what_the_defaults_or_a_task_sets_wins_over_the_recipe_wherever_that_stands(raw):
    raw["defaults"]["optimizer"] = {"schedule": "cosine"}
    for overrides in (["defaults.recipe=lester2021"], ["tasks.a.recipe=lester2021", "tasks.b.recipe=lester2021"]):
        settings = parse_settings(raw, [*overrides, "tasks.b.optimizer.lr=0.01", "tasks.b.max_steps=7"])
        assert chosen_by(settings.tasks["a"]) == (16, "random", *LESTER[2:6], "cosine", *LESTER[7:9], 8, 30_000)
        assert chosen_by(settings.tasks["b"]) == (
            *(3, "random", "direct", "adafactor", 0.01, 1e-5, "cosine"),
            *(0, None, 8, 7),
        )
        assert Settings.model_validate(json.loads(settings.model_dump_json())) == settings


def test_a_task_is_rid_of_an_inherited_recipe_by_null_and_a_sweep_wins_over_one(raw):
    usual = parse_settings(raw)
    raw["defaults"]["recipe"] = "lester2021"
    assert parse_settings(raw, ["tasks.a.recipe=null"]).tasks["a"] == usual.tasks["a"]
    swept = parse_settings(raw, ["tasks.a.sweep={optimizer.lr: [0.1, 0.2]}"]).tasks["a"].trials("a")
    assert [trial.optimizer.lr for trial in swept.values()] == [0.1, 0.2]
    with pytest.raises(SettingsError, match=r"'defaults\.recipe': input should be 'lester2021'"):
        parse_settings(raw, ["defaults.recipe=lester2022"])


def test_a_number_of_seeds_is_the_list_of_them_also_where_lists_are_inherited(raw):
    raw["defaults"]["sweep"] = {"seeds": 3, "prompt.length": [4, 8]}
    raw["tasks"]["b"] |= {"sweep": {"seed": [7]}, "prompt": {"length": 3}}
    raw["tasks"]["c"] = {"train": "c.parquet", "seed": 5}
    settings = parse_settings(raw)
    assert [t.seed for t in settings.tasks["a"].trials("a").values()] == [0, 1, 2, 0, 1, 2]
    assert [t.seed for t in settings.tasks["b"].trials("b").values()] == [7]
    assert [t.seed for t in settings.tasks["c"].trials("c").values()] == [5, 5]
    raw["defaults"]["sweep"] = {"seed": [0, 1, 2], "prompt.length": [4, 8]}
    assert parse_settings(raw).tasks == settings.tasks
    assert parse_settings(raw, ["tasks.a.sweep.seeds=2"]).tasks["a"].sweep["seed"] == [0, 1]
    jsonschema.validate(raw | {"defaults": {"sweep": {"seeds": 3}}}, json.loads(settings_schema()))


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ("{domain_shift: {a: [c]}}", "compare.domain_shift: there is no task 'c'; name tasks of this file"),
        ("{transfer: {starts: {a: [b, b+c]}}}", "compare.transfer.starts: there is no task 'c'"),
        ("{hard_prompts: {text: {c: Say it}}}", "compare.hard_prompts.text: there is no task 'c'"),
        ("{lora: {rnk: 3}}", "unknown key 'compare.lora.rnk'; did you mean 'rank'?"),
        ("{panels: [seed]}", "panels: a seed is no choice"),
    ],
)
def test_a_mistake_in_what_is_compared_is_one_sentence(raw, block, sentence):
    with pytest.raises(SettingsError) as caught:
        parse_settings(raw, [f"compare={block}"])
    (line,) = str(caught.value).splitlines()
    assert sentence in line


def test_a_task_can_do_without_the_inherited_sweep_and_halving(swept):
    swept["defaults"]["halving"] = {"factor": 4}
    settings = parse_settings(swept, ["tasks.a.sweep=null"])
    assert settings.tasks["a"].trials("a") == {"a": settings.tasks["a"]} and settings.tasks["a"].halving is None
    assert settings.tasks["b"].halving.model_dump() == {"first": 2, "factor": 4}


def test_what_a_task_sets_itself_is_not_swept_by_an_inherited_list(swept):
    settings = parse_settings(swept, ["tasks.a.optimizer.lr=0.7", "tasks.b.sweep.prompt.length=[5, 6]"])
    a, b = (settings.tasks[name].trials(name).values() for name in "ab")
    assert [(t.prompt.length, t.optimizer.lr) for t in a] == [(4, 0.7), (8, 0.7)]
    assert {t.prompt.length for t in b} == {5, 6} and {t.optimizer.lr for t in b} == {0.3}
    alone = parse_settings(swept, ["tasks.a.optimizer.lr=0.7", "tasks.a.prompt.length=3"]).tasks["a"]
    assert list(alone.trials("a")) == ["a"] and alone.prompt.length == 3


def test_swept_settings_travel_to_workers_and_back_unchanged(swept):
    settings = parse_settings(swept)
    again = Settings.model_validate(json.loads(json.dumps(settings.model_dump(mode="json"))))
    assert again == settings and again.tasks["b"].trials("b") == settings.tasks["b"].trials("b")
    jsonschema.validate(swept, json.loads(settings_schema()))


def test_a_trials_name_is_a_files_name_whatever_is_swept(raw):
    raw["tasks"]["a"]["sweep"] = {
        "prompt.init": ["text"],
        "prompt.text": ["is it good/bad?", "x" * 300, "plain"],
        "optimizer.clip_norm": [None, 1e-5],
    }
    raw["tasks"]["a"]["prompt"] = {"text": "swept"}
    names = list(parse_settings(raw).tasks["a"].trials("a"))
    assert len(set(names)) == 6 and all(re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name) for name in names)
    assert "a.init-text.text-plain.clip_norm-none" in names


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tasks.a.sweep={optimizer.rate: [1]}", "'tasks.a.sweep.optimizer.rate': input should be 'prompt.length'"),
        ("tasks.a.sweep={optimizer.lr: 1}", "'tasks.a.sweep.optimizer.lr': input should be a valid list"),
        ("tasks.a.sweep={seed: []}", "'tasks.a.sweep.seed': list should have at least 1 item"),
        (
            "tasks.a.sweep={optimizer.lr: [0.1, -1]}",
            "'tasks.a': sweep: with optimizer.lr -1, optimizer.lr: Input should",
        ),
        ("defaults.sweep={prompt.length: [many]}", "'defaults': sweep: with prompt.length many, prompt.length: Input"),
        ("tasks.a.sweep={prompt.init: [text]}", "with prompt.init text, prompt: init 'text' needs the setting 'text'"),
        ("tasks.a.sweep={optimizer.lr: [1, 1.0]}", "'tasks.a': sweep: optimizer.lr 1.0 is there twice"),
        ("tasks.a.sweep={seeds: 0}", "'tasks.a.sweep': seeds is how many seeds to take, from 1 to 1,000; it is 0"),
        ("tasks.a.sweep={seeds: 2, seed: [1]}", "give 'seed' (a list) or 'seeds' (how many), and not both"),
        (f"tasks.a.sweep={{seed: {[*range(1001)]}}}", "make 1,001 trials, more than 1,000"),
        ("tasks.a.halving={factor: 3}", "task 'a': halving is there to stop trials of a sweep; give a 'sweep', too"),
        ("tasks.a.halving={facter: 3}", "unknown key 'tasks.a.halving.facter'; did you mean 'factor'?"),
        ("tasks.a={train: x, sweep: {seed: [1]}, halving: {first: 60}}", "60 x eval_every 100 is not before max_steps"),
        ("tasks={a: {train: x, sweep: {seed: [1]}}, a.seed-1: {train: x}}", "both have a trial 'a.seed-1'; rename"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_sentence_that_names_the_choice(raw, override, sentence):
    with pytest.raises(SettingsError) as caught:
        parse_settings(raw, [override])
    (line,) = str(caught.value).splitlines()
    assert sentence in line


@pytest.mark.parametrize("own", [{"text": "mine"}, {"text_file": "mine.txt"}])
@pytest.mark.parametrize("inherited", [{"text": "all"}, {"text_file": "all.txt", "weight": 0.7}])
def test_a_tasks_own_words_for_its_teacher_replace_the_inherited_ones_whatever_holds_them(
    raw, own, inherited, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "all"):
        Path(f"{name}.txt").write_text(name)
    raw["defaults"] = {**raw.get("defaults", {}), "teacher": inherited}
    raw["tasks"]["a"]["teacher"] = own
    teacher = parse_settings(raw).tasks["a"].teacher
    assert teacher.text == "mine" and teacher.weight == inherited.get("weight", 0.5)


@pytest.mark.parametrize("override", ["max_steps", "=3", "model.path.deep=1", "run.seed=[1"])
def test_a_malformed_override_is_quoted(raw, override):
    with pytest.raises(SettingsError) as caught:
        parse_settings(raw, [override])
    assert override in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_yaml_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere.yaml: No such file"):
        load_settings(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [1")
    with pytest.raises(SettingsError, match=r"broken.yaml is not valid YAML"):
        load_settings(broken)
    broken.write_text("- a list")
    with pytest.raises(SettingsError, match=r"expected a mapping"):
        load_settings(broken)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_that_ship_are_valid_for_the_job_and_for_editors(path):
    load_settings(path)
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(settings_schema()))


def test_a_settings_file_cannot_run_code(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("run: !!python/object/apply:os.system ['touch ran']")
    with pytest.raises(SettingsError):
        load_settings(path)
    assert not Path("ran").exists()


BASE = "model: {path: m}\ndefaults: {dev_fraction: 0.1}\ntasks:\n  a: {train: x}\n"
SLIPS = [
    ("  a: {train: y}", "line 5: the key 'a' is there twice (line 4); keep one"),
    ("  b: {train: y, prompt: {length: 3, 'length': 4}}", "the key 'length' is there twice"),
    ("  no: {train: y}", 'the key no, which YAML reads as false, is not text; put it in quotes: "no"'),
    ("  2026-02-20: {train: y}", 'put it in quotes: "2026-02-20"'),
    ("  2024: {train: y}", 'put it in quotes: "2024"'),
    ("  b: {train: y, labels: [off, good]}", "'tasks.b.labels.0': off is not text in YAML; put it in quotes"),
    ("  b: {train: y, labels: [good, 010]}", 'put it in quotes: "010"'),
    ("  b: {train: y, labels: [12:30, ~]}", 'put it in quotes: "12:30"'),
    ("  b: {train: y, labels: [null, good]}", 'put it in quotes: "null"'),
    ("run: {name: 2026-02-20}", """'run.name': 2026-02-20 is not text in YAML; put it in quotes: "2026-02-20\""""),
    ("run: {name: 2026-02-30}", "line 5: 2026-02-30 looks like a date and is not a valid one"),
    ("run: " + "[" * 3000 + "]" * 3000, "nested more than 50 levels deep"),
    ("run: &run [*run]", "nested more than 50 levels deep"),
    ("run: {seed: " + "9" * 5000 + "}", "(5,000 characters) looks like an integer and is not a valid one"),
    ("run: {seed: 0x" + "f" * 20000 + "}", "is an integer too large for any setting"),
    ("run: !!bool perhaps", "perhaps looks like a yes or no"),
    ("x: [&a [1,2,3,4,5,6,7,8,9,0], " + ", ".join(
        f"&{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 10)}]" for n in range(9)) + "]", "more than 100,000 values"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "sentence"), SLIPS, ids=[line[:30] for line, _ in SLIPS])
def test_what_yaml_reads_otherwise_than_it_was_meant_is_one_sentence_that_shows_the_mend(tmp_path, line, sentence):
    path = tmp_path / "my.yaml"
    path.write_text(f"{BASE}{line}\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{path}: ") and sentence in first and len(first) < len(str(path)) + 300


@pytest.mark.parametrize(
    "override", ["tasks.a.labels=[no, good]", "run={name: a, name: b}", "run.name=2026-02-31", "run.name=no"]
)
def test_an_overrides_value_is_read_as_strictly(raw, override):
    with pytest.raises(SettingsError, match=r"quotes|there twice"):
        parse_settings(raw, [override])


@pytest.mark.parametrize("load", [load_adaptation, load_joined])
def test_every_job_reads_its_file_as_strictly(tmp_path, load):
    path = tmp_path / "my.yaml"
    for text, sentence in (("a: 1\na: 2", "there twice"), ("no: 1", "quotes"), ("a: 2026-02-30", "a date")):
        path.write_text(text)
        with pytest.raises(SettingsError, match=sentence):
            load(path)


def test_a_merged_mapping_may_be_changed_key_by_key_and_a_models_configuration_may_have_numbers_for_keys(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(f"{BASE}  b: &b {{train: y, batch_size: 3}}\n  c: {{<<: *b, train: z}}\n  d: {{<<: *b, seed: 1}}\n")
    tasks = load_settings(path).tasks
    assert (tasks["c"].train, tasks["c"].batch_size, tasks["b"].train, tasks["d"].train) == ("z", 3, "y", "y")
    path.write_text("model: {config: {id2label: {0: a}}, tokenizer: t}\ncorpus: {train: x}\nsteps: 1\n")
    assert load_adaptation(path).model.config == {"id2label": {0: "a"}}


@pytest.mark.parametrize(
    "override",
    [
        "tasks.a.labels=[]",
        "tasks.a.labels=[a, a]",
        "tasks.a.labels=[a]",
        f"model.path={'x' * 300}",
        f"bank.uri={'x' * 300}",
        f"tasks.a.train={'x' * 300}",
        "run.seed=1.0e+30",
        "run.seed=1e30",
        "tasks.a.seed=18446744073709551616",
        "tasks.a.sweep={optimizer.lr: [.inf]}",
        "cluster.num_workers=100000",
        "cluster.tokens_per_microbatch=1000000000000",
        "refresh.wait_for_lease=.nan",
        "refresh.lease_expiry=.inf",
        "refresh.margin=.nan",
        "tasks.a.batch_size=yes",
        "compare.lora={rank: 10000000000}",
        "tasks.a.optimizer.lr=.inf",
    ],
)
def test_a_value_that_no_run_could_have_is_refused(raw, override):
    with pytest.raises(SettingsError) as caught:
        parse_settings(raw, [override])
    assert len(str(caught.value).splitlines()) == 1 and override.partition("=")[0].split(".")[-1] in str(caught.value)


def _numbers(model, place=()):
    """(place, annotation, default) of every number of the settings."""
    for name, known in model.model_fields.items():
        kinds = [known.annotation, *get_args(known.annotation)]
        if {int, float} & set(kinds):
            yield (*place, name)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _numbers(kind, (*place, name))


@pytest.mark.parametrize("place", sorted(set(_numbers(Settings))), ids=".".join)
@pytest.mark.parametrize("value", ["-.inf", ".nan", "-1", "true", f"{10**30}"])
def test_no_number_of_the_settings_takes_what_is_none_or_beyond_all_bounds(raw, place, value):
    unbounded = {"weight_decay", "margin", "clip_norm", "lr", "price_per_rank_hour", "wait_for_lease"}
    if value == f"{10**30}" and place[-1] in unbounded:
        pytest.skip("a large one is no mistake that could be told")
    with pytest.raises(SettingsError, match=place[-1]):
        parse_settings(raw, [f"{'.'.join(place)}={value}"])


@pytest.mark.parametrize("value", ["true", "[true]", "[1, off]"])
@pytest.mark.parametrize("place", ["compare.lora.lr", "compare.fine_tuning.lr", "compare.hard_prompts.shots"])
def test_a_list_of_numbers_takes_no_yes_for_one(raw, place, value):
    with pytest.raises(SettingsError, match=rf"{place}': .* is not a number; give one"):
        parse_settings(raw, [f"{place}={value}"])


@pytest.mark.parametrize(
    ("value", "told"),
    [("1", r"train': 1 is not text"), ("[1, x]", r"train\.0': 1 is not text"), ("{path: 1}", r"path': 1 is not text")],
)
def test_a_path_that_is_none_is_told_in_one_sentence(raw, value, told):
    with pytest.raises(SettingsError, match=told) as caught:
        parse_settings(raw, [f"tasks.a.train={value}"])
    assert len(str(caught.value).splitlines()) == 1
