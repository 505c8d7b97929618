"""A tokenizer with ids beyond the model's embedding table: only texts with such ids are refused."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.backbone.files import check_eos, find_model, read_config, read_tokenizer, short_embedding_table
from pipeline.backbone.host import host_backbone
from pipeline.bank import PromptBank
from pipeline.corpus.encoding import TokenizerSpec, load_tokenizer
from pipeline.corpus.rows import Recipe, RowStatus, tokenise_rows
from pipeline.corpus.tally import tally_table
from pipeline.corpus.task_corpus import _label_ids
from pipeline.corpus.template import parse_template
from pipeline.errors import BackboneError, CorpusError, SettingsError
from pipeline.run.checks import check_run
from pipeline.serving import PromptedModel, load_backbone
from pipeline.serving.requests import Request
from pipeline.settings import parse_settings
from pipeline.tuning.initialise import initial_prompt
from pipeline.tuning.trials import make_trial
from tests.corpora import make_task
from tests.jobs_data import make_project
from tests.serving.prompts import LABELS, new_prompt
from tests.tiny import VOCAB, make_model


@pytest.fixture(params=["llama", "t5"])
def folder(request, tmp_path) -> Path:
    """A model of 42 rows whose tokenizer knows `<beyond>` as id 42."""
    folder = make_model(tmp_path / "m", request.param)
    add_token(folder)
    return folder


def add_token(folder, **special):
    tokenizer = read_tokenizer(find_model(str(folder)))
    tokenizer.add_special_tokens(special) if special else tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(folder)


def opened(folder):
    files = find_model(str(folder))
    return read_config(files), read_tokenizer(files)


def test_only_a_tokenizer_that_is_larger_than_the_table_has_a_limit(folder, tmp_path):
    config, tokenizer = opened(folder)
    assert short_embedding_table(config, tokenizer) == VOCAB == 42 and len(tokenizer) == 43
    whole = make_model(tmp_path / "whole")
    assert short_embedding_table(*opened(whole)) is None
    assert short_embedding_table(*opened(make_model(tmp_path / "padded", vocab_size=64))) is None


def test_rows_with_such_a_token_are_left_out_alone_and_counted(folder):
    config, tokenizer = opened(folder)
    kind = "encoder-decoder" if config.is_encoder_decoder else "decoder-only"
    columns = {"text": ["good film", "good <beyond>", "bad film", "bad"], "label": ["yes", "yes", "<beyond>", "no"]}
    templates = parse_template("{text}", ""), parse_template("{label}", "")
    table = tokenise_rows(
        Recipe(*templates, " ", 9, 9, kind, short_embedding_table(config, tokenizer)), tokenizer, columns, 4
    )
    assert table["status"].to_pylist() == [0, RowStatus.NO_EMBEDDING, RowStatus.NO_EMBEDDING, 0]
    assert table["input_ids"].to_pylist()[1:3] == [[], []] == table["target_ids"].to_pylist()[1:3]
    assert max(max(row) for row in table["input_ids"].to_pylist() if row) < VOCAB
    counts = tally_table(table).rows.summary.counts
    assert (counts["ok"], counts["no_embedding"], sum(counts.values())) == (2, 2, 4)
    good = tokenise_rows(Recipe(*templates, " ", 9, 9, kind), tokenizer, {k: v[:1] for k, v in columns.items()}, 1)
    assert "no_embedding" not in tally_table(good).rows.summary.counts, "other models' counts are as they were"


def test_a_label_with_such_a_token_is_named(folder):
    config, _ = opened(folder)
    kind = "encoder-decoder" if config.is_encoder_decoder else "decoder-only"
    recipe = Recipe(parse_template("{text}", ""), parse_template("{label}", ""), " ", 9, 9, kind, VOCAB)
    load_tokenizer.cache_clear()
    with pytest.raises(CorpusError, match=r"'x': the label 'very <beyond>' has the token '<beyond>' \(id 42\).* 42 "):
        _label_ids("x", ("good", "very <beyond>"), recipe, TokenizerSpec(str(folder), "", kind, VOCAB))


def test_a_text_to_start_from_with_such_a_token_is_named(tmp_path):
    project = make_project(tmp_path)
    add_token(Path(project["model"]["path"]))
    settings = parse_settings(project, ["tasks.film.prompt={init: text, text: 'good <beyond>'}"])
    with pytest.raises(SettingsError, match=r"'film': prompt.text 'good <beyond>' has the token '<beyond>' \(id 42\)"):
        check_run(settings)


def test_initialisation_takes_tokens_that_have_an_embedding(folder):
    config, tokenizer = opened(folder)
    files = find_model(str(folder))
    backbone = host_backbone(files, config, int8=True, dtype=torch.float32, device=torch.device("cpu"), sharded=False)
    for init in ("sampled_vocab", "class_labels"):
        trial = make_trial("a", make_task(prompt={"init": init, "length": 200}), 0, "corpus", "backbone")
        assert initial_prompt(trial, backbone, tokenizer, ("good", "bad"), {}).isfinite().all()


def test_a_request_with_such_a_token_is_refused_alone(folder):
    backbone = load_backbone(str(folder))
    bank = PromptBank.open(folder.parent / "bank", create=True)
    bank.publish([new_prompt(n, 3 + i) for i, n in enumerate(LABELS)], backbone.identity, "test", {}, "latest")
    served, task = PromptedModel(backbone, bank), next(task for task, labels in LABELS.items() if labels)
    for ask in (lambda text: served.generate([text], [task], 3), lambda text: served.classify([text], [task])):
        before = ask("good film")
        with pytest.raises(CorpusError, match=r"row 0 for task '.*' has the token '<beyond>' \(id 42\)"):
            ask("good <beyond>")
        assert ask("good film") == before
    requests = [Request([text], [task], 3) for text in ("good film", "good <beyond>", "bad film")]
    first, bad, last = served.classify_each(requests).of_request
    assert isinstance(bad, CorpusError) and first == served.classify(["good film"], [task])
    assert last == served.classify(["bad film"], [task]), "those in its batch are answered"


def test_a_model_whose_eos_has_no_embedding_is_refused(tmp_path):
    folder = make_model(tmp_path / "m")
    add_token(folder, eos_token="<end>")
    with pytest.raises(BackboneError, match=r"the tokenizer's eos '<end>' is id 42"):
        check_eos("m", *opened(folder))
    with pytest.raises(BackboneError, match="m: the tokenizer's eos"):
        load_backbone(str(folder))


QUANTISED = {
    "GPTQ, 3 bit": {"quant_method": "gptq", "bits": 3},
    "AWQ, 4 bit": {"quant_method": "awq", "bits": 4, "version": "gemv"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "hqq": {"quant_method": "hqq"},
    "of an unnamed kind": {"zero_point": True},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_named_with_what_to_give_instead(kind, tmp_path):
    folder = make_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTISED[kind]}))
    with pytest.raises(BackboneError) as refused:
        read_config(find_model(str(folder)))
    assert f"quantised ({kind}: quantization_config)" in str(refused.value)
    assert "give the model in 16 or 32 bits" in str(refused.value) and "\n" not in str(refused.value)
