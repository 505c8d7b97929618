"""The int8 layers against the same arithmetic in float."""

import pytest
import torch

from pipeline.backbone import int8
from pipeline.backbone.fused import GatedMlp, use_kernels
from pipeline.backbone.int8 import Int8Embedding, Int8Linear, empty_int8, quantize_matrix, set_products


def loaded(weight: torch.Tensor, make):
    layer = make(empty_int8(*weight.shape))
    rows, layer.scale = quantize_matrix(weight)
    layer.weight = torch.nn.Parameter(rows, requires_grad=False)
    return layer


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (128, 64)])
def test_every_weight_is_kept_to_half_a_step_of_its_row(shape):
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    rows, scale = quantize_matrix(weight)
    assert rows.dtype == torch.int8 and scale.dtype == torch.float32
    error = (rows.float() * scale[:, None] - weight).abs()
    assert bool((error <= 0.5001 * scale[:, None]).all())


def test_product_and_gradient_are_exactly_those_of_the_kept_weights():
    weight = torch.randn(40, 24)
    bias = torch.nn.Parameter(torch.randn(40))
    layer = loaded(weight, lambda parameter: Int8Linear(parameter, bias))
    kept = layer.weight.float() * layer.scale[:, None]
    x = torch.randn(2, 5, 24, requires_grad=True)
    upstream = torch.randn(2, 5, 40)
    (ours,) = torch.autograd.grad((layer(x) * upstream).sum(), x)
    (reference,) = torch.autograd.grad(((x @ kept.t() + bias) * upstream).sum(), x)
    torch.testing.assert_close(layer(x), x @ kept.t() + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_a_large_matrix_is_converted_in_pieces_and_multiplies_the_same(monkeypatch):
    layer = loaded(torch.randn(40, 24), lambda parameter: Int8Linear(parameter, None))
    x, upstream = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 40)
    whole = layer(x)
    (whole_gradient,) = torch.autograd.grad((whole * upstream).sum(), x)
    monkeypatch.setattr(int8, "CONVERTED_AT_ONCE", 7 * 24)
    torch.testing.assert_close(layer(x), whole, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((layer(x) * upstream).sum(), x)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-5, atol=1e-6)


def test_bfloat16_activations_stay_bfloat16_and_lose_nothing_in_the_scale():
    weight = torch.randn(40, 24)
    layer = loaded(weight, lambda parameter: Int8Linear(parameter, None))
    x = torch.randn(5, 24).bfloat16()
    exact = x.float() @ (layer.weight.float() * layer.scale[:, None]).t()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("inner", [1, 576, 1024, 1025, 5000])
def test_a_product_through_floats_is_the_one_of_whole_numbers_to_the_last_bit(inner):
    """At its worst, too: all of one sign, and as large as they can be."""
    rows = torch.stack([torch.full((inner,), 127), torch.full((inner,), -127), torch.randint(-127, 128, (inner,))])
    matrix = torch.stack([torch.full((inner,), -128), torch.full((inner,), 127), torch.randint(-128, 128, (inner,))])
    product = int8._multiply_as_floats(rows.to(torch.int8), matrix.to(torch.int8).t())
    assert product.dtype == torch.int32 and torch.equal(product.long(), rows @ matrix.t())


def test_a_row_of_a_batch_does_not_depend_on_the_others():
    layer = loaded(torch.randn(40, 24), lambda parameter: Int8Linear(parameter, None))
    x = torch.randn(6, 24)
    spoiled = x.clone()
    spoiled[3:] *= 1e6
    torch.testing.assert_close(layer(x)[:3], layer(spoiled)[:3], rtol=1e-6, atol=1e-6)


def test_an_embedding_gives_the_kept_rows():
    table = torch.randn(30, 8)
    layer = loaded(table, lambda parameter: Int8Embedding(parameter, torch.float32))
    ids = torch.tensor([[0, 29], [7, 7]])
    torch.testing.assert_close(layer(ids), (layer.weight.float() * layer.scale[:, None])[ids])


