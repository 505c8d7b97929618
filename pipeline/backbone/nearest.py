"""Tokens of the vocabulary that are nearest to each row of a prompt (Lester et al. 2021, section 7).

Shapes: P prompt tokens, H hidden, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.backbone.conversion import require_stored
from pipeline.backbone.files import ModelFiles, find_model, read_config, read_tokenizer
from pipeline.backbone.loading import build_skeleton, stored_tensors
from pipeline.backbone.weights import open_weights
from pipeline.errors import BankError

_ROWS_AT_ONCE = 2**14


def nearest_tokens(model: str, prompt: np.ndarray, count: int = 5) -> list[list[tuple[str, float]]]:
    """For each row of a prompt `[P, H]` the `count` nearest tokens, as the vocabulary writes them, nearest first.

    The number beside a token is the cosine similarity of its input embedding and the row, in [-1, 1]. The model (a
    folder, hub name, .gguf file or packaged name) is not loaded: only one tensor of it is read.
    Raises: BankError when the prompt's rows do not have the model's hidden size, BackboneError.
    """
    files = find_model(model)
    tokenizer = read_tokenizer(files)
    table = read_input_embeddings(files)[: len(tokenizer)]  # some tables have more rows than there are tokens
    if prompt.ndim != 2 or prompt.shape[1] != table.shape[1]:
        raise BankError(
            f"the prompt's shape {list(prompt.shape)} does not fit the model {model}, whose rows are "
            f"[{table.shape[1]}]: name the model that it was tuned on"
        )
    rows = functional.normalize(torch.tensor(prompt, dtype=torch.float32))
    parts = table.split(_ROWS_AT_ONCE)  # a whole table in float32 would be gigabytes for some models
    cosines = torch.cat([rows @ functional.normalize(part.float()).T for part in parts], dim=1)  # [P, V]
    best = cosines.topk(min(count, len(table)), dim=1)
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in best.indices.tolist()]
    return [list(zip(*row, strict=True)) for row in zip(words, best.values.tolist(), strict=True)]


def read_input_embeddings(files: ModelFiles) -> Tensor:
    """The table `[V, H]` as stored."""
    skeleton = build_skeleton(read_config(files), int8=False)
    table = skeleton.get_input_embeddings().weight  # type: ignore[operator]
    names = [name for name, tensor in skeleton.named_parameters(remove_duplicate=False) if tensor is table]
    source = open_weights(files, skeleton)
    return require_stored(stored_tensors(skeleton, source), names, source).read(0, len(table))
