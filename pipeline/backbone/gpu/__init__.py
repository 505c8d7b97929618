"""Kernels for GPUs in Triton, which a CUDA build of torch brings along."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_log = logging.getLogger(__name__)
_given_up = False
_asked: bool | None = None


def runs_on(device: torch.device) -> bool:
    """Whether these kernels are used there. PROMPT_BANK_TRITON=0 leaves all to PyTorch's operators."""
    if _asked is not None:
        return _asked
    return device.type == "cuda" and not _given_up and _has_triton()


@contextmanager
def used(yes: bool) -> Iterator[None]:
    """Meanwhile these kernels run on every device or on none, so that both can be compared; in all threads."""
    global _asked
    before, _asked = _asked, yes
    try:
        yield
    finally:
        _asked = before


@cache
def _has_triton() -> bool:
    return os.environ.get("PROMPT_BANK_TRITON") != "0" and importlib.util.find_spec("triton") is not None


def give_up(reason: str) -> None:
    """Leave all to PyTorch's operators from now on in this process."""
    global _given_up
    _given_up = True
    _log.warning("PyTorch's operators take the place of this GPU's Triton kernels, which fail here: %s", reason)
