"""Text -> token ids, in the same way for training and serving.

transformers is imported only to load a tokenizer, and ray never.
"""

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel

from pipeline.corpus.chat import ModelChat
from pipeline.errors import CorpusError

Architecture = Literal["decoder-only", "encoder-decoder"]
# Texts a call: the encodings of 1000 texts no longer fit the processor's cache, which cost 8 % and more.
_CALL_ROWS = 64
# Words whose tokens a tokenizer caches; by default it has room for 10,000. This saves 8 to 18 % of the time on English
# and code, for some 20 MB (`docs/benchmarks.md`). Four times as many saved no more.
WORD_CACHE_SIZE = 2**16
# Texts to put before a target; at least one of them should end in a token of its own.
_BEFORE = ("a", ":", ".", "?", "\n", "0")


class FastTokenizer(Protocol):
    """What encoding needs of a tokenizer; every fast tokenizer of transformers has it."""

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
    """A loaded tokenizer as plain data: the process that receives it needs neither transformers nor the folder."""

    json: str
    eos_token_id: int | None
    split_special_tokens: bool
    name_or_path: str
    target_marks: "TargetMarks | None" = None

    @property
    def backend_tokenizer(self) -> Tokenizer:
        return _parsed(self.json)


TargetMarks = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids that a translator's tokenizer puts before and behind a target, which name the language that it is in."""

_target_marks: WeakKeyDictionary[Any, TargetMarks] = WeakKeyDictionary()