def both_products(weight: torch.Tensor, x: torch.Tensor, upstream: torch.Tensor, settings=("exact", "int8")):
    """Output and gradient of the exact product, then of the int8 one."""
    results = []
    for setting in settings:
        layer = loaded(weight, lambda parameter: Int8Linear(parameter, None))
        set_products(layer, setting, torch.device("cpu"))
        x = x.detach().requires_grad_()
        y = layer(x)
        results += [y.detach(), *torch.autograd.grad((y * upstream).sum(), x)]
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_products_and_gradients_are_near_the_exact_ones(dtype):
    torch.manual_seed(0)
    x, upstream = torch.randn(3, 50, 256, dtype=dtype), torch.randn(3, 50, 96, dtype=dtype)
    exact_y, exact_dx, y, dx = both_products(torch.randn(96, 256), x, upstream)
    for ours, reference in ((y, exact_y), (dx, exact_dx)):
        assert ours.dtype == dtype and ours.shape == reference.shape
        error = (ours.float() - reference.float()).norm() / reference.float().norm()
        assert error < 0.02


def test_int8_products_forward_alone_have_the_exact_gradient_bit_by_bit():
    torch.manual_seed(0)
    weight, x, upstream = torch.randn(40, 24), torch.randn(6, 24), torch.randn(6, 40)
    _, exact_dx, y, dx = both_products(weight, x, upstream, ("exact", "int8_forward"))
    _, _, int8_y, int8_dx = both_products(weight, x, upstream)
    assert torch.equal(y, int8_y)
    assert torch.equal(dx, exact_dx) and not torch.equal(dx, int8_dx)


def test_a_row_of_an_int8_product_does_not_depend_on_the_others_bit_by_bit():
    torch.manual_seed(0)
    weight, x, upstream = torch.randn(40, 24), torch.randn(6, 24), torch.randn(6, 40)
    spoiled, spoiled_upstream = x.clone(), upstream.clone()
    spoiled[3:] = torch.tensor([float("nan"), float("inf"), 1e30])[:, None]
    spoiled_upstream[3:] = float("nan")
    _, _, y, dx = both_products(weight, x, upstream)
    _, _, spoiled_y, spoiled_dx = both_products(weight, spoiled, spoiled_upstream)
    assert torch.equal(y[:3], spoiled_y[:3]) and torch.equal(dx[:3], spoiled_dx[:3])
    assert not spoiled_y[3].isfinite().any()


def test_rows_of_zeros_stay_zeros_in_int8_products():
    _, _, y, dx = both_products(torch.randn(8, 16), torch.zeros(2, 16), torch.zeros(2, 8))
    assert not y.any() and not dx.any()


def _linear_and_gated():
    torch.manual_seed(0)
    sides = {"gate_proj": (80, 48), "up_proj": (80, 48), "down_proj": (48, 80)}
    layers = {name: loaded(torch.randn(shape), lambda p: Int8Linear(p, None)) for name, shape in sides.items()}
    mlp = GatedMlp(layers, "silu")
    use_kernels(mlp, True)
    return mlp, torch.randn(2, 70, 48)


def test_int16_products_lose_a_ten_thousandth_and_have_the_exact_gradient():
    mlp, x = _linear_and_gated()
    x.requires_grad_()
    results = {}
    for setting in ("exact", "int16", "int8"):
        set_products(mlp, setting, torch.device("cpu"))
        y = mlp.gate_proj(x)
        results[setting] = y.detach(), torch.autograd.grad(y.sum(), x)[0]
    exact, fine, coarse = results.values()
    assert (fine[0] - exact[0]).norm() <= 1e-4 * exact[0].norm() <= 0.1 * (coarse[0] - exact[0]).norm()
    torch.testing.assert_close(fine[1], exact[1])


def test_a_gated_layer_of_int16_products_is_its_layers_one_by_one():
    mlp, x = _linear_and_gated()
    set_products(mlp, "int16", torch.device("cpu"))
    one_by_one = mlp(x.requires_grad_())  # with a gradient, they run so
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), one_by_one, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(mlp(x[1:, 3:9]), mlp(x)[1:, 3:9])  # each row by itself
