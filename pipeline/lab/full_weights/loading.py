"""A model's files -> a model with all weights trained: whole on one rank, or partitioned over several by ZeRO-3."""

import torch
from transformers import PretrainedConfig

from pipeline.backbone.files import ModelFiles, read_generation
from pipeline.backbone.fused import RmsNorm, use_kernels
from pipeline.backbone.loading import build_skeleton, untie_separate_weights
from pipeline.backbone.weights import open_weights
from pipeline.lab.full_weights.pieces import TrainedModel
from pipeline.lab.full_weights.whole import load_whole
from pipeline.settings import OptimizerSettings
from pipeline.tuning.ranks import world_size


def load_trained(
    files: ModelFiles,
    config: PretrainedConfig,
    optimizer: OptimizerSettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> TrainedModel:
    """Load a model in `dtype` (float32 or bfloat16) with its optimizer, over all ranks of torch.distributed.

    The optimizer always works in float32. Dropout is off, so that ranks agree.
    Raises: BackboneError when weights are damaged or missing.
    """
    model = build_skeleton(config, int8=False, dtype=dtype)
    model.generation_config = read_generation(files, config)
    use_kernels(model, True)
    for module in model.modules():
        if isinstance(module, RmsNorm):  # its kernel has no gradient of the norm's weight
            module.kernels = False
    source = open_weights(files, model)
    untie_separate_weights(model, source)
    if world_size() == 1:
        return load_whole(model, source, config, optimizer, dtype, device)
    from pipeline.lab.full_weights.partitioned import load_partitioned  # imports DeepSpeed

    return load_partitioned(model, source, config, optimizer, dtype, device)
