"""Loading leaf by leaf: every tensor arrives, no rank holds the model, bad folders are refused."""

import hashlib
import json
import shutil
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.backbone import host, loading, weights
from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.fingerprint import identify
from pipeline.backbone.host import held_bytes, host_backbone
from pipeline.backbone.loading import Partition, Placement, build_skeleton, load_weights
from pipeline.backbone.memory import estimate_memory
from pipeline.backbone.packaged import PACKAGED
from pipeline.backbone.weights import open_weights
from pipeline.errors import BackboneError
from pipeline.lab.benchmark.resident import MemoryWatch, resident
from tests.ranks import run_ranks
from tests.tiny import make_model

CPU = torch.device("cpu")
LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "head_dim": 128, "vocab_size": 32_000}


def identity_of(folder, quantisation="int8"):
    files = find_model(str(folder))
    config = read_config(files)
    source = open_weights(files, build_skeleton(config, int8=False))
    return identify("m", config, read_tokenizer(files), source, quantisation)


def load_and_watch(folder):
    loading._CHUNK = 2**18
    # Everything that loading imports and starts is paid for by a first, tiny model.
    load_sharded(folder.parent / "tiny")
    before, choose_way = resident(), host.choose_way
    with ExitStack() as loading_alone:
        watch = loading_alone.enter_context(MemoryWatch())
        # Loading ends where the model first runs, to find out how its rows run.
        host.choose_way = lambda *args, **options: loading_alone.close() or choose_way(*args, **options)
        backbone = load_sharded(folder)
    return watch.peak.total - before.total, held_bytes(backbone)


def load_sharded(folder):
    files = find_model(str(folder))
    return host_backbone(files, read_config(files), int8=True, dtype=torch.float32, device=CPU, sharded=True)


@pytest.mark.slow
@pytest.mark.processes
def test_no_rank_holds_the_whole_model_before_or_after_or_while_loading(tmp_path):
    make_model(tmp_path / "tiny")
    folder = make_model(tmp_path / "large", **LARGE)
    config = read_config(find_model(str(folder)))
    estimated = estimate_memory(config, int8=True, dtype=torch.float32, world_size=2, tokens_per_microbatch=0).weights
    skeleton = build_skeleton(config, int8=True)
    int8 = sum(p.numel() for p in {id(p): p for p in skeleton.parameters()}.values() if p.dtype == torch.int8)
    largest = 32_000 * 512 * 4  # as stored
    for peak, held in run_ranks(2, load_and_watch, folder):
        assert held["int8"] == int8 / 2, "int8 bytes per rank are the total over the ranks"
        assert held["float32"] < int8 / 20, "only norms and scales are kept whole"
        assert sum(held.values()) == pytest.approx(estimated, rel=0.02), "what --plan says"
        assert peak < int8 / 2 + largest / 4, "a rank held more than its part and some rows while loading"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "t5", "t5_tied"])
@pytest.mark.parametrize("int8", [True, False])
def test_the_ranks_pieces_put_together_are_the_model_bit_by_bit_however_it_is_cut(family, int8, tmp_path, monkeypatch):
    folder = make_model(tmp_path / "m", family)
    whole = pieces_of(folder, int8, Partition())
    monkeypatch.setattr(loading, "_CHUNK", 100)  # some rows at a time, as for a large model
    for ranks in (2, 3, 7):
        shared = [pieces_of(folder, int8, Partition(rank, ranks)) for rank in range(ranks)]
        for name, (tensor, _) in whole.items():
            joined = torch.cat([piece for piece, _ in (rank[name] for rank in shared)])
            assert torch.equal(joined[: tensor.numel()], tensor), f"{name} over {ranks} ranks"
            assert not joined[tensor.numel() :].any(), "padding"
        scales = {name: [rank[name][1] for rank in shared] for name in whole if whole[name][1] is not None}
        for name, parts in scales.items():
            assert torch.equal(torch.stack(parts).sum(0), whole[name][1]), f"scale of {name} over {ranks} ranks"


def pieces_of(folder, int8, share):
    """Every parameter's piece, and its scales as this rank knows them."""
    files = find_model(str(folder))
    model = build_skeleton(read_config(files), int8)
    source = open_weights(files, model)
    pieces = {}

    def keep(piece, shape):
        kept = torch.nn.Parameter(torch.empty(0, dtype=piece.dtype), requires_grad=False)
        pieces[id(kept)] = piece
        return kept

    load_weights(model, source, torch.float32, Placement(share, keep, lambda scale: scale, lambda module: None))
    scales = dict(model.named_buffers())
    return {
        name: (pieces[id(kept)], scales.get(name.removesuffix("weight") + "scale"))
        for name, kept in model.named_parameters()
    }


