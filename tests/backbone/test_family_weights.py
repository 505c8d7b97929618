"""Every family: its tensors are transformers' own, and int8 is the model that its kept weights make."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from pipeline.backbone import int8_layers, loading
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import held_bytes, host_backbone, layer_types, whole_placement
from pipeline.backbone.int8 import scale_of, set_products
from pipeline.backbone.int8_layers import weights_in_float
from pipeline.backbone.loading import (
    Partition,
    Placement,
    build_skeleton,
    load_weights,
    stored_buffers,
    untie_separate_weights,
)
from pipeline.backbone.memory import estimate_memory
from pipeline.backbone.offload import on_device
from pipeline.backbone.weights import open_weights
from pipeline.errors import BackboneError
from tests import seq2seq_families
from tests.families import DECODERS, Family, make_decoder
from tests.ranks import run_ranks
from tests.seq2seq_families import make_seq2seq
from tests.tiny import VOCAB

CPU = torch.device("cpu")
FAMILIES = {
    **DECODERS,
    # Experts of classes of their own.
    "jetmoe": Family(
        "jetmoe",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 64}
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256},
    ),
    "longcat_flash": Family(
        "longcat_flash",
        {**DECODERS["deepseek_v3"].sizes, "num_layers": 2, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 16}
        | {"moe_topk": 2, "zero_expert_num": 2, "head_dim": 8},
    ),
    "qwen3_5, with vision": Family(
        "qwen3_5",
        {**DECODERS["qwen3_5_text"].sizes, "vocab_size": VOCAB},
        text_of={
            "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
            | {"out_hidden_size": 32, "num_position_embeddings": 16},
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "vision_end_token_id": 6,
        },
    ),
}
WITH_EXPERTS = [
    "deepseek_v3",
    "gemma4_text, experts",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss, sinks",
    "granitemoehybrid",
    "jamba",
    "jetmoe",
    "llama4_text, chunks",
    "longcat_flash",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
]
"""Families whose experts are one tensor of three sides."""
SEQ2SEQ = seq2seq_families.FAMILIES
PER_LAYER = ["gemma4_text, inputs of layers"]
"""Families whose own forward needs ids beside embeddings."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a family, made once."""
    made = {}

    def folder_of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("family")
            of_two = family in seq2seq_families.CONFIGS
            made[family] = make_seq2seq(folder, family) if of_two else make_decoder(folder, FAMILIES[family])
        return made[family]

    return folder_of


def load(folder, int8, placement=None, dtype=torch.float32):
    files = find_model(str(folder))
    model = build_skeleton(read_config(files), int8, dtype)
    source = open_weights(files, model)
    untie_separate_weights(model, source)
    load_weights(model, source, dtype, placement or whole_placement(CPU, on_device(CPU)))
    return model


def tensors_of(model):
    """Parameters under each of their names, in float as they are kept, and persistent buffers."""
    tensors = {name: module._buffers[key] for name, (module, key) in stored_buffers(model).items()}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            kept = parameter.detach()
            if parameter.dtype == torch.int8:
                kept = parameter.float() * getattr(module, scale_of(key))[..., None]
                kept = kept.mT if getattr(module, "stored_transposed", False) else kept
            tensors[f"{path}.{key}".replace(".usual.", ".")] = kept
    return tensors


def theirs(folder):
    """transformers' own reading of a folder; of a multimodal one, the text model's part."""
    config = AutoConfig.from_pretrained(folder)
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    if config.get_text_config() is config:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    text = {name: tensor for name, tensor in whole.items() if "language_model." in name or name.startswith("lm_head")}
    return {name.replace("language_model.", ""): tensor for name, tensor in text.items()}


def assert_same_tensors(ours, reference):
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family", [*FAMILIES, *SEQ2SEQ])
def test_every_tensor_of_a_family_is_the_one_that_transformers_reads(family, saved):
    assert_same_tensors(tensors_of(load(saved(family), int8=False)), theirs(saved(family)))


