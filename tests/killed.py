"""A death in the middle of work, played in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


class _Killed(BaseException):
    pass


@contextmanager
def killed_at_call(module: ModuleType, name: str, at: int) -> Iterator[None]:
    """What runs inside must die at its `at`-th call (from 1) of `module.name`; the calls before it go through."""
    real, calls = getattr(module, name), 0

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise _Killed
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(module, name, dying)
        yield
