"""Keys and values of the prompts that were used last, so that a prompt runs once and not once a batch."""

from collections import OrderedDict
from collections.abc import Callable

from pipeline.backbone.prompted import PromptState


class StateCache:
    """States by digest of the prompt's blob, at most `limit` bytes of them; the longest unused goes first.

    A digest names the prompt's bytes, so versions of a bank share what they have in common.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        """Bytes that are held."""
        self._states: OrderedDict[str, PromptState] = OrderedDict()

    def get(self, digest: str, make: Callable[[], PromptState]) -> PromptState:
        """The state of a prompt, made only if it is not held."""
        if digest not in self._states:
            state = self._states[digest] = make()
            self.nbytes += state.nbytes
        self._states.move_to_end(digest)
        state = self._states[digest]
        while self.nbytes > self.limit:  # also of a state that is larger than the limit by itself
            self.nbytes -= self._states.popitem(last=False)[1].nbytes
        return state
