"""The vocabulary's tokens nearest to a prompt's rows, from one tensor of the model's files."""

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from pipeline.backbone import nearest
from pipeline.backbone.files import find_model, read_tokenizer
from pipeline.backbone.nearest import nearest_tokens
from pipeline.errors import BackboneError, BankError
from tests.tiny import FAMILIES, SPECIAL, VOCAB, WORDS, make_model

GGUF_TOKENS = [*SPECIAL, *WORDS, "x", "y", "xy"]  # a byte-level tokenizer must have a merge
TABLES = {"gpt2": "transformer.wte.weight", "t5": "shared.weight", "mt5": "shared.weight", "t5_tied": "shared.weight"}


def stored_table(folder, family):
    return load_file(folder / "model.safetensors")[TABLES.get(family, "model.embed_tokens.weight")].numpy()


def words_of(folder, ids):
    return read_tokenizer(find_model(str(folder))).convert_ids_to_tokens(list(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_are_tokens_embeddings_come_back_as_those_tokens(family, tmp_path):
    folder = make_model(tmp_path / family, family)
    ids = [7, 3, 41, 7]
    found = nearest_tokens(str(folder), stored_table(folder, family)[ids] * 2.5, count=3)
    assert [row[0][0] for row in found] == words_of(folder, ids)
    for row in found:
        assert len(row) == 3 and row[0][1] == pytest.approx(1.0, abs=1e-5)
        assert [cosine for _, cosine in row] == sorted((cosine for _, cosine in row), reverse=True)


@pytest.mark.parametrize("rows_at_once", [7, 2**14])
def test_the_numbers_are_cosines_however_the_table_is_cut(rows_at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(nearest, "_ROWS_AT_ONCE", rows_at_once)
    folder = make_model(tmp_path / "m")
    table = stored_table(folder, "llama")
    prompt = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    norms = np.linalg.norm(prompt, axis=1)[:, None] * np.linalg.norm(table, axis=1)
    cosines = prompt @ table.T / np.maximum(norms, 1e-9)  # the padding token's row is 0
    found = nearest_tokens(str(folder), prompt, count=VOCAB + 10)
    order = np.argsort(-cosines, axis=1)
    assert [[word for word, _ in row] for row in found] == [words_of(folder, row) for row in order]
    np.testing.assert_allclose([[c for _, c in row] for row in found], -np.sort(-cosines, axis=1), atol=1e-5)


def test_only_the_embedding_table_is_read(tmp_path):
    folder = make_model(tmp_path / "m", "llama_untied")
    table = stored_table(folder, "llama_untied")
    save_file({"model.embed_tokens.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"]},
              folder / "model.safetensors")  # fmt: skip
    assert nearest_tokens(str(folder), table[[5]], 1)[0][0][0] == words_of(folder, [5])[0]


def test_rows_of_the_table_without_a_token_are_left_out(tmp_path):
    folder = make_model(tmp_path / "m", vocab_size=VOCAB + 6)
    found = nearest_tokens(str(folder), stored_table(folder, "llama")[[VOCAB + 1]], count=VOCAB + 6)
    assert len(found[0]) == VOCAB and all(isinstance(word, str) for word, _ in found[0])


def test_a_prompt_of_another_hidden_size_is_refused(tmp_path):
    folder = str(make_model(tmp_path / "m"))
    for shape in ((4, 8), (32,)):
        with pytest.raises(BankError, match=r"does not fit the model .*\[32\]: name the model that it was tuned on"):
            nearest_tokens(folder, np.zeros(shape, np.float32))
    with pytest.raises(BackboneError, match="no such folder or file"):
        nearest_tokens(str(tmp_path / "nowhere"), np.zeros((4, 32), np.float32))


def write_gguf(path, table):
    """As much of a Llama in GGUF as reading its configuration, vocabulary and embeddings takes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(table.shape[1])
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(table))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(GGUF_TOKENS)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(table))
    writer.add_token_merges(["x y"])
    writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", table)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_models_tokens_come_back_too(tmp_path):
    table = np.random.default_rng(0).normal(size=(len(GGUF_TOKENS), 32)).astype(np.float32)
    write_gguf(tmp_path / "tiny.gguf", table)
    found = nearest_tokens(str(tmp_path / "tiny.gguf"), table[[7, 20]], count=2)
    assert [row[0][0] for row in found] == [GGUF_TOKENS[7], GGUF_TOKENS[20]]
    assert [row[0][1] for row in found] == pytest.approx([1, 1], abs=1e-5)
