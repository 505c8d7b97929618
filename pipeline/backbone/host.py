"""Host the frozen model: whole in one process, or partitioned over ranks by DeepSpeed ZeRO-3.

It is the only module that knows DeepSpeed, beside `full_weights.partitioned`, which trains all weights. ZeRO-3 hosts
the model alone, without an optimizer. Prompts stay outside as small ordinary tensors, so that each can have its own
optimizer, clipping and schedule.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig

from pipeline.backbone import gpu
from pipeline.backbone.allocator import configure_allocator_for_loading
from pipeline.backbone.embedding import embed_words
from pipeline.backbone.files import Architecture, ModelFiles, architecture_of, embedding_rows, read_generation
from pipeline.backbone.fused import use_kernels
from pipeline.backbone.int8 import set_products
from pipeline.backbone.loading import (
    Partition,
    Placement,
    build_skeleton,
    input_width,
    load_weights,
    untie_separate_weights,
)
from pipeline.backbone.node_memory import NodeMemory, join_node_memory
from pipeline.backbone.offload import Keep, on_device
from pipeline.backbone.prefetch import Gather, prefetch_layers
from pipeline.backbone.proof import Proof, Way, prove
from pipeline.backbone.weights import open_weights
from pipeline.errors import BackboneError


class Hosted(nn.Module):
    """Runs plain functions of the model inside one `forward`, since ZeRO-3's hooks gather weights only there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


@dataclass
class Traffic:
    """Counts what ZeRO-3 costs this rank."""

    gathered: int = 0
    """Bytes of weights gathered, this rank's own part included."""
    ahead: int = 0
    """Of these, the bytes that were asked for while another layer ran (see `prefetch`)."""


@dataclass(frozen=True)
class Backbone:
    """A frozen model ready to run. Under ZeRO-3 every rank must make the same calls in the same order."""

    config: PretrainedConfig
    hosted: nn.Module
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    """H: the width of an input embedding, and so of a prompt's row."""
    proof: Proof
    """What decided how rows run."""
    traffic: Traffic = field(default_factory=Traffic)
    partitioned: bool = False
    """Whether each rank holds a part of every matrix, so that a pass gathers weights from all of them."""

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.config)

    @property
    def way(self) -> Way:
        assert self.proof.way is not None, "a model without an exact way is refused when it is loaded"
        return self.proof.way

    @property
    def embedding_rows(self) -> int:
        """V: a token id from here on has no embedding."""
        return embedding_rows(self.config)

    @property
    def pads_rows(self) -> bool:
        """Whether rows of a batch are padded to the longest."""
        return self.way != "packed"

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt runs once for all its rows of a batch, and what it made can be kept."""
        return self.way == "packed" and self.architecture == "decoder-only"

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(model, *args)`, with every weight that it touches gathered while it is used."""
        return self.hosted(function, *args)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Input embeddings `[..., H]` in float32 of token ids `[...]`."""
        with torch.no_grad():
            embeddings: Tensor = self.run(embed_words, token_ids.to(self.device))
            return embeddings.float()

    def no_prompt(self) -> Tensor:
        """`[0, H]`: what stands before rows that have no soft prompt."""
        return torch.zeros(0, self.hidden_size, device=self.device)


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The type of activations: as set; `auto` means float32 on a CPU and bfloat16 on a GPU."""
    if setting == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, setting)
    assert isinstance(dtype, torch.dtype)
    return dtype


