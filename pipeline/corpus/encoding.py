"""Text -> token ids, one way for training and serving. Imports transformers only to load a tokenizer, ray never."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from pipeline.errors import CorpusError

Architecture = Literal["decoder-only", "encoder-decoder"]


@dataclass(frozen=True)
class TokenizerSpec:
    dir: str
    """Folder with a saved fast tokenizer, seen by every node."""
    digest: str
    """Of the folder's content; another digest means other token shards."""
    architecture: Architecture


@lru_cache(maxsize=4)
def load_tokenizer(folder: str) -> Any:
    """The fast tokenizer saved in `folder`, loaded once per process. Raises: CorpusError."""
    from transformers import AutoTokenizer  # seconds of import that a reader of shards never pays

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise CorpusError(f"{folder} holds no tokenizer that can be loaded ({reason}); save it there again") from error
    if not tokenizer.is_fast:
        raise CorpusError(f"the tokenizer in {folder} is not a fast one; save it with its tokenizer.json")
    return tokenizer


def encode_inputs(tokenizer: Any, architecture: Architecture, inputs: Sequence[str]) -> list[list[int]]:
    """[B] texts -> [B][T] ids with the special tokens that the tokenizer adds.

    Decoder-only inputs lose the eos that some tokenizers put at the end: the target goes on from there.
    """
    ids = _encode(tokenizer, inputs, special=True)
    # Asked of a word, not of the row: where bos is eos, an empty row is one bos that must stay.
    if architecture == "decoder-only" and _encode(tokenizer, ["a"], special=True)[0][-1:] == [tokenizer.eos_token_id]:
        return [row[:-1] for row in ids]
    return ids


def encode_targets(
    tokenizer: Any, architecture: Architecture, separator: str, targets: Sequence[str]
) -> list[list[int]]:
    """[B] texts -> [B][T] ids that end with eos; decoder-only ones begin with the separator.

    Raises: CorpusError when the tokenizer has no eos token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise CorpusError(
            f"the tokenizer in {tokenizer.name_or_path} has no eos token, so no target could end; set its eos_token"
        )
    if architecture == "decoder-only":
        return [[*row, eos] for row in _encode(tokenizer, [separator + target for target in targets], special=False)]
    return [row if row[-1:] == [eos] else [*row, eos] for row in _encode(tokenizer, targets, special=True)]


def _encode(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about lengths: the limits are the task's own
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids
