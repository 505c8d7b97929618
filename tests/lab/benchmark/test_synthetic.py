"""Synthetic checkpoints: what transformers loads is what this project loads, whatever the files' sizes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.host import host_backbone
from pipeline.errors import BackboneError
from pipeline.lab.benchmark.shapes import SHAPES, published_config
from pipeline.lab.benchmark.synthetic import write_checkpoint
from tests.tiny import CONFIGS

SHARD = 64 * 1024
FAMILIES = ["llama", "llama_untied", "mistral", "qwen3", "gpt2", "t5", "t5_tied"]


def tiny_config(family, **changes):
    config_type, sizes = CONFIGS[family]
    return config_type(**{**sizes, "vocab_size": 300, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_a_synthetic_checkpoint_and_computes_the_same_finite_logits(family, tmp_path):
    write_checkpoint(tiny_config(family), tmp_path, torch.float32, shard_bytes=SHARD)
    files = find_model(str(tmp_path))
    config, tokenizer = read_config(files), read_tokenizer(files)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = host_backbone(
        files, config, int8=False, dtype=torch.float32, device=torch.device("cpu"), sharded=False, kernels=False
    )
    ids = tokenizer(["a film", "good ☂"], return_tensors="pt", padding=True).input_ids
    more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids, **more).logits
        got = ours.run(lambda model: model(input_ids=ids, **more).logits)
    assert expected.isfinite().all() and expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_files_are_bounded_and_the_index_names_them(tmp_path):
    write_checkpoint(tiny_config("llama_untied"), tmp_path, torch.float32, shard_bytes=SHARD)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    held = {file.name: load_file(file) for file in tmp_path.glob("*.safetensors")}
    assert len(held) > 2
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    sizes = {file: sum(tensor.nbytes for tensor in tensors.values()) for file, tensors in held.items()}
    assert max(sizes.values()) <= SHARD
    assert index["metadata"]["total_size"] == sum(sizes.values())


def test_values_depend_on_the_seed_and_not_on_the_files(tmp_path):
    for name, shard, seed in [("a", SHARD, 0), ("b", 2**30, 0), ("c", SHARD, 1)]:
        write_checkpoint(tiny_config("llama"), tmp_path / name, torch.bfloat16, seed, shard)
    tensors = {
        name: {key: value for file in (tmp_path / name).glob("*.safetensors") for key, value in load_file(file).items()}
        for name in "abc"
    }
    assert tensors["a"].keys() == tensors["b"].keys()
    assert all(torch.equal(value, tensors["b"][key]) for key, value in tensors["a"].items())
    assert not torch.equal(*(tensors[name]["model.embed_tokens.weight"] for name in "ac"))


def test_a_token_for_every_byte_comes_back_as_it_was(tmp_path):
    write_checkpoint(tiny_config("t5"), tmp_path, torch.float32)
    tokenizer = read_tokenizer(find_model(str(tmp_path)))
    ids = tokenizer("für 3 €\n").input_ids
    assert ids[-1] == tokenizer.eos_token_id and len(ids) == len("für 3 €\n".encode()) + 1
    assert tokenizer.decode(ids[:-1]) == "für 3 €\n"


# T5's without the output layer, which its checkpoints store apart from the embedding.
PARAMETERS = {
    "t5-xl": 2.78e9,
    "t5-xxl": 11.0e9,
    "llama-3b": 3.21e9,
    "llama-7b": 6.74e9,
    "llama-13b": 13.02e9,
    "llama-8b": 8.03e9,
}


@pytest.mark.parametrize("shape", PARAMETERS)
def test_published_shapes_have_as_many_parameters_as_published(shape):
    from pipeline.backbone.loading import build_skeleton

    assert shape in SHAPES
    skeleton = build_skeleton(published_config(shape), int8=True)
    count = sum(p.numel() for p in {id(p): p for p in skeleton.parameters()}.values())
    assert count == pytest.approx(PARAMETERS[shape], rel=0.005)


def test_a_shape_that_cannot_be_written_gets_one_sentence(tmp_path):
    with pytest.raises(BackboneError, match="no known shape; known: t5-base, t5-large"):
        published_config("t5-xs")
    with pytest.raises(BackboneError, match="needs at least 259"):
        write_checkpoint(tiny_config("llama", vocab_size=100), tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BackboneError, match=r"config\.json"):
        published_config(str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text('{"model_type": "albert"}')
    with pytest.raises(BackboneError, match="no language model of the family 'albert'"):
        published_config(str(tmp_path / "config.json"))
