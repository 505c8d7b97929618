"""Parts of a model's layers that run as one kernel each, in place of transformers' modules.

They keep the names of parameters and compute the same. Where a kernel cannot be used (another device or type, no
compiler), PyTorch's operators run as before.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.backbone import gpu
from pipeline.backbone.gpu import attention as gpu_attention
from pipeline.backbone.gpu import rows as gpu_rows
from pipeline.backbone.int8 import int8_gated_layer, int16_gated_layer, multiplies_in_int8, multiplies_in_int16
from pipeline.backbone.native import attention as native_attention
from pipeline.backbone.native import rows as native
from pipeline.backbone.packed import current_run
from pipeline.backbone.unpadded import relative_attention

# By class name: what they compute takes a whole model's configuration to try.
_ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "Gemma3Attention")
_GATED = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


class RmsNorm(nn.Module):
    """`x / rms(x) * weight`, or `* (1 + weight)`, as transformers' norms of that kind compute it."""

    def __init__(self, weight: nn.Parameter, epsilon: float, plus_one: bool = False, wide: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon
        self.plus_one = plus_one
        self.wide = wide
        """Whether weights, too, multiply in float32, before the result gets the type of x."""
        self.kernels = False

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., H]` -> `[..., H]`."""
        if self.kernels and gpu.runs_on(x.device):
            of_gpu: Tensor = gpu_rows.RmsNormFunction.apply(x, self.weight, self.epsilon, self.plus_one, self.wide)
            return of_gpu
        weight: Tensor = self.weight
        if self.wide:
            weight = weight.float()
        if self.plus_one:
            weight = 1.0 + weight
        if self.kernels and native.supports(x, weight):
            y: Tensor = native.RmsNormFunction.apply(x, weight, self.epsilon)
            return y
        # Squares overflow in 16 bits; transformers, too, computes norms in float32.
        wide = x.to(torch.float32)
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (normal * weight).to(x.dtype) if self.wide else weight * normal.to(x.dtype)


class GatedMlp(nn.Module):
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(self, layers: Mapping[str, nn.Module], activation: str) -> None:
        """`layers`: gate, up and down, in this order, under the family's own names."""
        super().__init__()
        self._names = tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.activation = activation
        self.kernels = False

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., H]` -> `[..., H]`."""
        # Looked up each time: they may have been replaced.
        layers: list[Any] = [self._modules[name] for name in self._names]
        gate_proj, up_proj, down_proj = layers
        supported = native.supports(x) or gpu.runs_on(x.device)
        if self.kernels and supported and all(map(multiplies_in_int8, layers)):
            return int8_gated_layer(x, gate_proj, up_proj, down_proj, self.activation)
        no_gradient = not torch.is_grad_enabled()
        if self.kernels and no_gradient and native.supports(x) and all(map(multiplies_in_int16, layers)):
            return int16_gated_layer(x, gate_proj, up_proj, down_proj, self.activation)
        gate, up = gate_proj(x), up_proj(x)
        if self.kernels and native.supports(gate, up):
            inner = native.GatedProductFunction.apply(gate, up, self.activation)
        else:
            inner = _ACTIVATIONS[self.activation](gate) * up
        y: Tensor = down_proj(inner)
        return y


class RotaryAttention(nn.Module):
    """transformers' attention of the Llama kind; behind packed prompts, rotation and attention are one kernel."""

    def __init__(self, usual: nn.Module) -> None:
        super().__init__()
        self._modules = usual._modules  # one shared dictionary: a layer that is replaced later is replaced in both
        self._usual: list[Any] = [usual]  # in a list, which hides it from PyTorch: its parameters would be listed twice

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **rest: Any) -> Any:
        """`[1, N, H]` -> `[1, N, H]`, and no attention weights."""
        # Without a packed run this is transformers' own pass, with its own cache and mask.
        run = current_run()
        usual = self._usual[0]
        on_gpu = gpu_attention.supports(hidden_states, usual.head_dim)
        supported = run is not None and run.kernels and (on_gpu or native.supports(hidden_states))
        if run is None or not supported or run.biases(rest["attention_mask"]):
            return usual(hidden_states, position_embeddings=position_embeddings, **rest)
        # A view, made once: the layers quantise what they share once, and no gradient is copied into a larger one.
        x = hidden_states.flatten(0, 1)
        q, k, v = (
            project(x).unflatten(-1, (-1, usual.head_dim)) for project in (usual.q_proj, usual.k_proj, usual.v_proj)
        )
        if hasattr(usual, "q_norm"):
            q, k = usual.q_norm(q), usual.k_norm(k)
        rotation = run.layout.rotation(position_embeddings)
        if on_gpu:
            q, k = gpu_attention.rotate(q, k, rotation)
            if run.kept is not None:
                run.kept[usual.layer_idx] = (k, v)
            k, v = run.with_given(usual.layer_idx, k, v)
            turned = gpu_attention.attend(q, k, v, usual.scaling, run.layout.tables)
            return usual.o_proj(turned.flatten(1))[None], None
        if run.parts is not None:
            grown = native_attention.attend_growing(q, k, v, usual.scaling, run.parts(usual.layer_idx), rotation)
            return usual.o_proj(grown.flatten(1))[None], None
        if run.kept is not None:
            run.kept[usual.layer_idx] = (native_attention.rotated(k, rotation), v)
        # Given keys are rotated already, which the kernel knows by their number.
        k, v = run.with_given(usual.layer_idx, k, v)
        out = native_attention.attend(q, k, v, usual.scaling, run.layout.forest, rotation)
        return usual.o_proj(out.flatten(1))[None], None


