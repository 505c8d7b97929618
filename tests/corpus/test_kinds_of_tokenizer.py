"""Every kind of tokenizer, trained here: the tokens of a target behind an input, and texts that are lost."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.encoding import (
    encode_inputs,
    encode_plain,
    encode_targets,
    encodes_beginnings_differently,
    tokenizer_content,
    unencodable,
)

LINES = [
    "a good film about a bad story -> yes",
    "the actor is good: the plot is bad. no",
    "Answer yes? 0 1 2\n->no",
] * 3
TARGETS = ["yes", "no", "bad story", "0"]
_ALPHABET = [*" abcdefghijklmnopqrstuvwxyzA:.?\n->012▁"]
_SPECIAL: dict[str, Any] = {"special_tokens": ["<unk>", "</s>"], "vocab_size": 300}


def byte_level(add_prefix_space: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(LINES, trainers.BpeTrainer(initial_alphabet=letters, **_SPECIAL))
    return made


def llama_2(fallback: bool = True) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if fallback else []
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>", *bytes_], vocab_size=400, initial_alphabet=_ALPHABET)
    words = (word for line in LINES for word in line.split())
    made.train_from_iterator(words, trainer)
    return made


def metaspace(scheme: str) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # words apart: no token spans two
    made.train_from_iterator(LINES, trainers.BpeTrainer(initial_alphabet=_ALPHABET, **_SPECIAL))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return made


def t5() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(LINES, trainers.UnigramTrainer(unk_token="<unk>", **_SPECIAL))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


def unigram_with_bytes(count: int = 256) -> Tokenizer:
    trained = json.loads(t5().to_str())["model"]
    of_bytes = [(f"<0x{byte:02X}>", -20.0) for byte in range(count)]
    vocabulary = [*map(tuple, trained["vocab"]), *of_bytes]
    made = Tokenizer(models.Unigram(vocabulary, trained["unk_id"], byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    return made


def bert() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.train_from_iterator(LINES, trainers.WordPieceTrainer(**_SPECIAL))
    return made


def words() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(LINES, trainers.WordLevelTrainer(**_SPECIAL))
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": byte_level,
    "GPT-2 with a first space": lambda: byte_level(add_prefix_space=True),
    "Llama 2": llama_2,
    "Llama 2 without bytes": lambda: llama_2(fallback=False),
    "Metaspace always": lambda: metaspace("always"),
    "Metaspace first": lambda: metaspace("first"),
    "Metaspace never": lambda: metaspace("never"),
    "T5": t5,
    "Unigram with bytes": unigram_with_bytes,
    "BERT": bert,
    "words": words,
}
UNSAID = {"Llama 2 without bytes", "Metaspace always", "Metaspace first", "Metaspace never", "T5", "BERT", "words"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, Any]:
    made = PreTrainedTokenizerFast(tokenizer_object=KINDS[request.param](), eos_token="</s>", unk_token="<unk>")
    return request.param, made


@pytest.mark.parametrize("separator", [" ", "\n", " -> "])
@pytest.mark.parametrize("text", ["a good film", "the plot is bad.", "Answer:"])
def test_input_and_target_have_the_tokens_of_the_whole_text(kind: tuple[str, Any], separator: str, text: str) -> None:
    _, tokenizer = kind
    for one in (tokenizer, tokenizer_content(tokenizer)):
        (first,) = encode_inputs(one, "decoder-only", [text])
        for target, ids in zip(TARGETS, encode_targets(one, "decoder-only", separator, TARGETS), strict=True):
            (whole,) = encode_plain(one, [text + separator + target])
            assert first + ids[:-1] == whole, tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("separator", [" ", "\n", "", ": "])
def test_where_a_text_begins_as_it_goes_on_targets_have_the_tokens_they_always_had(
    kind: tuple[str, Any], separator: str
) -> None:
    name, tokenizer = kind
    if name == "GPT-2":
        assert not encodes_beginnings_differently(tokenizer, separator)
    if not encodes_beginnings_differently(tokenizer, separator):
        ids = encode_targets(tokenizer, "decoder-only", separator, TARGETS)
        plain = [tokenizer(separator + target, add_special_tokens=False)["input_ids"] for target in TARGETS]
        assert ids == [[*row, tokenizer.eos_token_id] for row in plain]


@pytest.mark.parametrize("architecture", ["decoder-only", "encoder-decoder"])
def test_a_target_that_the_tokenizer_has_no_tokens_for_is_told_and_no_other(
    kind: tuple[str, Any], architecture: Any
) -> None:
    name, tokenizer = kind
    separator = " " if architecture == "decoder-only" else ""
    texts = [*TARGETS, "{no}", "ý½", "né", "☃"]
    lost = unencodable(tokenizer, architecture, separator, texts)
    assert lost[: len(TARGETS)] == [False] * len(TARGETS)
    assert lost[-1] == (name in UNSAID) and lost[-4:-2] == [name in UNSAID] * 2


def test_a_unigram_that_lacks_some_bytes_says_unknown_only_for_those() -> None:
    made = PreTrainedTokenizerFast(tokenizer_object=unigram_with_bytes(0xC0), eos_token="</s>", unk_token="<unk>")
    assert unencodable(made, "encoder-decoder", "", ["no", "{no}", "\x7f", "½"]) == [False, False, False, True]


def test_a_bpe_that_leaves_letters_out_without_a_word_is_told() -> None:
    made = Tokenizer(models.BPE())
    made.train_from_iterator(LINES, trainers.BpeTrainer(initial_alphabet=_ALPHABET, **_SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    assert encode_plain(tokenizer, ["{no}"]) == encode_plain(tokenizer, ["no"])
    assert unencodable(tokenizer, "decoder-only", " ", ["no", "{no}"]) == [False, True]
