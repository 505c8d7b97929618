"""`log` and `diff` tell what happened to a bank, and what changed from version to version."""

import json
import re

import pytest

from pipeline.bank import PromptBank, TableState
from tests.bank.conftest import make_prompt, publish
from tests.bank.test_integrity import overwrite

VERSION_FIELDS = [
    "version", "parent", "time", "run", "tuned", "carried_forward", "kept", "failed", "aliases", "signed_by", "problem",
]  # fmt: skip


def test_log_lists_versions_newest_first_with_what_became_of_their_prompts(document, uri):
    found = document("log")
    assert list(found) == ["bank", "versions", "older"] and found["older"] == 0
    assert [list(version) for version in found["versions"]] == [VERSION_FIELDS] * 3
    told = [[version[field] for field in VERSION_FIELDS if field != "time"] for version in found["versions"]]
    assert told == [
        [3, 2, "weekly", 1, 1, 1, 0, ["latest"], None, None],
        [2, 1, "nightly", 1, 1, 0, 1, [], None, None],
        [1, None, "nightly", 2, 0, 0, 0, ["prod"], None, None],
    ]


def test_log_in_a_pipe_has_the_same_columns_always(run):
    _, stdout, _ = run("log")
    rows = [re.split(r" {2,}", line.strip()) for line in stdout.splitlines()]
    assert len(rows) == 4 and {len(row) for row in rows} == {len(VERSION_FIELDS)}


def test_log_shows_the_newest_and_says_how_many_are_older(document, uri):
    found = document("log", "--last", "1")
    assert ([version["version"] for version in found["versions"]], found["older"]) == ([3], 2)
    PromptBank.open(uri).promote(2, "prod", by="bob")
    assert document("log", "prod", "-n", 1)["older"] == 1


def test_log_of_an_alias_lists_its_moves_newest_first(document, run, uri):
    bank = PromptBank.open(uri)
    bank.promote(3, "prod", by="bob")
    bank.rollback("prod", by="carol")
    found = document("log", "prod")
    assert list(found) == ["bank", "alias", "moves", "older"]
    assert [set(move) for move in found["moves"]] == [{"seq", "version", "manifest", "action", "by", "time"}] * 3
    told = [(move["seq"], move["version"], move["action"], move["by"]) for move in found["moves"]]
    assert told == [(3, 1, "rollback", "carol"), (2, 3, "promote", "bob"), (1, 1, "promote", "alice")]
    assert run("log", "prod")[1].splitlines()[1].split()[:4] == ["3", "1", "rollback", "carol"]


def test_log_refuses_an_alias_that_was_never_set(refusal, uri):
    assert refusal("log", "nix") == f"the bank {uri} has no alias 'nix'; known: latest, prod"


def test_log_tells_of_a_damaged_version_in_its_line_and_goes_on(run, document, uri):
    path = uri / "versions/3.json"
    overwrite(path, path.read_bytes() + b" ")
    code, stdout, stderr = run("log")
    assert (code, stderr) == (1, "") and f"{path} is damaged" in stdout.splitlines()[1]
    assert stdout.splitlines()[2].split()[0] == "2"
    damaged, whole, _ = document("log", code=1)["versions"]
    assert "is damaged" in damaged["problem"] and damaged["tuned"] is None and whole["problem"] is None


def test_log_and_show_go_on_without_the_aliases_when_one_is_damaged(run, uri):
    overwrite(uri / "aliases/prod/1.json", b"damaged")
    for command in (["log"], ["show", "sst2@2"]):
        code, stdout, stderr = run(*command, "--json")
        assert code == 0 and stderr.startswith("warning: the aliases are not shown: ") and stderr.count("\n") == 1
        assert "aliases/prod/1.json is damaged" in stderr and json.loads(stdout)


