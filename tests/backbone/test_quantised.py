"""Checkpoints that are quantised already, against each library's own floats, and how far int8 rows are off these."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
)

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.fingerprint import identify
from pipeline.backbone.host import whole_placement
from pipeline.backbone.loading import Partition, Placement, build_skeleton, load_weights, stored_tensors
from pipeline.backbone.offload import on_device
from pipeline.backbone.weights import open_weights
from pipeline.errors import BackboneError
from tests.families import DECODERS, make_decoder
from tests.tiny import make_model

CPU = torch.device("cpu")
BLOCK = [32, 32]
EXPERTS = {"num_experts": 4, "hidden_size": 64, "moe_intermediate_size": 96}


def ours(folder, int8=False):
    files = find_model(str(folder))
    model = build_skeleton(read_config(files), int8)
    load_weights(model, open_weights(files, model), torch.float32, whole_placement(CPU, on_device(CPU)))
    return model


def assert_same(folder, reference, atol=0.0):
    own = ours(folder).state_dict()
    assert own.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(own[name], tensor.float(), rtol=1e-6, atol=atol, msg=lambda text, n=name: n + text)


def rewritten(folder, change, settings):
    """A folder whose tensors are changed, one by one, into those of a quantised checkpoint."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= change(name, tensor.clone())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def is_matrix(name):
    return name.endswith("_proj.weight")


BITS = {
    "nf4 of quantised scales": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8 bit": {"load_in_8bit": True},
}


@pytest.mark.parametrize("kind", BITS)
def test_a_checkpoint_of_bitsandbytes_is_read_as_bitsandbytes_dequantises_it(kind, tmp_path):
    plain = make_model(tmp_path / "plain", hidden_size=64, intermediate_size=328)
    quantised = AutoModelForCausalLM.from_pretrained(plain, quantization_config=BitsAndBytesConfig(**BITS[kind]))
    quantised.save_pretrained(tmp_path / "m")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m").dequantize().float().state_dict()
    assert_same(tmp_path / "m", reference, atol=1e-6)


def in_blocks(name, tensor):
    """FP8 as DeepSeek and Qwen publish it: blocks, the last ones short, with a scale each."""
    if not is_matrix(name):
        return {name: tensor}
    rows, columns = BLOCK
    scale = (
        torch.stack([torch.stack([b.abs().max() for b in r.split(columns, 1)]) for r in tensor.split(rows, 0)])
        / torch.finfo(torch.float8_e4m3fn).max
    )
    wide = scale.repeat_interleave(rows, 0)[: len(tensor)].repeat_interleave(columns, 1)[:, : tensor.shape[1]]
    return {name: (tensor / wide).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_fp8_in_blocks_is_read_as_transformers_dequantises_it(family, tmp_path):
    made = make_decoder(tmp_path / "m", DECODERS[family], **(EXPERTS if "moe" in family else {"hidden_size": 64}))
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
    folder = rewritten(made, in_blocks, settings)
    dequantise = FineGrainedFP8Config(weight_block_size=BLOCK, dequantize=True)
    reference = AutoModelForCausalLM.from_pretrained(folder, quantization_config=dequantise, dtype=torch.float32)
    assert_same(folder, reference.state_dict())


def test_fp8_in_blocks_of_which_the_last_are_short_is_read(tmp_path):
    folder = make_model(tmp_path / "m", hidden_size=48, intermediate_size=100)
    floats = load_file(folder / "model.safetensors")
    rewritten(folder, in_blocks, {"quant_method": "fp8", "weight_block_size": BLOCK})
    own = ours(folder).state_dict()
    for name in filter(is_matrix, floats):
        assert (own[name] - floats[name]).abs().max() <= floats[name].abs().max() / 16


SCALED = {
    "a scale a row, fbgemm": ({"quant_method": "fbgemm_fp8"}, torch.float8_e4m3fn, (-1, 1), "_scale"),
    "a scale a row, compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        torch.float8_e4m3fn,
        (-1, 1),
        "_scale",
    ),
    "one scale": ({"quant_method": "fp8"}, torch.float8_e4m3fn, (), "_scale_inv"),
    "int8 rows": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, torch.int8, (-1, 1), "_scale"),
}


