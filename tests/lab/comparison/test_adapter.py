"""LoRA has the losses and adapters of a plain PEFT loop over the same rows, and keeps the best on dev."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.host import host_backbone
from pipeline.backbone.loading import build_skeleton
from pipeline.corpus.reader import open_split
from pipeline.errors import SettingsError
from pipeline.lab.comparison import adapter
from pipeline.lab.comparison.adapter import (
    adapter_weights,
    add_adapter,
    load_adapter_weights,
    loss_and_gradients,
    reset_adapter,
    score_alone,
    train_adapter,
)
from pipeline.lab.comparison.derived_settings import training_settings
from pipeline.lab.comparison.tensor_files import load_adapter, save_adapter
from pipeline.settings import LoraSettings
from pipeline.tuning.batches import rows_of_step
from pipeline.tuning.evaluate import eval_request
from pipeline.tuning.optimise import update
from pipeline.tuning.trials import make_trial
from tests.corpora import make_corpus, make_task
from tests.tiny import make_model

LORA = LoraSettings(rank=4, alpha=8, lr=0.05, schedule="constant")


@pytest.fixture(params=["llama", "gpt2", "t5"])
def tuned(request, tmp_path):
    """A model in float with an adapter, its folder, and a trial with its corpus."""
    folder = make_model(tmp_path / "model", request.param, scale=1.0)
    files = find_model(str(folder))
    backbone = host_backbone(
        files, read_config(files), int8=False, dtype=torch.float32, device=torch.device("cpu"), sharded=False
    )
    tokenizer = read_tokenizer(files)
    parameters = add_adapter(backbone.hosted.model, LORA)
    corpus = make_corpus(tmp_path / "corpus", tokenizer, backbone.architecture, "film")
    task = training_settings(make_task(max_steps=8, eval_every=4), LORA, 0.05)
    return backbone, tokenizer, parameters, corpus, make_trial("film", task, 0, corpus.digest, "backbone"), folder


def plain_peft(folder, weights):
    """The same model and adapter as anyone would make them."""
    config = read_config(find_model(str(folder)))
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = get_peft_model(
        auto.from_pretrained(folder).eval(), LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0)
    )
    set_peft_model_state_dict(model, {f"base_model.model.{name}": weight for name, weight in weights.items()})
    return model.eval()


def plain_loss(model, split, rows):
    """The mean over target tokens of a padded batch, by transformers' own loss."""
    pairs = [(split.input_ids(row).tolist(), split.target_ids(row).tolist()) for row in rows]

    def pad(sequences, value):
        longest = max(map(len, sequences))
        return torch.tensor([[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences])

    if model.config.is_encoder_decoder:
        inputs, labels = [x for x, _ in pairs], [y for _, y in pairs]
    else:
        inputs, labels = [x + y for x, y in pairs], [[-100] * len(x) + y for x, y in pairs]
    mask = pad([[1] * len(x) for x in inputs], 0)
    return model(input_ids=pad(inputs, 0), attention_mask=mask, labels=pad(labels, -100)).loss


def test_losses_and_adapters_are_those_of_a_plain_peft_loop(tuned):
    backbone, _, parameters, corpus, trial, folder = tuned
    reset_adapter(backbone.hosted.model, 0)
    train = open_split(corpus.splits["train"])
    reference = plain_peft(folder, adapter_weights(backbone.hosted.model))
    theirs = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in parameters) == sum(p.numel() for p in theirs)
    optimizer, plain = AdamW(parameters, lr=0.05, weight_decay=0.0), AdamW(theirs, lr=0.05, weight_decay=0.0)
    for step in range(8):
        loss = loss_and_gradients(backbone, trial, train, step, token_budget=100)
        update(optimizer, trial.settings.optimizer, step, 8)
        other = plain_loss(reference, train, rows_of_step(trial, train, step))
        plain.zero_grad()
        other.backward()
        plain.step()
        assert loss == pytest.approx(other.item(), rel=1e-4), f"step {step}"
    for name, weight in get_peft_model_state_dict(reference).items():
        own = adapter_weights(backbone.hosted.model)[name.removeprefix("base_model.model.")]
        torch.testing.assert_close(own, weight, rtol=1e-2, atol=1e-3)


