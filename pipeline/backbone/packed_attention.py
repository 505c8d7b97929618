"""Attention of packed segments with PyTorch's own operators, on any device and in any type.

It takes two products. One is of each segment with itself. The other is of all tokens behind one parent (a family) with
the keys of their ancestors, which are gathered once a family and not once a row. One softmax runs over both.

Shapes: G tokens that are given, N that run, and for the segments of one level: n their tokens, R segments, T the
longest, F families (segments with one parent), M tokens of the largest family, K the longest chain of ancestors.
A heads, A' heads of keys, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.backbone.segments import Segments
from pipeline.backbone.transfer import to_device


@dataclass(frozen=True)
class _Ancestors:
    """What families attend to before themselves."""

    tokens: Tensor
    """`[F, M]` indices of each family's tokens; padding repeats the last one."""
    keys: Tensor
    """`[F, K]` indices among the tokens that are given and, after them, those that run."""
    hidden: Tensor
    """`[F, 1, 1, K]`: 0, or -inf for padding."""
    own_of_family: Tensor
    """`[F * M]`: index of each family's token in `[R * T]`."""
    family_of_own: Tensor
    """`[R * T]`: index of each segment's token in `[F * M]`."""
    used: Tensor
    """`[n]` indices in `[F * M]` of the segments' tokens."""


@dataclass(frozen=True)
class _Level:
    """Segments of one depth and of like length (8 or less, 16 or less, …), padded for attention alone."""

    own: Tensor
    """`[R, T]` indices of tokens; padding repeats the segment's last one."""
    own_keys: Tensor
    """`[R, T]`: the same among all tokens, those that are given included."""
    causal: Tensor
    """`[T, T]`: 0, or -inf for what comes later."""
    used: Tensor
    """`[n]` indices in `[R * T]` that are no padding."""
    ancestors: _Ancestors | None
    """None at depth 1."""


@dataclass(frozen=True)
class Levels:
    levels: tuple[_Level, ...]
    order: Tensor
    """`[N]`: index of each token in the levels' outputs, one after the other."""


def make_levels(segments: Segments, device: torch.device) -> Levels:
    """Group the segments that run by depth and length."""
    places, chains = segments.places(), segments.chains()
    # Padding is to the longest of a group, so groups of like length (by powers of two, from 8 on) waste less than half.
    alike = [
        (len(chain), max(3, (n - 1).bit_length())) for chain, n in zip(chains, segments.lengths.tolist(), strict=True)
    ]
    levels, seen = [], []
    for kind in sorted({alike[s] for s in segments.run}):
        members = [s for s in segments.run if alike[s] == kind]
        own, ancestors = [places[m] for m in members], [chains[m][:-1] for m in members]
        levels.append(_level(own, ancestors, places, segments.given_tokens, device))
        seen.append(np.concatenate([places[m] for m in members]))
    # Levels give their tokens in another order than the packed row; argsort inverts it.
    return Levels(tuple(levels), _tensor(np.argsort(np.concatenate(seen)), device))


Biases = Sequence[tuple[Tensor, Tensor | None]]
"""For each level what its tokens may look at, 0 or -inf: of their own segment `[R, T, T]`, and of their ancestors
`[F, M, K]`."""


def make_biases(levels: Levels, sees: Callable[[Tensor, Tensor], Tensor], positions: Tensor) -> Biases:
    """Ask a family's rule about `positions` `[G + N]` of all tokens: `sees(query, key)` of two tensors of positions."""
    given = len(positions) - len(levels.order)

    def bias(queries: Tensor, keys: Tensor) -> Tensor:
        """Indices among the tokens that run `[..., M]` and among all `[..., K]` -> `[..., M, K]`."""
        seen = sees(positions[queries + given].unsqueeze(-1), positions[keys].unsqueeze(-2))
        return torch.where(seen, 0.0, -torch.inf)

    return [
        (
            # Causal by index as well: padding has the position of the token that it repeats.
            bias(level.own, level.own_keys) + level.causal,
            None if (a := level.ancestors) is None else bias(a.tokens, a.keys) + a.hidden[:, 0],
        )
        for level in levels.levels
    ]


