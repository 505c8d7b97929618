"""Prompts of one task in the service of another: as its start (SPoT, Vu et al. 2022), as they are, and how alike."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np

from pipeline.backbone.files import embedding_rows
from pipeline.lab.comparison.choice import Group
from pipeline.lab.comparison.prompts import TunedPrompts, tune_prompts
from pipeline.lab.comparison.results import Likeness
from pipeline.lab.comparison.study import Study, with_own_bank
from pipeline.run.checks import check_start, find_bank
from pipeline.settings import TaskSettings, changed_settings
from pipeline.settings.comparing import parts


def tune_from_others(
    study: Study, starts: Mapping[str, tuple[str, ...]], tuned: TunedPrompts, chosen: Mapping[str, Group]
) -> TunedPrompts | None:
    """Tune tasks anew from the best prompts of others, with all else as in each task's best choice.

    None where there is nothing to start from. Raises: PromptBankError.
    """
    tasks = {}
    for task, sources in starts.items():
        there = [source for source in sources if all(part in chosen for part in parts(source))]
        if task in chosen and there:
            first = chosen[task].members[0].candidate.name
            tasks[task] = _from_others(tuned.trials[first], there, [m.candidate.seed for m in chosen[task].members])
    if not tasks:
        return None
    settings = with_own_bank(study.settings, study.folder)
    plain = {name: task.model_dump(mode="json") for name, task in tasks.items()}
    # What names tasks that are not tuned here has no place.
    only = {"tasks": plain, "compare": {}, "refresh": {}}
    settings = changed_settings(settings, **only)
    bank = find_bank(settings)
    for task in tasks:
        check_start(
            task, settings, study.checked.tokenizer, embedding_rows(study.checked.config), bank, study.checked.identity
        )
    return tune_prompts(study, replace(study.checked, settings=settings), "transfer", "transferred prompt")


def _from_others(trial: TaskSettings, sources: list[str], seeds: list[int | None]) -> TaskSettings:
    prompt = trial.prompt.model_copy(update={"init": "bank", "source": sources[0]})
    sweep = {"prompt.source": sources, "seed": seeds}
    return trial.model_copy(update={"prompt": prompt, "sweep": sweep, "seed": None})


def likeness(prompts: Mapping[str, np.ndarray]) -> tuple[Likeness, ...]:
    """How alike the tasks' prompts `[P, H]` are, two by two (Vu et al. 2022, section 5).

    Lengths may differ: of one the cosine of the mean tokens, of the other the mean cosine over all pairs of tokens.
    """
    found = []
    for a, b in combinations(prompts, 2):
        pairs = _unit(prompts[a]) @ _unit(prompts[b]).T  # [P_a, P_b]
        means = _unit(prompts[a].mean(0, keepdims=True)) @ _unit(prompts[b].mean(0, keepdims=True)).T
        found.append(Likeness(a, b, float(means[0, 0]), float(pairs.mean())))
    return tuple(found)


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    unit: np.ndarray = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return unit
