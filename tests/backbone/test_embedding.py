"""Embeddings of words, against what transformers' own models make of ids."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.backbone.embedding import embed_words
from pipeline.errors import BackboneError
from tests.tiny import VOCAB

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
    "scale_embedding": True,
}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
SCALED = {
    "pegasus": _ENCODER_DECODER,
    "marian": _ENCODER_DECODER,
    "bart": _ENCODER_DECODER,
    "falcon_h1": {**_DECODER, **_MAMBA, "mamba_chunk_size": 16, "embedding_multiplier": 5.0},
    "granite": {**_DECODER, "embedding_multiplier": 3.0},
    "gemma3_text": {**_DECODER, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4},
}


def make(family):
    config = CONFIG_MAPPING[family](**SCALED[family], vocab_size=VOCAB, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config).eval()


def stack(model):
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


@pytest.mark.parametrize("family", SCALED)
def test_a_model_does_with_embedded_words_what_it_does_with_their_ids(family):
    model = make(family)
    ids = torch.tensor([[4, 9, 4, 17]])
    with torch.no_grad():
        embedded = embed_words(model, ids)
        wanted = stack(model)(input_ids=ids).last_hidden_state
        given = stack(model)(inputs_embeds=embedded).last_hidden_state
    torch.testing.assert_close(given, wanted, rtol=0, atol=0)


def test_a_factor_outside_the_embedding_is_found_wherever_the_family_keeps_it():
    """The table alone is not what such a model makes of ids: the families above would not show a factor of 1."""
    for family, factor in (("pegasus", 32**0.5), ("marian", 32**0.5), ("falcon_h1", 5.0), ("granite", 1.0)):
        model = make(family)
        ids = torch.tensor([3, 8])
        torch.testing.assert_close(embed_words(model, ids), factor * model.get_input_embeddings().weight[ids])


def test_a_model_that_treats_ids_in_a_way_of_its_own_is_refused():
    model = make("pegasus")
    model.get_encoder().embed_scale = 7  # no number of floats, so nothing that is tried
    with pytest.raises(BackboneError, match="PegasusEncoder does not do with embeddings what it does with ids"):
        embed_words(model, torch.tensor([3]))


def test_finding_the_factor_leaves_no_hook_in_the_model():
    model = make("pegasus")
    embed_words(model, torch.tensor([3]))
    assert not any(module._forward_pre_hooks for module in model.modules())
