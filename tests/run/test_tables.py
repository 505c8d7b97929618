"""The plan before a run and the table after it."""

from dataclasses import dataclass, replace
from io import StringIO

from rich.console import Console

from pipeline.reporting.plan import PlanRow, memory_table, plan_table
from pipeline.run.table import print_results


@dataclass
class TrialResult:
    """What the table asks of a `TaskResult`."""

    trial: str
    task: str
    steps: int
    metric: str
    dev_before: float | None
    dev_after: float | None
    test: float | None
    status: str
    reason: str | None = None
    among: str | None = None
    dev_constant: float | None = None
    test_constant: float | None = None
    withheld: bool = False


TUNED = TrialResult("sst2", "sst2", 100, "accuracy", 0.5, 0.875, None, "tuned")
FAILED = TrialResult("trec-lr0.3", "trec", 7, "accuracy", 0.2, None, None, "failed", "its loss is [not] a number")


def shown(results: list[TrialResult], width: int = 100, terminal: bool = False) -> str:
    console = Console(file=(out := StringIO()), width=width, force_terminal=terminal)
    print_results(console, results)
    return out.getvalue()


def cells(text: str, first: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def test_every_trial_has_a_row_with_its_dev_metric_before_and_after() -> None:
    assert cells(shown([TUNED, FAILED]), "sst2") == ["sst2", "sst2", "100", "accuracy", "0.500", "0.875", "tuned"]


def test_what_was_not_measured_is_a_dash_and_not_zero() -> None:
    assert cells(shown([TUNED, FAILED]), "trec-lr0.3")[4:] == ["0.200", "–", "failed"]


def test_the_test_column_is_there_only_if_a_trial_has_a_test_split() -> None:
    tested = TrialResult("cr", "cr", 50, "f1", 0.1, 0.9, 0.8, "stopped early")
    assert "test" not in shown([TUNED])
    assert cells(shown([TUNED, tested]), "trial")[-2:] == ["test", "status"]
    assert cells(shown([TUNED, tested]), "sst2")[-2:] == ["–", "tuned"]


def test_only_failed_trials_are_explained_under_the_table() -> None:
    no_gain = TrialResult("cr", "cr", 50, "f1", 0.9, 0.8, None, "no gain", "the first prompt was the best")
    assert shown([TUNED, FAILED, no_gain]).splitlines()[-1] == "trec-lr0.3 failed: its loss is [not] a number"
    assert "the first prompt" not in shown([no_gain])


def test_a_sweeps_winner_tells_which_trials_it_was_chosen_from() -> None:
    best = TrialResult("cr.lr-0.1", "cr", 50, "f1", 0.1, 0.9, None, "tuned", among="best of 12 (8 halved)")
    assert cells(shown([best], width=120), "cr.lr-0.1")[-6:] == ["tuned,", "best", "of", "12", "(8", "halved)"]


def test_colour_is_for_terminals_only() -> None:
    assert "\x1b[" in shown([TUNED], terminal=True)
    assert "\x1b[" not in shown([TUNED])


def test_long_names_are_folded_and_never_cut() -> None:
    name = "a-task-with-a-long-name" * 3
    text = shown([TrialResult(name, "t", 1, "f1", 0.0, 0.1, None, "tuned")], width=80)
    assert name in "".join(line[:40].strip().split(" ")[0] for line in text.splitlines())


def plan(tasks: list[PlanRow], memory: dict[str, int], ranks: int) -> str:
    console = Console(file=(out := StringIO()), width=100)
    console.print(plan_table(tasks))
    console.print(memory_table(memory, ranks))
    return out.getvalue()


SST2 = PlanRow("sst2", 6920, 872, None, 2, 100, 16, "accuracy")
TREC = PlanRow("trec", 5452, None, 500, 1, 50, 32, "accuracy", dev_fraction=0.1)


def test_a_plan_sums_rows_trials_and_the_steps_of_all_trials() -> None:
    text = plan([SST2, TREC], {"model": 10**9}, ranks=2)
    assert cells(text, "sst2") == ["sst2", "6,920", "872", "–", "2", "100", "16", "accuracy"]
    assert cells(text, "trec") == ["trec", "5,452", "10%", "of", "train", "500", "1", "50", "32", "accuracy"]
    assert cells(text, "total") == ["total", "12,372", "500", "3", "250"]


def test_a_plan_has_a_column_of_unlabelled_rows_where_a_task_has_some() -> None:
    text = plan([SST2, replace(TREC, unlabelled_rows=9_000)], {"model": 10**9}, ranks=2)
    assert "unlabelled" in text and "unlabelled" not in plan([SST2, TREC], {"model": 10**9}, ranks=2)
    assert cells(text, "sst2")[:5] == ["sst2", "6,920", "872", "–", "–"]
    assert cells(text, "trec")[6:8] == ["9,000", "1"] and cells(text, "total")[3] == "9,000"


def test_a_plan_sums_the_memory_of_a_rank_and_of_all() -> None:
    text = plan([SST2], {"model": 1_500_000_000, "prompts": 500_000_000}, ranks=2)
    assert cells(text[text.index("memory") :], "model") == ["model", "1.50", "GB", "3.00", "GB"]
    assert cells(text[text.index("memory") :], "total") == ["total", "2.00", "GB", "4.00", "GB"]
