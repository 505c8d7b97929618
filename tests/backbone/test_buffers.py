"""Buffers, and embeddings with a forward of their own, against transformers' `from_pretrained`.

Of families that are not admitted, too: what is tested here is the loading, which knows no family.
"""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import host_backbone
from pipeline.backbone.int8 import Int8Embedding, Int8Linear
from pipeline.backbone.loading import Partition, Placement, build_skeleton, load_weights, stored_buffers
from pipeline.backbone.weights import open_weights
from pipeline.errors import BackboneError
from tests.ranks import run_ranks
from tests.tiny import CONFIGS, make_model

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 42,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
BART = {
    **{"vocab_size": 42, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64},
    **{"scale_embedding": True, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1},
}
LLAMA_3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "gemma": ("gemma", SIZES),
    "gemma3_text": ("gemma3_text", {**SIZES, "sliding_window": 32}),
    "gemma4_text": ("gemma4_text", {**SIZES, "global_head_dim": 12, "vocab_size_per_layer_input": 42}),
    "bart": ("bart", BART),
    "mbart": ("mbart", BART),
    "m2m_100": ("m2m_100", BART),
    "llama 3's rotation": ("llama", {**SIZES, "rope_parameters": LLAMA_3}),
    "yarn": ("qwen3", {**SIZES, "rope_parameters": YARN}),
    "gpt2": ("gpt2", {"vocab_size": 42, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "t5": ("t5", {**CONFIGS["t5"][1], "vocab_size": 42}),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path, monkeypatch):
    """A random model of each kind, whose stored buffers are not what they begin as."""
    kind, sizes = MODELS[request.param]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes)
    model = auto_of(config).from_config(config)
    with torch.no_grad():
        for module, key in stored_buffers(model).values():
            module._buffers[key].add_(0.5)
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def auto_of(config):
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def theirs(folder, dtype=torch.float32):
    config = AutoConfig.from_pretrained(folder)
    return auto_of(config).from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


def ours(folder, int8, dtype=torch.float32):
    files = find_model(str(folder))
    return host_backbone(files, read_config(files), int8=int8, dtype=dtype, device=CPU, sharded=False).hosted.model


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_buffer_is_what_from_pretrained_gives(folder, int8, dtype):
    expected = dict(theirs(folder, dtype).named_buffers())
    scales = {
        f"{name}.scale" for name, m in ours(folder, int8).named_modules() if isinstance(m, Int8Linear | Int8Embedding)
    }
    found = {name.replace(".usual.", "."): value for name, value in ours(folder, int8, dtype).named_buffers()}
    assert set(found) - scales == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name


def test_logits_are_those_of_from_pretrained(folder):
    ids = torch.tensor([[3, 4, 5, 6, 7, 30, 41]])
    extra = {"decoder_input_ids": ids} if theirs(folder).config.is_encoder_decoder else {}
    with torch.no_grad():
        expected, found = (model(input_ids=ids, **extra).logits for model in (theirs(folder), ours(folder, False)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_in_int8_does_all_that_it_did(folder, dtype):
    ids = torch.tensor([[3, 4, 5], [0, 41, 1]])
    with torch.no_grad():
        expected = theirs(folder, dtype).get_input_embeddings()(ids)
        found = ours(folder, True, dtype).get_input_embeddings()(ids)
    assert found.dtype == expected.dtype == dtype
    step = expected.float().abs().amax(-1, keepdim=True) / 127
    rounding = 0 if dtype == torch.float32 else expected.float().abs() / 64
    assert bool(((found.float() - expected.float()).abs() <= 0.51 * step + rounding).all())


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_stored_buffer_is_read_whole_on_every_rank(ranks, tmp_path, monkeypatch):
    folder = with_stored_buffers(tmp_path, monkeypatch)
    files = find_model(str(folder))
    for rank in range(ranks):
        model = build_skeleton(read_config(files), int8=True)
        load_weights(model, open_weights(files, model), torch.float32, in_parts(rank, ranks))
        assert float(model.model.embed_tokens.usual.offset) == 1.5
        assert model.model.embed_tokens.usual.factor.tolist() == [2.0] * 32
        assert model.model.embed_tokens.usual.inner.weight.shape == (-(-32 * 32 // ranks),)


def test_a_stored_buffer_that_is_missing_or_of_another_shape_is_named(tmp_path, monkeypatch):
    folder = with_stored_buffers(tmp_path, monkeypatch)
    tensors = load_file(folder / "model.safetensors")
    for value, sentence in ((None, "the weights lack 'model.embed_tokens.offset'"), (torch.ones(3), "has the shape")):
        changed = {**tensors, "model.embed_tokens.offset": value}
        save_file({k: v for k, v in changed.items() if v is not None}, folder / "model.safetensors")
        with pytest.raises(BackboneError, match=sentence):
            ours(folder, True)


def in_parts(rank, ranks):
    return Placement(
        Partition(rank, ranks), lambda piece, _: nn.Parameter(piece, False), lambda scale: scale, lambda module: None
    )


class OddEmbedding(nn.Embedding):
    """Reads its own table's type, its own ids, a stored buffer of each shape, and a layer inside."""

    def __init__(self, rows: int, columns: int, padding: int) -> None:
        super().__init__(rows, columns, padding)
        self.register_buffer("offset", torch.tensor(0.0))
        self.register_buffer("factor", torch.zeros(columns))
        self.inner = nn.Linear(columns, columns, bias=False)

    def forward(self, token_ids):
        rows = super().forward(token_ids) * self.factor.to(self.weight.dtype)
        return self.inner(rows + self.offset + (token_ids == 3).unsqueeze(-1))


def with_stored_buffers(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "nn", SimpleNamespace(**{**vars(nn), "Embedding": OddEmbedding}))
    folder = make_model(tmp_path / "m", "llama_untied")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.offset"] = torch.tensor(1.5)
    tensors["model.embed_tokens.factor"] = torch.full((32,), 2.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_odd_embedding_in_int8_answers_as_it_does_in_transformers(tmp_path, monkeypatch):
    folder = with_stored_buffers(tmp_path, monkeypatch)
    ids = torch.tensor([[3, 4, 5], [0, 41, 1]])
    with torch.no_grad():
        expected, found = (m.get_input_embeddings()(ids) for m in (theirs(folder), ours(folder, True)))
        assert torch.equal(ours(folder, False).get_input_embeddings()(ids), expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def sharded_answers(folder):
    files = find_model(str(folder))
    backbone = host_backbone(files, read_config(files), int8=True, dtype=torch.float32, device=CPU, sharded=True)
    with torch.no_grad():
        return backbone.run(answers).numpy()


def answers(model):
    return model(input_ids=torch.tensor([[3, 4, 5, 0, 41]])).logits


@pytest.mark.processes
def test_over_two_ranks_a_scaled_embedding_answers_as_in_one_process(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3_text", **MODELS["gemma3_text"][1])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    with torch.no_grad():
        whole = answers(ours(tmp_path / "m", True))
    for of_rank in run_ranks(2, sharded_answers, tmp_path / "m"):
        torch.testing.assert_close(torch.tensor(of_rank), whole, rtol=1e-4, atol=1e-4)
