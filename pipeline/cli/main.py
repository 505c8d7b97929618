"""The entry point of the command `promptbank`."""

import logging
import sys


def main() -> None:
    """Run the command that `sys.argv` asks for, and exit. 0: fine; 1: something was found; 2: a mistake of the user."""
    logging.basicConfig(format="warning: %(message)s")
    try:
        from pipeline.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich"):
            raise
        print("error: this command needs two more packages: pip install 'promptbank[cli]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    app(prog_name="promptbank")


if __name__ == "__main__":
    main()
