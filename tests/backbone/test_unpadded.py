"""Encoder-decoder rows one after another against transformers' own attention of each row alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Config, UMT5Config
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from pipeline.backbone.native.build import load_kernels
from pipeline.backbone.unpadded import (
    RelativeAttention,
    UnpaddedRun,
    _current,
    across,
    decoder_rows,
    encoder_rows,
)
from tests.backbone.test_encoder_decoder_families import host
from tests.seq2seq_families import make_seq2seq

SIZES = {"d_model": 24, "d_kv": 8, "num_heads": 3, "d_ff": 8, "num_layers": 1, "vocab_size": 8}
# Farther than the 128 tokens from which on T5 counts all distances alike.
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=5)
KERNELS = [
    pytest.param(True, marks=pytest.mark.skipif(load_kernels() is None, reason="no C compiler on this machine")),
    False,
]


def attention(kind, decodes, biased):
    torch.manual_seed(0)
    config = {T5Attention: T5Config, UMT5Attention: UMT5Config}[kind](**SIZES)
    config.is_decoder, config._attn_implementation = decodes, "eager"
    usual = kind(config, has_relative_attention_bias=biased, layer_idx=0).eval()
    for parameter in usual.parameters():
        parameter.data.normal_(std=0.4)
    return usual.requires_grad_(False)


def causal(length):
    return torch.full((length, length), -torch.inf).triu(1)[None, None]


def gradients_of(outputs, inputs, upstream):
    return torch.autograd.grad((outputs * upstream).sum(), inputs)


def run(module, run, *args, **kwargs):
    token = _current.set(run)
    try:
        return module(*args, **kwargs)[0]
    finally:
        _current.reset(token)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kind", [T5Attention, UMT5Attention])
@pytest.mark.parametrize("decodes", [False, True])
@settings(max_examples=8, deadline=None)
@given(lengths=LENGTHS)
def test_each_row_attends_as_transformers_attends_in_it_alone(kernels, kind, decodes, lengths):
    usual = attention(kind, decodes, biased=True)
    x, upstream = torch.randn(1, sum(lengths), 24, requires_grad=True), torch.randn(1, sum(lengths), 24)
    name = "mask" if kind is T5Attention else "attention_mask"
    alone = torch.cat(
        [usual(row, **({name: causal(row.shape[1])} if decodes else {}))[0] for row in x.split(lengths, 1)], 1
    )
    rows = (decoder_rows if decodes else encoder_rows)(np.array(lengths))
    beside = run(RelativeAttention(usual), UnpaddedRun(rows, None, kernels), x)
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)
    theirs, ours = (gradients_of(y, x, upstream)[0] for y in (alone, beside))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=15, deadline=None)
@given(encoder=LENGTHS, decoder=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40)), min_size=1, max_size=6))
def test_each_target_looks_at_the_row_that_it_answers_and_a_row_may_have_several(kernels, encoder, decoder):
    usual = attention(T5Attention, True, biased=False)
    row_of = np.array([row % len(encoder) for row, _ in decoder])
    lengths = [length for _, length in decoder]
    y, x = (torch.randn(1, sum(side), 24, requires_grad=True) for side in (lengths, encoder))
    upstream = torch.randn_like(y)
    texts = x.split(encoder, 1)
    alone = torch.cat(
        [usual(of, key_value_states=texts[row])[0] for of, row in zip(y.split(lengths, 1), row_of, strict=True)], 1
    )
    own = decoder_rows(np.array(lengths))
    seen = across(encoder_rows(np.array(encoder)), own, row_of)
    beside = run(RelativeAttention(usual), UnpaddedRun(own, seen, kernels), y, key_value_states=x)
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)
    theirs, ours = (gradients_of(out, (y, x), upstream) for out in (alone, beside))
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_bias_that_is_trained_has_the_gradient_that_transformers_gives_it(kernels):
    usual = attention(T5Attention, False, biased=True).requires_grad_(True)
    weight, lengths = usual.relative_attention_bias.weight, [150, 3, 31]
    x, upstream = torch.randn(1, sum(lengths), 24), torch.randn(1, sum(lengths), 24)
    alone = torch.cat([usual(row)[0] for row in x.split(lengths, 1)], 1)
    beside = run(RelativeAttention(usual), UnpaddedRun(encoder_rows(np.array(lengths)), None, kernels), x)
    theirs, ours = (gradients_of(y, weight, upstream)[0] for y in (alone, beside))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("family", "way"),
    [
        *((family, "packed") for family in ("t5", "t5_tied", "mt5", "umt5")),
        # Local attention of the encoder, experts that take a batch's tokens together, and places that are numbered.
        *((family, "padded") for family in ("longt5_local", "switch", "bart")),
    ],
)
def test_rows_run_without_padding_where_positions_are_distances(family, way, tmp_path):
    assert host(make_seq2seq(tmp_path, family)).way == way