@dataclass(frozen=True)
class Scores:
    """What a family does with scores before their softmax, beside the plain causal rule."""

    biases: Biases | None = None
    softcap: float | None = None
    """Scores are bounded to ± so much."""
    sinks: Tensor | None = None
    """`[A]`: a score of each head for looking at no token."""


PLAIN = Scores()


def attend(q: Tensor, k: Tensor, v: Tensor, levels: Levels, scores: Scores = PLAIN) -> Tensor:
    """Q `[N, A, D]`, scaled, k `[G + N, A', D]` and v `[G + N, A', D']` -> `[N, A, D']`."""
    remember = torch.is_grad_enabled() and q.requires_grad
    biases: Sequence[tuple[Tensor | None, Tensor | None]] = scores.biases or [(None, None)] * len(levels.levels)
    outputs = [
        # Scores are computed again in the backward pass: kept for every layer, they would outgrow all else.
        checkpoint(_attend_level, q, k, v, level, bias, scores, use_reentrant=False)
        if remember
        else _attend_level(q, k, v, level, bias, scores)
        for level, bias in zip(levels.levels, biases, strict=True)
    ]
    return torch.cat(outputs)[levels.order]


def _level(
    own: list[np.ndarray], ancestors: list[list[int]], places: list[np.ndarray], given: int, device: torch.device
) -> _Level:
    """One level of segments, from the indices of their tokens and the segments before each."""
    padded = _pad(own)
    causal = np.triu(np.full((padded.shape[1], padded.shape[1]), -np.inf, dtype=np.float32), 1)
    used = np.flatnonzero(_is_token(own))
    return _Level(
        _tensor(padded, device),
        _tensor(padded + given, device),
        to_device(causal, device),
        _tensor(used, device),
        _ancestors(own, ancestors, places, given, device) if ancestors[0] else None,
    )


def _ancestors(
    own: list[np.ndarray], ancestors: list[list[int]], places: list[np.ndarray], given: int, device: torch.device
) -> _Ancestors:
    # Siblings have the same ancestors, so these are gathered once for all of them.
    families: dict[int, list[int]] = {}
    for row, chain in enumerate(ancestors):
        families.setdefault(chain[-1], []).append(row)
    width = max(map(len, own))
    # A segment's tokens by their indices in [R * T].
    flat = [row * width + np.arange(len(tokens)) for row, tokens in enumerate(own)]
    members = [np.concatenate([flat[row] for row in rows]) for rows in families.values()]
    keys = [np.concatenate([places[s] for s in ancestors[rows[0]]]) + given for rows in families.values()]
    tokens = [np.concatenate([own[row] for row in rows]) for rows in families.values()]
    own_of_family = _pad(members)  # [F, M]
    place_in_family = np.flatnonzero(_is_token(members))  # of the tokens, family by family
    place = np.empty(len(own) * width, dtype=np.int64)
    place[np.concatenate(members)] = place_in_family
    family_of_own = _pad([place[tokens] for tokens in flat])  # [R, T]
    hidden = np.where(_is_token(keys), 0.0, -np.inf).astype(np.float32)
    return _Ancestors(
        _tensor(_pad(tokens), device),
        _tensor(_pad(keys), device),
        to_device(hidden[:, None, None], device),
        _tensor(own_of_family.ravel(), device),
        _tensor(family_of_own.ravel(), device),
        _tensor(place[np.concatenate(flat)], device),
    )


def _pad(rows: list[np.ndarray]) -> np.ndarray:
    """`[rows, longest]`; a row's padding repeats its last entry, so that a NaN stays among its own."""
    longest = max(map(len, rows))
    return np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in rows])


def _is_token(rows: list[np.ndarray]) -> np.ndarray:
    """`[rows, longest]`: False for padding."""
    lengths = np.array([len(row) for row in rows])
    return np.arange(lengths.max()) < lengths[:, None]


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return to_device(values, device, torch.long)


