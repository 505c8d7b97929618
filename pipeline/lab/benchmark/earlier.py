"""An earlier commit of this project as a side of a benchmark: what changed since then, in one run.

Its code runs in processes of its own, from a checkout such as `git worktree add ../earlier COMMIT` makes.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import SettingsError
from pipeline.lab.benchmark.side_by_side import Side

_TIMEOUT = 3600
_RUN = """
if __name__ == "__main__":
    import json, sys
    from dataclasses import asdict
    from pathlib import Path
    from {package}.bench import open_bench
    from {package}.work import WorkOptions
    given = json.loads(sys.argv[1])
    work = WorkOptions(**given["work"])
    bench = open_bench(given["model"], Path(given["data"]), given["names"], work, *given["counts"])
    side = asdict(bench.ours()())
    side["prompts"] = []
    Path(given["out"]).write_text(json.dumps(side))
"""


def earlier_side(
    checkout: Path, data: Path, names: Sequence[str], model: str, work: dict[str, Any], counts: Sequence[int]
) -> Callable[[], Side]:
    """A side that does the work of `open_bench` with the code of another checkout, in this environment.

    counts: steps, ranks and threads. Raises: SettingsError for a folder without this project's code.
    """
    if not (checkout / "pipeline").is_dir():
        raise SettingsError(f"{checkout} holds no checkout of this project; make one: git worktree add FOLDER COMMIT")

    # Not by trying to import it: an installation of this checkout would lend its own laboratory to the earlier code.
    package = "pipeline.lab.benchmark" if (checkout / "pipeline/lab").is_dir() else "pipeline.benchmark"

    def run() -> Side:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "side.json"
            given = {"data": str(data.resolve()), "names": list(names), "model": model, "work": work}
            text = json.dumps({**given, "counts": list(counts), "out": str(out)})
            # The script is a file: processes that it starts import it again, and find the same code.
            script = Path(folder) / "side.py"
            script.write_text(_RUN.replace("{package}", package))
            environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
            subprocess.run(
                [sys.executable, str(script), text], env=environment, cwd=checkout, check=True, timeout=_TIMEOUT
            )
            return Side(**json.loads(out.read_text()))

    return run
