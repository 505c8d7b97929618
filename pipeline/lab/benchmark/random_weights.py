"""Models of random weights made where they run, without a file: shapes of any size for measurements."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from pipeline.backbone.fused import use_kernels
from pipeline.backbone.host import Backbone, Hosted, choose_way
from pipeline.backbone.int8 import empty_int8, scale_of, unknown_scale
from pipeline.backbone.loading import build_skeleton, input_width
from pipeline.lab.benchmark.synthetic import deviations

_SPREAD = 127 / 3**0.5
"""Standard deviation of whole numbers from -127 to 127, all equally likely."""


def random_backbone(
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    int8: bool = True,
    products: str = "exact",
    kernels: bool = True,
    seed: int = 0,
) -> Backbone:
    """A frozen model of random weights, whole on `device`; the options are those of `host_backbone`.

    Raises: BackboneError where the model cannot be run exactly.
    """
    model = random_model(config, device, dtype, int8=int8, kernels=kernels, seed=seed)
    whole = Hosted(model)
    proof = choose_way(whole, model, "random weights", device, dtype, partitioned=False, products=products)
    return Backbone(config, whole, device, dtype, input_width(model), proof)


def random_model(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, *, int8: bool, kernels: bool, seed: int = 0
) -> Any:
    """The model itself, with nothing decided on how it runs; on the meta device its weights have shapes alone.

    Activations are about one wide, as in `synthetic`. Norms' weights are scattered around one.
    """
    model: Any = build_skeleton(config, int8, dtype)
    use_kernels(model, kernels)
    if not getattr(config, "scale_decoder_outputs", True):  # T5 1.1; transformers always ties in memory
        output = model.get_output_embeddings()
        output._parameters["weight"] = empty_int8(*output._parameters["weight"].shape) if int8 else _like(output)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    wide = deviations(model, config)
    made: dict[int, tuple[nn.Parameter, Tensor | None, nn.Parameter]] = {}
    for path, module in model.named_modules():
        for key, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:  # a tied parameter stays one; the old one is kept, so that no other gets its id
                deviation = wide.get(f"{path}.{key}", 0.0)
                made[id(old)] = (*_values(key, old, deviation, device, dtype, generator), old)
            parameter, scale, _ = made[id(old)]
            module._parameters[key] = parameter
            if scale is not None:
                setattr(module, scale_of(key), scale)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    return model


def _like(layer: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(layer.weight), requires_grad=False)


def _values(
    key: str,
    like: nn.Parameter,
    deviation: float,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> tuple[nn.Parameter, Tensor | None]:
    """A parameter, and the scales of its rows where it is int8."""
    shape = like.shape
    if like.dtype == torch.int8:
        rows = torch.randint(-127, 128, shape, dtype=torch.int8, device=device, generator=generator)
        # Rows of different scales, so that a scale in another row's place shows.
        of_row = torch.empty(unknown_scale(like).shape, device=device).uniform_(0.8, 1.2, generator=generator)
        return nn.Parameter(rows, requires_grad=False), of_row * ((deviation or shape[-1] ** -0.5) / _SPREAD)
    values = torch.empty(shape, dtype=dtype, device=device)
    if deviation:
        values.uniform_(-(3**0.5) * deviation, 3**0.5 * deviation, generator=generator)
    elif key.endswith("bias"):
        values.zero_()
    else:
        values.uniform_(0.8, 1.2, generator=generator)
    return nn.Parameter(values, requires_grad=False), None
