"""A Ray that does not start is code 5 and a sentence, for the next start may go well."""

import pytest

from pipeline.errors import SettingsError, TuningError
from pipeline.run.terminal import exit_code_of
from pipeline.settings import ClusterSettings
from pipeline.tuning import connection
from pipeline.tuning.connection import connected_ray


def connect() -> None:
    with connected_ray(ClusterSettings()):
        pass


@pytest.mark.parametrize("folder", ["/proc/nothing", "/dev/null/ray"])
def test_a_folder_that_ray_cannot_write_is_named(folder, monkeypatch):
    """Ray itself fails here, before it starts a process."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(TuningError, match=rf"^Ray did not start: {folder}.*RAY_TMPDIR.*again$") as told:
        connect()
    assert exit_code_of(told.value) == 5


TIMED_OUT = "The current node timed out during startup. This could happen because"


# As Ray 2.60 raises them: of its own start, and of a cluster that was named.
@pytest.mark.parametrize(
    ("error", "address", "kind"),
    [
        (Exception(TIMED_OUT), None, TuningError),
        (
            Exception(TIMED_OUT),
            "10.0.0.1:6379",
            TuningError,
        ),
        (RuntimeError("Failed to start GCS."), None, TuningError),
        (ValueError("Attempting to cap object store memory usage at 512 bytes"), None, TuningError),
        (OSError(28, "No space left on device", "/tmp/ray/session_1"), None, TuningError),
        (TimeoutError(), "10.0.0.1:6379", TuningError),
        (ConnectionError("ray client connection timeout\nand more"), "10.0.0.1:6379", SettingsError),
    ],
)
def test_whatever_ray_raises_at_its_start_is_one_sentence(error, address, kind, monkeypatch):
    def fail(**_):
        raise error

    monkeypatch.setattr(connection.ray, "init", fail)
    monkeypatch.setattr(connection, "_wait_for_head", lambda address: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(kind) as told:
        connect()
    assert type(told.value) is kind and "\n" not in str(told.value)
    assert address or "this machine" in str(told.value) or "/tmp/ray" in str(told.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379"])
def test_a_head_that_does_not_answer_is_one_sentence_soon(address, monkeypatch):
    monkeypatch.setattr(connection, "_HEAD_PATIENCE_S", 0.5)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(SettingsError, match=rf"^cluster.address: no Ray cluster answers at {address} \("):
        connect()


def test_what_a_node_reports_never_reaches_stdout_and_a_kill_for_memory_is_one_line(monkeypatch, capsys, caplog):
    """Ray prints it to stdout itself, where `tracking.log: json` has events."""
    from ray._private import worker

    from tests.reporting.test_memory_kill import TOLD

    monkeypatch.setattr(connection.ray, "init", lambda **_: None)
    with connected_ray(ClusterSettings()):
        for text in (TOLD, "a node was lost"):
            worker.print_to_stdstream({"lines": [text], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    killed, lost = caplog.messages
    assert killed.startswith("Ray ended process 4711") and "\n" not in killed
    assert lost == "a node was lost" and capsys.readouterr().out == ""
