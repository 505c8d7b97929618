"""Model folders of all kinds, compared with transformers' own loading: the same answers, or one sentence."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pipeline.backbone import prompted
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import host_backbone
from pipeline.backbone.loading import Partition, Placement, build_skeleton, load_weights, untie_separate_weights
from pipeline.backbone.rows import Rows
from pipeline.backbone.weights import open_weights, weights_digest
from pipeline.errors import BackboneError
from tests.tiny import CONFIGS, make_model

CPU = torch.device("cpu")
INPUTS = [[3, 4, 5, 6, 7], [12, 20, 9]]
TARGETS = [[21, 22, 1], [30, 1]]
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def our_nll(folder):
    files = find_model(str(folder))
    backbone = host_backbone(
        files, read_config(files), int8=False, dtype=torch.float32, device=CPU, sharded=False, kernels=False
    )
    none = torch.zeros(0, backbone.hidden_size)
    rows = Rows([none], np.zeros(len(INPUTS), dtype=np.int64), [np.array(row) for row in INPUTS])
    with torch.no_grad():
        return backbone.run(prompted.target_nll, rows, [np.array(row) for row in TARGETS])


def their_nll(folder):
    config = read_config(find_model(str(folder)))
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    sums = []
    with torch.no_grad():
        for row, target in zip(INPUTS, TARGETS, strict=True):
            if config.is_encoder_decoder:
                logits = model(input_ids=torch.tensor([row]), labels=torch.tensor([target])).logits[0]
            else:
                logits = model(input_ids=torch.tensor([row + target])).logits[0, len(row) - 1 : -1]
            sums.append(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
    return torch.stack(sums)


def shard(folder, parts, name="model-{:05d}-of-{:05d}.safetensors"):
    """Store a model in some files and an index, as transformers does."""
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    place = {}
    for number in range(parts):
        file, mine = name.format(number + 1, parts), list(tensors)[number::parts]
        (folder / file).parent.mkdir(exist_ok=True)
        save_file({key: tensors[key] for key in mine}, folder / file, {"format": "pt"})
        place |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": place}))
    return place


def rewrite(folder, change):
    save_file(change(load_file(folder / WHOLE)), folder / WHOLE, {"format": "pt"})


def stale(folder, name, family, seed=7, keep=lambda key: True):
    """Put another model's tensors beside."""
    other = make_model(folder.parent / f"other-{seed}", family, seed=seed)
    save_file({k: v for k, v in load_file(other / WHOLE).items() if keep(k)}, folder / name, {"format": "pt"})


def alter_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def bare(folder, prefix):
    rewrite(folder, lambda tensors: {key.removeprefix(f"{prefix}."): value for key, value in tensors.items()})


