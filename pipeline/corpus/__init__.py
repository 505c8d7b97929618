"""Parquet -> text-to-text pairs -> token shards. Importing this package loads neither ray nor transformers."""

from pipeline.corpus.encoding import Architecture, TokenizerSpec, encode_inputs, encode_targets, load_tokenizer
from pipeline.corpus.reader import SplitRef, open_split
from pipeline.corpus.task_corpus import TaskCorpus, TaskPlan, check_task, prepare_task, prepare_tasks
from pipeline.corpus.token_set import TokenSet

__all__ = [
    "Architecture",
    "SplitRef",
    "TaskCorpus",
    "TaskPlan",
    "TokenSet",
    "TokenizerSpec",
    "check_task",
    "encode_inputs",
    "encode_targets",
    "load_tokenizer",
    "open_split",
    "prepare_task",
    "prepare_tasks",
]
