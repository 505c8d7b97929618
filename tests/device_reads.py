"""Where a step makes the host wait for the device, found without one.

The model lies on PyTorch's device "meta", whose tensors have shapes and no numbers. It stands for a GPU: what has to be
known on the host cannot be had there, so each place that asks for it shows. Fake tensors of the device "cuda" cannot do
this: without CUDA in the build, autograd ends the process.

What an operator does inside itself is not seen.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.host import Backbone, host_backbone
from pipeline.corpus.reader import open_split
from pipeline.tuning.state import TrialState, start
from pipeline.tuning.step import TrialStep, losses_and_gradients
from tests.corpora import make_corpus, trial

DEVICE = torch.device("meta")
_ATEN = torch.ops.aten
_OF_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
"""They copy numbers of the host to a device, and wait until they are there."""
_OF_UNKNOWN_SIZE = {"nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_consecutive", "bincount"}
"""The size of what they give is known on the device alone."""


def _on_device(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.device == DEVICE]


def _on_host(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.device != DEVICE]


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.__name__.partition(".")[0]
        found = _on_device((args, kwargs))
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            indices = [x for x in args[1] if x is not None]
            if found and (_on_host(indices) or any(x.dtype in (torch.bool, torch.uint8) for x in indices)):
                self._note(name)
        if name in ("_to_copy", "copy_"):
            target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or args[0].device)
            source = args[1] if name == "copy_" else args[0]
            if source.device == DEVICE and target != DEVICE:  # a read, or a copy that nobody may look at yet
                self._note("read")
                if name == "copy_":
                    return args[0].zero_()
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            sent = source.device != DEVICE and target == DEVICE
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if sent and waits and source.dim():  # a single number travels with the launch
                self._note("sent and waited for")
        if found and name == "_local_scalar_dense":
            self._note("read")
            return True if args[0].dtype == torch.bool else 0 if not args[0].is_floating_point() else 0.0
        if found and name == "equal":
            self._note("read")
            return True
        if found and name in _OF_UNKNOWN_SIZE:
            self._note(name)
        return function(*args, **kwargs)

    def _note(self, what: str) -> None:
        note(self.waits, what)


class _Calls(TorchFunctionMode):
    """Those that reach no operator that a dispatch mode sees."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.waits.total()
        made = function(*args, **(kwargs or {}))
        data = args[1] if function is Tensor.new_tensor and len(args) > 1 else args[0] if args else None
        seen = self.waits.total() > before  # an array's copy is an operator, and a list's is none
        if function in _OF_DATA and _on_device(made) and not _on_device(data) and not seen:
            note(self.waits, "sent and waited for")
        return made


def note(waits: Counter[str], what: str) -> None:
    """Count what the host waits for under the line of the code that asks for it."""
    ours = [frame for frame in traceback.extract_stack()[:-2] if "/torch/" not in frame.filename]
    ours = [frame for frame in ours if frame.filename != __file__]
    at = ours[-1]
    waits[f"{what}: {'/'.join(at.filename.split('/')[-3:])}:{at.lineno} {at.line}"] += 1


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Counts, by place, what the host waits for within the block."""
    waits: Counter[str] = Counter()
    # What has a size that only the device knows goes on with the largest, once it is counted.
    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True), _Calls(waits), _Operators(waits):
        yield waits


def a_backbone(folder: Path, products: str = "int8") -> tuple[Backbone, Any]:
    """A model of bfloat16 as a GPU runs it, without numbers, and its tokenizer."""
    files, cpu = find_model(str(folder)), torch.device("cpu")
    backbone = host_backbone(
        files, read_config(files), int8=True, dtype=torch.bfloat16, device=cpu, sharded=False, products=products
    )
    backbone.hosted.to(DEVICE)
    return replace(backbone, device=DEVICE), read_tokenizer(files)


def trials(folder: Path, backbone: Backbone, tokenizer: Any) -> tuple[list[TrialState], list[TrialStep]]:
    """Trials of two tasks and both optimizers, and their first step."""
    states, work = [], []
    for task in ("film", "food"):
        corpus = make_corpus(folder / task, tokenizer, backbone.architecture, task)
        train = open_split(corpus.splits["train"])
        for name in ("adafactor", "adamw"):
            own = trial(task, corpus, optimizer={"name": name, "lr": 0.1, "clip_norm": 1.0})
            states.append(start(own, torch.zeros(5, backbone.hidden_size, device=DEVICE)))
            work.append(TrialStep(own, states[-1].prompt, 0, train))
    return states, work


def waits_of_a_step(backbone: Backbone, states: list[TrialState], work: list[TrialStep], budget: int) -> Counter[str]:
    """What the host waits for in a whole step: forward and backward of every micro-batch, losses, each update."""
    with host_waits() as waits:
        losses, _ = losses_and_gradients(backbone, work, budget)
        for state, loss in zip(states, losses, strict=True):
            state.update(float(loss))
    assert all(state.step == 1 for state in states)
    return waits