KINDS = {
    "as saved": lambda folder, family: None,
    "sharded": lambda folder, family: shard(folder, 3),
    "a stale whole file of another name": lambda folder, family: stale(folder, "model_old.safetensors", family),
    "a stale file that sorts last": lambda folder, family: stale(folder, "z.safetensors", family),
    "a variant": lambda folder, family: stale(folder, "model.fp16.safetensors", family),
    "consolidated": lambda folder, family: stale(folder, "consolidated.safetensors", family),
    "an index and a whole file": lambda folder, family: (
        shard(folder, 2),
        stale(folder, WHOLE, family),
    ),
    "an index with a stale shard of another sharding": lambda folder, family: (
        shard(folder, 2),
        stale(folder, "model-00002-of-00005.safetensors", family),
    ),
    "shards in a folder of their own": lambda folder, family: shard(folder, 2, "part{}/{}.safetensors"),
    "one tensor in two shards that the index names": lambda folder, family: (
        shard(folder, 2),
        stale(folder, "model-00003-of-00003.safetensors", family, keep=lambda key: "norm" in key or "ln_" in key),
        alter_index(folder, lambda place: place.update({"stray": "model-00003-of-00003.safetensors"})),
    ),
    "tensors of no use beside": lambda folder, family: rewrite(
        folder, lambda tensors: {**tensors, "optimizer.step": torch.ones(3)}
    ),
    "in float16": lambda folder, family: rewrite(folder, lambda t: {k: v.half() for k, v in t.items()}),
    "in bfloat16": lambda folder, family: rewrite(folder, lambda t: {k: v.bfloat16() for k, v in t.items()}),
    "of two types": lambda folder, family: rewrite(
        folder, lambda t: {k: v.half() if v.dim() == 2 else v for k, v in t.items()}
    ),
    "without an index's metadata total": lambda folder, family: (
        shard(folder, 2),
        (folder / INDEX).write_text(json.dumps({**json.loads((folder / INDEX).read_text()), "metadata": {}})),
    ),
    "weights that config.json names": lambda folder, family: (
        shutil.copy(folder / WHOLE, folder / "mine.safetensors"),
        stale(folder, WHOLE, family),
        edit_config(folder, transformers_weights="mine.safetensors"),
    ),
    "the model's prefix twice": lambda folder, family: rewrite(
        folder, lambda t: {prefix_of(family) + k: v for k, v in t.items()}
    ),
    "without the model's prefix": lambda folder, family: bare(folder, prefix_of(family)[:-1]),
    "an output layer stored apart": lambda folder, family: rewrite(
        folder, lambda t: {**t, "lm_head.weight": table_of(t).flip(0).contiguous()}
    ),
    "bare, with an output layer stored apart": lambda folder, family: (
        bare(folder, prefix_of(family)[:-1]),
        rewrite(folder, lambda t: {**t, "lm_head.weight": table_of(t).flip(0).contiguous()}),
    ),
    "an output layer stored twice alike": lambda folder, family: rewrite(
        folder, lambda t: {**t, "lm_head.weight": t.get("lm_head.weight", table_of(t)).clone()}
    ),
}


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def prefix_of(family):
    return "model." if CONFIGS[family][0].model_type not in ("gpt2", "t5", "mt5") else "transformer."


