"""Many token segments run through a decoder-only model in one row, without padding.

A segment follows its parent: an input follows a soft prompt, a label follows an input. It attends
to its ancestors and, causally, to itself. So a prompt that many rows share runs once, and its
gradient is the exact sum over them (known as shared-prefix forward, arXiv 2506.05433). Products
with weights see every token once. A prompt whose keys and values are given does not run at all.

Shapes: N tokens that run, G tokens that are given. A heads, A' heads of keys, D head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.backbone import packed_attention
from pipeline.backbone.fused import uses_kernels
from pipeline.backbone.native import attention as native_attention
from pipeline.backbone.rows import PromptState
from pipeline.backbone.segments import Segments, make_segments

_NAME = "prompt_bank_packed"


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of each segment lie in the packed row, and what they attend to."""

    segments: Segments
    device: torch.device

    @property
    def starts(self) -> np.ndarray:
        """Index of each segment's first token; given segments lie at -G to -1, before all that run."""
        return self.segments.starts

    # There is no `[N, N]` mask: most of its entries would say "another row". The two forms below list for each segment
    # only what it attends to. Each is made once a batch and serves every layer.

    @cached_property
    def levels(self) -> packed_attention.Levels:
        return packed_attention.make_levels(self.segments, self.device)

    def rotation(self, embeddings: tuple[Tensor, Tensor]) -> native_attention.Rotation:
        """From transformers' cosine and sine `[1, N, D]`, the same for every layer."""
        # Kept by hand: `cached_property` takes no argument, and the dataclass is frozen.
        if "_rotation" not in self.__dict__:
            # Both halves of a head turn by the same angles, so one half is enough.
            cosine, sine = (part[0, :, : part.shape[-1] // 2].float().contiguous() for part in embeddings)
            self.__dict__["_rotation"] = (cosine, sine)
        kept: native_attention.Rotation = self.__dict__["_rotation"]
        return kept

    @cached_property
    def forest(self) -> native_attention.Forest:
        return native_attention.make_forest(self.segments)


def make_layout(lengths: Sequence[int], parents: Sequence[int | None], device: torch.device, given: int = 0) -> Layout:
    """Lay out segments of `lengths` tokens; a parent comes before its children.

    The first `given` segments do not run: others only attend to them.
    """
    return Layout(make_segments(lengths, parents, given), device)


def run_packed(model: Any, embeddings: Tensor, layout: Layout, given: Sequence[PromptState] = ()) -> Tensor:
    """Last hidden states `[N, H]` of packed input embeddings `[N, H]`, behind the layout's given segments."""
    # A token's position counts its ancestors' tokens, not its neighbours in the packed row: each row runs as if it had
    # its prompt to itself. A prompt that many rows share runs once, and autograd sums their gradients in it.
    positions = torch.as_tensor(layout.segments.positions()[None], dtype=torch.long, device=layout.device)
    with _packed_attention(model):
        output = model.base_model(
            inputs_embeds=embeddings[None],
            position_ids=positions,
            use_cache=False,
            layout=layout,
            given=given,
            kernels=uses_kernels(model),
        )
    return output.last_hidden_state[0]


@contextmanager
def _packed_attention(model: Any) -> Iterator[None]:
    """Let transformers call `_attend` in place of its own attention, for this forward pass alone."""
    usual = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = usual


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: Layout,
    given: Sequence[PromptState],
    kernels: bool,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q `[1, A, N, D]`, k and v `[1, A', N, D]` -> `[1, N, A, D]`."""
    assert attention_mask is None and dropout == 0.0
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, A, D]
    # A prompt whose keys and values are given was run before, by itself: it attends to nothing but itself, so they are
    # the same behind whatever input, and a service need not compute them again.
    if given:  # [G + N, A', D]
        k = torch.cat([*(state.keys[module.layer_idx] for state in given), k])
        v = torch.cat([*(state.values[module.layer_idx] for state in given), v])
    scaling = scaling or q.shape[-1] ** -0.5
    if kernels and native_attention.supports(q, k, v):
        return native_attention.attend(q, k, v, scaling, layout.forest)[None], None
    return packed_attention.attend(q * scaling, k, v, layout.levels)[None], None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