def host_backbone(
    files: ModelFiles,
    config: PretrainedConfig,
    *,
    int8: bool,
    dtype: torch.dtype,
    device: torch.device,
    sharded: bool,
    products: str = "exact",
    kernels: bool = True,
    keep: Keep | None = None,
    share_memory: bool = True,
    prefetch: bool | None = None,
) -> Backbone:
    """Load the frozen model: whole into this process, or partitioned over all ranks of torch.distributed.

    `products` (`exact`, `int8` or `int8_forward`, see `int8.set_products`) tells how int8 layers multiply.
    `kernels` tells whether parts of the layers run as compiled kernels where these can be used (`native`).
    `keep` tells where weights stay between uses (`offload`), by default on the device. `share_memory` lets ranks on
    CPUs of one machine read each other's parts directly (`node_memory`). `prefetch` tells whether the next layer's
    weights are gathered while a layer runs, by default on GPUs (see `prefetch`).
    With `sharded`, no rank ever holds the whole model, nor a whole matrix: it reads and quantises its own part.
    Raises: BackboneError when weights are damaged or missing, or the model cannot be run exactly.
    """
    model = build_skeleton(config, int8, dtype)
    model.generation_config = read_generation(files, config)
    width = input_width(model)
    use_kernels(model, kernels)
    source = open_weights(files, model)
    # Before weights are loaded and partitioned: afterwards a tied parameter is one partition.
    untie_separate_weights(model, source)
    if not sharded:
        load_weights(model, source, dtype, whole_placement(device, keep or on_device(device)))
        whole = Hosted(model)
        proof = choose_way(whole, model, files.name, device, dtype, partitioned=False, products=products)
        return Backbone(config, whole, device, dtype, width, proof)
    start_deepspeed(device)
    import deepspeed

    zero = zero_settings(width)
    configure_allocator_for_loading()
    # On GPUs NCCL is faster than main memory, and offloaded weights have their own place.
    node = join_node_memory() if share_memory and keep is None and device.type == "cpu" else None
    keep = keep or (node.keep if node else on_device(device))
    traffic = Traffic()
    set_gather(node, traffic)
    load_weights(model, source, dtype, zero3_placement(zero, dtype, device, keep))
    dist.barrier()  # from here on every rank's part is there, and others may read it
    hosted = Hosted(model)
    # One gather for a whole transformer layer, in place of one for each of its matrices.
    deepspeed.utils.set_z3_leaf_modules(hosted, layer_types(model))
    # The engine installs the hooks that gather and release. Its own `forward` and `step` are for training: unused.
    engine, *_ = deepspeed.initialize(model=hosted, config=zero)
    if device.type == "cuda" if prefetch is None else prefetch:
        prefetch_layers(model, gathers_of(engine, traffic))
    proof = choose_way(engine.module, model, files.name, device, dtype, partitioned=True, products=products)
    traffic.gathered = traffic.ahead = 0
    return Backbone(config, engine.module, device, dtype, width, proof, traffic, partitioned=True)


def choose_way(
    hosted: nn.Module,
    model: Any,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    partitioned: bool,
    products: str = "exact",
    gradients: bool = True,
) -> Proof:
    """Find out how the model's rows run from now on (see `proof`), and note it in the model.

    Under ZeRO-3 every rank calls this. Raises: BackboneError when no way is exact.
    """

    def on_all_ranks(yes: bool) -> bool:
        if not dist.is_initialized():
            return yes
        said = torch.tensor(int(yes), device=device)
        dist.all_reduce(said, dist.ReduceOp.MIN)
        return bool(said)

    set_products(model, "exact", device)  # rounding to int8 would hide a small difference
    model.partitioned = partitioned
    model.keeps_rows = model.keeps_prompts = False  # nothing is kept before it is proved
    proof = prove(hosted, model, device, dtype, gradients, on_all_ranks)
    ways = {way: difference for way, difference in proof.differences.items() if way not in ("alone", proof.way)}
    if ways and gpu.runs_on(device):  # a way may be refused for a kernel's sake, so it is tried once more without
        gpu.give_up("; ".join(f"{way}: {difference}" for way, difference in ways.items()))
        proof = prove(hosted, model, device, dtype, gradients, on_all_ranks)
    set_products(model, products, device)
    if proof.way is None:
        found = "; ".join(f"{way}: {difference}" for way, difference in proof.differences.items())
        raise BackboneError(
            f"model.path {name}: no way of running it behind soft prompts gives what its own forward pass gives "
            f"({found}); prompts tuned on it would be wrong, so it is refused"
        )
    model.way, model.keeps_rows = proof.way, proof.keeps_rows
    # Partitioned, all ranks must run the same passes, and each has other prompts.
    model.keeps_prompts = proof.keeps_prompts and not partitioned
    return proof


def whole_placement(device: torch.device, keep: Keep) -> Placement:
    """Each tensor whole in this process, where `keep` puts it."""

    def parameter(piece: Tensor, shape: torch.Size) -> nn.Parameter:
        return nn.Parameter(keep(piece).view(shape), requires_grad=False)

    return Placement(Partition(), parameter, lambda scale: scale, lambda module: _move_buffers(module, device))


