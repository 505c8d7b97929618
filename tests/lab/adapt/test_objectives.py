"""Inputs and targets of each objective: exact token ids of worked examples, and no token is lost."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.lab.adapt.objectives import Markers, make_example, noise_mask, prefix_lm, span_corruption, span_count
from pipeline.settings import ObjectiveSettings

EOS = 1
MARKERS = Markers(EOS, [99, 98, 97, 96, *range(95, 60, -1)])
# Thank you for inviting me to your party last week: the figure of Raffel et al. (2020).
TEXT = np.arange(10, 20)


def test_the_prefix_goes_in_and_the_rest_comes_out():
    example = prefix_lm(TEXT, 4, MARKERS)
    assert example.input.tolist() == [10, 11, 12, 13, EOS]
    assert example.target.tolist() == [14, 15, 16, 17, 18, 19, EOS]


def noise_at(*places):
    noise = np.zeros(len(TEXT), dtype=bool)
    noise[list(places)] = True
    return noise


def test_spans_give_way_to_sentinels_and_come_out_behind_them():
    example = span_corruption(TEXT, noise_at(2, 3, 8, 9), MARKERS, sentinels_in_targets=True)
    assert example.input.tolist() == [10, 11, 99, 14, 15, 16, 17, 98, EOS]
    assert example.target.tolist() == [99, 12, 13, 98, 18, 19, EOS]


def test_without_sentinels_in_targets_the_spans_come_out_alone_and_the_input_is_the_same():
    noise = noise_at(2, 3, 6, 9)
    bare = span_corruption(TEXT, noise, MARKERS, sentinels_in_targets=False)
    named = span_corruption(TEXT, noise, MARKERS, sentinels_in_targets=True)
    assert bare.target.tolist() == [12, 13, 16, 19, EOS]
    assert bare.input.tolist() == named.input.tolist() == [10, 11, 99, 14, 15, 98, 17, 18, 97, EOS]
    assert named.target.tolist() == [99, 12, 13, 98, 16, 97, 19, EOS]


def texts():
    return st.lists(st.integers(2, 60), min_size=2, max_size=200).map(lambda ids: np.array(ids, dtype=np.int64))


def drawn(seed):
    return np.random.default_rng(seed)


@given(texts(), st.integers(0, 2**32))
def test_prefix_and_target_together_are_the_text(text, seed):
    example = make_example(ObjectiveSettings(), text, MARKERS, drawn(seed))
    assert len(example.input) > 1 and len(example.target) > 1, "one side is empty"
    assert [*example.input[:-1], *example.target[:-1]] == text.tolist()


def filled_in(example):
    """The input with every sentinel replaced by what the target says behind it."""
    said: dict[int, list[int]] = {}
    for token in example.target[:-1].tolist():
        if token in MARKERS.sentinels:
            said[token] = []
        else:
            said[[*said][-1]].append(token)
    return [token for shown in example.input[:-1].tolist() for token in said.get(shown, [shown])]


densities, spans = st.floats(0.01, 0.9), st.floats(3, 10)


@given(texts(), densities, spans, st.integers(0, 2**32))
def test_input_and_target_of_span_corruption_together_give_the_text_back(text, density, mean_span, seed):
    objective = ObjectiveSettings(name="span_corruption", noise_density=density, mean_span=mean_span)
    if span_count(len(text), density, mean_span) > len(MARKERS.sentinels):
        return
    example = make_example(objective, text, MARKERS, drawn(seed))
    assert filled_in(example) == text.tolist()
    assert example.input[-1] == example.target[-1] == EOS
    bare = make_example(objective.model_copy(update={"sentinels_in_targets": False}), text, MARKERS, drawn(seed))
    assert bare.input.tolist() == example.input.tolist()
    assert bare.target.tolist() == [token for token in example.target.tolist() if token not in MARKERS.sentinels]


@given(st.integers(2, 600), densities, st.floats(1, 10), st.integers(0, 2**32))
def test_a_mask_has_the_noise_and_the_spans_that_were_asked_for(length, density, mean_span, seed):
    noise = noise_mask(length, density, mean_span, drawn(seed))
    assert len(noise) == length and not noise[0] and noise[-1]
    assert noise.sum() == min(max(round(length * density), 1), length - 1)
    found = int((noise & ~np.r_[False, noise[:-1]]).sum())
    assert found == min(span_count(length, density, mean_span), length - noise.sum())