def test_a_rank_reads_only_the_rows_that_it_holds(tmp_path):
    folder = make_model(tmp_path / "m", hidden_size=64, intermediate_size=512)
    files = find_model(str(folder))
    model = build_skeleton(read_config(files), int8=True)
    source = open_weights(files, model)
    read = []

    def counted(name, first=0, last=None):
        tensor = source.read(name, first, last)
        read.append(tensor.numel())
        return tensor

    keep = Placement(
        Partition(1, 4), lambda piece, _: torch.nn.Parameter(piece, False), lambda scale: scale, lambda module: None
    )
    load_weights(model, replace(source, read=counted), torch.float32, keep)
    skeleton = build_skeleton(read_config(files), int8=True)
    total = sum(p.numel() for p in {id(p): p for p in skeleton.parameters()}.values())
    assert sum(read) < 0.27 * total


def test_weights_spread_over_many_files_are_the_same_model(tmp_path):
    folder = make_model(tmp_path / "one")
    spread = tmp_path / "many"
    shutil.copytree(folder, spread)
    tensors = load_file(spread / "model.safetensors")
    (spread / "model.safetensors").unlink()
    files = {name: f"model-{i:05d}.safetensors" for i, name in enumerate(tensors)}
    for name, file in files.items():
        save_file({name: tensors[name]}, spread / file)
    (spread / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert identity_of(spread) == identity_of(folder)


def test_an_output_layer_stored_apart_from_the_embedding_is_not_tied_to_it(tmp_path):
    folder = make_model(tmp_path / "t5", "t5")
    tensors = load_file(folder / "model.safetensors")

    def rows_of(output):
        save_file({**tensors, "lm_head.weight": output}, folder / "model.safetensors")
        files = find_model(str(folder))
        model = host_backbone(files, read_config(files), int8=True, dtype=torch.float32, device=CPU, sharded=False)
        return model.hosted.model.get_input_embeddings().weight, model.hosted.model.get_output_embeddings().weight

    table, output = rows_of(tensors["shared.weight"].clone())
    assert output is table, "stored twice, but equal"
    table, output = rows_of(tensors["shared.weight"].flip(0).contiguous())
    assert torch.equal(output, table.flip(0)) and not torch.equal(output, table)


def test_the_fingerprint_is_of_the_whole_tensors_however_they_are_read(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "m")
    expected = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        expected.update(f"{name}\0".encode() + hashlib.sha256(tensor.numpy().tobytes()).digest())
    assert identity_of(folder).weights == expected.hexdigest()
    monkeypatch.setattr(weights, "_PIECE", 100)
    assert identity_of(folder).weights == expected.hexdigest()


def test_the_fingerprint_covers_config_tokenizer_weights_and_quantisation(tmp_path):
    folder = make_model(tmp_path / "m")
    original = identity_of(folder)
    assert identity_of(make_model(tmp_path / "same")) == original
    assert original.differing_parts(identity_of(make_model(tmp_path / "w", seed=1))) == ("weights",)
    assert original.differing_parts(identity_of(folder, "full")) == ("quantization",)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert original.differing_parts(identity_of(folder)) == ("config",)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace('"awful"', '"aweful"'))
    assert original.differing_parts(identity_of(folder)) == ("tokenizer",)


def test_bad_model_folders_are_refused_with_one_sentence_each(tmp_path):
    folder = make_model(tmp_path / "m")
    stored = folder / "model.safetensors"
    whole = stored.read_bytes()

    def refused(match: str, path=folder) -> None:
        with pytest.raises(BackboneError, match=match) as caught:
            files = find_model(str(path))
            config = read_config(files)
            host_backbone(files, config, int8=True, dtype=torch.float32, device=CPU, sharded=False)
        assert "\n" not in str(caught.value)

    stored.write_bytes(whole[: len(whole) // 2])
    refused("damaged or incomplete")
    tensors = load_file(_restored(stored, whole))
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}, stored)
    refused("lack 'model.layers.1.mlp.up_proj.weight'")
    save_file({k: v[:8].clone() if "layers.1.mlp.up_proj" in k else v for k, v in tensors.items()}, stored)
    refused("config.json says")
    stored.unlink()
    refused("no weights")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused("only pickled weights")
    refused("no config.json", tmp_path)
    refused("no such folder or file", tmp_path / "nowhere")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "albert"}))
    save_file(tensors, stored)
    refused("no language model of the family 'albert'")


def _restored(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.slow
@pytest.mark.processes
def test_gguf_weights_are_read_as_transformers_reads_them():
    try:
        files = find_model("smollm2-135m")
    except BackboneError:
        pytest.skip(f"the package {PACKAGED['smollm2-135m'].install} is not installed")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    skeleton = build_skeleton(read_config(files), int8=False)
    theirs = load_gguf_checkpoint(files.folder / files.gguf, return_tensors=True, model_to_load=skeleton)["tensors"]
    source = open_weights(files, skeleton)
    assert set(theirs) - {"lm_head.weight"} == set(source.names)
    for name in source.names:
        torch.testing.assert_close(source.read(name), theirs[name], rtol=0, atol=0)
