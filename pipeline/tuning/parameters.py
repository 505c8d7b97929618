"""What may be trained in a prompt's place: parameters that fold into the plain prompt `[P, H]`.

Nobody but the trial's own update sees them. The step computes the gradient of the prompt, summed over the ranks, and
`pull_back` turns it into gradients of the parameters. After training only the prompt is kept.

**Each kind starts exactly at the initial prompt**, so that `prompt.init` means the same for all.

**Rates.** `optimizer.lr` is how far an update moves an entry of the prompt, in the embeddings' units. Networks and
coefficients have no units: what they give is multiplied by the prompt's size, the RMS of where it starts. Their rate is
therefore a share of `lr / size`, so small that all the weights behind one entry together move it about as far as `lr`
does. The schedule holds for all of them alike.

Shapes: P prompt tokens, H hidden, W the width (`prompt.width`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, relu

from pipeline.backbone.host import Backbone
from pipeline.tuning.initialise import sampled_tokens
from pipeline.tuning.optimise import Group
from pipeline.tuning.trials import Trial

WIDTH = 128
"""The width of networks, and the number of vocabulary vectors, where none is set."""
RANK = 8
"""The width of `low_rank`, where none is set."""


@dataclass(frozen=True, eq=False)
class PromptParameters(ABC):
    """Tensors of which those that have a rate are trained."""

    def __post_init__(self) -> None:
        for name in self.rates():
            getattr(self, name).requires_grad_()

    @abstractmethod
    def fold(self) -> Tensor:
        """The prompt `[P, H]`, differentiable in what is trained."""

    @abstractmethod
    def rates(self) -> Mapping[str, float]:
        """The rate of each tensor that is trained, as a share of the optimizer's."""

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name: enough to make these parameters again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def groups(self) -> list[Group]:
        """What is trained, for `make_optimizer`, in the order of `rates`."""
        return [Group(params=[getattr(self, name)], relative_rate=rate) for name, rate in self.rates().items()]

    def pull_back(self, gradient: Tensor) -> None:
        """Leave in each trained tensor its gradient, given the prompt's own `[P, H]`."""
        for tensor in self.tensors().values():
            tensor.grad = None
        self.fold().backward(gradient)


@dataclass(frozen=True, eq=False)
class Residual(PromptParameters):
    """p + MLP(p): trained vectors, and a bottleneck of one hidden layer that all of them share.

    Residual Prompt Tuning (Razdaibiedina et al. 2023). There the norm comes last; here it comes first, for the layer
    behind it starts at zero. The norm has no gain and shift of its own, for a layer follows that has them.
    """

    vectors: Tensor
    """`[P, H]`."""
    down: Tensor
    """`[W, H]`."""
    down_bias: Tensor
    up: Tensor
    """`[H, W]`, zero at first."""
    up_bias: Tensor
    size: Tensor
    """RMS of the initial prompt, a scalar."""

    def fold(self) -> Tensor:
        normed = layer_norm(self.vectors / self.size, self.vectors.shape[-1:])
        hidden = relu(linear(normed, self.down, self.down_bias))
        return self.vectors + self.size * linear(hidden, self.up, self.up_bias)

    def rates(self) -> Mapping[str, float]:
        return {"vectors": 1.0, **_rates_of_layers(self.size, down=self.down, up=self.up)}


@dataclass(frozen=True, eq=False)
class Encoder(PromptParameters):
    """start + MLP(e): P-tuning's encoder of trained embeddings e (Liu et al. 2021), here without its LSTM.

    Theirs starts wherever a random encoder leads. Here the initial prompt stays as a constant, and the encoder's last
    layer starts at zero, so that it gives what is added.
    """

    start: Tensor
    """`[P, H]`, not trained."""
    embeddings: Tensor
    """`[P, H]`, of size one."""
    first: Tensor
    """`[W, H]`."""
    first_bias: Tensor
    second: Tensor
    """`[W, W]`."""
    second_bias: Tensor
    last: Tensor
    """`[H, W]`, zero at first."""
    last_bias: Tensor
    size: Tensor
    """RMS of the initial prompt, a scalar."""

    def fold(self) -> Tensor:
        hidden = relu(linear(self.embeddings, self.first, self.first_bias))
        hidden = relu(linear(hidden, self.second, self.second_bias))
        return self.start + self.size * linear(hidden, self.last, self.last_bias)

    def rates(self) -> Mapping[str, float]:
        layers = _rates_of_layers(self.size, first=self.first, second=self.second, last=self.last)
        return {"embeddings": 1.0 / float(self.size), **layers}


