"""`promote` and `rollback` move an alias, and say from where to where."""

import getpass

import pytest

from pipeline.bank import PromptBank
from tests.bank.test_integrity import overwrite

FIELDS = ["bank", "alias", "seq", "action", "time", "by", "from", "to", "moved"]


def versions(uri):
    return PromptBank.open(uri).aliases()


def test_promote_moves_an_alias_forward_and_back_and_tells_so(run, uri):
    assert run("promote", "3", "prod", "--by", "bob") == (0, "prod: version 1 → 3 (promote, move 2, by bob)\n", "")
    assert versions(uri) == {"latest": 3, "prod": 3}
    assert run("promote", 2, "prod", "--by", "bob")[1] == "prod: version 3 → 2 (promote, move 3, by bob)\n"
    assert versions(uri) == {"latest": 3, "prod": 2}


def test_promote_takes_an_alias_for_the_version_and_makes_a_new_one(run, uri):
    assert (
        run("promote", "prod", "staging", "--by", "x")[1] == "staging: new alias → version 1 (promote, move 1, by x)\n"
    )
    assert versions(uri)["staging"] == 1


def test_promote_to_where_it_stands_moves_nothing_so_that_rollback_still_goes_back(run, document, uri):
    run("promote", "3", "prod")
    found = document("promote", "latest", "prod")
    assert (found["moved"], found["seq"], found["to"]) == (False, 2, 3)
    assert run("promote", "3", "prod")[1].endswith("nothing was moved\n")
    run("rollback", "prod")
    assert versions(uri)["prod"] == 1


def test_rolling_back_twice_goes_two_back_and_no_further(run, document, refusal, uri):
    for version in (2, 3):
        run("promote", version, "prod")
    first = document("rollback", "prod", "--by", "bob")
    assert list(first) == FIELDS
    assert [first[field] for field in ("alias", "seq", "action", "by", "from", "to", "moved")] == [
        "prod", 4, "rollback", "bob", 3, 2, True,
    ]  # fmt: skip
    assert run("rollback", "prod", "--by", "bob")[1] == "prod: version 2 → 1 (rollback, move 5, by bob)\n"
    assert "cannot be rolled back" in refusal("rollback", "prod")
    assert versions(uri) == {"latest": 3, "prod": 1}


def test_promote_json_has_the_fields_of_rollback(document):
    found = document("promote", "2", "prod")
    assert list(found) == FIELDS and found["from"] == 1
    assert document("promote", "2", "new")["from"] is None


def test_a_move_is_by_the_login_name_unless_another_is_given(document, monkeypatch):
    assert document("promote", "2", "prod")["by"] == getpass.getuser()

    def nobody():
        raise KeyError("no such user")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert document("promote", "3", "prod")["by"].startswith("user ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["promote", "9", "prod"], "has no version 9; the newest is 3"),
        (["promote", "nix", "prod"], "has no alias 'nix'; known: latest, prod"),
        (["promote", "3", "7"], "the alias name '7' is refused: a number stands for a version; begin it with a letter"),
        (["promote", "3", "../x"], "the alias name '../x' is refused"),
        (["rollback", "nix"], "has no alias 'nix'; known: latest, prod"),
        (["promote", "3"], "missing argument 'ALIAS' (see promptbank promote --help)"),
    ],
)
def test_what_cannot_be_moved_is_refused_and_nothing_moves(refusal, uri, arguments, sentence):
    assert sentence in refusal(*arguments)
    assert versions(uri) == {"latest": 3, "prod": 1}


def test_prod_can_be_moved_while_latest_is_damaged(run, uri):
    for place in ("versions/3.json", "aliases/latest/3.json"):
        overwrite(uri / place, b"damaged")
    assert run("promote", "2", "prod", "--by", "x")[:2] == (0, "prod: version 1 → 2 (promote, move 2, by x)\n")
    assert run("rollback", "prod", "--by", "x")[:2] == (0, "prod: version 2 → 1 (rollback, move 3, by x)\n")
