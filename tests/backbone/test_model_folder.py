"""A model written as a folder: what another library computes on it is what a job computes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.backbone import prompted
from pipeline.backbone.files import find_model, read_tokenizer
from pipeline.backbone.model_folder import write_model_folder
from pipeline.cli.models import identity_of
from pipeline.errors import BackboneError
from pipeline.serving import load_backbone
from tests.gguf_files import open_model, write_gguf
from tests.tiny import make_model

IDS = torch.tensor([5, 9, 3, 12, 7])


def scores(served):
    """`[V]`: log P of every token behind IDS, as the job's own model computes it."""
    rows = prompted.Rows([torch.zeros(1, served.identity.hidden_size)], [0], [IDS.numpy()])
    every = [torch.tensor([token]).numpy() for token in range(served.embedding_rows)]
    ((found),) = served.backbone.run(prompted.label_log_likelihoods, rows, [every])
    return torch.from_numpy(found)


def by_transformers(folder, hidden):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    embedded = model.get_input_embeddings()(IDS)
    with torch.no_grad():
        return model(inputs_embeds=torch.cat([torch.zeros(1, hidden), embedded])[None]).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("weights", ["int8", "full"])
@pytest.mark.parametrize("family", ["llama", "llama_untied", "gpt2", "qwen3"])
def test_transformers_computes_on_the_folder_what_the_job_computes_on_the_model(family, weights, tmp_path):
    model = make_model(tmp_path / "model", family)
    write_model_folder(str(model), tmp_path / "folder", int8=weights == "int8")
    served = load_backbone(str(model), weights)
    found = by_transformers(tmp_path / "folder", served.identity.hidden_size)
    torch.testing.assert_close(found, scores(served), rtol=1e-4, atol=1e-4)
    written = load_backbone(str(tmp_path / "folder"), weights)
    torch.testing.assert_close(scores(written), scores(served), rtol=1e-4, atol=1e-4)
    assert written.identity.tokenizer == served.identity.tokenizer and written.identity.config == served.identity.config
    if weights == "full":
        assert written.identity.weights == served.identity.weights


def test_a_gguf_file_becomes_a_folder_that_scores_alike(tmp_path):
    folder = make_model(tmp_path / "model", hidden_size=8, num_attention_heads=2)
    path = write_gguf(tmp_path / "m.gguf", open_model(folder), "llama", pre="llama-bpe")
    write_model_folder(str(path), tmp_path / "folder", int8=True)
    one, other = load_backbone(str(path)), load_backbone(str(tmp_path / "folder"))
    torch.testing.assert_close(scores(other), scores(one), rtol=1e-4, atol=1e-4)
    text = 'AB!" 12'
    assert read_tokenizer(find_model(str(path)))(text).input_ids == other.tokenizer(text).input_ids
    assert identity_of(str(tmp_path / "folder"), "int8", None) == other.identity


def test_nothing_is_overwritten_and_an_encoder_decoder_is_refused(tmp_path):
    model = make_model(tmp_path / "t5", "t5")
    with pytest.raises(BackboneError, match="is there already, and nothing is overwritten"):
        write_model_folder(str(model), model, int8=False)
    with pytest.raises(BackboneError, match="is an encoder-decoder"):
        write_model_folder(str(model), tmp_path / "folder", int8=False)
    assert not (tmp_path / "folder").exists()
