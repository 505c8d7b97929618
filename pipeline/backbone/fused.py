"""Parts of a model's layers that run as one kernel each, in place of transformers' modules.

They keep the names of parameters and compute the same. Where a kernel cannot be used (another device or type, no
compiler), PyTorch's operators run as before.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.backbone.native import attention as native_attention
from pipeline.backbone.native import rows as native
from pipeline.backbone.packed import current_run

# By class name: transformers has a copy of each class in every family's module, without a common parent.
_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "T5LayerNorm", "MT5LayerNorm")
_ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
_GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


class RmsNorm(nn.Module):
    """`x / rms(x) * weight`, as transformers' norms of that kind compute it."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon
        self.kernels = False

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., H]` -> `[..., H]`."""
        if self.kernels and native.supports(x, self.weight):
            y: Tensor = native.RmsNormFunction.apply(x, self.weight, self.epsilon)
            return y
        # Squares overflow in 16 bits; transformers, too, computes norms in float32.
        wide = x.to(torch.float32)
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * normal.to(x.dtype)


class GatedMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.kernels = False

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., H]` -> `[..., H]`."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.kernels and native.supports(gate, up):
            inner = native.SiluProductFunction.apply(gate, up)
        else:
            inner = functional.silu(gate) * up
        y: Tensor = self.down_proj(inner)
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
        if run is None or not run.kernels or not native.supports(hidden_states) or run.biases(rest["attention_mask"]):
            return self._usual[0](hidden_states, position_embeddings=position_embeddings, **rest)
        usual = self._usual[0]
        q, k, v = (
            project(hidden_states[0]).unflatten(-1, (-1, usual.head_dim))
            for project in (usual.q_proj, usual.k_proj, usual.v_proj)
        )
        if hasattr(usual, "q_norm"):
            q, k = usual.q_norm(q), usual.k_norm(k)
        # Given keys are rotated already, which the kernel knows by their number.
        k, v = run.with_given(usual.layer_idx, k, v)
        rotation = run.layout.rotation(position_embeddings)
        out = native_attention.attend(q, k, v, usual.scaling, run.layout.forest, rotation)
        return usual.o_proj(out.flatten(1))[None], None


def fuse(model: nn.Module) -> None:
    """Put fused parts in place of those that transformers made."""
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            fused = _fused(child)
            if fused is not None:
                setattr(parent, key, fused)


def _fused(usual: Any) -> nn.Module | None:
    kind = type(usual).__name__
    if kind in _RMS_NORMS:
        return RmsNorm(usual.weight, usual.variance_epsilon)
    if kind in _ATTENTIONS:
        return RotaryAttention(usual)
    if kind in _GATED_MLPS and usual.config.hidden_act in ("silu", "swish"):
        return GatedMlp(usual.gate_proj, usual.up_proj, usual.down_proj)
    return None


def use_kernels(model: nn.Module, kernels: bool) -> None:
    """Set whether the model's parts run as compiled kernels from now on, where these can be used."""
    for module in (model, *model.modules()):
        if module is model or hasattr(module, "kernels"):
            setattr(module, "kernels", kernels)  # noqa: B010 (an attribute of some modules alone)
