"""Which stored tensors make each tensor of a model, by transformers' own mapping of names.

A checkpoint keeps the names of its first code. Experts are stored one by one where the model has one tensor of all;
projections are stored joined where the model has two; a text model lies under a prefix in the files of a model that
also sees. transformers' mapping knows them, and its own operations put a tensor together. Here they run on some
entries of the first side at a time, so that no process holds all experts of a layer as stored.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from pipeline.backbone.files import UNQUANTISED
from pipeline.backbone.weights import WeightSource
from pipeline.errors import BackboneError

_PARTS_OF_A_WHOLE = ("", "language_model.", "text_model.", "thinker.")
"""Prefixes that a text model has in the files of a model of which it is a part."""
_OF_QUANTISED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB", "_blocks")
"""Ends of names that only the weights of a quantised model have."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model, as stored tensors make it."""

    names: tuple[str, ...]
    """The stored tensors that it is made of."""
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    """Its entries along the first side, from the first number up to the second."""
    in_parts: bool
    """Whether some entries cost less to read than all."""


def stored_tensors(model: Any, shapes: dict[str, tuple[int, ...]], source: WeightSource) -> dict[str, StoredTensor]:
    """The model's tensors that a source has: name in the model -> how stored tensors make it.

    `shapes` has the names and shapes of transformers' own model. What the model has no place for is passed over.
    Raises: BackboneError when one tensor is stored under two names, or cannot be put together.
    """
    mapping = get_model_conversion_mapping(model)
    places = _Places({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    made: dict[str, StoredTensor] = {}
    for name, parts in _collect(model, mapping, places, source).items():
        if parts.converter is None:
            made[name] = _as_stored(parts, source)
        else:
            made |= _converted(name, parts, model, places, source)
    return {name: tensor for name, tensor in made.items() if name in shapes}


def require_stored(stored: dict[str, StoredTensor], candidates: Iterable[str], source: WeightSource) -> StoredTensor:
    """The stored tensor of the first of a tensor's names that the source has.

    Raises: BackboneError naming what is missing.
    """
    candidates = list(candidates)
    for name in candidates:
        if name in stored:
            return stored[name]
    # A quantised checkpoint has its matrices under other names; say so, and not only that one is missing.
    packed = next((name for name in sorted(source.names) if name.endswith(_OF_QUANTISED)), None)
    reason = f"it has '{packed}', so it is quantised; {UNQUANTISED}" if packed else "the checkpoint is incomplete"
    raise BackboneError(f"{source.origin}: the weights lack '{candidates[0]}'; {reason}")


@dataclass(frozen=True)
class _Places:
    """Stands for the model where transformers' operations ask for a tensor's shape."""

    tensors: dict[str, Tensor]
    first: int | None = None
    last: int | None = None
    """The entries along the first side that are made; None for all."""

    def get_parameter(self, name: str) -> Tensor:
        return self.tensors[name][self.first : self.last]


@dataclass(frozen=True)
class _Parts:
    """Stored tensors that belong together."""

    converter: WeightConverter | None
    """None where one tensor is taken as it is."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """The converter's pattern -> the stored tensors that it matches, in the order of their numbers."""

    @property
    def all_names(self) -> tuple[str, ...]:
        return tuple(name for names in self.names.values() for name in names)


def _collect(model: Any, mapping: Sequence[Any], places: _Places, source: WeightSource) -> dict[str, _Parts]:
    """As `transformers.core_model_loading.convert_and_load_state_dict_in_model` collects them."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}

    def place_of(key: str) -> tuple[str, str | None] | None:
        for part in _PARTS_OF_A_WHOLE:
            own = key.replace(part, "", 1) if part else key
            if part and own == key:
                continue
            # Names that are the model's own already are taken as they are, even where the mapping would change them.
            for transforms in ((renamings, converters), ([], [])):
                name, pattern = rename_source_key(own, *transforms, model.base_model_prefix, places.tensors)
                if name in places.tensors:
                    return name, pattern
        return None

    collected: dict[str, _Parts] = {}
    for key in sorted(source.names, key=dot_natural_key):
        place = place_of(key)
        if place is None:
            continue
        name, pattern = place
        parts = collected.setdefault(name, _Parts(converter_of[pattern] if pattern is not None else None))
        if (parts.converter is None) != (pattern is None) or (parts.converter is None and parts.names):
            raise BackboneError(
                f"{source.origin}: the weights hold one tensor as '{parts.all_names[0]}' and as '{key}'; keep only one "
                "of them"
            )
        parts.names.setdefault(pattern or key, []).append(key)
    return collected


def _as_stored(parts: _Parts, source: WeightSource) -> StoredTensor:
    (name,) = parts.all_names

    def read(first: int, last: int) -> Tensor:
        return source.read(name, first, last) if source.shape(name) else source.read(name)

    return StoredTensor((name,), source.shape(name), read, source.reads_rows and name not in source.whole)


def _converted(name: str, parts: _Parts, model: Any, places: _Places, source: WeightSource) -> dict[str, StoredTensor]:
    """All tensors that a conversion makes; transformers names it by the first of them."""
    converter = parts.converter
    assert converter is not None
    cut_by_number = _is_merge(converter.operations[0])
    # Where each stored tensor is one entry, an entry reads it whole anyway.
    read_by_entry = cut_by_number or (source.reads_rows and not any(part in source.whole for part in parts.all_names))
    in_parts = read_by_entry and all(_keeps_entries(operation) for operation in converter.operations[cut_by_number:])

    def convert(read: Callable[[str], Tensor], first: int | None = None, last: int | None = None) -> dict[str, Any]:
        """The tensors from entry `first` up to `last`; all entries without them."""
        run = copy.deepcopy(converter)
        for pattern, names in parts.names.items():
            some = names[first:last] if cut_by_number else names
            run.collected_tensors[pattern] = [read(stored) for stored in some]
        shapes = replace(places, first=first, last=last)
        made = run.convert(name, model=shapes, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    try:
        shapes = convert(lambda stored: torch.empty(source.shape(stored), device="meta"))
    except Exception as error:
        raise BackboneError(
            f"{source.origin}: transformers cannot make the weight {name} of '{parts.all_names[0]}' and what is stored "
            f"with it ({str(error).splitlines()[0]}); the checkpoint is incomplete, or of another version"
        ) from error

    def reader(key: str) -> Callable[[int, int], Tensor]:
        def read(first: int, last: int) -> Tensor:
            if not in_parts:
                return convert(source.read)[key][first:last]
            if cut_by_number:
                return convert(source.read, first, last)[key]
            return convert(lambda stored: source.read(stored, first, last), first, last)[key]

        return read

    return {
        key: StoredTensor(parts.all_names, tuple(tensor.shape), reader(key), in_parts) for key, tensor in shapes.items()
    }


def _is_merge(operation: ConversionOps) -> bool:
    """Whether an entry along the first side is one stored tensor of each pattern."""
    return isinstance(operation, MergeModulelist) and operation.dim == 0


def _keeps_entries(operation: ConversionOps) -> bool:
    """Whether an operation makes an entry of the same entry of its tensors alone."""
    if isinstance(operation, Transpose):
        return operation.dim0 > 0 and operation.dim1 > 0
    return isinstance(operation, Chunk | Concatenate | Interleave) and operation.dim > 0
