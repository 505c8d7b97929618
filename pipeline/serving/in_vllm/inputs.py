"""A row behind a soft prompt as vLLM's engine takes it: the prompt as vectors, the text as token ids."""

import torch
from vllm.inputs import EmbedsInput, embeds_input

from pipeline.serving.requests import EncodedRow


def engine_input(row: EncodedRow, dtype: torch.dtype, salt: str) -> EmbedsInput:
    """`[P; X]` as one mixed request. Shapes: P prompt tokens, T tokens, H hidden.

    salt: names the prompt. vLLM 0.32 looks cached blocks up by token ids and vectors, and not by which of the two a
    place takes (vLLM issue 56655). Behind one salt all rows have the same places, so no block is taken for another.
    """
    length = len(row.prompt.array)
    ids = row.input_ids.tolist()
    vectors = torch.zeros(length + len(ids), row.prompt.array.shape[1], dtype=dtype)
    vectors[:length] = torch.from_numpy(row.prompt.array.copy())
    # The prompt's places need some id, which vLLM counts as part of the text (for penalties): one that is in it anyway.
    return embeds_input(
        vectors,
        cache_salt=salt,
        prompt_token_ids=[ids[0]] * length + ids,
        is_token_ids=[False] * length + [True] * len(ids),
    )
