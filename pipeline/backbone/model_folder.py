"""A model as a folder that other servers load: config, tokenizer and float32 weights, as transformers saves them."""

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.backbone.conversion import require_stored
from pipeline.backbone.files import architecture_of, find_model, read_config, read_tokenizer
from pipeline.backbone.int8 import quantize_matrix
from pipeline.backbone.loading import build_skeleton, stored_tensors
from pipeline.backbone.weights import open_weights
from pipeline.errors import BackboneError
from pipeline.whole_files import put_in_place


def write_model_folder(model: str, folder: Path, int8: bool) -> None:
    """Write a decoder-only model's weights as float32; the folder is there whole or not at all.

    int8: write the values of the int8 rows that prompts are tuned on, so that a server that holds floats computes what
    a job with exact products computes. Quantised again, they give the same rows.
    Raises: BackboneError when the model cannot be read, or the folder is there already; StorageError.
    """
    if folder.exists():
        raise BackboneError(f"{folder} is there already, and nothing is overwritten: remove it or name another place")
    files = find_model(model)
    config, tokenizer = read_config(files), read_tokenizer(files)
    if architecture_of(config, model) != "decoder-only":
        raise BackboneError(f"{model} is an encoder-decoder, which no server here takes from such a folder")
    skeleton = build_skeleton(config, int8)
    source = open_weights(files, build_skeleton(config, int8=False))
    stored = stored_tensors(skeleton, source)
    turned = {
        f"{path}.{key}": bool(getattr(module, "stored_transposed", False))
        for path, module in skeleton.named_modules(remove_duplicate=False)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype == torch.int8
    }
    own = copy.deepcopy(config)  # transformers notes the type in the config that it is given
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(own, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            found = require_stored(stored, [name], source)
            tensor = found.read(0, found.shape[0]).to(torch.float32)
            if name in turned:
                tensor = _of_int8_rows(tensor.mT).mT if turned[name] else _of_int8_rows(tensor)
            parameter.copy_(tensor)

    def write(place: Path) -> None:
        plain.save_pretrained(place)
        tokenizer.save_pretrained(place)

    put_in_place(folder, write)


def _of_int8_rows(matrix: Tensor) -> Tensor:
    """`[…, O, I]` as int8 rows hold it."""
    rows, scale = quantize_matrix(matrix.reshape(-1, matrix.shape[-1]).contiguous())
    return (rows * scale.unsqueeze(-1)).view(matrix.shape)