@pytest.mark.parametrize("layers, head", [("model.language_model.", ""), ("language_model.model.", "language_model.")])
@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES[f].text_of])
def test_the_text_model_is_found_under_each_prefix_that_files_of_multimodal_models_have(
    family, layers, head, saved, tmp_path
):
    folder = tmp_path / "m"
    shutil.copytree(saved(family), folder)
    text = {name: tensor.clone() for name, tensor in theirs(saved(family)).items()}
    own = {name.replace("model.", layers) if name.startswith("model.") else head + name: text[name] for name in text}
    vision = {"vision_tower.layers.0.self_attn.q_proj.weight": torch.ones(2), "model.visual.norm.weight": torch.ones(3)}
    save_file(own | vision, folder / "model.safetensors", {"format": "pt"})
    assert_same_tensors(tensors_of(load(folder, int8=False)), text)


def test_a_file_that_lacks_one_expert_is_refused_in_a_sentence(saved, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(saved("qwen3_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.experts.2.up_proj" not in name}
    assert len(lacking) == len(tensors) - 1, "experts are stored one by one"
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"layers.1.mlp.experts.gate_up_proj.*incomplete") as refused:
        load(folder, int8=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss, sinks", "llama4_text, chunks", "jamba"])
@pytest.mark.parametrize("int8", [True, False])
def test_the_ranks_pieces_of_experts_put_together_are_the_model_bit_by_bit(family, int8, saved, monkeypatch):
    whole = pieces_of(saved(family), int8, Partition())
    for chunk in (100, 2**18):  # one expert at a time, and several
        monkeypatch.setattr(loading, "_CHUNK", chunk)
        for ranks in (2, 7):
            parts = [pieces_of(saved(family), int8, Partition(rank, ranks)) for rank in range(ranks)]
            for name, (tensor, scale) in whole.items():
                joined = torch.cat([part[name][0] for part in parts])
                assert torch.equal(joined[: tensor.numel()], tensor), f"{name} over {ranks} ranks"
                if scale is not None:
                    assert torch.equal(torch.stack([part[name][1] for part in parts]).sum(0), scale), name


def pieces_of(folder, int8, partition):
    kept = {}

    def keep(piece, shape):
        parameter = torch.nn.Parameter(torch.empty(0, dtype=piece.dtype), requires_grad=False)
        kept[id(parameter)] = piece
        return parameter

    model = load(folder, int8, Placement(partition, keep, lambda scale: scale, lambda module: None))
    buffers = dict(model.named_buffers())
    return {
        name: (kept[id(parameter)], buffers.get(f"{name.rpartition('.')[0]}.{scale_of(name.rpartition('.')[2])}"))
        for name, parameter in model.named_parameters()
    }


def test_a_rank_reads_of_a_layers_experts_only_those_that_it_holds(saved, tmp_path, monkeypatch):
    folder = make_decoder(tmp_path / "m", DECODERS["qwen3_moe"], num_experts=32)
    monkeypatch.setattr(loading, "_CHUNK", 100)
    read = []
    files = find_model(str(folder))
    model = build_skeleton(read_config(files), int8=True)
    source = open_weights(files, model)

    def counted(name, first=0, last=None):
        tensor = source.read(name, first, last)
        read.append((name, tensor.numel()))
        return tensor

    keep = Placement(Partition(1, 4), lambda piece, _: torch.nn.Parameter(piece, False), lambda s: s, lambda m: None)
    load_weights(model, replace(source, read=counted), torch.float32, keep)
    stored = load_file(folder / "model.safetensors")
    total = sum(tensor.numel() for name, tensor in stored.items() if ".experts." in name)
    assert sum(count for name, count in read if ".experts." in name) == total / 4


TARGETS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))


