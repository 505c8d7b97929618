"""What a step costs a rank: bytes gathered and sent, and operations. Measured here, and modelled for other machines."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig

from pipeline.backbone.int8 import Int8Embedding
from pipeline.backbone.loading import build_skeleton
from pipeline.lab.benchmark.bench import Bench, OurOptions, host_for
from pipeline.lab.benchmark.ours import tune_together
from pipeline.lab.benchmark.peak import useful_operations
from pipeline.lab.benchmark.ranks import run_ranks
from pipeline.lab.benchmark.shapes import published_config
from pipeline.lab.benchmark.side_by_side import write_figures


@dataclass(frozen=True)
class Machine:
    """Assumptions of the model of a step's cost. Rates are those that are reached, not those of a data sheet."""

    ranks_per_node: int
    inside: float
    """Bytes a second that a rank receives from others of its node."""
    between: float
    """Bytes a second that a rank receives from other nodes."""
    operations: float
    """Int8 operations a second of a rank."""


# NVIDIA's data sheets for H100 SXM nodes say: NVLink 450e9 bytes a second each way, one 400 Gb/s network card a GPU,
# 1979e12 dense int8 operations a second. The factors are the shares that are assumed to be reached.
H100_NODES = Machine(ranks_per_node=8, inside=0.7 * 450e9, between=0.8 * 50e9, operations=0.3 * 1979e12)


@dataclass(frozen=True)
class StepCost:
    """Cost of one rank in one step of one micro-batch."""

    ranks: int
    gathered: float
    """Bytes of weights received from other ranks; as many are sent."""
    reduced: float
    """Bytes of prompts' gradients sent in the all-reduce."""
    gather_seconds: float
    compute_seconds: float

    @property
    def share(self) -> float:
        """Share of the step's time that gathers take, if nothing overlaps them."""
        return self.gather_seconds / (self.gather_seconds + self.compute_seconds)


def step_cost(config: PretrainedConfig, ranks: int, tokens: int, prompt_values: int, machine: Machine) -> StepCost:
    """The modelled cost of a step.

    `tokens`: tokens of a micro-batch on each rank; `prompt_values`: floats of all prompts together.
    """
    others = (ranks - 1) / ranks
    gathered = gathered_bytes(config) * others
    nodes = -(-ranks // machine.ranks_per_node)
    # Weights from other nodes come in once, over all of a node's network cards, and are passed on inside the node.
    across = gathered_bytes(config) * (nodes - 1) / nodes / (machine.ranks_per_node * machine.between)
    stacks = 2 if config.is_encoder_decoder else 1  # a token passes through one of them
    return StepCost(
        ranks=ranks,
        gathered=gathered,
        reduced=2 * others * 4 * prompt_values,
        gather_seconds=max(gathered / machine.inside, across),
        compute_seconds=useful_operations(config, tokens / stacks) / machine.operations,
    )


def gathered_bytes(config: PretrainedConfig) -> int:
    """Bytes of weights that one micro-batch gathers: every matrix forward and backward, a lookup table forward only.

    Small parameters stay on every rank (see `host`).
    """
    hidden, total = int(config.get_text_config(decoder=True).hidden_size), 0
    for name, module in build_skeleton(config, int8=True).named_modules():
        if name == "shared":  # T5's encoder and decoder call this table, each under another name
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.numel() > 2 * hidden:
                table = isinstance(module, Int8Embedding | nn.Embedding) and parameter.shape[1] == hidden
                total += parameter.nbytes * (1 if table else 2)
    return total


class TrafficCounter(TorchDispatchMode):
    """Counts the bytes that are gathered and reduced while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = 0
        self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "c10d::_allgather_base_":
            self.gathered += args[0].nbytes
        if func._schema.name == "c10d::broadcast_":  # on gloo a gather is a broadcast from every rank, see `host`
            self.gathered += sum(tensor.nbytes for tensor in args[0])
        if func._schema.name == "c10d::allreduce_":
            self.reduced += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class StepTraffic:
    """Measured traffic of one rank in one step."""

    gathered: float
    """Bytes of weights received from other ranks."""
    reduced: float
    """Bytes of the gradients and losses that are summed over ranks."""
    walks: float
    """How many times `gathered_bytes` were gathered, which is the number of the step's micro-batches."""


def measure_traffic(bench: Bench) -> StepTraffic:
    """Bytes of the last step of a bench, counted at the collectives themselves."""
    gathered, reduced = run_ranks(bench.ranks, _count_on_rank, bench)[0]
    others = (bench.ranks - 1) / bench.ranks
    return StepTraffic(gathered * others, reduced, gathered / gathered_bytes(bench.config))


def _count_on_rank(bench: Bench) -> tuple[int, int]:
    backbone = host_for(bench, OurOptions(partition="always", share_memory=False))  # as between machines
    tune_together(backbone, bench.tasks, bench.prompts, bench.steps - 1, OurOptions().token_budget)
    with TrafficCounter() as traffic:
        tune_together(backbone, bench.tasks, bench.prompts, 1, OurOptions().token_budget)
    return traffic.gathered, traffic.reduced


def costs_of(
    shapes: Sequence[str], counts: Sequence[int], tokens: int, trials: int, length: int
) -> dict[str, list[StepCost]]:
    """Costs of a step of `trials` prompts on `H100_NODES`, by shape and number of ranks."""
    costs = {}
    for shape in shapes:
        config = published_config(shape)
        values = trials * length * int(config.get_text_config(decoder=True).hidden_size)
        costs[shape] = [step_cost(config, count, tokens, values, H100_NODES) for count in counts]
    return costs


def save_costs(
    path: Path, traffic: StepTraffic, tokens: int, trials: int, costs: Mapping[str, Sequence[StepCost]]
) -> None:
    """Write everything as JSON, with the assumptions."""
    plain = {shape: [{**asdict(cost), "share": cost.share} for cost in row] for shape, row in costs.items()}
    facts = {"tokens_a_rank": tokens, "trials": trials, "assumed": asdict(H100_NODES)}
    write_figures(path, {"measured_here": asdict(traffic), **facts, "costs": plain})
