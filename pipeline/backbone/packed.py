"""Many token segments run through a decoder-only model in one row, without padding.

A segment follows its parent: an input follows a soft prompt, a label follows an input. It attends
to its ancestors and, causally, to itself. So a prompt that many rows share runs once, and its
gradient is the exact sum over them (known as shared-prefix forward, arXiv 2506.05433). Products
with weights see every token once. A prompt whose keys and values are given does not run at all.

Nothing here knows a family: transformers' own layers run, and hand their queries, keys and values to
`_attend` through its attention interface. What a token may look at is the family's own rule (a window,
a chunk), which transformers hands over through its mask interface; here it is asked about positions.

Shapes: N tokens that run, G tokens that are given. A heads, A' heads of keys, D head size.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from pipeline.backbone import packed_attention
from pipeline.backbone.gpu import attention as gpu_attention
from pipeline.backbone.native import attention as native_attention
from pipeline.backbone.output import layers_of
from pipeline.backbone.rows import PromptState
from pipeline.backbone.segments import Segments, make_segments
from pipeline.backbone.transfer import to_device

_NAME = "prompt_bank_packed"

_QUERIES = 256
"""Positions of queries that a rule is asked about at a time."""

KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""Keys and values `[N, A', D]` by the index of their layer."""


class NotPackedError(Exception):
    """The family's layers do not take part: they pass over the interface, or hand over what is not known here."""


