"""Files with a digest of their own content: whatever bit flips, a reader gets what was written, or is told."""

import json
import random
from contextlib import suppress

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.sealed_files import DamagedError, open_json, open_tensors, sealed_json, sealed_tensors

VALUES = {"name": "ä", "figures": [0.1, float("nan"), 1e-300], "nested": {"1": None, "b": True}, "step": 12}
TENSORS = {"a/b": np.arange(12, dtype=np.float32).reshape(3, 4), "empty": np.zeros((0, 3), np.float32)}
METADATA = {"told": json.dumps(VALUES)}


def flips(data: bytes):
    for bit in random.Random(5).sample(range(8 * len(data)), 800):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def test_json_with_a_bit_flipped_is_what_it_was_or_refused():
    data = sealed_json(VALUES)
    assert str(open_json(data, ())) == str(VALUES)
    for flipped in flips(data):
        with suppress(DamagedError):
            assert str(open_json(flipped, VALUES)) == str(VALUES)


def test_tensors_with_a_bit_flipped_are_what_they_were_or_refused():
    data = sealed_tensors(save(TENSORS, METADATA))
    refused = 0
    for flipped in flips(data):
        try:
            metadata, tensors = open_tensors(flipped, ("told",)), load(flipped)
        except (DamagedError, SafetensorError):
            refused += 1
            continue
        assert metadata == METADATA and tensors.keys() == TENSORS.keys()
        assert all(np.array_equal(tensors[name], array) for name, array in TENSORS.items())
    assert refused > 0.9 * 800


def test_a_sealed_file_of_tensors_is_a_file_that_safetensors_reads():
    for metadata in (METADATA, None):
        loaded = load(sealed_tensors(save(TENSORS, metadata)))
        assert all(np.array_equal(loaded[name], array) for name, array in TENSORS.items())


def test_files_without_a_digest_are_accepted_with_the_keys_of_their_version_alone():
    assert open_json(b'{"a": 1}', ("a", "b")) == {"a": 1}
    assert open_tensors(save(TENSORS, METADATA), ("told",)) == METADATA
    assert open_tensors(save(TENSORS), ()) == {}
    with pytest.raises(DamagedError, match="no digest"):
        open_json(b'{"a": 1, "sha257": ""}', ("a", "b"))
    with pytest.raises(DamagedError, match="no digest"):
        open_tensors(save(TENSORS, {**METADATA, "sha257": ""}), ("told",))


@pytest.mark.parametrize("rubbish", [b"", b"[]", b"null", b"{", b"\xff" * 20, b"[" * 100_000, bytes(16), b"{}" * 8])
def test_rubbish_is_damage_and_no_traceback(rubbish):
    length = len(rubbish).to_bytes(8, "little")
    for opened in (lambda: open_json(rubbish, ()), lambda: open_tensors(length + rubbish, ())):
        with suppress(DamagedError):
            assert opened() == {}
