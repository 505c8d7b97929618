"""The frozen model on one rank, as a run's settings ask for it."""

from pathlib import Path

import torch
from transformers import AutoConfig

from pipeline.backbone.allocator import configure_allocator
from pipeline.backbone.files import find_model
from pipeline.backbone.host import Backbone, compute_dtype, held_bytes, host_backbone
from pipeline.backbone.offload import offload_of_settings
from pipeline.settings import Settings
from pipeline.tuning.placement import agreed_products, partitions
from pipeline.tuning.ranks import world_size
from pipeline.tuning.run_log import RunLog


def host_on_rank(settings: Settings, model_folder: Path, device: torch.device, journal: RunLog) -> Backbone:
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
    journal.event("stage", name="backbone", text=f"loading {model.path}, {how} {world_size()} rank(s)")
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
    configure_allocator(sum(held_bytes(backbone).values()))
    return backbone