def test_diff_tells_what_was_added_and_changed_and_not_what_was_only_carried_forward(document, uri):
    found = document("diff", "1", "2")
    assert list(found) == ["bank", "from", "to", "header", "prompts", "unchanged"]
    assert (found["from"], found["to"], found["header"], found["unchanged"]) == (1, 2, [], 1)
    added, changed = found["prompts"]
    assert (added["name"], added["change"], changed["name"], changed["change"]) == ("cr", "added", "sst2", "changed")
    assert all(change["from"] is None for change in added["fields"])
    changes = {change["field"]: (change["from"], change["to"]) for change in changed["fields"]}
    digests = [PromptBank.open(uri).manifest(n).prompts["sst2"].digest for n in (1, 2)]
    assert changes == {
        "digest": tuple(digests),
        "labels": (["negative", "positive"], ["no", "yes"]),
        "metrics.dev_after": (0.9, 0.94),
        "metrics.test": (None, 0.91),
        "metrics.dev_loss_before": (1.5, None),
        "metrics.dev_loss_after": (1.1, None),
    }


def test_diff_tells_of_kept_prompts_of_the_backbone_and_of_libraries(document):
    found = document("diff", "2", "latest")
    assert found["header"] == [
        {"field": "backbone.model", "from": "SmolLM2-135M", "to": "another name for it"},
        {"field": "libraries.numpy", "from": "2", "to": "3"},
        {"field": "libraries.torch", "from": None, "to": "2"},
    ]
    kept = next(prompt for prompt in found["prompts"] if prompt["name"] == "trec")
    assert kept["fields"] == [
        {"field": "status", "from": "carried_forward", "to": "kept"},
        {"field": "reason", "from": None, "to": "no step was better"},
    ]


def test_diff_the_other_way_round_removes_what_was_added(document):
    assert [(prompt["name"], prompt["change"]) for prompt in document("diff", "2", "prod")["prompts"]] == [
        ("cr", "removed"),
        ("sst2", "changed"),
    ]


def test_diff_of_equal_versions_is_empty_and_fine(run, document, uri):
    assert run("diff", "latest", "3") == (0, "", "")
    found = document("diff", "3", "3")
    assert (found["header"], found["prompts"], found["unchanged"]) == ([], [], 3)
    publish(PromptBank.open(uri), make_prompt("new"), alias="staging")
    code, stdout, _ = run("diff", "3", "staging")
    assert code == 0 and {line.split()[0] for line in stdout.splitlines()[1:]} == {"-", "new"}


def test_diff_of_a_changed_template_shows_spaces_and_line_breaks(run, uri):
    from pipeline.bank import Template

    changed = make_prompt(
        "trec", 2, template=Template(input="{text}\n“quoted” \\ {x} ", target="{label}", separator="")
    )
    publish(PromptBank.open(uri), changed)
    _, stdout, _ = run("diff", "3", "4")
    assert '"{text}\\n“quoted” \\\\ {x} "' in stdout and re.search(r'template.separator +" " +""\n', stdout)


@pytest.mark.parametrize("revision", ["9", "nix"])
def test_diff_refuses_a_version_that_is_not_there(refusal, revision):
    assert f"{revision}" in refusal("diff", "1", revision)


def test_diff_and_show_tell_which_version_of_a_table_each_prompt_was_tuned_on(run, document, uri):
    def at(version: str) -> dict[str, tuple[TableState, ...]]:
        return {"train": (TableState(address="delta:///lake/reviews", version=version, table="id", time=None),)}

    bank = PromptBank.open(uri)
    publish(bank, make_prompt("lake", 1.0, tables=at("12")), make_prompt("plain"))
    publish(bank, make_prompt("lake", 2.0, tables=at("13"), corpus_digest="c" * 64))
    record = bank.at("latest").record("lake")
    assert record.tables == at("13") and bank.at("latest").record("plain").tables is None
    before, after = bank.versions()[-2:]
    (change,) = [one for one in document("diff", before, after)["prompts"] if one["name"] == "lake"]
    told = {field["field"]: (field["from"], field["to"]) for field in change["fields"]}
    assert told["tables.train"] == ("delta:///lake/reviews@12", "delta:///lake/reviews@13")
    assert "delta:///lake/reviews@13" in run("diff", before, after)[1]
    assert re.search(r"train from +delta:///lake/reviews@13", run("show", "lake")[1])
    added = [one for one in document("diff", before - 1, before)["prompts"] if one["name"] == "lake"]
    assert added and "delta:///lake/reviews@12" in run("diff", before - 1, before)[1]
    # A manifest without tables is written as before.
    written = (uri / f"versions/{before - 1}.json").read_text()
    assert '"tables"' not in written and '"tables"' in (uri / f"versions/{after}.json").read_text()
