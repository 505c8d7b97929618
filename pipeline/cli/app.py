"""All commands in one typer application, which turns errors into one sentence each."""

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.cli import backbones, exporting, history, importing, listing, maintenance, moves, output, saving
from pipeline.cli.runs import runs
from pipeline.errors import PromptBankError


class Commands(TyperGroup):
    """Ends with one sentence and exit code 2 on a user's mistake, also when a test starts the commands."""

    def main(self, *args: Any, **options: Any) -> Any:
        output.escape_unencodable()
        try:
            sys.exit(super().main(*args, **{**options, "standalone_mode": False}))
        except PromptBankError as error:
            _fail(str(error))
        except typer.TyperException as error:
            message = error.format_message()
            sentence = message[:1].lower() + message[1:].rstrip(".").replace("Value error, ", "")
            context = getattr(error, "ctx", None)
            _fail(f"{sentence} (see {context.command_path if context else 'promptbank'} --help)")


def _fail(sentence: str) -> None:
    output.write_error(f"error: {sentence}")
    sys.exit(2)


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,  # plain help: it reads the same on a terminal, in a pipe and in a pager
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    epilog="""Name the bank by --bank, or once for all commands by the variable PROMPT_BANK_URI:

\b
export PROMPT_BANK_URI=quickstart/bank
promptbank ls
promptbank show sst2@prod
promptbank promote 12 prod

Exit codes: 0 all is well; 1 a problem was found (verify, log); 2 a mistake, explained in one sentence on stderr.""",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        output.write(f"promptbank {version('promptbank')}\n")
        raise typer.Exit


@app.callback()
def promptbank(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Look at a prompt bank and at runs, move aliases, maintain a bank, and exchange prompts with other tools."""
    if context.invoked_subcommand is None:
        output.write(context.get_help() + "\n")


_COMMANDS: dict[str, Callable[..., None]] = {
    "ls": listing.list_prompts,
    "show": listing.show_prompt,
    "log": history.show_log,
    "diff": history.show_differences,
    "promote": moves.promote,
    "rollback": moves.rollback,
    "verify": maintenance.verify,
    "gc": maintenance.collect_garbage,
    "export": exporting.export_prompt,
    "import": importing.import_prompt,
    "same-backbone": backbones.same_backbone,
    "save-model": saving.save_model,
}
for name, command in _COMMANDS.items():
    app.command(name)(command)
app.add_typer(runs, name="runs")
