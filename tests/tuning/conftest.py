import pytest
import torch

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.host import host_backbone
from tests.tiny import make_model


@pytest.fixture(scope="session", params=["llama", "t5"])
def model(request, tmp_path_factory):
    """A tiny int8 backbone of each architecture in this process, its tokenizer and its folder."""
    folder = make_model(tmp_path_factory.mktemp(request.param), request.param, scale=1.0)
    files = find_model(str(folder))
    backbone = host_backbone(
        files, read_config(files), int8=True, dtype=torch.float32, device=torch.device("cpu"), sharded=False
    )
    return backbone, read_tokenizer(files), folder