def _attend_level(
    q: Tensor, k: Tensor, v: Tensor, level: _Level, bias: tuple[Tensor | None, Tensor | None], scores: Scores
) -> Tensor:
    """Outputs `[n, A, D']` of one level's tokens."""
    heads, length = k.shape[1], level.own.shape[1]
    own_k, own_v = (_by_head(_take(x, level.own_keys), heads) for x in (k, v))  # [R * A', T, D]
    own = _capped(_by_head(_take(q, level.own), heads) @ own_k.mT, scores)  # [R * A', (A/A') * T, T]
    own = _biased(own, level.causal if bias[0] is None else bias[0], heads)
    if level.ancestors is None:  # prompts, which have nothing before them
        return _take(_by_token(_softmax(own, heads, scores) @ own_v, heads, length), level.used)
    family = level.ancestors
    tokens = family.tokens.shape[1]
    before_k, before_v = (_by_head(_take(x, family.keys), heads) for x in (k, v))  # [F * A', K, D]
    before = _capped(_by_head(_take(q, family.tokens), heads) @ before_k.mT, scores)  # [F * A', (A/A') * M, K]
    if bias[1] is None:
        before = (before.unflatten(0, (-1, heads)) + family.hidden.to(q.dtype)).flatten(0, 1)
    else:
        before = _biased(before, bias[1], heads)
    # Scores against the own segment move into the families' order, so that one softmax covers both.
    own = _by_head(_take(_by_token(own, heads, length), family.own_of_family).unflatten(0, (-1, tokens)), heads)
    weights = _softmax(torch.cat([before, own], -1), heads, scores)
    to_before, to_own = weights.split([before.shape[-1], length], -1)
    # And the weights move back, for the product with the own segment's values.
    out = _take(_by_token(to_before @ before_v, heads, tokens), family.used)
    to_own = _take(_by_token(to_own, heads, tokens), family.family_of_own).unflatten(0, (-1, length))
    return out + _take(_by_token(_by_head(to_own, heads) @ own_v, heads, length), level.used)


def _capped(scores: Tensor, how: Scores) -> Tensor:
    return scores if how.softcap is None else torch.tanh(scores / how.softcap) * how.softcap


def _biased(scores: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Scores `[R * A', (A/A') * T, K]` + bias `[T, K]` or `[R, T, K]`."""
    if bias.dim() == 2:
        return (scores.unflatten(1, (-1, len(bias))) + bias.to(scores.dtype)).flatten(1, 2)
    split = scores.unflatten(0, (-1, heads)).unflatten(2, (-1, bias.shape[1]))  # [R, A', A/A', T, K]
    return (split + bias[:, None, None].to(scores.dtype)).flatten(2, 3).flatten(0, 1)


def _softmax(scores: Tensor, heads: int, how: Scores) -> Tensor:
    """Over the keys of scores `[R * A', (A/A') * T, K]`; a sink takes its part and gives nothing."""
    if how.sinks is None:
        return scores.softmax(-1)
    sinks = how.sinks.to(scores.dtype).view(heads, -1, 1)  # [A', A/A', 1]
    of_query = sinks.repeat_interleave(scores.shape[1] // sinks.shape[1], 1)  # [A', (A/A') * T, 1]
    joined = torch.cat([scores, of_query.repeat(len(scores) // heads, 1, 1)], -1)
    return joined.softmax(-1)[..., :-1]


def _by_head(x: Tensor, heads: int) -> Tensor:
    """`[R, T, A, X]` -> `[R * A', (A/A') * T, X]`: one matrix for each head of keys and all queries that share it."""
    return x.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def _by_token(x: Tensor, heads: int, length: int) -> Tensor:
    """`[R * A', (A/A') * T, X]` -> `[R * T, A, X]`."""
    split = x.unflatten(0, (-1, heads)).unflatten(2, (-1, length))  # [R, A', A/A', T, X]
    return split.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """`[N, A, X]` at indices `[...]` -> `[..., A, X]`."""
    # An embedding lookup: its backward pass sums over repeated indices several times faster than indexing does.
    return functional.embedding(places, x.flatten(1)).unflatten(-1, x.shape[1:])
