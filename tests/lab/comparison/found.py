"""Results of an imagined comparison: three tasks, every method, three seeds."""

from collections.abc import Callable
from itertools import product

import numpy as np

from pipeline.lab.comparison import tables
from pipeline.lab.comparison.candidates import Candidate, Cost, MeasuredCandidate
from pipeline.lab.comparison.choice import choose_best, group_over_seeds
from pipeline.lab.comparison.questions import SplitAnswers
from pipeline.lab.comparison.results import PromptSimilarity, Results, TaskFacts, TransferCell

TASKS = ("sst2", "trec", "a task with <a long> name")
METRICS = dict.fromkeys(TASKS, "accuracy")


def candidates() -> list[MeasuredCandidate]:
    """Hard prompts, prompts of two lengths and two initialisations, prompts from elsewhere, and LoRA."""
    rng, out = np.random.default_rng(0), []

    def add(method, task, choice, seed, level, cost):
        name = f"{method}.{task}.{choice}.{seed}".replace(" ", "-")
        value = float(np.clip(level + rng.normal(0, 0.03), 0, 1))
        out.append(MeasuredCandidate(Candidate(name, method, task, choice, seed), value, 1 - value, cost))

    for place, task in enumerate(TASKS):
        base = 0.55 + 0.1 * place
        add("hard prompt", task, {"shots": 0}, None, base - 0.05, Cost(stored_bytes=30, prompt_tokens=7))
        for seed in range(3):
            add("hard prompt", task, {"shots": 4}, seed, base, Cost(stored_bytes=600, prompt_tokens=140))
            for length, init in product((1, 20), ("random", "class_labels")):
                cost = Cost(length * 576, length * 576 * 4, 40.0, 2**30, length)
                choice = {"prompt.length": length, "prompt.init": init}
                add("prompt tuning", task, choice, seed, base + 0.05 + length / 100, cost)
            if place:
                cost = Cost(20 * 576, 20 * 576 * 4, 41.0, 2**30, 20)
                add("transferred prompt", task, {"prompt.source": "sst2"}, seed, base + 0.2, cost)
            cost = Cost(460_800, 1_843_200, 300.0, 2**31)
            add("LoRA", task, {"rank": 8, "lr": 0.001}, seed, base + 0.28, cost)
    return out


def answered(value: float, rows: int = 200) -> SplitAnswers:
    """Answers of which so large a share is right."""
    right = round(min(max(value, 0.0), 1.0) * rows)
    targets, texts = ["yes"] * rows, ["yes"] * right + ["no"] * (rows - right)
    scores = np.array([[0.0, -1.0] if text == "yes" else [-1.0, 0.0] for text in texts])
    return SplitAnswers(np.full(rows, 1 - value), np.full(rows, 2), targets, texts, scores, ("yes", "no"))


def nothing_seen(source: str, on: str, split: str) -> np.ndarray:
    return np.zeros(200, bool)


def results(
    measured: list[MeasuredCandidate] | None = None, on_test: Callable[[float], float] = lambda dev: dev - 0.01
) -> Results:
    """From candidates whose test metric follows from their dev metric."""
    measured = candidates() if measured is None else measured
    answers = {(m.candidate.name, m.candidate.task, "test"): answered(on_test(m.value)) for m in measured}
    answers |= {(m.candidate.name, m.candidate.task, "dev"): answered(m.value) for m in measured}
    answers |= {
        (m.candidate.name, "trec", "test"): answered(m.value - 0.1) for m in measured if m.candidate.task == "sst2"
    }
    groups = group_over_seeds(measured)
    chosen = choose_best(groups, METRICS)
    judged = tables.CountedAnswers(answers, METRICS, nothing_seen)
    pairs = [(a, b) for i, a in enumerate(TASKS) for b in TASKS[i + 1 :]]
    return Results(
        run="example",
        model="smollm2-135m",
        weights="int8",
        backbone="0123456789abcdef",
        parameters=134_515_008,
        ranks=2,
        device="two cores",
        started=1_770_000_000.0,
        ended=1_770_007_200.0,
        tasks=tuple(
            TaskFacts(t, "accuracy", ("yes", "no"), {"train": 5000, "dev": 500, "test": 800}, {"dev": 500, "test": 800})
            for t in TASKS
        ),
        numbers=tuple(tables.candidate_rows(groups, chosen, judged)),
        rows=tuple(tables.method_rows(groups, chosen, judged)),
        ensembles=tuple(tables.ensemble_rows(chosen, judged)),
        transfer=tuple(
            TransferCell(a, 0, b, "test", 0.9 - 0.1 * abs(i - j), 0.4, (i + j) % 2 == 0, 200 - 30 * i, 30 * i)
            for i, a in enumerate(TASKS)
            for j, b in enumerate(TASKS)
        ),
        likeness=tuple(PromptSimilarity(a, b, 0.8 - 0.5 * i, 0.05 - 0.04 * i) for i, (a, b) in enumerate(pairs)),
        starts=tuple(tables.start_rows(groups, chosen, judged)),
        shifts=tuple(tables.shift_rows({"sst2": ("trec",)}, chosen, judged)),
        panels=tuple(tables.panel(key, groups, judged) for key in ("prompt.length", "prompt.init")),
        left_out={"mpqa": "its train split has no row"},
        libraries={"torch": "2.13.0"},
        settings={"run": {"name": "example"}},
    )