class NotPlainError(Exception):
    """A layer's attention does more than the kernel for growing rows knows."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of each segment lie in the packed row, and what they attend to."""

    segments: Segments
    device: torch.device
    _rotations: dict[int, tuple[Tensor, native_attention.Rotation]] = field(default_factory=dict)

    @property
    def starts(self) -> np.ndarray:
        """Index of each segment's first token; given segments lie at -G to -1, before all that run."""
        return self.segments.starts

    # There is no `[N, N]` mask: most of its entries would say "another row". The forms below list for each segment
    # only what it attends to. Each is made once a batch and serves every layer.

    @cached_property
    def levels(self) -> packed_attention.Levels:
        return packed_attention.make_levels(self.segments, self.device)

    def rotation(self, embeddings: tuple[Tensor, Tensor]) -> native_attention.Rotation:
        """From transformers' cosine and sine `[1, N, D]`, the same for every layer of a kind."""
        if id(embeddings[0]) not in self._rotations:
            # Both halves of a head turn by the same angles, so one half is enough.
            cosine, sine = (part[0, :, : part.shape[-1] // 2].float().contiguous() for part in embeddings)
            self._rotations[id(embeddings[0])] = (embeddings[0], (cosine, sine))  # kept, so that no other gets its id
        return self._rotations[id(embeddings[0])][1]

    @cached_property
    def tables(self) -> gpu_attention.Tables:
        return gpu_attention.make_tables(self.segments, self.device)

    @cached_property
    def forest(self) -> native_attention.Forest:
        return native_attention.make_forest(self.segments)


def make_layout(lengths: Sequence[int], parents: Sequence[int | None], device: torch.device, given: int = 0) -> Layout:
    """Lay out segments of `lengths` tokens; a parent comes before its children.

    The first `given` segments do not run: others only attend to them.
    """
    return Layout(make_segments(lengths, parents, given), device)


@dataclass(frozen=True, eq=False)
class Rule:
    """What a token may look at, as a family says it: a function of positions. It travels as an attention mask."""

    function: Callable[[Any, Any, Tensor, Tensor], Tensor]

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether the token at position q sees the one at k."""
        none = torch.zeros((), dtype=torch.long, device=q.device)  # the rule is the same for every row and head
        return self.function(none, none, q, k)

    def __getitem__(self, _: Any) -> "Rule":
        return self  # Gemma 4 slices the masks of layers that share keys

    def is_causal(self, queries: np.ndarray, device: torch.device) -> bool:
        """Whether tokens at positions `[N]` see all up to their own, as in a window that is longer than they are."""
        if self.function is causal_mask_function:
            return True
        places = np.unique(queries)[::-1]  # the last come first, for there a window hides something
        keys = np.arange(places[0] + 1)
        for start in range(0, len(places), _QUERIES):  # some at a time, since the whole is positions by positions
            some = places[start : start + _QUERIES, None].copy()
            if not np.array_equal(self._seen(some, keys[None], device), keys <= some):
                return False
        return True

    def _seen(self, queries: np.ndarray, keys: np.ndarray, device: torch.device) -> np.ndarray:
        try:
            # On the host, which would otherwise wait until the device has caught up, only to decide what to launch.
            return self(torch.from_numpy(queries), torch.from_numpy(keys)).cpu().numpy()
        except RuntimeError:  # a rule that has numbers of its own on the device (llama4's chunks)
            return self(to_device(queries, device), to_device(keys, device)).cpu().numpy()


@dataclass(frozen=True, eq=False)
class PackedRun:
    """One forward pass of a packed row, as the attention of its layers sees it."""

    layout: Layout
    given: Sequence[PromptState]
    kernels: bool
    kept: KeysAndValues | None = None
    """Where keys and values go, if they are wanted."""
    parts: Callable[[int], native_attention.Parts] | None = None
    """Of a layer, where the keys and values lie to which one more token of each row attends, and where its own go; in
    place of `given` and `kept`, where the kernel is used."""
    _biases: dict[int, tuple[Rule, packed_attention.Biases | None]] = field(default_factory=dict)

    def biases(self, rule: Rule | None) -> packed_attention.Biases | None:
        """What the rule adds to scores; None where it is plain causal. Once a pass, for all layers."""
        if rule is None:
            return None
        if id(rule) not in self._biases:
            segments, device = self.layout.segments, self.layout.device
            made = None
            if not rule.is_causal(segments.positions(), device):
                positions = to_device(segments.all_positions(), device)
                made = packed_attention.make_biases(self.layout.levels, rule, positions)
            self._biases[id(rule)] = (rule, made)  # the rule is kept, so that no other gets its id
        return self._biases[id(rule)][1]

    def with_given(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[N, A', D]` behind those of the prompts that are given: `[G + N, A', D]`."""
        # A prompt that was run before ran by itself: it attends to nothing but itself, so its keys and values are the
        # same behind whatever input, and a service need not compute them again.
        if not self.given:
            return k, v
        return (
            torch.cat([*(state.keys[layer] for state in self.given), k]),
            torch.cat([*(state.values[layer] for state in self.given), v]),
        )


# Not by keyword arguments through the model: some families' layers drop those that they do not know.
_current: ContextVar[PackedRun | None] = ContextVar("packed run", default=None)


_setting = threading.Lock()


def current_run() -> PackedRun | None:
    """The packed run that is under way in this thread, if there is one."""
    return _current.get()


def run_packed(
    model: Any,
    embeddings: Tensor,
    layout: Layout,
    given: Sequence[PromptState] = (),
    kept: KeysAndValues | None = None,
    more: Mapping[str, Tensor] = MappingProxyType({}),
    parts: Callable[[int], native_attention.Parts] | None = None,
) -> Tensor:
    """Last hidden states `[N, H]` of packed input embeddings `[N, H]`, behind the layout's given segments.

    Keys and values of every layer go into `kept`, if it is there. `more` are inputs that the family has beside
    them. `parts`: as in `PackedRun`.
    """
    # A token's position counts its ancestors' tokens, not its neighbours in the packed row: each row runs as if it had
    # its prompt to itself. A prompt that many rows share runs once, and autograd sums their gradients in it.
    # A row that is done may be decoded on beside longer ones, beyond the model's table of positions.
    last = (getattr(model.config, "max_position_embeddings", None) or 2**62) - 1
    positions = to_device(layout.segments.positions()[None].clip(max=last), layout.device)
    run = PackedRun(layout, given, bool(getattr(model, "kernels", False)), kept, parts)
    token = _current.set(run)
    try:
        # One pass at a time, whichever thread calls: the setting is the whole model's.
        with _setting, _attention_of_all(model, _NAME):
            output = layers_of(model)(
                inputs_embeds=embeddings[None],
                position_ids=positions,
                # Of ones: without it transformers takes positions that jump for sequences of its own packing.
                attention_mask=torch.ones_like(positions),
                use_cache=False,
                **more,
            )
    finally:
        _current.reset(token)
    return output.last_hidden_state[0]


@contextmanager
def _attention_of_all(model: Any, name: str) -> Iterator[None]:
    """Let transformers call another attention in place of its own, for this forward pass alone."""
    # Every config that some module holds: parts of a model may have one of their own.
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    usual = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = usual[key]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Rule | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q `[1, A, N, D]`, k and v `[1, A', N, D]` -> `[1, N, A, D]`.

    `softcap` bounds scores (Gemma 2); `s_aux` `[A]` are sinks, which a head may look at in place of a token (gpt-oss).
    """
    run = _current.get()
    assert run is not None and dropout == 0.0
    if not isinstance(attention_mask, Rule | None):
        raise NotPackedError(f"its layers hand over a mask of their own ({type(attention_mask).__name__})")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, A, D]
    scaling = scaling or q.shape[-1] ** -0.5
    biases, layout = run.biases(attention_mask), run.layout
    plain = biases is None and softcap is None and s_aux is None and key.shape[-1] == value.shape[-1]
    by_kernel = run.kernels and plain and native_attention.supports(q, k, v)
    if run.parts is not None:
        if not by_kernel:
            raise NotPlainError
        return native_attention.attend_growing(q, k, v, scaling, run.parts(module.layer_idx))[None], None
    if run.kept is not None:
        run.kept[module.layer_idx] = (k, v)
    k, v = run.with_given(getattr(module, "layer_idx", -1), k, v)
    if by_kernel:
        return native_attention.attend(q, k, v, scaling, layout.forest)[None], None
    if run.kernels and plain and gpu_attention.supports(q, q.shape[-1]):
        return gpu_attention.attend(q, k, v, scaling, layout.tables)[None], None
    scores = packed_attention.Scores(biases, softcap, s_aux)
    return packed_attention.attend(q * scaling, k, v, layout.levels, scores)[None], None


def _rule(mask_function: Callable[..., Tensor], **_: Any) -> Rule:
    """transformers' mask interface, which makes a mask from a family's rule; here the rule itself is wanted."""
    return Rule(mask_function)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, _rule)