def nll_and_gradient(model, embeddings):
    embeddings = embeddings.clone().requires_grad_()
    target = {"decoder_input_ids": TARGETS} if model.config.is_encoder_decoder else {}
    logits = model(inputs_embeds=embeddings, use_cache=False, **target).logits.float()
    nll = -logits.log_softmax(-1)[:, :-1].gather(-1, TARGETS[:, 1:, None]).sum()
    (gradient,) = torch.autograd.grad(nll, embeddings)
    return nll.detach(), gradient


def distance(ours, reference):
    return float((ours - reference).norm() / reference.norm())


def some_embeddings(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    words = model.get_input_embeddings()(ids)
    return (words + 0.1 * words.std() * torch.randn(words.shape, generator=generator)).detach()


@pytest.mark.parametrize("family", [family for family in [*FAMILIES, *SEQ2SEQ] if family not in PER_LAYER])
def test_a_family_in_int8_is_the_model_that_its_kept_weights_make_and_near_the_one_in_float(family, saved):
    int8 = load(saved(family), int8=True)
    set_products(int8, "exact", CPU)
    usual = load(saved(family), int8=False)
    embeddings = some_embeddings(usual)
    float_nll, float_gradient = nll_and_gradient(usual, embeddings)
    kept = tensors_of(int8)
    with torch.no_grad():
        for name, tensor in tensors_of(usual).items():
            tensor.copy_(kept[name])
    kept_nll, kept_gradient = nll_and_gradient(usual, embeddings)
    nll, gradient = nll_and_gradient(int8, embeddings)
    torch.testing.assert_close(nll, kept_nll, rtol=2e-5, atol=0)
    assert distance(gradient, kept_gradient) < 2e-4
    assert distance(nll, float_nll) < 5e-3
    assert distance(gradient, float_gradient) < 0.5, "tiny layers round coarsely"
    set_products(int8, "int8", CPU)
    nll, gradient = nll_and_gradient(int8, embeddings)
    assert distance(nll, float_nll) < 1e-2
    assert distance(gradient, float_gradient) < 0.5


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_no_large_matrix_of_experts_stays_in_float(family, saved):
    model = build_skeleton(read_config(find_model(str(saved(family)))), int8=True)
    large = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "conv1d" not in name]
    assert large and all(model.get_parameter(name).dtype == torch.int8 for name in large)
    modules = [model.get_submodule(name.rpartition(".")[0]) for name in large]
    assert all(
        module._non_persistent_buffers_set >= {scale_of(name.rpartition(".")[2])}
        for name, module in zip(large, modules, strict=True)
    )


