"""Make the tables of a comparison from measured candidates, choices and answers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.lab.comparison import ensembles
from pipeline.lab.comparison.answers import AnswersByKey
from pipeline.lab.comparison.candidates import METHODS, MeasuredCandidate, choice_text
from pipeline.lab.comparison.choice import SeedGroup, choose_best, spread
from pipeline.lab.comparison.overlap import SeenRows, unseen_answers
from pipeline.lab.comparison.questions import Split, SplitAnswers
from pipeline.lab.comparison.results import (
    CandidateRow,
    EnsembleRow,
    Mean,
    MethodRow,
    Panel,
    PanelPoint,
    ShiftRow,
    StartRow,
    TransferCell,
)
from pipeline.lab.comparison.study import Study
from pipeline.settings.sweeps import SweptKey
from pipeline.tuning.evaluate import score_texts

Chosen = Mapping[tuple[str, str], SeedGroup]
"""By (method, task)."""


@dataclass(frozen=True)
class CountedAnswers:
    """The answers that count: not those to rows of another task that the training has seen."""

    answers: AnswersByKey
    metrics: Mapping[str, str]
    """Of each task."""
    seen: SeenRows

    def of(
        self, one: MeasuredCandidate, on: str, split: Split, sources: Collection[str] | None = None
    ) -> SplitAnswers | None:
        """The counted answers. sources: tasks whose rows count as seen; by default those that it was trained on."""
        given = self.answers.get((one.candidate.name, on, split))
        if given is None:
            return None
        return unseen_answers(given, one.candidate.trained_on if sources is None else sources, on, split, self.seen)

    def rows(
        self, one: MeasuredCandidate, on: str, split: Split, sources: Collection[str] | None = None
    ) -> tuple[int, int]:
        """How many rows count, and how many do not because the training has seen them."""
        asked, counted = self.answers.get((one.candidate.name, on, split)), self.of(one, on, split, sources)
        left = 0 if counted is None else len(counted.nll)
        return left, (0 if asked is None else len(asked.nll)) - left


def candidate_rows(groups: Sequence[SeedGroup], chosen: Chosen, judged: CountedAnswers) -> list[CandidateRow]:
    """A row for every candidate, on its own task."""
    return [_number(one, _is_chosen(group, chosen), judged) for group in _in_order(groups) for one in group.members]


def method_rows(groups: Sequence[SeedGroup], chosen: Chosen, judged: CountedAnswers) -> list[MethodRow]:
    """A row for every choice of every method, on every task."""
    return [_row(group, _is_chosen(group, chosen), judged) for group in _in_order(groups)]


def start_rows(groups: Sequence[SeedGroup], chosen: Chosen, judged: CountedAnswers) -> list[StartRow]:
    """What starting from other tasks' prompts gains, on the same test rows."""
    found = []
    for group in groups:
        plain = chosen.get(("prompt tuning", group.task))
        if group.method != "transferred prompt" or plain is None or not group.succeeded:
            continue
        first = group.succeeded[0]
        started = _test(group.succeeded, group.task, judged)
        without = _test(plain.succeeded, group.task, judged, first.candidate.trained_on)
        if started is not None and without is not None:
            source = str(group.choice["prompt.source"])
            found.append(StartRow(group.task, source, without, started, *judged.rows(first, group.task, "test")))
    return found


def ensemble_rows(chosen: Chosen, judged: CountedAnswers) -> list[EnsembleRow]:
    """Ensembles of the seeds of every task's best choice, on dev and on test."""
    found = []
    for (method, task), group in chosen.items():
        if method != "prompt tuning" or len(group.succeeded) < 2:
            continue
        best = group.best(judged.metrics[task])
        assert best is not None
        splits: tuple[Split, ...] = ("dev", "test")
        for split in splits:
            members = [judged.of(one, task, split) for one in group.succeeded]
            there = [member for member in members if member is not None]
            if len(there) == len(members):
                place = group.succeeded.index(best)
                found.append(_ensemble(task, split, group, there, place, judged.metrics[task]))
    return found


def transfer_cells(best: Mapping[str, MeasuredCandidate], judged: CountedAnswers, study: Study) -> list[TransferCell]:
    """Every task's best prompt on every task."""
    cells = []
    for task, one in best.items():
        for on, corpus in study.corpora.items():
            split = last_split(study, on)
            given = judged.of(one, on, split)
            if given is None:
                continue
            same = set(study.corpora[task].labels or ()) == set(corpus.labels or ())
            value, seed = given.value(judged.metrics[on]), one.candidate.seed or 0
            cells.append(TransferCell(task, seed, on, split, value, given.loss, same, *judged.rows(one, on, split)))
    return cells


