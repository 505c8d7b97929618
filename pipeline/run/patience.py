"""What a store that is away for a while costs: waiting, and not the night's work."""

from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from pipeline.errors import UnreachableError
from pipeline.reporting.events import EventLog

PATIENCE_S = 240.0
"""Each try of an object store waits up to half a minute by itself."""

T = TypeVar("T")


def retry_while_unreachable(action: Callable[[], T], stage: str, log: EventLog) -> T:
    """`action()`, again and again for some minutes while the store that it needs cannot be reached.

    It must be safe to repeat. Raises: what `action` raises, the last UnreachableError in the end.
    """

    def tell(state: RetryCallState) -> None:
        assert state.outcome is not None
        log.write("stage", name=stage, text=f"trying again soon: {state.outcome.exception()}")

    retrying = Retrying(
        retry=retry_if_exception_type(UnreachableError),
        wait=wait_exponential(multiplier=1, max=15),
        stop=stop_after_delay(PATIENCE_S),
        before_sleep=tell,
        reraise=True,
    )
    return retrying(action)
