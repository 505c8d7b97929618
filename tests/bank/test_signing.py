"""Signed manifests: with trusted keys, nothing unsigned, forged or foreign is read or published."""

import subprocess

import pytest

from pipeline.bank import PromptBank
from pipeline.errors import BankError
from tests.bank.test_integrity import overwrite

pytestmark = pytest.mark.processes


def make_key(folder, name):
    """A key pair made as the documentation says."""
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return {name: make_key(folder, name) for name in ("ours", "theirs")}


@pytest.fixture
def signed(uri, keys, new_prompt, publish):
    private, public = keys["ours"]
    bank = PromptBank.open(uri, create=True, trusted_keys=[public], signing_key=private)
    publish(bank, new_prompt())
    return uri


@pytest.mark.processes
def test_what_a_trusted_key_signed_is_read_with_and_without_the_key(signed, keys, new_prompt):
    for trusted in ([], [keys["ours"][1]], [keys["theirs"][1], keys["ours"][1]]):
        assert (PromptBank.open(signed, trusted_keys=trusted).load("sst2").array == new_prompt().array).all()


def test_a_manifest_without_a_signature_or_by_another_key_is_refused_by_name(
    signed, bank, uri, keys, new_prompt, publish
):
    with pytest.raises(BankError, match=r"versions/1\.json is refused: .*which is not trusted"):
        PromptBank.open(signed, trusted_keys=[keys["theirs"][1]])
    publish(bank, new_prompt("cr"))  # by someone without a key
    with pytest.raises(BankError, match=r"versions/2\.json is refused: it is not signed"):
        PromptBank.open(uri, trusted_keys=[keys["ours"][1]])
    assert PromptBank.open(uri).version == 2


def test_verify_asks_for_signatures_when_keys_are_trusted(signed, bank, uri, keys, new_prompt, publish):
    trusting = PromptBank.open(signed, trusted_keys=[keys["ours"][1]])
    publish(bank, new_prompt("cr"))
    assert [problem.split("/")[-1] for problem in trusting.verify().problems] == [
        "2.json is refused: it is not signed, and this bank is opened with trusted keys"
    ]


@pytest.mark.parametrize("place", [0, 40, 85])
def test_a_signature_with_one_other_character_is_refused(signed, keys, place):
    path = signed / "versions/1.json"
    data = path.read_bytes()
    at = data.index(b'"ed25519":"') + 11 + place
    other = b"A" if data[at : at + 1] != b"A" else b"Q"
    overwrite(path, data[:at] + other + data[at + 1 :])
    with pytest.raises(BankError, match=r"versions/1\.json is refused: its signature is wrong"):
        PromptBank.open(signed, trusted_keys=[keys["ours"][1]])


def test_a_signature_does_not_pass_for_other_contents(signed, keys):
    path = signed / "versions/1.json"
    first, _, body = path.read_bytes().partition(b"\n")
    from pipeline.bank.sealed import seal

    forged = seal(body.replace(b'"run":"nightly"', b'"run":"evening"')).partition(b"\n")
    signature = first[first.index(b'"signature"') :]
    overwrite(path, forged[0] + signature + b"\n" + forged[2])
    with pytest.raises(BankError, match="it was replaced"):
        PromptBank.open(signed, trusted_keys=[keys["ours"][1]])
    with pytest.raises(BankError, match="its signature is wrong"):
        PromptBank.open(signed, alias="none", create=True, trusted_keys=[keys["ours"][1]]).at("1")


def test_publishing_without_the_key_or_with_one_that_readers_refuse_is_refused_before_writing(
    signed, keys, new_prompt, publish
):
    before = sorted(signed.rglob("*"))
    with pytest.raises(BankError, match="a signing key is needed too"):
        publish(PromptBank.open(signed, trusted_keys=[keys["ours"][1]]), new_prompt(value=2))
    with pytest.raises(BankError, match="is not among the trusted keys"):
        PromptBank.open(signed, trusted_keys=[keys["ours"][1]], signing_key=keys["theirs"][0])
    assert sorted(signed.rglob("*")) == before


@pytest.mark.parametrize(("argument", "index"), [("trusted_keys", 1), ("signing_key", 0)])
@pytest.mark.processes
def test_files_that_are_no_such_key_get_one_sentence(uri, tmp_path, keys, argument, index):
    rsa = tmp_path / "rsa.key"
    subprocess.run(["openssl", "genpkey", "-algorithm", "rsa", "-out", rsa], check=True, capture_output=True)
    public = tmp_path / "rsa.pub"
    subprocess.run(["openssl", "pkey", "-in", rsa, "-pubout", "-out", public], check=True, capture_output=True)
    (tmp_path / "text").write_text("no key")
    for path, sentence in (
        ((rsa, public)[index], "is not an Ed25519"),
        (tmp_path / "text", "in PEM"),
        (tmp_path / "missing", "cannot read the key .*: No such file"),
    ):
        value = [path] if argument == "trusted_keys" else path
        with pytest.raises(BankError, match=sentence):
            PromptBank.open(uri, create=True, **{argument: value})
