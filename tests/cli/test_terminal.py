"""The command as a process: what it imports, where it writes, its colours, and how it ends."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.conftest import COMMAND, ROOT, environment, start

pytestmark = pytest.mark.processes

READING = [["ls"], ["show", "sst2"], ["log"], ["log", "prod"], ["diff", "1", "3"], ["verify"], ["gc", "--dry-run"]]


def on_terminal(*arguments: str, **changes: str) -> str:
    """What the command writes to a terminal of 200 columns."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*COMMAND, *arguments], stdout=theirs, stderr=theirs, cwd=ROOT,
        env=environment(COLUMNS="200", TERM="xterm-256color", **changes),
    )  # fmt: skip
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 65536):
            written += chunk
    except OSError:  # Linux' end of file of a terminal
        pass
    os.close(ours)
    assert child.wait() == 0
    return written.decode()


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_neither_torch_nor_transformers_nor_pyarrow_is_imported(uri, command):
    code = (
        "import sys; from pipeline.cli.app import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'ray', 'pyarrow', 'obstore'} & set(sys.modules)), file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, *command, "--bank", str(uri)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_in_a_pipe_there_is_no_colour_no_frame_and_no_end_of_line_at_80(uri, command):
    done = start(*command, "--bank", uri, FORCE_COLOR="1", COLUMNS="40", TERM="xterm-256color")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout and not set("─│┃╭…") & set(done.stdout)
    assert done.stdout == start(*command, "--bank", uri).stdout


def test_on_a_terminal_there_are_tables_and_colours_and_remarks_unless_NO_COLOR_is_set(uri):
    coloured = on_terminal("ls", "--bank", str(uri))
    assert "\x1b[32mtuned" in coloured and "───" in coloured and "3 prompts of version 3" in coloured
    plain = on_terminal("ls", "--bank", str(uri), NO_COLOR="1")
    assert "\x1b[3" not in plain and "tuned" in plain and "───" in plain
    assert "trec kept: no step was better" in plain
    assert "undo: promptbank rollback prod" in on_terminal("promote", "3", "prod", "--bank", str(uri))
    json.loads(on_terminal("ls", "--json", "--bank", str(uri)))


def test_verify_tells_on_the_terminal_how_far_it_is(uri):
    assert "verifying" in on_terminal("verify", "--bank", str(uri))


@pytest.mark.parametrize("command", ["ls", "ls --json", "log prod", "verify"])
def test_a_reader_that_has_left_ends_the_command_without_a_word(uri, command):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, *command.split(), "--bank", str(uri)],
        stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(), check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_sentence(uri):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "ls", "--bank", str(uri)],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(), check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: cannot write the output: No space left on device\n")


