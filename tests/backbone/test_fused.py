"""Parts of layers are fused where they compute what a fused part computes, whatever their classes are called."""

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from pipeline.backbone.fused import GatedMlp, RmsNorm, fuse

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 4}


class Renamed(LlamaRMSNorm):
    """A name that no list has."""


class Bounded(LlamaMLP):
    """Looks like a gated layer, and computes something else."""

    def forward(self, x):
        return super().forward(x).clamp(max=0.1)


def fused(part):
    parent = nn.Sequential(part).requires_grad_(False)
    with torch.no_grad():
        for parameter in parent.parameters():
            parameter.normal_()
    usual = parent[0]
    fuse(parent)
    return usual, parent[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (lambda: LlamaRMSNorm(8, 1e-5), RmsNorm),
        (lambda: Renamed(8, 1e-3), RmsNorm),
        (lambda: Gemma3RMSNorm(8, 1e-6), RmsNorm),
        (lambda: LlamaMLP(LlamaConfig(**SIZES)), GatedMlp),
        (lambda: LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh")), GatedMlp),
        (lambda: Gemma3MLP(Gemma3TextConfig(**SIZES)), GatedMlp),
    ],
)
def test_what_computes_the_same_is_replaced_and_gives_the_same_bits(part, kind, dtype):
    usual, made = fused(part())
    assert type(made) is kind
    x = torch.randn(2, 3, 8, dtype=dtype)
    assert torch.equal(made.to(dtype)(x), usual.to(dtype)(x))


@pytest.mark.parametrize(
    "part",
    [
        lambda: nn.LayerNorm(8, bias=False),
        lambda: MambaRMSNormGated(8, 8),
        lambda: Bounded(LlamaConfig(**SIZES)),
        lambda: LlamaMLP(LlamaConfig(**SIZES, hidden_act="relu")),
    ],
)
def test_what_computes_something_else_stays(part):
    usual, made = fused(part())
    assert made is usual


def test_experts_that_a_family_lists_keep_their_class():
    experts = nn.ModuleList([LlamaMLP(LlamaConfig(**SIZES))])
    fuse(nn.ModuleDict({"experts": experts}))
    assert type(experts[0]) is LlamaMLP
