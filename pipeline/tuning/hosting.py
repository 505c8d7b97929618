"""The frozen model on one rank, as a run's settings ask for it.

All ranks must decide alike whether they share one copy, partitioned by ZeRO-3, and how it multiplies.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from pipeline.backbone.allocator import configure_allocator
from pipeline.backbone.files import find_model
from pipeline.backbone.host import Backbone, compute_dtype, held_bytes, host_backbone
from pipeline.backbone.int8 import multiplies_int8_fast
from pipeline.backbone.memory import estimate_memory
from pipeline.backbone.offload import offload_of_settings
from pipeline.settings import Settings
from pipeline.tuning.machine import free_bytes
from pipeline.tuning.ranks import rank, true_on_all, world_size
from pipeline.tuning.run_log import RunLog
from pipeline.whole_files import write_atomically

ROWS_RUN = "rows_run.txt"
"""The file in the model's folder of a run that tells how its rows ran."""
_MOST = 0.25
"""The share of a rank's free memory that a whole backbone may take; the rest is for activations and for others."""


def host_on_rank(settings: Settings, model_folder: Path, device: torch.device, run_log: RunLog) -> Backbone:
    """Load this rank's part of the model as the settings say. All ranks call this. Raises: BackboneError.

    `model_folder` holds config and tokenizer, saved by the driver.
    """
    model, cluster = settings.model, settings.cluster
    config = AutoConfig.from_pretrained(model_folder, trust_remote_code=False)
    int8, dtype = model.weights == "int8", model.dtype
    # Who asks for offload has no room to spare.
    setting = "always" if model.offload != "none" and cluster.partition == "auto" else cluster.partition
    sharded = partitions(setting, config, int8, compute_dtype(dtype, device), device)
    how = "partitioned over" if sharded else "whole on each of"
    run_log.event("stage", name="backbone", text=f"loading {model.path}, {how} {world_size()} rank(s)")
    backbone = host_backbone(
        find_model(model.path),
        config,
        int8=int8,
        dtype=compute_dtype(dtype, device),
        device=device,
        sharded=sharded,
        products=agreed_products(model.products, device),
        keep=offload_of_settings(model.offload, model.offload_folder),
    )
    exact = f"rows run {backbone.way}, {backbone.proof.differences[backbone.way]} from rows alone"
    run_log.event("stage", name="backbone", text=f"{model.path}: {exact}")
    if rank() == 0:
        write_atomically(model_folder / ROWS_RUN, backbone.way.encode())
    configure_allocator(sum(held_bytes(backbone).values()))
    return backbone


def partitions(setting: str, config: PretrainedConfig, int8: bool, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to partition the backbone: `always`, `never`, or `auto`, where a rank has little room for all of it.

    Every rank must call this; all get the same answer.
    """
    if world_size() == 1 or setting == "never":
        return False
    if setting == "always":
        return True
    needed = estimate_memory(config, int8, dtype, 1, 0)
    fits = needed.weights + needed.gathered <= _MOST * free_bytes(device)
    return not true_on_all(fits, device)


def agreed_products(setting: str, device: torch.device) -> str:
    """How int8 layers multiply (see `int8.set_products`): as set, or by `auto` in int8 where every rank does it fast.

    Every rank must call this; all get the same answer, for a trial's gradient must not depend on which has its rows.
    """
    if setting != "auto":
        return setting
    return "int8" if true_on_all(multiplies_int8_fast(device), device) else "exact"