def test_a_token_is_not_touched_by_the_others_that_go_to_its_experts(saved):
    for products in ("exact", "int8"):
        model = load(saved("qwen3_moe"), int8=True)
        set_products(model, products, CPU)
        experts = model.model.layers[0].mlp
        x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
        spoiled = x.clone()
        spoiled[:, 3:] = torch.nan
        spoiled[:, 4:] = 1e9
        torch.testing.assert_close(experts(spoiled)[:, :3], experts(x)[:, :3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("products", ["exact", "int8"])
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_one_token_runs_though_most_experts_have_none(family, products, saved):
    model = load(saved(family), int8=True, dtype=torch.bfloat16)
    set_products(model, products, CPU)
    embeddings = some_embeddings(model)[:1, :1].bfloat16().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.float().logsumexp(-1).sum(), embeddings)
    assert logits.isfinite().all() and gradient.isfinite().all() and gradient.any()


def test_layers_of_every_class_of_a_hybrid_are_found(saved):
    skeleton = build_skeleton(read_config(find_model(str(saved("jamba")))), int8=True)
    assert {kind.__name__ for kind in layer_types(skeleton)} == {"JambaMambaDecoderLayer", "JambaAttentionDecoderLayer"}


def on_rank(folder):
    files = find_model(str(folder))
    backbone = host_backbone(files, read_config(files), int8=True, dtype=torch.float32, device=CPU, sharded=True)
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(2):  # the second pass walks ZeRO's recorded order
        embeddings = torch.randn(2, 9, backbone.hidden_size, generator=generator)
        nll, gradient = backbone.run(nll_and_gradient, embeddings)
        results.append((nll.numpy(), gradient.numpy()))
    experts = [p for p in backbone.hosted.parameters() if p.ds_tensor.dtype == torch.int8 and len(p.ds_shape) == 3]
    held = [len(p.ds_tensor) * dist.get_world_size() / p.ds_numel for p in experts]
    return results, held, [tuple(p.shape) for p in experts]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss, sinks", "jamba"])
def test_two_zero3_ranks_give_the_loss_and_gradients_of_one_process(family, saved):
    model = load(saved(family), int8=True)
    generator = torch.Generator().manual_seed(0)
    ranks = run_ranks(2, on_rank, saved(family))
    for step in range(2):
        nll, gradient = nll_and_gradient(model, torch.randn(2, 9, 32, generator=generator))
        for results, held, shapes in ranks:
            torch.testing.assert_close(torch.tensor(results[step][0]), nll, rtol=1e-5, atol=0)
            assert distance(torch.tensor(results[step][1]), gradient) < 1e-4
            assert all(part == 1 for part in held), "an expert's matrices are in two halves"
            assert all(shape == (0,) for shape in shapes), "experts were not released"
            assert bool(held) == (family != "llama")


def test_buffers_that_decide_the_experts_come_from_the_checkpoint(saved):
    folder = saved("deepseek_v3")
    stored = load_file(folder / "model.safetensors")
    model = load(folder, int8=True, dtype=torch.bfloat16)
    biases = {name: buffer for name, buffer in model.named_buffers() if "correction_bias" in name}
    assert biases
    for name, bias in biases.items():
        assert bias.dtype == torch.float32 and torch.equal(bias, stored[name]) and bias.any()


def test_a_table_of_embeddings_besides_the_first_is_int8_where_it_is_large(saved, monkeypatch):
    config = read_config(find_model(str(saved(PER_LAYER[0]))))
    table = "model.embed_tokens_per_layer"
    assert build_skeleton(config, int8=True).get_submodule(table).weight.dtype == torch.float32
    monkeypatch.setattr(int8_layers, "_LARGE_TABLE", 1000)
    model = load(saved(PER_LAYER[0]), int8=True)
    assert model.get_submodule(table).weight.dtype == torch.int8
    ids = torch.arange(VOCAB)[None]
    usual = AutoModelForCausalLM.from_pretrained(saved(PER_LAYER[0])).get_submodule(table)(ids)
    step = usual.abs().amax(-1, keepdim=True) / 127
    assert bool(((model.get_submodule(table)(ids) - usual).abs() <= 0.51 * step).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_what_a_family_holds(family, saved):
    files = find_model(str(saved(family)))
    config = read_config(files)
    source = open_weights(files, build_skeleton(config, int8=True))
    planned = estimate_memory(config, True, torch.float32, 1, tokens_per_microbatch=100, source=source)
    model = load(saved(family), int8=True)
    held = held_bytes(SimpleNamespace(hosted=model))
    assert planned.weights == pytest.approx(sum(held.values()), rel=0.02)
    in_float = weights_in_float(build_skeleton(config, int8=True), torch.float32)
    buffers = sum(buffer.nbytes for buffer in model.buffers())  # scales among them
    assert held["int8"] + sum(in_float.values()) + buffers == pytest.approx(planned.weights, rel=0.01)


def test_what_stays_in_float_is_told_by_name_and_bytes_where_it_is_much(saved, caplog):
    with caplog.at_level("INFO"):
        load(saved("opt"), int8=True)
        load(saved("opt"), int8=False)
    (told,) = (record.getMessage() for record in caplog.records if "stay in float" in record.getMessage())
    assert "model.decoder.embed_positions.weight (0.0 MB)" in told
    caplog.clear()
    with caplog.at_level("INFO"):
        load(saved("llama"), int8=True)
    assert not any("stay in float" in record.getMessage() for record in caplog.records)
