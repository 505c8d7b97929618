"""Parts of layers are fused where they compute what a fused part computes, whatever their classes are called."""

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from pipeline.backbone.fused import GatedMlp, RmsNorm, fuse, use_kernels
from pipeline.backbone.int8 import Int8Linear, empty_int8, multiplies_in_int8, quantize_matrix, set_products
from pipeline.backbone.native.build import load_kernels

needs_compiler = pytest.mark.skipif(load_kernels() is None, reason="no C compiler on this machine")

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


@needs_compiler
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_layer_in_int8_is_its_three_layers_one_by_one_bit_by_bit(activation):
    torch.manual_seed(0)
    layers = []
    for shape in ((40, 24), (40, 24), (24, 40)):
        layer = Int8Linear(empty_int8(*shape), None)
        rows, layer.scale = quantize_matrix(torch.randn(shape))
        layer._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        layers.append(layer)
    mlp = GatedMlp(dict(zip(("gate", "up", "down"), layers, strict=True)), activation)
    use_kernels(mlp, True)
    set_products(mlp, "int8", torch.device("cpu"))
    x, upstream = torch.randn(2, 7, 24) * 3, torch.randn(2, 7, 24)
    x[1, 2] = float("nan")
    results = []
    for alone in (True, False):  # where something hooks into a layer, it runs by itself
        if not alone:
            layers[0].register_forward_hook(lambda *_: None)
        assert all(map(multiplies_in_int8, layers)) == alone
        leaf = x.clone().requires_grad_()
        y = mlp(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, leaf, upstream)])
        assert y[1, 2].isnan().all() and y.isnan().any(-1).sum() == 1
    for fused_part, one_by_one in zip(*results, strict=True):
        assert torch.equal(fused_part.nan_to_num(), one_by_one.nan_to_num())


def test_experts_that_a_family_lists_keep_their_class():
    experts = nn.ModuleList([LlamaMLP(LlamaConfig(**SIZES))])
    fuse(nn.ModuleDict({"experts": experts}))
    assert type(experts[0]) is LlamaMLP