@lru_cache(maxsize=2)
def _parsed(content: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(content)
    resize_word_cache(tokenizer, WORD_CACHE_SIZE)
    return tokenizer


def resize_word_cache(tokenizer: Tokenizer, words: int) -> None:
    """Let a tokenizer cache the tokens of so many words; no id changes. BPE and Unigram models have such a cache."""
    resize = getattr(tokenizer.model, "_resize_cache", None)  # not public: without it only time is lost
    if resize is not None:
        resize(words)


@dataclass(frozen=True)
class TokenizerSpec:
    dir: str
    """Folder with a saved fast tokenizer, which every node sees."""
    digest: str
    """Digest of the folder's content; another digest means other token shards."""
    architecture: Architecture
    embedding_rows: int | None = None
    """See `Recipe`."""


@lru_cache(maxsize=4)
def load_tokenizer(folder: str) -> Any:
    """The fast tokenizer saved in `folder`, loaded once per process. Raises: CorpusError."""
    from transformers import AutoTokenizer  # takes seconds, which a reader of shards never pays

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise CorpusError(f"{folder} holds no tokenizer that can be loaded ({reason}); save it there again") from error
    if not tokenizer.is_fast:
        raise CorpusError(f"the tokenizer in {folder} is not a fast one; save it with its tokenizer.json")
    return tokenizer


def tokenizer_content(tokenizer: FastTokenizer) -> TokenizerContent:
    """A tokenizer to send to another process, where it gives the same ids."""
    return TokenizerContent(
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.eos_token_id,
        tokenizer.split_special_tokens,
        tokenizer.name_or_path,
        target_marks(tokenizer),
    )


def missing_embedding(tokenizer: Any, ids: Iterable[int], rows: int | None) -> str | None:
    """What is wrong with a text that has a token id beyond the model's `rows` of embeddings; None if nothing is."""
    beyond = next((int(token) for token in ids if rows is not None and token >= rows), None)
    if beyond is None:
        return None
    return (
        f"has the token {tokenizer.convert_ids_to_tokens(beyond)!r} (id {beyond}), for which the model's table of "
        f"{rows} embeddings has no row; word it differently"
    )


def encode_inputs(
    tokenizer: FastTokenizer, architecture: Architecture, inputs: Sequence[str], chat: ModelChat | None = None
) -> list[list[int]]:
    """[B] texts -> [B][T] ids with the special tokens that the tokenizer adds; a rendered chat has all of its own.

    Decoder-only inputs lose the eos that some tokenizers put at the end, since the target continues them.
    """
    if chat is not None:
        return encode_plain(tokenizer, inputs)
    ids = _encode(tokenizer, inputs, special=True)
    eos = [tokenizer.eos_token_id]
    if architecture != "decoder-only" or not any(row[-1:] == eos for row in ids):
        return ids
    # Whether eos is added is tested with a word, not with the row: where bos is eos, an empty row is one bos that must
    # stay.
    return [row[:-1] for row in ids] if _encode(tokenizer, ["a"], special=True)[0][-1:] == eos else ids


def decode_inputs(
    tokenizer: Any, architecture: Architecture, rows: Sequence[Sequence[int]], chat: ModelChat | None = None
) -> list[str]:
    """[B][T] ids of `encode_inputs` -> texts that have the same ids, as far as the tokenizer can decode them."""
    if chat is not None:
        written: list[str] = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        return written
    first, behind = added_tokens(tokenizer, architecture)
    # Only the added tokens are cut off. `skip_special_tokens` would drop the token of an unknown word, too.
    own = [list(row[first : len(row) - behind]) for row in rows]
    texts: list[str] = tokenizer.batch_decode(own, clean_up_tokenization_spaces=False)
    return texts


def added_tokens(tokenizer: FastTokenizer, architecture: Architecture) -> tuple[int, int]:
    """How many tokens `encode_inputs` puts before a text's own, and behind them."""
    whole, bare = encode_inputs(tokenizer, architecture, ["a"])[0], _encode(tokenizer, ["a"], special=False)[0]
    first = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return first, len(whole) - first - len(bare)


def encode_plain(tokenizer: FastTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """[B] texts -> [B][T] ids without any special token."""
    return _encode(tokenizer, texts, special=False)


def encode_targets(
    tokenizer: FastTokenizer,
    architecture: Architecture,
    separator: str,
    targets: Sequence[str],
    chat: ModelChat | None = None,
) -> list[list[int]]:
    """[B] texts -> [B][T] ids that end with eos, or as a chat's answers do.

    Decoder-only targets begin with the separator, as behind an input; those of a chat stand as in the rendered chat.
    A translator's target is that of `tokenizer(text_target=…)`: with the token of its language first, or behind eos.
    Raises: CorpusError when the tokenizer has no eos token.
    """
    if chat is not None:
        return _encode_answers(tokenizer, chat, targets)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise CorpusError(
            f"the tokenizer in {tokenizer.name_or_path} has no eos token, so no target could end; set its eos_token"
        )
    if architecture == "decoder-only":
        texts = [separator + target for target in targets]
        behind = encodes_beginnings_differently(tokenizer, separator)
        return [
            [*row, eos] for row in (_encode_after_text(tokenizer, texts) if behind else encode_plain(tokenizer, texts))
        ]
    if (marks := target_marks(tokenizer)) is not None:
        before, after = marks
        return [[*before, *row, *after] for row in encode_plain(tokenizer, targets)]
    return [row if row[-1:] == [eos] else [*row, eos] for row in _encode(tokenizer, targets, special=True)]


def target_marks(tokenizer: FastTokenizer) -> TargetMarks | None:
    """What stands around a target; None where the tokenizer encodes targets as it does inputs."""
    if isinstance(tokenizer, TokenizerContent):
        return tokenizer.target_marks
    if not hasattr(tokenizer, "_switch_to_target_mode"):
        return None
    if tokenizer not in _target_marks:
        # A copy: other threads may encode inputs meanwhile.
        own: Any = copy.deepcopy(tokenizer)
        own._switch_to_target_mode()
        (whole,), (bare,) = (_encode(own, ["a"], special) for special in (True, False))
        first = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        _target_marks[tokenizer] = tuple(whole[:first]), tuple(whole[first + len(bare) :])
    return _target_marks[tokenizer]


def _encode_answers(tokenizer: FastTokenizer, chat: ModelChat, targets: Sequence[str]) -> list[list[int]]:
    """[B] texts -> [B][T] the ids that the rendered chat has from the end of its input to the end of the answer."""
    texts = [chat.separator + target + chat.closing for target in targets]
    (before,) = encode_plain(tokenizer, [chat.before])
    whole = encode_plain(tokenizer, [chat.before + text for text in texts])
    alone = encode_plain(tokenizer, texts)
    # A target that merges with what stands before it is encoded alone: the input's tokens are there already.
    return [
        [*(row[len(before) :] if row[: len(before)] == before else own), chat.end_id]
        for row, own in zip(whole, alone, strict=True)
    ]


def encodes_beginnings_differently(tokenizer: FastTokenizer, separator: str) -> bool:
    """Whether a text that begins with the separator is encoded differently alone than behind another text.

    Llama 2's normalizer puts a word's mark before every text; others strip white space there. A target stands behind
    an input, so encoding it alone would train on tokens that never occur there.
    """
    first, alone, whole = (_pre_tokenized(tokenizer, text) for text in ("a", f"{separator}a", f"a{separator}a"))
    return whole.removeprefix(first) != alone


def _pre_tokenized(tokenizer: FastTokenizer, text: str) -> str:
    """A text as the tokenizer's model sees it, normalised and pre-tokenised."""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    if backend.pre_tokenizer is None:
        return text
    return "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))


def _encode_after_text(tokenizer: FastTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """[B] texts -> [B][T] the ids that they have behind another text."""
    # A text in front may merge with the beginning into one token. Then the ids cannot be told apart, and the next text
    # in front is tried; what merges with all of them is encoded alone.
    ids: list[list[int] | None] = [None] * len(texts)
    for before in _BEFORE:
        (first,) = encode_plain(tokenizer, [before])
        left = [place for place, of_text in enumerate(ids) if of_text is None]
        for place, row in zip(left, encode_plain(tokenizer, [before + texts[place] for place in left]), strict=True):
            if row[: len(first)] == first:
                ids[place] = row[len(first) :]
    missing = [place for place, of_text in enumerate(ids) if of_text is None]
    alone = dict(zip(missing, encode_plain(tokenizer, [texts[place] for place in missing]), strict=True))
    return [alone[place] if of_text is None else of_text for place, of_text in enumerate(ids)]


def can_lose_text(tokenizer: FastTokenizer) -> bool:
    """Whether some texts have no tokens: the tokenizer gives its unknown token for them, or none."""
    backend = tokenizer.backend_tokenizer
    if _has_byte_fallback(backend):
        return not all(backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    return not all(backend.token_to_id(letter) is not None for letter in ByteLevel.alphabet())


def unencodable(
    tokenizer: FastTokenizer,
    architecture: Architecture,
    separator: str,
    targets: Sequence[str],
    chat: ModelChat | None = None,
) -> list[bool]:
    """[B] whether a target's own text, separator and specials aside, is lost in its tokens."""
    if not targets or not can_lose_text(tokenizer):
        return [False] * len(targets)
    backend = tokenizer.backend_tokenizer
    unknown = _unknown_token(backend)
    if unknown is None:
        # A BPE without an unknown token silently leaves out the letters that it does not know.
        return [
            any(backend.token_to_id(letter) is None for letter in _pre_tokenized(tokenizer, one)) for one in targets
        ]
    # The unknown token must come from the target: not from the separator, nor from a target that spells it out.
    own = encode_plain(tokenizer, targets)
    joined = encode_targets(tokenizer, architecture, separator, targets, chat)
    (alone,) = encode_plain(tokenizer, [separator])
    mark, of_separator = backend.id_to_token(unknown) or "", alone.count(unknown)
    return [
        mark not in target and (unknown in row or whole.count(unknown) > of_separator)
        for target, row, whole in zip(targets, own, joined, strict=True)
    ]


def _has_byte_fallback(backend: Tokenizer) -> bool:
    if isinstance(backend.model, models.Unigram):
        return bool(_unigram(backend)[1])
    return bool(getattr(backend.model, "byte_fallback", False))


def _unknown_token(backend: Tokenizer) -> int | None:
    if isinstance(backend.model, models.Unigram):
        return _unigram(backend)[0]
    mark = backend.model.unk_token
    return None if mark is None else backend.token_to_id(mark)


@lru_cache(maxsize=4)
def _unigram(backend: Tokenizer) -> tuple[int | None, bool]:
    """-> (the unknown token, whether bytes stand in for it) of a Unigram model.

    Only its JSON tells, which takes long to read; hence the cache.
    """
    model = json.loads(backend.to_str())["model"]
    return model["unk_id"], model.get("byte_fallback", False)


def _encode(tokenizer: FastTokenizer, texts: Sequence[str], special: bool) -> list[list[int]]:
    """The ids of `tokenizer(texts)`, from the Rust tokenizer below it, without offsets and masks that nobody reads."""
    backend = tokenizer.backend_tokenizer
    # transformers, too, resets these before each call, since a tokenizer.json may ask for truncation and padding.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    calls = (texts[start : start + _CALL_ROWS] for start in range(0, len(texts), _CALL_ROWS))
    try:
        return [
            encoded.ids
            for call in calls
            for encoded in backend.encode_batch_fast(list(call), add_special_tokens=special)
        ]
    except Exception as error:  # tokenizers has no class of its own for a word without a token
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise CorpusError(
            f"the tokenizer in {tokenizer.name_or_path} cannot encode a text ({reason}); give it an unknown token"
        ) from error