def zero3_placement(zero: dict[str, Any], dtype: torch.dtype, device: torch.device, keep: Keep) -> Placement:
    """Give DeepSpeed each rank's partition as it is.

    DeepSpeed's own way, `zero.Init(module=…)`, takes the whole tensor on every rank and broadcasts it first.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, free_param

    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=zero, dtype=dtype)
    partition = Partition(dist.get_rank(), dist.get_world_size())

    def parameter(piece: Tensor, shape: torch.Size) -> nn.Parameter:
        # DeepSpeed asks for a tensor of the whole shape; `expand` gives one with a single entry of memory.
        whole = nn.Parameter(piece.new_empty(1, device=device).expand(shape), requires_grad=False)
        init._convert_to_deepspeed_param(whole)
        # From here on these are the fields that DeepSpeed's own partitioning would have set.
        held: Any = keep(piece)
        held.ds_numel, held.final_location = len(piece), None
        held.status = PartitionedParamStatus.AVAILABLE
        whole.ds_tensor, whole.ds_numel_aligned = held, len(piece) * partition.ranks  # type: ignore[attr-defined]
        free_param(whole)
        return whole

    def sum_over_ranks(scale: Tensor) -> Tensor:
        scale = scale.to(device)
        dist.all_reduce(scale)
        return scale

    return Placement(partition, parameter, sum_over_ranks, lambda module: _move_buffers(module, device))


def set_gather(node: NodeMemory | None, traffic: Traffic) -> None:
    """Set how DeepSpeed gathers in this process, and count what it gathers.

    It replaces a private function of DeepSpeed, since there is no setting for it.
    """
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters

    def gather(partition: Tensor, whole: Tensor, group: Any = None) -> Any:
        traffic.gathered += whole.nbytes
        if node is not None and node.holds(partition):
            node.gather(partition, whole)
            return _Gathering(())
        if dist.get_backend(group) == "gloo":
            return _gather_in_place(partition, whole, group)
        return deepspeed.comm.allgather_fn(whole, partition, group=group, async_op=True)

    partition_parameters._dist_allgather_fn = gather


def gathers_of(engine: Any, traffic: Traffic) -> Gather:
    """DeepSpeed's own gathering of some parameters, which does not wait for them; it passes over those that are there.

    A private function, since DeepSpeed gathers ahead by its own order alone.
    """
    coordinator = engine.optimizer.get_param_coordinator()  # without an optimizer, this is what holds the weights

    def gather(parameters: set[nn.Parameter], forward: bool) -> None:
        before = traffic.gathered
        coordinator._PartitionedParameterCoordinator__all_gather_params(parameters, forward)
        traffic.ahead += traffic.gathered - before

    return gather


@dataclass(frozen=True)
class _Gathering:
    """The handle that DeepSpeed waits on after it asked for a gather."""

    parts: Sequence[Any]

    def wait(self) -> None:
        for part in self.parts:
            part.wait()


def _gather_in_place(partition: Tensor, whole: Tensor, group: Any = None) -> _Gathering:
    """Broadcast each rank's partition straight into its place in `whole`.

    gloo's own all-gather makes a second tensor as large as `whole`.
    """
    places = whole.chunk(dist.get_world_size(group))
    places[dist.get_rank(group)].copy_(partition)
    sources = range(len(places)) if group is None else dist.get_process_group_ranks(group)
    return _Gathering(
        [dist.broadcast(place, source, group, async_op=True) for place, source in zip(places, sources, strict=True)]
    )


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for key, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[key] = buffer.to(device)


def layer_types(model: nn.Module) -> list[type[nn.Module]]:
    """The classes of the model's transformer layers, which every family keeps in a `ModuleList`.

    A hybrid has layers of several classes in one list.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    types = dict.fromkeys(type(layer) for layers in lists for layer in layers if any(layer.children()))
    # A container has no forward of its own, around which weights could be gathered.
    return [kind for kind in types if kind.forward is not nn.ModuleList.forward]


def zero_settings(hidden_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a frozen model under ZeRO-3."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            # Norms and biases stay on every rank; every matrix is partitioned.
            "stage3_param_persistence_threshold": 2 * hidden_size,
            # DeepSpeed's own prefetching follows a recorded order of layers, which training and evaluation do not
            # share; `prefetch` takes its place. Gathers have a stream of their own on a GPU.
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
            "overlap_comm": True,
            # Each matrix is gathered into its own memory; by default they come side by side and are then copied.
            "stage3_allgather_sequential": True,
        },
        # Never: the CPU backend would report every step.
        "steps_per_print": 10**9,
    }


def start_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed and let it join the ranks. It takes seconds the first time, and nothing after that."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    # On a CPU DeepSpeed would compile a shared-memory all-reduce at start, which this project never calls. That takes
    # a minute and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)


def held_bytes(backbone: Backbone) -> dict[str, int]:
    """Bytes that this rank holds between calls, by type of number, hidden attributes included."""
    # By storage, since tied parameters and views share one.
    seen: dict[int, Tensor] = {}
    for module in backbone.hosted.modules():
        for value in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(value, Tensor):
                tensor = getattr(value, "ds_tensor", None)
                tensor = value if tensor is None else tensor
                seen[tensor.untyped_storage().data_ptr()] = tensor
                if tensor is not value and value.numel():  # gathered, or kept whole on purpose
                    seen[value.untyped_storage().data_ptr()] = value
    total: dict[str, int] = {}
    for tensor in seen.values():
        key = str(tensor.dtype).removeprefix("torch.")
        total[key] = total.get(key, 0) + tensor.untyped_storage().nbytes()
    return total


def held_digest(backbone: Backbone) -> str:
    """Digest of the weights that this rank holds: the same before and after training."""
    total = hashlib.sha256()
    for name, tensor in [*backbone.hosted.named_parameters(), *backbone.hosted.named_buffers()]:
        held = getattr(tensor, "ds_tensor", tensor).detach().cpu().contiguous()
        total.update(name.encode())
        total.update(held.view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
