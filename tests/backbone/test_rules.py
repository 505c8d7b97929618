"""Whether what a family's rule lets tokens see is all that lies before them."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils

from pipeline.backbone.packed import Rule

CPU = torch.device("cpu")
PLACES = st.lists(st.integers(0, 700), min_size=1, max_size=40)


def seen_by(rule, queries):
    keys = torch.arange(max(queries) + 1)
    return rule(torch.tensor(queries)[:, None], keys[None]), keys


@settings(max_examples=60, deadline=None)
@given(PLACES, st.integers(1, 800), st.sampled_from(["window", "chunk", "gaps", "ahead"]))
def test_a_rule_is_causal_where_each_token_sees_all_up_to_its_own(places, size, kind):
    rule = {
        "window": lambda: Rule(masking_utils.sliding_window_causal_mask_function(size)),
        "chunk": lambda: Rule(masking_utils.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))),
        "gaps": lambda: Rule(lambda b, h, q, k: (k <= q) & ((q - k) % size == 0)),
        "ahead": lambda: Rule(lambda b, h, q, k: k <= q + size),
    }[kind]()
    seen, keys = seen_by(rule, places)
    plain = torch.equal(seen, keys <= torch.tensor(places)[:, None])
    assert rule.is_causal(np.array(places), CPU) == plain
    if kind in ("window", "chunk"):
        assert plain == (max(places) < size)


def test_the_plain_causal_rule_is_causal():
    assert Rule(masking_utils.causal_mask_function).is_causal(np.array([0, 5, 900]), CPU)


def test_a_rule_that_has_numbers_on_the_device_is_asked_there():
    asked = []

    def function(_b, _h, q, k):
        if not asked:
            asked.append("on the host")
            raise RuntimeError("Expected all tensors to be on the same device")
        return (k <= q) & (k > q - 3)

    assert not Rule(function).is_causal(np.arange(6), CPU)
    assert asked
