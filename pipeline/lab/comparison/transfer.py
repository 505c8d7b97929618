"""Transfer between tasks: prompts that start from another task's (SPoT, Vu et al. 2022), and their similarity."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np

from pipeline.backbone.files import embedding_rows
from pipeline.lab.comparison.choice import SeedGroup
from pipeline.lab.comparison.derived_settings import with_own_bank
from pipeline.lab.comparison.prompts import TunedPrompts, tune_prompts
from pipeline.lab.comparison.results import PromptSimilarity
from pipeline.lab.comparison.study import Study
from pipeline.run.bank import find_bank
from pipeline.run.checks import check_start
from pipeline.settings import changed_settings
from pipeline.settings.comparing import parts


def tune_from_others(
    study: Study, starts: Mapping[str, tuple[str, ...]], tuned: TunedPrompts, chosen: Mapping[str, SeedGroup]
) -> TunedPrompts | None:
    """Tune tasks again from the best prompts of other tasks, with all else as in each task's best choice.

    None where no prompt to start from was tuned. Raises: PromptBankError.
    """
    tasks = {}
    for task, sources in starts.items():
        there = [source for source in sources if all(part in chosen for part in parts(source))]
        if task in chosen and there:
            members = chosen[task].members
            trial = tuned.trials[members[0].candidate.name]
            prompt = trial.prompt.model_copy(update={"init": "bank", "source": there[0]})
            sweep = {"prompt.source": there, "seed": [member.candidate.seed for member in members]}
            tasks[task] = trial.model_copy(update={"prompt": prompt, "sweep": sweep, "seed": None})
    if not tasks:
        return None
    settings = with_own_bank(study.settings, study.folder)
    plain = {name: task.model_dump(mode="json") for name, task in tasks.items()}
    # Blocks that name tasks which are not tuned here would be refused.
    only = {"tasks": plain, "compare": {}, "refresh": {}}
    settings = changed_settings(settings, **only)
    bank = find_bank(settings)
    for task in tasks:
        check_start(
            task, settings, study.checked.tokenizer, embedding_rows(study.checked.config), bank, study.checked.identity
        )
    return tune_prompts(study, replace(study.checked, settings=settings), "transfer", "transferred prompt")


def prompt_similarities(prompts: Mapping[str, np.ndarray]) -> tuple[PromptSimilarity, ...]:
    """Cosine similarity of the tasks' prompts `[P, H]`, pair by pair (Vu et al. 2022, section 5).

    Lengths may differ. One figure is the cosine of the mean tokens, the other the mean cosine over all pairs of tokens.
    """
    found = []
    for a, b in combinations(prompts, 2):
        pairs = _unit(prompts[a]) @ _unit(prompts[b]).T  # [P_a, P_b]
        means = _unit(prompts[a].mean(0, keepdims=True)) @ _unit(prompts[b].mean(0, keepdims=True)).T
        found.append(PromptSimilarity(a, b, float(means[0, 0]), float(pairs.mean())))
    return tuple(found)


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    unit: np.ndarray = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return unit
