"""Answers in pieces, of tokenizers of every kind: together they are the answer, whatever its tokens and stops are."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.serving.prompted_model import _completion, _has_stop
from pipeline.serving.streamed_text import AnswerDecoder, StreamedText

WORDS = [
    "▁good",
    "▁",
    "film",
    "▁▁",
    "é",
    "🎉",
    "▁don",
    "'t",
    "▁n",
    "▁.",
    ".",
    "▁'",
    "m",
    "▁'m",
    "\ufffd",
    "ab",
    "a",
    "b",
]
PARTS = [*"🎉é語".encode(), 0xFF, 0x80]


def _sentencepiece():
    """As Llama 2 and Gemma have it: a character that is no token is a run of byte tokens."""
    vocab = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [], byte_fallback=True, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return made, [2 + byte for byte in PARTS]


def _byte_level():
    """As GPT-2 and Llama 3 have it: tokens of whole words, and of parts of a character."""
    letters = {byte: letter for byte, letter in zip(range(256), _letters(), strict=True)}
    tokens = {"".join(letters[byte] for byte in part) for part in (b"\xf0\x9f", b"\x8e\x89", b" \xf0", b" good", b"ab")}
    vocab = ["<unk>", "</s>", *letters.values(), *sorted(tokens)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [], unk_token="<unk>"))
    made.decoder = decoders.ByteLevel()
    return made, [2 + byte for byte in PARTS]


def _letters():
    """What stands for each byte in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def _word_pieces():
    """As BERT has it; transformers takes out spaces before punctuation and contractions."""
    vocab = [
        "<unk>",
        "</s>",
        "do",
        "##n",
        "n't",
        "n",
        "'",
        "t",
        "##t",
        ".",
        "m",
        "'m",
        "##m",
        "'ve",
        "good",
        ",",
        "##s",
    ]
    made = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="<unk>"))
    made.decoder = decoders.WordPiece(cleanup=False)
    return made, []


def _metaspace():
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((word, -1.0) for word in WORDS)], unk_id=0))
    made.decoder = decoders.Metaspace()
    return made, []


def _whole_words():
    made = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "good": 2, "film": 3, ".": 4}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made, []


def _rewriting():
    """What comes later changes what came before."""
    vocab = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "aa": 4, "ab": 5}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])
    return made, []


KINDS = {f.__name__: f() for f in (_sentencepiece, _byte_level, _word_pieces, _metaspace, _whole_words, _rewriting)}


def decoder_of(kind):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind][0],
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=kind == "_word_pieces",
    )
    return AnswerDecoder(tokenizer)


DECODERS = {kind: decoder_of(kind) for kind in KINDS}


def streamed(decoder, ids, stops=()):
    """The pieces of an answer of these ids, and the answer as who does not stream gets it."""
    row = SimpleNamespace(stops=stops, max_new_tokens=len(ids), length=3)
    text, pieces = StreamedText(decoder, stops), []
    for tokens in range(1, len(ids) + 1):
        if tokens == len(ids) or _has_stop(row, decoder, ids[:tokens]):
            whole = _completion(row, np.array(ids[:tokens]), decoder).text
            return [*pieces, text.rest(whole)], whole
        pieces.append(text.piece(ids[:tokens]))
    raise AssertionError("an answer has a token")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_pieces_of_an_answer_are_the_answer(kind, data):
    decoder, often = DECODERS[kind], KINDS[kind][1]
    token = st.integers(0, len(decoder.tokenizer) - 1)
    ids = data.draw(st.lists(st.one_of(token, st.sampled_from(often)) if often else token, min_size=1, max_size=14))
    text = decoder.text(ids)
    places = st.tuples(st.integers(0, len(text)), st.integers(1, 6))
    drawn = [text[at : at + n] for at, n in data.draw(st.lists(places, max_size=3))]
    stops = [stop for stop in (*drawn, data.draw(st.sampled_from(["", "ab", "aab", "\ufffd"]))) if stop]
    pieces, whole = streamed(decoder, ids, stops)
    assert "".join(pieces) == whole
    assert not any(stop in whole for stop in stops)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("_word_pieces", "_rewriting")])
def test_a_token_that_is_certain_is_handed_over_at_once(kind):
    decoder = DECODERS[kind]
    vocab = decoder.tokenizer.get_vocab()
    words = [number for token, number in vocab.items() if token.strip("▁Ġ").isascii() and token.strip("▁Ġ").isalpha()]
    text = StreamedText(decoder, ["0 is never in it"])
    assert len(words) >= 2
    for tokens in range(1, len(words) + 1):
        assert text.piece(words[:tokens]) != ""


def test_a_character_comes_whole_and_a_stop_not_even_in_part():
    decoder = DECODERS["_byte_level"]
    ids = [2 + byte for byte in "a🎉ab!".encode()]
    assert streamed(decoder, ids, ["ab!"]) == (["", "", "", "", "a🎉", "", "", ""], "a🎉")