def fuse(model: nn.Module) -> None:
    """Put fused parts in place of those that transformers made."""
    for parent in list(model.modules()):
        # Experts of one layer are made int8 together, by the class that the family gave them.
        of_experts = isinstance(parent, nn.ModuleList) or hasattr(parent, "experts")
        for key, child in list(parent.named_children()):
            fused: nn.Module | None = _fused_norm(child) or relative_attention(child)
            if fused is None and not of_experts:
                fused = _fused_mlp(child)
            if type(child).__name__ in _ATTENTIONS and not getattr(child, "attn_logit_softcapping", None):
                fused = RotaryAttention(child)
            if fused is not None:
                setattr(parent, key, fused)


# transformers has a copy of each class in every family's module, without a common parent, and what bears one name does
# not always compute the same. So a module is tried: where its numbers are a fused part's, to the last bit and in each
# type, it is replaced.


def _fused_norm(usual: Any) -> RmsNorm | None:
    weight = usual._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len([*usual.named_parameters(), *usual.named_buffers()]) != 1:
        return None
    # Of a size at which epsilon counts.
    x, w = (torch.randn(shape, generator=_generator()) for shape in ((2, len(weight)), (len(weight),)))
    found = [_tried(usual, {"weight": nn.Parameter(w.to(dtype))}, x.to(dtype) * 1e-3) for dtype in _TYPES]
    if any(y is None for y in found):
        return None
    for epsilon in dict.fromkeys(value for value in vars(usual).values() if isinstance(value, float)):
        for plus_one, wide in itertools.product((False, True), repeat=2):
            norms = [RmsNorm(nn.Parameter(w.to(dtype)), epsilon, plus_one, wide) for dtype in _TYPES]
            if _are_equal(found, [norm(x.to(dtype) * 1e-3) for norm, dtype in zip(norms, _TYPES, strict=True)]):
                return RmsNorm(weight, epsilon, plus_one, wide)
    return None


def _fused_mlp(usual: Any) -> GatedMlp | None:
    names = next((names for names in _GATED if set(names) <= usual._modules.keys()), None)
    if names is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # every rank, and every start, decides alike
        layers = dict(zip(names, (nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 3)), strict=True))
    x = torch.randn((1, 16, 3), generator=_generator()) * 3
    found = _tried(usual, layers, x)
    for activation in _ACTIVATIONS:
        # T5's gelu is written out, and PyTorch's own differs from it in the last bit. Another one is farther off.
        if found is not None and torch.allclose(found, GatedMlp(layers, activation)(x), rtol=1e-5, atol=1e-6):
            return GatedMlp({name: getattr(usual, name) for name in names}, activation)
    return None


_TYPES = (torch.float32, torch.bfloat16)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def _tried(usual: nn.Module, parts: dict[str, Any], x: Tensor) -> Tensor | None:
    """What a module makes of x with other parts; None where it takes more than x, or fails."""
    if len(inspect.signature(usual.forward).parameters) != 1:
        return None
    tried = copy.copy(usual)
    tried._parameters = {key: parts.get(key, value) for key, value in usual._parameters.items()}
    tried._modules = {key: parts.get(key, value) for key, value in usual._modules.items()}
    try:
        y = tried(x)
    except Exception:  # other parts of it are on the meta device, or do not fit
        return None
    return y if isinstance(y, Tensor) else None


def _are_equal(found: Sequence[Tensor | None], wanted: Sequence[Tensor]) -> bool:
    return all(
        a is not None and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for a, b in zip(found, wanted, strict=True)
    )


def use_kernels(model: nn.Module, kernels: bool) -> None:
    """Set whether the model's parts run as compiled kernels from now on, where these can be used."""
    for module in (model, *model.modules()):
        if module is model or hasattr(module, "kernels"):
            setattr(module, "kernels", kernels)  # noqa: B010 (an attribute of some modules alone)
