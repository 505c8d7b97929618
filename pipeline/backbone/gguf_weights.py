"""Weights of a GGUF file under transformers' names. A tensor that nothing reads is refused by name."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbone.files import ModelFiles
from pipeline.backbone.gguf_metadata import ROPE_FACTORS, ROTARY_FAMILIES, quick_gguf_reader
from pipeline.backbone.weights import WeightSource
from pipeline.errors import BackboneError

# llama.cpp itself ignores these: frequencies that follow from the metadata, and T5's bias of an attention that has no
# relative positions.
_UNUSED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight|dec\.blk\.\d+\.cross_attn_rel_b\.weight")
_TURNED_IN_GPT2 = re.compile(r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight")
_NAMED = 3


def open_gguf(files: ModelFiles, skeleton: nn.Module) -> WeightSource:
    """Open a GGUF file's weights; `skeleton` (on the meta device) maps its names to transformers'.

    Raises: BackboneError when the file is damaged, or holds a tensor that the model has no place for.
    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    path = files.folder / str(files.gguf)
    try:
        with quick_gguf_reader():
            reader = gguf.GGUFReader(path)
        family = reader.fields["general.architecture"].contents()
    except (ValueError, KeyError, OSError) as error:
        raise BackboneError(f"{path} is damaged or no GGUF file ({error}); fetch the model again") from error
    config: Any = skeleton.config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    to_gguf = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    tensors, zeros = {}, {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        stem, _, suffix = name.rpartition(".")
        tensor = stored.get(f"{to_gguf.get_name(stem)}.{suffix}")
        if tensor is not None:
            tensors[name] = tensor
        elif name.endswith("_proj.bias") and config.model_type in ("llama", "qwen3"):
            zeros[name] = tuple(parameter.shape)  # one setting adds biases everywhere; the file may have some
    read_by_config = {ROPE_FACTORS} if family in ROTARY_FAMILIES else set()
    _refuse_unread(str(path), stored.keys() - read_by_config - {tensor.name for tensor in tensors.values()})
    # llama.cpp permutes some matrices; transformers knows how to undo it.
    processor = TENSOR_PROCESSORS.get(family, TensorProcessor)(config=config.to_dict())

    def read(name: str, first: int = 0, last: int | None = None) -> Tensor:
        if name in zeros:
            return torch.zeros(zeros[name])[first:last]
        tensor = tensors[name]
        floats = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name != "output.weight":  # no processor changes it, and GPT-2's would keep it to itself
            floats = processor.process(weights=floats, name=tensor.name).weights
        return torch.from_numpy(floats[first:last].copy())

    def shape(name: str) -> tuple[int, ...]:
        if name in zeros:
            return zeros[name]
        sides = tuple(int(side) for side in reversed(tensors[name].shape))
        turned = family == "gpt2" and _TURNED_IN_GPT2.fullmatch(tensors[name].name)
        return sides[::-1] if turned else sides

    def pieces(name: str) -> Iterator[Any]:
        yield bytes(4 * zeros[name][0]) if name in zeros else tensors[name].data.tobytes()

    return WeightSource(str(path), frozenset(tensors | zeros), shape, read, pieces, reads_rows=False)


def _refuse_unread(path: str, unread: set[str]) -> None:
    left = sorted(name for name in unread if not _UNUSED.fullmatch(name))
    if left:
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        raise BackboneError(
            f"{path} holds tensors that this model family has no place for, so its answers would be wrong without a "
            f"word: {', '.join(left[:_NAMED])}{more}; give the model's safetensors folder instead"
        )
