"""A fit's results for people."""

from rich.table import Table

from pipeline.lab.benchmark.fit import Fit


def fit_table(fit: Fit) -> Table:
    """One row a rank, in GB; the bound and what it is made of in the title."""
    size = fit.size
    title = (
        f"{fit.shape}, {size.parameters / 1e9:.2f} B parameters ({fit.device})\n"
        f"bound: {_gb(size.int8_bytes)} int8 / {fit.options.ranks} ranks + {_gb(size.layer_bytes)} layer + 1 GiB = "
        f"{_gb(fit.bound)} GB: {'holds' if fit.holds else 'DOES NOT HOLD'}\n"
        f"loading {fit.load_rate / 1e9:.2f} GB/s, plain reading {' and '.join(_gb(rate) for rate in fit.plain_rates)} "
        f"GB/s ({'from disk' if fit.cold else 'from the page cache'}); "
        f"ranks' losses {'agree' if fit.ranks_agree else 'DIFFER'}"
    )
    table = Table(title=title, title_justify="left")
    columns = ["rank", "before", "int8 held", "loading: peak", "anonymous", "training: peak", "anonymous", "files"]
    for column in [*columns, "loading, s", "steps, s"]:
        table.add_column(column)
    for place, rank in enumerate(fit.ranks):
        loading, training = rank.loading, rank.training
        sizes = [
            rank.before.total,
            rank.held["int8"],
            loading.total,
            loading.own,
            training.total,
            training.own,
            training.file,
        ]
        steps = " ".join(f"{seconds:.1f}" for seconds in rank.step_seconds)
        table.add_row(str(place), *map(_gb, sizes), f"{rank.load_seconds:.1f}", steps)
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"