def test_ctrl_c_ends_the_command_without_a_traceback(uri):
    code = (
        "import time; from pipeline.bank import PromptBank; from pipeline.cli.main import main\n"
        "def verify(self, step): print('started', flush=True); time.sleep(60)\n"
        "PromptBank.verify = verify\nmain()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, "verify", "--bank", str(uri)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a script starts with `&`
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "started\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=20)
    assert (child.returncode, stderr) == (130, "")


def test_the_bank_the_alias_and_keys_may_come_from_the_environment(uri):
    done = start("ls", "--json", PROMPT_BANK_URI=str(uri), PROMPT_BANK_ALIAS="prod")
    assert json.loads(done.stdout)["version"] == 1
    done = start("ls", PROMPT_BANK_URI=str(uri), PROMPT_BANK_TRUSTED_KEYS=os.pathsep.join(["/nowhere", "/nowhere2"]))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "cannot read the key /nowhere:" in done.stderr


def test_what_the_library_warns_of_is_a_line_on_stderr(uri):
    done = start("ls", "--json", "--bank", uri, "--cache", "/dev/null/x")
    assert done.returncode == 0 and json.loads(done.stdout)["version"] == 3
    assert {line.partition(":")[0] for line in done.stderr.splitlines()} == {"warning"}


def test_a_bank_that_is_not_named_is_asked_for():
    for command in (["ls"], ["show", "x"], ["log"], ["verify"], ["gc"], ["rollback", "x"]):
        done = start(*command)
        assert (done.returncode, done.stdout, done.stderr) == (
            2,
            "",
            "error: no bank is named: add --bank FOLDER (or --bank s3://bucket/prompts), or set PROMPT_BANK_URI\n",
        )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sho"], "no such command 'sho'. Did you mean 'show'? (see promptbank --help)"),
        (
            ["ls", "--versoin"],
            "no such option: --versoin (Possible options: --json, --version) (see promptbank ls --help)",
        ),
        (
            ["ls", "--status", "x"],
            "'x' is not one of 'tuned', 'carried_forward', 'kept', 'failed', 'not_learned' (see promptbank ls",
        ),
        (["log", "--last", "0"], "(see promptbank log --help)"),
    ],
)
def test_a_mistyped_command_is_one_sentence_too(words, sentence):
    done = start(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and sentence in done.stderr


def test_without_a_command_there_is_the_help(uri):
    bare, asked = start(), start("--help")
    assert (bare.returncode, bare.stdout) == (0, asked.stdout) and "promptbank show sst2@prod" in bare.stdout


@pytest.mark.parametrize(
    "command",
    [
        *[
            "ls",
            "show",
            "log",
            "diff",
            "promote",
            "rollback",
            "verify",
            "gc",
            "export",
            "import",
            "same-backbone",
            "save-model",
        ]
    ],
)
def test_every_command_has_examples_and_a_summary_that_fits_its_line(command):
    help_text = start(command, "--help").stdout
    assert f"Examples:\n\n  promptbank {command}" in help_text
    line = next(line for line in start("--help").stdout.splitlines() if line.startswith(f"  {command} "))
    assert not line.endswith("...")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("promptbank show ", ["cr", "sst2", "trec"]),
        ("promptbank show s", ["sst2"]),
        ("promptbank show sst2@", ["sst2@latest", "sst2@prod", "sst2@3", "sst2@2", "sst2@1"]),
        ("promptbank show sst2@p", ["sst2@prod"]),
        ("promptbank diff ", ["latest", "prod", "3", "2", "1"]),
        ("promptbank rollback ", ["latest", "prod"]),
        ("promptbank ls --alias p", ["prod"]),
        ("promptbank log --last 3 ", ["latest", "prod"]),
        ("promptbank export sst2 x --to ", ["peft", "npy", "vllm", "llama-cpp", "sglang"]),
    ],
)
def test_a_shell_is_offered_what_the_bank_holds(uri, words, offered):
    asked = {"_PROMPTBANK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = start(PROMPT_BANK_URI=str(uri), **asked)
    assert (done.stdout.split(), done.stderr) == (offered, "")


def test_a_shell_is_offered_what_the_bank_holds_that_is_named_before(uri):
    words = f"promptbank rollback --bank {uri} p"
    done = start(_PROMPTBANK_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD="4")
    assert (done.stdout.split(), done.stderr) == (["prod"], "")


def test_a_path_that_is_no_text_is_printed_all_the_same(uri, tmp_path):
    odd = os.fsencode(tmp_path / "caf") + b"\xe9"
    os.symlink(uri, odd)
    for words in (["ls", "--json"], ["ls", "--json", "--version", "9"], ["show", "sst2"]):
        arguments = [*COMMAND, *words, "--bank", odd]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
        assert "caf\\udce9" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_shell_is_offered_nothing_and_told_nothing_where_there_is_no_bank(tmp_path):
    asked = {"_PROMPTBANK_COMPLETE": "complete_bash", "COMP_WORDS": "promptbank show ", "COMP_CWORD": "2"}
    done = start(PROMPT_BANK_URI=str(tmp_path / "x"), **asked)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_without_its_packages_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from pipeline.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: this command needs two more packages: pip install 'promptbank[cli]'\n",
    )
