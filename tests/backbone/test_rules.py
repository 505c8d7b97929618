"""What a family's rule lets a token see, as the first position that it sees."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils

from pipeline.backbone import packed
from pipeline.backbone.packed import Rule

CPU = torch.device("cpu")
PLACES = st.lists(st.integers(0, 700), min_size=1, max_size=40)


def seen_by(rule, queries):
    keys = torch.arange(max(queries) + 1)
    return rule(torch.tensor(queries)[:, None], keys[None]), keys


@settings(max_examples=40, deadline=None)
@given(PLACES, st.integers(1, 800), st.booleans())
def test_a_window_and_a_chunk_are_what_lies_between_the_first_position_seen_and_a_tokens_own(places, size, chunks):
    if chunks:
        rule = Rule(masking_utils.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long)))
    else:
        rule = Rule(masking_utils.sliding_window_causal_mask_function(size))
    first = rule.first_seen(np.array(places), CPU)
    seen, keys = seen_by(rule, places)
    between = (keys >= torch.from_numpy(first)[:, None]) & (keys <= torch.tensor(places)[:, None])
    assert torch.equal(seen, between)
    assert first.any() == (max(places) >= size)


def test_the_plain_causal_rule_sees_all_from_the_first_position_on():
    assert not Rule(masking_utils.causal_mask_function).first_seen(np.array([0, 5, 900]), CPU).any()


@pytest.mark.parametrize("positions", [[4], [0, 3, 4], list(range(600))])
def test_a_rule_with_gaps_has_no_first_position(positions):
    rule = Rule(lambda b, h, q, k: (k <= q) & ((q - k) % 3 == 0))
    assert rule.first_seen(np.array(positions), CPU) is None


def test_a_rule_that_has_numbers_on_the_device_is_asked_there():
    asked = []

    def function(_b, _h, q, k):
        if not asked:
            asked.append("on the host")
            raise RuntimeError("Expected all tensors to be on the same device")
        return (k <= q) & (k > q - 3)

    found = Rule(function).first_seen(np.arange(packed._QUERIES), CPU)
    assert asked and found.tolist() == [0, 0, *range(packed._QUERIES - 2)]
