"""Weights kept in files give the same numbers, and a clear sentence when the disk is full."""

import pytest
import torch

from pipeline.backbone.offload import in_files, offload_of_settings
from pipeline.errors import StorageError


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16])
def test_a_piece_comes_back_as_it_was_from_a_file_without_a_name(dtype, tmp_path):
    piece = torch.arange(1001).to(dtype)
    keep = offload_of_settings("nvme", tmp_path / "new")
    assert keep is not None
    kept = keep(piece)
    assert kept.data_ptr() != piece.data_ptr() and kept.dtype == dtype
    assert torch.equal(kept, piece)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_written_gets_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"model\.offload_folder .*file: cannot keep weights there") as caught:
        in_files(tmp_path / "file")(torch.zeros(4))
    assert "\n" not in str(caught.value)
