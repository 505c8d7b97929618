"""Find mistakes in a comparison's settings before anything is tuned."""

from collections.abc import Iterator

from pipeline.backbone.loading import build_skeleton
from pipeline.errors import SettingsError
from pipeline.lab.comparison.adapter import add_adapter
from pipeline.lab.comparison.study import Study
from pipeline.run.checks import CheckedRun


def check_model(checked: CheckedRun) -> None:
    """Check what concerns the model and the tasks' inputs. Raises: SettingsError."""
    chat = next((name for name, task in checked.settings.tasks.items() if not isinstance(task.input, str)), None)
    if chat is not None and checked.settings.compare.hard_prompts is not None:
        raise SettingsError(
            f"compare.hard_prompts: the input of '{chat}' is a chat, before which no text can stand; leave hard "
            "prompts out, or compare them on tasks whose input is one text"
        )
    if checked.settings.compare.lora is not None:
        add_adapter(build_skeleton(checked.config, int8=False), checked.settings.compare.lora)


def check_corpora(study: Study) -> None:
    """Check what concerns the tasks' rows. Raises: SettingsError with a sentence for each mistake."""
    mistakes = [*_shots(study), *_shifts(study)]
    if mistakes:
        raise SettingsError("\n".join(mistakes))


def _shots(study: Study) -> Iterator[str]:
    hard = study.settings.compare.hard_prompts
    most = max(hard.shots, default=0) if hard is not None else 0
    for task, corpus in study.corpora.items():
        rows = corpus.counts["train"]["ok"]
        if most > rows:
            yield f"compare.hard_prompts.shots: {most} is more than the {rows} train rows of '{task}'; lower it"


def _shifts(study: Study) -> Iterator[str]:
    for task, others in study.settings.compare.domain_shift.items():
        for on in others:
            if task not in study.corpora or on not in study.corpora:
                continue  # a task that was left out, which is reported elsewhere
            here, corpus = f"compare.domain_shift.{task}", study.corpora[on]
            if "test" not in corpus.splits:
                yield f"{here}: '{on}' has no test split to be tested on; give it one, or leave it out"
            own, theirs = study.corpora[task].labels, corpus.labels
            if set(own or ()) != set(theirs or ()):
                yield (
                    f"{here}: '{on}' has the labels {_told(theirs)} and '{task}' {_told(own)}; name tasks of the same "
                    "labels (for others there is compare.transfer.matrix)"
                )


def _told(labels: tuple[str, ...] | None) -> str:
    return ", ".join(map(repr, labels or ())) or "none"
