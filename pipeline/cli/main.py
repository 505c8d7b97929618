"""The entry point of the command `promptbank`."""

import logging
import sys


def main() -> None:
    """Run the command in `sys.argv` and exit: 0 all is well, 1 a problem was found, 2 the user made a mistake."""
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
