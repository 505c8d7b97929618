"""The text of an answer while it is written: what is certain of it can be sent, for no later token changes it.

Shapes: T tokens.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token of SentencePiece that is one byte of a character."""
_LAST_WORDS = 3
"""As many as become one word when transformers cleans a text up: `do n ' t` is "don't"."""
_REPLACEMENT = "\ufffd"
"""What an incomplete character is decoded to."""
_APPENDING = {"ByteLevel", "Metaspace", "BPEDecoder", "WordPiece", "ByteFallback", "Fuse", "Strip"}
"""Decoders of the tokenizers library of which a longer answer's text begins with that of a shorter one."""


@dataclass(frozen=True)
class AnswerDecoder:
    """A model's tokenizer, as far as answers are concerned."""

    tokenizer: Any

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """What the ids `[T]` of an answer are as text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def certain(self, ids: Sequence[int]) -> str:
        """The beginning of the text that stays, whatever tokens follow these `[T]`."""
        if not self._appends:
            return ""
        text = self.text(ids[: self._before_bytes(ids)]).rstrip(_REPLACEMENT)
        return _without_last_words(text) if self._cleans_up else text

    def _before_bytes(self, ids: Sequence[int]) -> int:
        """Tokens before the bytes at the end: SentencePiece decodes a run of bytes as a whole, or none of it."""
        before = end = len(ids)
        while end and (ids[end - 1] in self._bytes or ids[end - 1] in self._silent):
            end -= 1
            before = end if ids[end] in self._bytes else before
        return before

    @cached_property
    def _bytes(self) -> frozenset[int]:
        return frozenset(number for token, number in self.tokenizer.get_vocab().items() if _BYTE.fullmatch(token))

    @cached_property
    def _silent(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def _cleans_up(self) -> bool:
        """Whether spaces before punctuation and contractions are taken out, which only the next words tell."""
        of_bpe = type(self.tokenizer.backend_tokenizer.model).__name__ == "BPE"  # transformers leaves its texts alone
        forced = getattr(
            self.tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False
        )
        return bool(self.tokenizer.clean_up_tokenization_spaces) and (forced or not of_bpe)

    @cached_property
    def _appends(self) -> bool:
        decoder = self.tokenizer.backend_tokenizer.decoder
        told: dict[str, Any] = {"type": "Fuse"} if decoder is None else json.loads(decoder.__getstate__())
        parts = told["decoders"] if told["type"] == "Sequence" else [told]
        return all(part["type"] in _APPENDING or _replaces_a_character(part) for part in parts)


def _without_last_words(text: str) -> str:
    words = text.rsplit(maxsplit=_LAST_WORDS)
    # A space at the beginning may go, too, as long as few words follow it.
    return words[0] if len(words) > _LAST_WORDS or (words and not text[0].isspace()) else ""


def _replaces_a_character(part: Mapping[str, Any]) -> bool:
    return part["type"] == "Replace" and len(part["pattern"].get("String", "")) == 1


class StreamedText:
    """The pieces of one answer. Together they are the answer, and none has the beginning of what stops it."""

    def __init__(self, decoder: AnswerDecoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = stops
        self._sent = 0
        """Characters."""

    def piece(self, ids: Sequence[int]) -> str:
        """What of an answer that goes on has become certain with its ids `[T]`; "" where nothing has."""
        text = self._decoder.certain(ids)
        until = len(text) - max((_begun(stop, text) for stop in self._stops), default=0)
        piece = text[self._sent : until]
        self._sent = max(self._sent, until)
        return piece

    def rest(self, text: str) -> str:
        """What of the whole answer's text was not sent yet."""
        return text[self._sent :]


def _begun(stop: str, text: str) -> int:
    """Characters at the end of the text that may be the beginning of a stop."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