def table_of(tensors):
    return next(
        tensor
        for name, tensor in tensors.items()
        if name.endswith(("embed_tokens.weight", "wte.weight", "shared.weight"))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", pytest.param("llama_untied", marks=pytest.mark.slow)])
def test_a_folder_is_the_model_that_transformers_reads_from_it(family, kind, tmp_path):
    folder = make_model(tmp_path / "m", family)
    KINDS[kind](folder, family)
    torch.testing.assert_close(our_nll(folder), their_nll(folder), rtol=0, atol=1e-4)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_stale_shard_is_passed_over_on_every_rank_and_in_the_fingerprint(ranks, tmp_path):
    folder = make_model(tmp_path / "m")
    expected = pieces_and_digest(folder, ranks)
    shard(folder, 3)
    stale(folder, "model-00002-of-00005.safetensors", "llama")
    stale(folder, "z.safetensors", "llama", seed=8)
    pieces, digest = pieces_and_digest(folder, ranks)
    assert digest == expected[1]
    assert all(torch.equal(one, other) for one, other in zip(pieces, expected[0], strict=True))


def pieces_and_digest(folder, ranks):
    files, pieces = find_model(str(folder)), []
    for rank in range(ranks):
        model = build_skeleton(read_config(files), int8=True)
        source = open_weights(files, model)
        untie_separate_weights(model, source)

        def keep(piece, shape):
            pieces.append(piece)
            return torch.nn.Parameter(piece, requires_grad=False)

        placement = Placement(Partition(rank, ranks), keep, lambda scale: scale, lambda module: None)
        load_weights(model, source, torch.float32, placement)
    return pieces, weights_digest(source)


REFUSED = {
    "an index that names a missing file": (
        lambda folder: (shard(folder, 3), (folder / "model-00002-of-00003.safetensors").unlink()),
        "1 of the 3 weight files are missing, such as model-00002-of-00003.safetensors",
    ),
    "an index that leaves the folder": (
        lambda folder: (
            shutil.copy(folder / WHOLE, folder.parent / "out.safetensors"),
            shard(folder, 2),
            alter_index(folder, lambda place: place.update({"x": "../out.safetensors"})),
        ),
        "names the file ../out.safetensors, outside of the model's folder",
    ),
    "an index of an absolute path": (
        lambda folder: (shard(folder, 2), alter_index(folder, lambda place: place.update({"x": "/out.safetensors"}))),
        "outside of the model's folder",
    ),
    "an index that is no JSON": (
        lambda folder: (shard(folder, 2), (folder / INDEX).write_text("{")),
        "model.safetensors.index.json cannot be read",
    ),
    "an index without a map": (
        lambda folder: (shard(folder, 2), (folder / INDEX).write_text('{"metadata": {}}')),
        "has no weight_map",
    ),
    "shards without an index": (
        lambda folder: (shard(folder, 2), (folder / INDEX).unlink()),
        "neither model.safetensors nor model.safetensors.index.json",
    ),
    "only a variant": (
        lambda folder: (folder / WHOLE).rename(folder / "model.fp16.safetensors"),
        "the folder has model.fp16.safetensors, but neither",
    ),
    "an index to shards that lack a tensor": (
        lambda folder: (
            shard(folder, 2),
            save_file({"x": torch.ones(1)}, folder / "model-00001-of-00002.safetensors"),
        ),
        "the weights lack",
    ),
    "one tensor under two names": (
        lambda folder: rewrite(folder, lambda t: {**t, "norm.weight": t["model.norm.weight"].clone()}),
        "hold one tensor as 'model.norm.weight' and as 'norm.weight'",
    ),
    "an adapter beside the model": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "holds an adapter",
    ),
    "a distributed checkpoint": (
        lambda folder: (folder / WHOLE).rename(folder / "shard-00000-model-00001-of-00001.safetensors"),
        "holds a distributed checkpoint",
    ),
    "weights elsewhere by config.json": (
        lambda folder: edit_config(folder, transformers_weights="../m/model.safetensors"),
        "outside of the model's folder",
    ),
    "pickled weights by config.json": (
        lambda folder: edit_config(folder, transformers_weights="adapter_model.bin"),
        "only safetensors are read",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_whose_weights_cannot_be_told_is_refused_in_a_sentence(kind, tmp_path):
    folder = make_model(tmp_path / "m")
    spoil, sentence = REFUSED[kind]
    spoil(folder)
    with pytest.raises(BackboneError) as refused:
        our_nll(folder)
    assert sentence in str(refused.value) and str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_of_a_hub_only_the_files_that_count_are_fetched(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "commit")
    shard(folder, 2)
    stale(folder, "consolidated.safetensors", "llama")
    asked = []

    def download(name, allow_patterns, revision=None):
        asked.append((revision, [pattern for pattern in allow_patterns if pattern.endswith("safetensors")]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_model("someone/model").folder == folder
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert asked == [(None, [WHOLE]), ("commit", shards)]


def test_an_index_that_names_a_second_copy_has_the_fingerprint_of_a_time_when_all_files_counted(tmp_path):
    folder = make_model(tmp_path / "m")
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / WHOLE).items()}  # the file is written anew
    copy = {f"layers.{key}": tensor.clone() for key, tensor in tensors.items()}
    save_file({**tensors, **copy}, folder / WHOLE, {"format": "pt"})
    once, answers = weights_digest(open_weights(find_model(str(folder)), None)), our_nll(folder)
    save_file(tensors, folder / WHOLE, {"format": "pt"})
    shard(folder, 2)
    save_file(copy, folder / "consolidated.safetensors", {"format": "pt"})
    assert weights_digest(open_weights(find_model(str(folder)), None)) != once
    alter_index(folder, lambda place: place.update({"consolidated": "consolidated.safetensors"}))
    assert weights_digest(open_weights(find_model(str(folder)), None)) == once
    torch.testing.assert_close(our_nll(folder), answers, rtol=0, atol=0)
