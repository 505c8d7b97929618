"""Rows that join and leave between tokens, against the same rows decoded alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backbone import prompted
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.fused import use_kernels
from pipeline.backbone.growing import GrowingRows
from pipeline.backbone.host import host_backbone
from tests.families import DECODERS, make_decoder
from tests.tiny import VOCAB

NEVER = VOCAB  # no token: rows go on to their limit
KINDS = ["llama", "qwen3", "mistral, window", "gemma2, caps", "gemma3_text"]


@pytest.fixture(scope="module", params=KINDS)
def backbone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.replace(", ", "-"))
    files = find_model(str(make_decoder(folder, DECODERS[request.param])))
    return host_backbone(
        files, read_config(files), int8=False, dtype=torch.float32, device=torch.device("cpu"), sharded=False
    )


@pytest.fixture(scope="module")
def rows(backbone):
    """Rows with the states of their prompts, and of one prompt the tokens too."""
    rng = np.random.default_rng(0)
    made = [torch.randn(p, backbone.hidden_size, generator=torch.Generator().manual_seed(p)) for p in (3, 7, 2)]
    states = [backbone.run(prompted.prompt_state, prompt, rng.integers(3, VOCAB, 2)) for prompt in made]
    return [(states[i % 3], rng.integers(3, VOCAB, n)) for i, n in enumerate([5, 1, 9, 4, 12, 2, 30, 3])]


@pytest.fixture(scope="module")
def alone(backbone, rows):
    """40 tokens of each row: more than the window of a family that has one."""
    return [
        backbone.run(prompted.greedy_decode, prompted.Rows([state], [0], [ids]), 40, NEVER)[0].tolist()
        for state, ids in rows
    ]


@torch.no_grad()
def decoded(model, rows, joins, limits):
    """The tokens of each row, where rows join in groups after so many steps, and leave at their limits."""
    growing, place_of, out, step = GrowingRows(), {}, {}, 0
    while len(out) < len(rows) or place_of:
        now = [row for row, at in enumerate(joins) if at == step]
        if now:
            places, tokens = growing.join(
                model, prompted.Rows([rows[r][0] for r in now], range(len(now)), [rows[r][1] for r in now])
            )
            for row, place, token in zip(now, places, tokens.tolist(), strict=True):
                assert place not in place_of.values()
                place_of[row], out[row] = place, [token]
        done = [row for row in place_of if len(out[row]) >= limits[row]]
        growing.leave([place_of.pop(row) for row in done])
        if place_of:
            found = growing.step(model, list(place_of.values()), torch.tensor([out[row][-1] for row in place_of]))
            for row, token in zip(place_of, found.tolist(), strict=True):
                out[row].append(token)
        step += 1
    assert len(growing) == 0
    return [out[row] for row in range(len(rows))]


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_rows_that_join_and_leave_in_any_order_get_the_tokens_that_they_get_alone(backbone, rows, alone, data):
    joins = data.draw(st.lists(st.integers(0, 12), min_size=len(rows), max_size=len(rows)))
    limits = data.draw(st.lists(st.integers(1, 40), min_size=len(rows), max_size=len(rows)))
    found = backbone.run(decoded, rows, joins, limits)
    assert found == [tokens[:most] for tokens, most in zip(alone, limits, strict=True)]


def test_the_kernel_and_pytorchs_operators_give_the_same_tokens(backbone, rows, alone):
    use_kernels(backbone.hosted.model, False)
    try:
        assert backbone.run(decoded, rows, [0, 0, 3, 0, 1, 0, 0, 2], [40] * len(rows)) == alone
    finally:
        use_kernels(backbone.hosted.model, True)


@torch.no_grad()
def test_places_that_are_free_are_taken_again(backbone, rows):
    growing = GrowingRows()

    def join(model, which):
        return growing.join(model, prompted.Rows([rows[r][0] for r in which], range(len(which)), [rows[1][1]] * 2))[0]

    first = backbone.run(join, [0, 1])
    size = growing.nbytes
    for _ in range(20):
        growing.leave(first[:1])
        first = [*backbone.run(join, [2, 3]), *first[1:]]
        growing.leave(first[:1])
        first = first[1:]
        growing.leave(first[1:])
        first = first[:1]
    assert growing.nbytes <= 3 * size


@torch.no_grad()
def test_a_long_row_beside_many_short_ones_leaves_no_room_behind_for_as_many_long_ones(backbone):
    growing, chance = GrowingRows(), np.random.default_rng(0)
    prompt = torch.randn(3, 32)

    def join(model, *lengths):
        inputs = [chance.integers(3, VOCAB, n) for n in lengths]
        return growing.join(model, prompted.Rows([prompt], [0] * len(lengths), inputs))[0]

    def room_of_a_token():
        return growing.nbytes / growing._keys[0].shape[0] / growing._keys[0].shape[1]

    short = backbone.run(join, *[5] * 40)
    of_a_token = room_of_a_token()
    growing.leave(short[1:])
    (long,) = backbone.run(join, 300)
    assert growing.nbytes <= of_a_token * 2 * 2 * (301 + 150)  # two rows, as wide as the long one may grow at once
    growing.leave([long])
    others = backbone.run(join, *[5] * 40)
    assert growing.nbytes <= of_a_token * 2 * 41 * (2 * 6 + 2 * 32)
    tokens = backbone.run(growing.step, [short[0], *others], torch.full((41,), 5))
    assert len(tokens) == 41 and len(growing) == 41