@dataclass(frozen=True, eq=False)
class Superposition(PromptParameters):
    """Each vector is a mix of fixed ones: SuperPos-Prompt (Sadeghi et al. 2024).

    The fixed ones are embeddings of W tokens drawn from the vocabulary, as theirs, and the initial prompt's own
    vectors, of which each vector at first takes its own and nothing else.
    """

    mix: Tensor
    """`[P, P + W]`."""
    basis: Tensor
    """`[P + W, H]`, not trained."""

    def fold(self) -> Tensor:
        return self.mix @ self.basis

    def rates(self) -> Mapping[str, float]:
        # The vectors of the basis are nearly at right angles: what the coefficients do adds up as a root.
        return {"mix": 1.0 / (float(_size(self.basis)) * math.sqrt(len(self.basis)))}


@dataclass(frozen=True, eq=False)
class LowRank(PromptParameters):
    """start + A B: decomposed prompt tuning (Xiao et al. 2023), of what is added to the initial prompt."""

    start: Tensor
    """`[P, H]`, not trained."""
    left: Tensor
    """A, `[P, W]`, its rows about as long as one."""
    right: Tensor
    """B, `[W, H]`, zero at first."""
    size: Tensor
    """RMS of the initial prompt, a scalar."""

    def fold(self) -> Tensor:
        return self.start + self.left @ self.right

    def rates(self) -> Mapping[str, float]:
        return {"left": 1.0 / (float(self.size) * math.sqrt(len(self.right))), "right": 1.0}


KINDS: Mapping[str, type[PromptParameters]] = {
    "residual": Residual,
    "mlp": Encoder,
    "superposition": Superposition,
    "low_rank": LowRank,
}
"""By `prompt.parameters`; `direct` has none, for there the prompt itself is trained."""


def initial_parameters(trial: Trial, start: Tensor, backbone: Backbone, tokenizer: Any) -> PromptParameters | None:
    """What is trained in place of a trial's first prompt `[P, H]`; None where that is the prompt itself.

    Every rank makes the same, in the same order.
    """
    prompt, generator = trial.settings.prompt, trial.generator("parameters")
    (length, hidden), size = start.shape, _size(start)
    width = prompt.width or (RANK if prompt.parameters == "low_rank" else WIDTH)

    def normal(*shape: int) -> Tensor:
        return torch.as_tensor(generator.standard_normal(shape), dtype=start.dtype, device=start.device)

    def layer(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        # As wide as keeps the size of what comes in (He et al. 2015).
        return normal(outputs, inputs) * math.sqrt(2.0 / inputs), start.new_zeros(outputs)

    def silent_layer(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        return start.new_zeros(outputs, inputs), start.new_zeros(outputs)

    match prompt.parameters:
        case "direct":
            return None
        case "residual":
            return Residual(start.clone(), *layer(hidden, width), *silent_layer(width, hidden), size)
        case "mlp":
            embeddings, first, second = normal(length, hidden), layer(hidden, width), layer(width, width)
            return Encoder(start, embeddings, *first, *second, *silent_layer(width, hidden), size)
        case "superposition":
            tokens = sampled_tokens(generator, tokenizer, backbone.embedding_rows, width)
            basis = torch.cat([start, backbone.embed(torch.as_tensor(tokens))])
            return Superposition(torch.eye(length, len(basis), device=start.device), basis)
        case "low_rank":
            left, right = normal(length, width) / math.sqrt(width), start.new_zeros(width, hidden)
            return LowRank(start, left, right, size)


def recorded_parameters(kind: str, tensors: Mapping[str, Tensor]) -> PromptParameters:
    """The parameters of this kind whose `tensors` were recorded."""
    return KINDS[kind](**{name: tensor.clone() for name, tensor in tensors.items()})


def _size(vectors: Tensor) -> Tensor:
    """RMS of the entries; one where all are zero."""
    rms = vectors.pow(2).mean().sqrt()
    return torch.where(rms > 0, rms, 1.0)


def _rates_of_layers(size: Tensor, **layers: Tensor) -> dict[str, float]:
    """Of matrices `[outputs, inputs]` and their biases: `inputs` weights move one output together."""
    rates = {name: 1.0 / (float(size) * layer.shape[1]) for name, layer in layers.items()}
    return {key: rate for name, rate in rates.items() for key in (name, f"{name}_bias")}
