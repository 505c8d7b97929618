import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, MBart50Tokenizer, MBartTokenizer, NllbTokenizer

from pipeline.corpus import encode_inputs, encode_targets, load_tokenizer
from pipeline.corpus.encoding import tokenizer_content
from pipeline.errors import CorpusError
from tests.tiny import make_tokenizer

from .conftest import LINES, save_tokenizer

TEXTS = ["a good film", "", " two  spaces ", "é 😀"]
EOS = 0


@pytest.mark.parametrize("ends_inputs", [False, True])
def test_a_decoder_reads_input_separator_target_and_one_eos(tmp_path: Path, ends_inputs: bool) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, ends_inputs)))
    inputs = encode_inputs(tokenizer, "decoder-only", TEXTS)
    targets = encode_targets(tokenizer, "decoder-only", "\n->", TEXTS)
    for text, first, second in zip(TEXTS, inputs, targets, strict=True):
        assert EOS not in first
        assert second[-1] == EOS and EOS not in second[:-1]
        assert tokenizer.decode(first + second[:-1]) == f"{text}\n->{text}"


@pytest.mark.parametrize("ends_inputs", [False, True])
def test_an_encoder_decoder_target_ends_with_one_eos_and_has_no_separator(tmp_path: Path, ends_inputs: bool) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, ends_inputs)))
    for text, first in zip(TEXTS, encode_inputs(tokenizer, "encoder-decoder", TEXTS), strict=True):
        assert first == tokenizer(text)["input_ids"]
    for text, ids in zip(TEXTS, encode_targets(tokenizer, "encoder-decoder", "|", TEXTS), strict=True):
        assert ids[-1] == EOS and EOS not in ids[:-1]
        assert tokenizer.decode(ids[:-1]) == text


def test_encoding_a_batch_is_encoding_each_row_alone(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert encode_inputs(tokenizer, "decoder-only", []) == []
    alone = [encode_inputs(tokenizer, "decoder-only", [text])[0] for text in TEXTS]
    assert encode_inputs(tokenizer, "decoder-only", TEXTS) == alone


ODD = [
    "</s>",
    " </s>a</s>",
    "\u200d",
    "\x00",
    "e\u0301",
    "\u00e9",
    "\ufeff",
    "<x>",
    "  \n\t ",
    "\U0001f468\u200d\U0001f469",
    "¼",
    "\u202e",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tokenizers that differ in what they add and how they split."""
    folder = tmp_path_factory.mktemp("saved")
    made = {
        name: load_tokenizer(str(save_tokenizer(folder / name, ends_inputs=name == "template")))
        for name in ("plain", "template", "cut", "split")
    }
    made["template"].add_tokens(["<x>", "go od"])
    made["split"].split_special_tokens = True
    return made | {"words": make_tokenizer(eos_template=True)}


@pytest.mark.parametrize("name", ["plain", "template", "cut", "split", "words"])
@given(texts=st.lists(st.lists(st.text(max_size=9) | st.sampled_from([*ODD, *LINES]), max_size=4).map("".join)))
def test_ids_are_those_of_the_tokenizers_own_call_here_and_where_it_was_sent(
    tokenizers: dict[str, Any], name: str, texts: list[str]
) -> None:
    tokenizer = tokenizers[name]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for one in (tokenizer, pickle.loads(pickle.dumps(tokenizer_content(tokenizer)))):
        if name == "cut":  # as a tokenizer.json may ask for, and transformers does not heed
            one.backend_tokenizer.enable_truncation(3)
            one.backend_tokenizer.enable_padding(length=9)
        assert encode_inputs(one, "encoder-decoder", texts) == expected
        assert encode_targets(one, "decoder-only", "", texts) == [[*ids, tokenizer.eos_token_id] for ids in bare]


def test_a_tokenizer_without_eos_or_without_files_is_refused_in_one_sentence(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path / "endless", has_eos=False)))
    with pytest.raises(CorpusError, match="has no eos token"):
        encode_targets(tokenizer, "decoder-only", " ", ["a"])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CorpusError, match="holds no tokenizer") as refused:
        load_tokenizer(str(tmp_path / "nothing"))
    assert "\n" not in str(refused.value)


@pytest.mark.processes
def test_importing_the_room_loads_neither_ray_nor_transformers() -> None:
    code = "import sys, pipeline.corpus; print({'ray', 'transformers', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


_LETTERS = ["▁", "a", "b", "▁a", "▁b"]
_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
_PIECES = [(piece, 0.0) for piece in _SPECIAL] + [(piece, -1.0) for piece in _LETTERS]
_IDS = {piece: place for place, piece in enumerate([*_SPECIAL, *_LETTERS])}
TRANSLATORS = {
    "mbart": (MBartTokenizer, {"vocab": _PIECES}, "en_XX", "de_DE"),
    "mbart50": (MBart50Tokenizer, {"vocab": _PIECES}, "en_XX", "de_DE"),
    "nllb": (NllbTokenizer, {"vocab": _IDS, "merges": [("▁", "a"), ("▁", "b")]}, "eng_Latn", "deu_Latn"),
}


@pytest.mark.parametrize("told", [True, False], ids=["told its language", "not told"])
@pytest.mark.parametrize("kind", TRANSLATORS)
def test_a_translators_target_is_encoded_as_transformers_encodes_targets(kind: str, told: bool, tmp_path: Path) -> None:
    make, words, source, target = TRANSLATORS[kind]
    make(**words, src_lang=source, tgt_lang=target if told else None).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for own in (tokenizer, tokenizer_content(tokenizer)):
        assert encode_targets(own, "encoder-decoder", "", ["b a"]) == tokenizer(text_target=["b a"]).input_ids
        assert encode_inputs(own, "encoder-decoder", ["a b"]) == tokenizer(["a b"]).input_ids