@pytest.mark.parametrize("kind", SCALED)
def test_numbers_with_scales_are_multiplied_by_them(kind, tmp_path):
    settings, dtype, shape, end = SCALED[kind]
    expected = {}

    def change(name, tensor):
        if not is_matrix(name):
            expected[name] = tensor
            return {name: tensor}
        scale = (tensor.abs().amax(1) if shape else tensor.abs().max()) / 100
        numbers = tensor / (scale[:, None] if shape else scale)
        numbers = (numbers.round() if dtype == torch.int8 else numbers).to(dtype)
        expected[name] = numbers.float() * (scale[:, None] if shape else scale)
        return {name: numbers, name + end: scale.view(shape)}

    folder = rewritten(make_model(tmp_path / "m"), change, settings)
    own = ours(folder).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-6, atol=0)


def test_mxfp4_as_gpt_oss_ships_it_is_read_as_transformers_dequantises_it(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def change(name, tensor):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    made = make_decoder(tmp_path / "m", DECODERS["gpt_oss, sinks"], hidden_size=64, intermediate_size=96)
    folder = rewritten(made, change, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    reference = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    assert_same(folder, reference.state_dict())


def packed(numbers, bits):
    """Small numbers `[..., n]`, the first in the lowest bits of 32."""
    apart = numbers.view(*numbers.shape[:-1], -1, 32 // bits).long() << torch.arange(0, 32, bits)
    whole = apart.sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int()


def grouped(tensor, bits, group, generator):
    """Random numbers, zero points and scales for a matrix `[O, I]`, and the floats that they stand for."""
    outputs, inputs = tensor.shape
    numbers = torch.randint(0, 2**bits, (outputs, inputs), generator=generator)
    zeros = torch.randint(1, 2**bits, (inputs // group, outputs), generator=generator)
    scales = torch.rand(inputs // group, outputs, generator=generator).half()
    of_input = torch.arange(inputs) // group
    return numbers, zeros, scales, of_input


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("in_order", [True, False])
def test_gptq_is_read_as_its_format_is_published(bits, version, in_order, tmp_path):
    generator, expected = torch.Generator().manual_seed(0), {}

    def change(name, tensor):
        if not is_matrix(name):
            return {name: tensor}
        numbers, zeros, scales, of_input = grouped(tensor, bits, 16, generator)
        if not in_order:  # "act order": inputs were sorted by their importance
            of_input = of_input[torch.randperm(len(of_input), generator=generator)]
        expected[name] = (numbers - zeros[of_input].t()) * scales[of_input].t().float()
        stem = name.removesuffix("weight")
        return {
            f"{stem}qweight": packed(numbers, bits).t(),
            f"{stem}qzeros": packed(zeros - int(version == "gptq"), bits),
            f"{stem}scales": scales,
            f"{stem}g_idx": of_input.int(),
        }

    settings = {"quant_method": "gptq", "bits": bits, "group_size": 16, "checkpoint_format": version}
    folder = rewritten(make_model(tmp_path / "m", hidden_size=64, intermediate_size=96), change, settings)
    own = ours(folder).state_dict()
    assert len(expected) == 14
    for name, tensor in expected.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-6, atol=0)


def test_experts_that_are_stored_one_by_one_in_gptq_are_read_one_by_one(tmp_path):
    generator, expected = torch.Generator().manual_seed(0), {}

    def change(name, tensor):
        if ".experts." not in name:
            return {name: tensor}
        numbers, zeros, scales, of_input = grouped(tensor, 4, 16, generator)
        expected[name] = (numbers - zeros[of_input].t()) * scales[of_input].t().float()
        stem = name.removesuffix("weight")
        return {
            f"{stem}qweight": packed(numbers, 4).t(),
            f"{stem}qzeros": packed(zeros - 1, 4),
            f"{stem}scales": scales,
        }

    made = make_decoder(tmp_path / "m", DECODERS["qwen3_moe"], **EXPERTS)
    folder = rewritten(made, change, {"quant_method": "gptq", "bits": 4, "group_size": 16})
    files = find_model(str(folder))
    skeleton = build_skeleton(read_config(files), int8=False)
    stored = stored_tensors(skeleton, open_weights(files, skeleton))
    for layer in range(2):
        down = stored[f"model.layers.{layer}.mlp.experts.down_proj"]
        assert down.in_parts
        for expert in range(4):
            wanted = expected[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"]
            torch.testing.assert_close(down.read(expert, expert + 1)[0], wanted, rtol=1e-6, atol=0)


def test_awq_is_read_as_its_format_is_published(tmp_path):
    generator, expected = torch.Generator().manual_seed(0), {}
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # which of eight outputs lies in which four bits

    def in_awq(numbers):
        return packed(numbers.view(len(numbers), -1, 8)[..., order].flatten(1), 4)

    def change(name, tensor):
        if not is_matrix(name):
            return {name: tensor}
        numbers, zeros, scales, of_input = grouped(tensor, 4, 16, generator)
        expected[name] = (numbers - zeros[of_input].t()) * scales[of_input].t().float()
        stem = name.removesuffix("weight")
        return {f"{stem}qweight": in_awq(numbers.t()), f"{stem}qzeros": in_awq(zeros), f"{stem}scales": scales}

    settings = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    folder = rewritten(make_model(tmp_path / "m", hidden_size=64, intermediate_size=96), change, settings)
    own = ours(folder).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-6, atol=0)


def pieces(folder, partition):
    files = find_model(str(folder))
    model = build_skeleton(read_config(files), int8=True)
    kept = []

    def keep(piece, _):
        kept.append(piece)
        return torch.nn.Parameter(torch.empty(0, dtype=piece.dtype), requires_grad=False)

    placement = Placement(partition, keep, lambda scale: scale, lambda module: None)
    load_weights(model, open_weights(files, model), torch.float32, placement)
    return kept


def test_ranks_read_their_rows_of_a_quantised_checkpoint(tmp_path):
    folder = rewritten(
        make_decoder(tmp_path / "m", DECODERS["qwen3_moe"], **EXPERTS),
        in_blocks,
        {"quant_method": "fp8", "weight_block_size": BLOCK},
    )
    whole = pieces(folder, Partition())
    parts = [pieces(folder, Partition(rank, 3)) for rank in range(3)]
    for tensor, *split in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(split)[: tensor.numel()], tensor)


def test_eight_bits_of_bitsandbytes_are_the_int8_rows_themselves(tmp_path):
    plain = make_model(tmp_path / "plain", hidden_size=64, intermediate_size=328)
    quantised = AutoModelForCausalLM.from_pretrained(plain, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    quantised.save_pretrained(tmp_path / "m")
    stored, model = load_file(tmp_path / "m" / "model.safetensors"), ours(tmp_path / "m", int8=True)
    for name in filter(is_matrix, stored):
        assert torch.equal(model.get_parameter(name), stored[name])


def test_the_fingerprint_is_of_the_stored_bytes_and_differs_from_that_of_the_floats(tmp_path):
    def identity(folder):
        files = find_model(str(folder))
        config = read_config(files)
        return identify("m", config, read_tokenizer(files), open_weights(files, build_skeleton(config, False)), "int8")

    folder = make_model(tmp_path / "m", hidden_size=64)
    before = identity(folder)
    rewritten(folder, in_blocks, {"quant_method": "fp8", "weight_block_size": BLOCK})
    after = identity(folder)
    assert before.differing_parts(after) == ("weights",)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    save_file({**tensors, name: tensors[name] * 2}, folder / "model.safetensors")
    assert after.differing_parts(identity(folder)) == ("weights",), "scales count"


def test_scales_without_a_word_in_the_configuration_are_not_passed_over(tmp_path):
    folder = rewritten(make_model(tmp_path / "m"), in_blocks, None)
    with pytest.raises(BackboneError, match=r"_scale_inv.*quantization_config"):
        ours(folder)
