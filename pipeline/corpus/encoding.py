"""Text -> token ids, one way for training and serving. Imports transformers only to load a tokenizer, ray never."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

from tokenizers import Tokenizer

from pipeline.errors import CorpusError

Architecture = Literal["decoder-only", "encoder-decoder"]
# Texts a call: the encodings of 1000 no longer fit the processor's cache, which cost 8 % and more.
_CALL_ROWS = 64
# Words whose tokens a tokenizer keeps; it comes with room for 10,000. On English and code 8 to 18 % of the time, for
# some 20 MB (`docs/benchmarks.md`); four times as many brought nothing more.
KEPT_WORDS = 2**16


class FastTokenizer(Protocol):
    """What encoding asks of a tokenizer; every fast one of transformers has it."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def split_special_tokens(self) -> bool: ...
    @property
    def name_or_path(self) -> str: ...


@dataclass(frozen=True)
class TokenizerContent:
    """A loaded tokenizer as plain data: where it arrives, neither transformers nor the folder is needed."""

    json: str
    eos_token_id: int | None
    split_special_tokens: bool
    name_or_path: str

    @property
    def backend_tokenizer(self) -> Tokenizer:
        return _parsed(self.json)


@lru_cache(maxsize=2)
def _parsed(content: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(content)
    keep_words(tokenizer, KEPT_WORDS)
    return tokenizer


def keep_words(tokenizer: Tokenizer, words: int) -> None:
    """Let a tokenizer keep the tokens of so many words; no id changes. BPE and Unigram keep any, others need none."""
    resize = getattr(tokenizer.model, "_resize_cache", None)  # not public: where it is gone, only time is lost
    if resize is not None:
        resize(words)


@dataclass(frozen=True)
class TokenizerSpec:
    dir: str
    """Folder with a saved fast tokenizer, seen by every node."""
    digest: str
    """Of the folder's content; another digest means other token shards."""
    architecture: Architecture
    embedding_rows: int | None = None
    """See `Recipe`."""


@lru_cache(maxsize=4)
def load_tokenizer(folder: str) -> Any:
    """The fast tokenizer saved in `folder`, loaded once per process. Raises: CorpusError."""
    from transformers import AutoTokenizer  # seconds of import that a reader of shards never pays

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise CorpusError(f"{folder} holds no tokenizer that can be loaded ({reason}); save it there again") from error
    if not tokenizer.is_fast:
        raise CorpusError(f"the tokenizer in {folder} is not a fast one; save it with its tokenizer.json")
    return tokenizer


def tokenizer_content(tokenizer: FastTokenizer) -> TokenizerContent:
    """A tokenizer for another process; it gives the same ids there."""
    return TokenizerContent(
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.eos_token_id,
        tokenizer.split_special_tokens,
        tokenizer.name_or_path,
    )


def without_embedding(tokenizer: Any, ids: Iterable[int], rows: int | None) -> str | None:
    """What is wrong with a text whose token `ids` are not all below the model's `rows` of embeddings; else None."""
    beyond = next((int(token) for token in ids if rows is not None and token >= rows), None)
    if beyond is None:
        return None
    return (
        f"has the token {tokenizer.convert_ids_to_tokens(beyond)!r} (id {beyond}), for which the model's table of "
        f"{rows} embeddings has no row; word it differently"
    )


def encode_inputs(tokenizer: FastTokenizer, architecture: Architecture, inputs: Sequence[str]) -> list[list[int]]:
    """[B] texts -> [B][T] ids with the special tokens that the tokenizer adds.

    Decoder-only inputs lose the eos that some tokenizers put at the end: the target goes on from there.
    """
    ids = _encode(tokenizer, inputs, special=True)
    # Asked of a word, not of the row: where bos is eos, an empty row is one bos that must stay.
    if architecture == "decoder-only" and _encode(tokenizer, ["a"], special=True)[0][-1:] == [tokenizer.eos_token_id]:
        return [row[:-1] for row in ids]
    return ids


def decode_inputs(tokenizer: Any, architecture: Architecture, rows: Sequence[Sequence[int]]) -> list[str]:
    """[B][T] ids of `encode_inputs` -> texts that it would give the same ids for, as far as the tokenizer can tell."""
    whole, bare = encode_inputs(tokenizer, architecture, ["a"])[0], _encode(tokenizer, ["a"], special=False)[0]
    first = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    behind = len(whole) - first - len(bare)
    # Only what was added is left out: an unknown word is special, too, and stays.
    own = [list(row[first : len(row) - behind]) for row in rows]
    texts: list[str] = tokenizer.batch_decode(own, clean_up_tokenization_spaces=False)
    return texts


def encode_plain(tokenizer: FastTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """[B] texts -> [B][T] ids without any special token."""
    return _encode(tokenizer, texts, special=False)


def encode_targets(
    tokenizer: FastTokenizer, architecture: Architecture, separator: str, targets: Sequence[str]
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


def _encode(tokenizer: FastTokenizer, texts: Sequence[str], special: bool) -> list[list[int]]:
    """What `tokenizer(texts)` gives, from the tokenizer below it: without the offsets and masks that nobody reads."""
    backend = tokenizer.backend_tokenizer
    # As transformers does before each call: a tokenizer.json may ask for truncation and padding.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    calls = (texts[start : start + _CALL_ROWS] for start in range(0, len(texts), _CALL_ROWS))
    return [
        encoded.ids for call in calls for encoded in backend.encode_batch_fast(list(call), add_special_tokens=special)
    ]