def shift_rows(shifts: Mapping[str, Sequence[str]], chosen: Chosen, judged: CountedAnswers) -> list[ShiftRow]:
    """Each method's best choice on a task, on test rows of that task and of others; the same rows for all methods."""
    found = []
    for task, others in shifts.items():
        of_method = {method: chosen[method, task] for method in METHODS if (method, task) in chosen}
        sources = {source for group in of_method.values() for source in group.members[0].candidate.trained_on}
        for method, group in of_method.items():
            for on in (task, *others):
                if on not in judged.metrics:
                    continue
                test = _test(group.succeeded, on, judged, sources)
                if test is not None:
                    counted = judged.rows(group.succeeded[0], on, "test", sources)
                    found.append(ShiftRow(method, task, on, choice_text(group.choice), test, *counted))
    return found


def panel(key: SweptKey, groups: Sequence[SeedGroup], judged: CountedAnswers) -> Panel:
    """The test metric over a swept key. At each of its values, other keys are those with the best mean dev metric."""
    of_value: dict[tuple[str, str], list[SeedGroup]] = {}
    for group in groups:
        if group.method == "prompt tuning" and key in group.choice:
            of_value.setdefault((group.task, repr(group.choice[key])), []).append(group)
    points = []
    for (task, _), own in of_value.items():
        best = choose_best(own, judged.metrics).get(("prompt tuning", task))
        if best is None:
            continue
        dev = _dev(best)
        assert dev is not None
        test = _test(best.succeeded, task, judged)
        points.append(PanelPoint(task, best.choice[key], choice_text(best.choice), dev, test))
    return Panel(key, tuple(points))


def last_split(study: Study, task: str) -> Split:
    """The split that prompts of other tasks answer."""
    return "test" if "test" in study.corpora[task].splits else "dev"


def _in_order(groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    return sorted(groups, key=lambda group: METHODS.index(group.method))


def _is_chosen(group: SeedGroup, chosen: Chosen) -> bool:
    return chosen.get((group.method, group.task)) is group


def _number(one: MeasuredCandidate, is_chosen: bool, judged: CountedAnswers) -> CandidateRow:
    candidate, task = one.candidate, one.candidate.task
    test = judged.of(one, task, "test")
    return CandidateRow(
        name=candidate.name,
        method=candidate.method,
        task=task,
        choice=dict(candidate.choice),
        written_choice=choice_text(candidate.choice),
        seed=candidate.seed,
        chosen=is_chosen,
        dev=None if one.failed else one.value,
        dev_loss=None if one.failed else one.loss,
        test=None if test is None else test.value(judged.metrics[task]),
        test_loss=None if test is None else test.loss,
        failed=one.failed,
        **_costs(one),
    )


def _row(group: SeedGroup, is_chosen: bool, judged: CountedAnswers) -> MethodRow:
    counted = group.succeeded or group.members
    costs = [_costs(one) for one in counted]
    peaks = [cost["peak_bytes"] for cost in costs if cost["peak_bytes"] is not None]
    return MethodRow(
        method=group.method,
        task=group.task,
        choice=dict(group.choice),
        written_choice=choice_text(group.choice),
        chosen=is_chosen,
        dev=_dev(group),
        test=_test(group.succeeded, group.task, judged),
        seen=judged.rows(counted[0], group.task, "test")[1],
        trained_parameters=costs[0]["trained_parameters"],
        stored_bytes=max(cost["stored_bytes"] for cost in costs),
        rank_seconds=sum(cost["rank_seconds"] for cost in costs) / len(costs),
        peak_bytes=max(peaks) if peaks else None,
        prompt_tokens=max(cost["prompt_tokens"] for cost in costs),
        failed=len(group.members) - len(group.succeeded),
    )


def _costs(one: MeasuredCandidate) -> dict[str, Any]:
    return {key: getattr(one.cost, key) for key in one.cost.__dataclass_fields__}


def _dev(group: SeedGroup) -> Mean | None:
    return _mean([member.value for member in group.succeeded], group.succeeded)


def _test(
    members: Sequence[MeasuredCandidate], on: str, judged: CountedAnswers, sources: Collection[str] | None = None
) -> Mean | None:
    given = [judged.of(one, on, "test", sources) for one in members]
    there = [answered.value(judged.metrics[on]) for answered in given if answered is not None]
    return _mean(there, members) if len(there) == len(members) else None


def _mean(values: Sequence[float], members: Sequence[MeasuredCandidate]) -> Mean | None:
    found = spread(values)
    if found is None:
        return None
    return Mean(found.mean, found.deviation, tuple(one.candidate.seed for one in members), tuple(values))


def _ensemble(
    task: str, split: str, group: SeedGroup, members: Sequence[SplitAnswers], best: int, metric: str
) -> EnsembleRow:
    values = [member.value(metric) for member in members]
    alone = _mean(values, group.succeeded)
    assert alone is not None
    average, most = ensembles.average(members), ensembles.majority(members)
    targets = members[0].targets
    return EnsembleRow(
        task=task,
        split=split,
        seeds=alone.seeds,
        members=alone,
        best=values[best],
        average=None if average is None else score_texts(metric, average, targets),
        majority=None if most is None else score_texts(metric, most, targets),
    )