def test_a_new_adapter_changes_nothing_and_depends_on_its_seed_alone(tuned):
    backbone, tokenizer, _, corpus, trial, folder = tuned
    request = eval_request(trial.settings, backbone.no_prompt(), open_split(corpus.splits["dev"]), corpus)
    reset_adapter(backbone.hosted.model, 3)
    first, (before,) = adapter_weights(backbone.hosted.model), score_alone(backbone, tokenizer, [request], 300)
    files = find_model(str(folder))
    bare = host_backbone(
        files, read_config(files), int8=False, dtype=torch.float32, device=torch.device("cpu"), sharded=False
    )
    assert before.loss == pytest.approx(score_alone(bare, tokenizer, [request], 300)[0].loss, rel=1e-5)
    reset_adapter(backbone.hosted.model, 4)
    assert any(not torch.equal(weight, first[n]) for n, weight in adapter_weights(backbone.hosted.model).items())
    reset_adapter(backbone.hosted.model, 3)
    assert all(torch.equal(weight, first[name]) for name, weight in adapter_weights(backbone.hosted.model).items())


def test_training_keeps_the_adapter_of_its_best_evaluation_and_the_model_as_it_was(tuned, tmp_path):
    backbone, tokenizer, parameters, corpus, trial, _ = tuned
    frozen = {n: p.clone() for n, p in backbone.hosted.model.named_parameters() if not p.requires_grad}
    trained = train_adapter(backbone, tokenizer, trial, corpus, parameters, 300)
    assert [evaluation.step for evaluation in trained.history] == [0, 4, 8] and len(trained.losses) == 8
    assert trained.failed is None and np.mean(trained.losses[-2:]) < np.mean(trained.losses[:2])
    save_adapter(tmp_path / "adapter.safetensors", trained)
    kept = load_adapter(tmp_path / "adapter.safetensors")
    assert (kept.history, kept.best_at) == (tuple(trained.history), trained.best_at) and kept.peak_bytes > 2**20
    reset_adapter(backbone.hosted.model, 9)
    load_adapter_weights(backbone.hosted.model, kept.weights)
    request = eval_request(trial.settings, backbone.no_prompt(), open_split(corpus.splits["dev"], 12), corpus)
    (score,) = score_alone(backbone, tokenizer, [request], 300)
    assert (score.value, score.loss) == pytest.approx((trained.best.value, trained.best.loss), rel=1e-5)
    for name, parameter in backbone.hosted.model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])


def test_training_that_leaves_the_range_of_numbers_fails_in_one_sentence(tuned, monkeypatch):
    backbone, tokenizer, parameters, corpus, trial, _ = tuned

    def explode(optimizer, *_):
        for parameter in parameters:
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr(adapter, "update", explode)
    trained = train_adapter(backbone, tokenizer, trial, corpus, parameters, 300)
    assert "lower compare.lora.lr" in trained.failed and trained.best.step == 0
    assert all(bool(weight.isfinite().all()) for weight in trained.weights.values())


def test_an_adapter_is_trained_in_float32_also_beside_a_model_in_bfloat16(tmp_path):
    files = find_model(str(make_model(tmp_path / "model", "llama", scale=1.0)))
    backbone = host_backbone(
        files, read_config(files), int8=False, dtype=torch.bfloat16, device=torch.device("cpu"), sharded=False
    )
    parameters = add_adapter(backbone.hosted.model, LORA)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    tokenizer = read_tokenizer(files)
    corpus = make_corpus(tmp_path / "corpus", tokenizer, backbone.architecture, "film")
    task = training_settings(make_task(max_steps=8, eval_every=4), LORA, 0.05)
    trial = make_trial("film", task, 0, corpus.digest, "backbone")
    trained = train_adapter(backbone, tokenizer, trial, corpus, parameters, 300)
    assert np.mean(trained.losses[-2:]) < np.mean(trained.losses[:2])


@pytest.mark.parametrize("targets", [("qproj",), ("q_proj", "vproj")])
def test_layers_that_are_not_there_are_refused_before_anything_is_loaded(targets, tmp_path):
    files = find_model(str(make_model(tmp_path / "model", "llama")))
    skeleton = build_skeleton(read_config(files), int8=False)
    with pytest.raises(
        SettingsError, match=r"^compare\.lora\.targets: .* no layer .proj; name layers such as .*q_proj"
    ):
        add_adapter(skeleton, LoraSettings(targets=targets))
    assert add_adapter(build_skeleton(read_config(files), int8=False), LORA)


def test_training_told_to_stop_leaves_nothing(tuned):
    backbone, tokenizer, parameters, corpus, trial, _ = tuned
    assert train_adapter(backbone, tokenizer, trial, corpus, parameters, 300, lambda: True) is None


def test_an_adapter_s_file_that_is_damaged_counts_as_none(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no adapter")
    assert load_adapter(tmp_path / "broken.safetensors") is None and load_adapter(tmp_path / "missing") is None
