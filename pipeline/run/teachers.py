"""Whether a task's teacher can be run: its words have tokens that the model knows, and fit into its context."""

from typing import Any

from transformers import PretrainedConfig

from pipeline.backbone.files import architecture_of, context_length, embedding_rows
from pipeline.corpus.encoding import missing_embedding
from pipeline.corpus.reader import open_split
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.errors import CorpusError, SettingsError
from pipeline.settings import Settings, TaskSettings
from pipeline.tuning.teaching import drawn_examples, teacher_ids, teacher_key
from pipeline.tuning.trials import make_trials


def check_words(name: str, task: TaskSettings, config: PretrainedConfig, tokenizer: Any) -> None:
    """Check a teacher's text before there is a corpus. Raises: SettingsError."""
    if task.teacher is None or task.teacher.text is None:
        return
    ids = teacher_ids(task, None, (), tokenizer, architecture_of(config))
    if not ids:
        raise SettingsError(f"task '{name}': teacher.text {task.teacher.text!r} holds no token; give some words")
    _check_ids(name, task, ids, config, tokenizer)


def check_examples(name: str, settings: Settings, corpus: TaskCorpus, config: PretrainedConfig, tokenizer: Any) -> None:
    """Check the solved rows that teachers see, as each trial draws them.

    Raises: CorpusError, for another day's rows may be fewer or longer, and other tasks have no part in it.
    """
    trials = make_trials(settings, {name: corpus.digest}, "", {})
    with_examples = list({teacher_key(trial): trial for trial in trials if _examples(trial.settings)}.values())
    if not with_examples:
        return
    wanted, rows = _examples(with_examples[0].settings), corpus.counts["train"]["ok"]
    if wanted >= rows:
        raise CorpusError(
            f"task '{name}': teacher.examples {wanted} are all {rows} rows of train, and leave none to learn from; "
            "lower it"
        )
    train = open_split(corpus.splits["train"])
    for trial in with_examples:
        shown = drawn_examples(trial, rows)
        ids = teacher_ids(trial.settings, train, shown, tokenizer, architecture_of(config))
        try:
            _check_ids(name, trial.settings, ids, config, tokenizer)
        except SettingsError as error:
            raise CorpusError(str(error)) from error


def _examples(task: TaskSettings) -> int:
    return (task.teacher.examples or 0) if task.teacher else 0


def _check_ids(name: str, task: TaskSettings, ids: list[int], config: PretrainedConfig, tokenizer: Any) -> None:
    if (reason := missing_embedding(tokenizer, ids, embedding_rows(config))) is not None:
        raise SettingsError(f"task '{name}': the text of its teacher {reason}")
    behind = f"max_input_tokens {task.max_input_tokens}"
    most = len(ids) + task.max_input_tokens
    if not config.is_encoder_decoder:  # an encoder-decoder's targets are not in the encoder's context
        behind += f" + max_target_tokens {task.max_target_tokens}"
        most += task.max_target_tokens
    context = context_length(config)
    if context is not None and most > context:
        raise SettingsError(
            f"task '{name}': a teacher of {len(ids)} tokens + {behind} = {most} is longer than the model's context of "
            f"{context} tokens; shorten teacher.text, or lower teacher.examples or one of them"
        )
