"""Plots that the documentation shows."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from pipeline.lab.benchmark.side_by_side import SidesResult

matplotlib.use("svg")


def plot_growth(counts: Sequence[int], result: SidesResult, path: Path) -> None:
    """Tokens a second and memory by the number of trials in one run."""
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, values, label in (
        (speed, result.rates, "text tokens a second"),
        (memory, result.peak_mib, "peak memory of all ranks, MiB"),
    ):
        axis.plot(counts, [max(values[side]) for side in values], marker="o", color="#0072b2")
        axis.set_xscale("log", base=4)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("trials in one run")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
