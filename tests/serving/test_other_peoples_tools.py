"""Exported prompts in the tools that they are made for, and prompts that those tools have made.

PEFT is the real one. What is sent to vLLM and SGLang is held against transformers here; the real vLLM is asked in
tests/vllm, and the real llama.cpp in tests/llama_cpp, each from an environment of its own.
"""

import copy
import importlib.util
import json
import re
import socket
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSeq2SeqLM,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from pipeline.backbone import prompted
from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.fingerprint import identify
from pipeline.backbone.host import Backbone, host_backbone
from pipeline.backbone.loading import build_skeleton
from pipeline.backbone.weights import open_weights
from pipeline.bank import BackboneId, Metrics, NewPrompt, PromptBank, Template
from pipeline.bank.exports import export_peft, export_sglang, export_vllm
from pipeline.bank.imports import import_peft, imported_prompt
from pipeline.corpus.encoding import encode_inputs, encode_targets
from pipeline.errors import BankError
from tests.tiny import VOCAB, make_model, make_tokenizer

TEXT = "the film was not very good"
LABELS = ("good", "bad")
TEMPLATE = Template(input="{text} it is", target="{label}", separator=" ")
EVERY_TOKEN = [np.array([token]) for token in range(VOCAB)]


def random_prompt() -> NewPrompt:
    return NewPrompt(
        name="film",
        array=np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32),
        task="film",
        template=TEMPLATE,
        labels=LABELS,
        metric="accuracy",
        metrics=Metrics(),
        initialisation="random",
        length=5,
        steps=0,
        seed=0,
        corpus_digest="0" * 64,
        settings_digest="0" * 64,
    )


@dataclass(frozen=True)
class Served:
    backbone: Backbone
    tokenizer: Any
    identity: BackboneId
    bank: PromptBank


def serve(folder, family):
    """A tiny model in full precision, and a bank with one prompt of it."""
    scale = 2.0 if family == "t5" else 3.0
    files = find_model(str(make_model(folder / "model", family, scale=scale)))
    config, tokenizer = read_config(files), read_tokenizer(files)
    backbone = host_backbone(files, config, int8=False, dtype=torch.float32, device=torch.device("cpu"), sharded=False)
    source = open_weights(files, build_skeleton(config, int8=False))
    identity = identify(files.name, config, tokenizer, source, "full")
    bank = PromptBank.open(folder / "bank", create=True)
    bank.publish([random_prompt()], identity, "test", {}, "latest")
    return Served(backbone, tokenizer, identity, bank)


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def served(request, tmp_path_factory):
    return serve(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return serve(tmp_path_factory.mktemp("llama"), "llama")


def load_plainly(served):
    auto = AutoModelForSeq2SeqLM if served.backbone.architecture == "encoder-decoder" else AutoModelForCausalLM
    return auto.from_pretrained(served.identity.model).eval()


def input_ids(served, text=TEXT + " it is"):
    return torch.tensor(encode_inputs(served.tokenizer, served.backbone.architecture, [text]))


def rows_of(served, prompt, text):
    return prompted.Rows([torch.tensor(prompt)], [0], list(input_ids(served, text).numpy()))


def our_answer(served, prompt, max_new_tokens, text=TEXT + " it is"):
    rows = rows_of(served, prompt, text)
    (ids,) = served.backbone.run(prompted.greedy_decode, rows, max_new_tokens, served.tokenizer.eos_token_id)
    return served.tokenizer.decode(ids, skip_special_tokens=True).strip()


def ours(served, prompt, text=TEXT + " it is"):
    """log P of every token of the vocabulary as the next one behind `[P; X]`: `[V]`."""
    rows = rows_of(served, prompt, text)
    (scores,) = served.backbone.run(prompted.label_log_likelihoods, rows, [EVERY_TOKEN])
    return torch.from_numpy(scores)


def theirs(model, **inputs):
    """The same of a transformers or PEFT model."""
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.no_grad():
        return model(**inputs).logits[0, -1].log_softmax(-1)


def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_peft_loads_an_export_without_a_look_up_and_computes_what_we_compute(served, tmp_path, monkeypatch):
    prompt = served.bank.load("film")
    folder = export_peft(prompt, tmp_path / "peft", "nobody/no-such-model")
    base = load_plainly(served)
    no_network(monkeypatch)
    adapted = PeftModel.from_pretrained(base, folder).eval()
    seq2seq = served.backbone.architecture == "encoder-decoder"
    assert type(adapted) is (PeftModelForSeq2SeqLM if seq2seq else PeftModelForCausalLM)
    embedded = base.get_input_embeddings()(input_ids(served))
    joined = torch.cat([torch.tensor(prompt.array)[None], embedded], dim=1)
    by_peft = theirs(adapted, input_ids=input_ids(served))
    torch.testing.assert_close(by_peft, theirs(base, inputs_embeds=joined), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_peft, ours(served, prompt.array), rtol=1e-4, atol=1e-4)
    without = theirs(base, input_ids=input_ids(served))
    assert (by_peft - without).abs().max() > 0.01, "the prompt makes no difference, so nothing was compared"


def test_peft_generates_what_we_generate(served, tmp_path):
    prompt = served.bank.load("film")
    folder = export_peft(prompt, tmp_path / "peft", "any")
    adapted = PeftModel.from_pretrained(load_plainly(served), folder).eval()
    ids = input_ids(served)
    out = adapted.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    answer = out[0] if adapted.config.is_encoder_decoder else out[0, ids.shape[1] :]
    text = served.tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert text and text == our_answer(served, prompt.array, 6)


TEXTS = ("good it is", TEXT + " it is", "it was a plain story it is")


def run_readme(folder, served, adapted):
    """Runs the Python block of an export's README.md as it stands; what it leaves behind."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    found = {"torch": torch, "tokenizer": copy.deepcopy(served.tokenizer), "model": adapted, "texts": list(TEXTS)}
    exec(code, found)
    return found


def test_the_readme_of_a_peft_export_pads_so_that_rows_of_a_batch_get_what_they_get_alone(served, tmp_path):
    prompt = served.bank.load("film")
    folder = export_peft(prompt, tmp_path / "peft", "any")
    adapted = PeftModel.from_pretrained(load_plainly(served), folder).eval()
    found = run_readme(folder, served, adapted)
    alone = [our_answer(served, prompt.array, 64, text) for text in TEXTS]
    answers = [served.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found["answers"]]
    assert answers == alone
    if adapted.config.is_encoder_decoder:
        return
    for row, text in enumerate(TEXTS):
        own = ours(served, prompt.array, text)
        torch.testing.assert_close(found["next_token"][row].log_softmax(-1), own, rtol=1e-4, atol=1e-4)
    # What the README warns of, with the real PEFT: when this fails, the warning can go.
    tokenizer = copy.deepcopy(served.tokenizer)
    tokenizer.padding_side = "left"
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        padded = adapted(**batch).logits[0, -1].log_softmax(-1)
    assert (padded - ours(served, prompt.array, TEXTS[0])).abs().max() > 0.005


def tuned_by_peft(served, folder, config_type=PromptTuningConfig, **config):
    """An adapter of the real PEFT, saved by its own code."""
    seq2seq = served.backbone.architecture == "encoder-decoder"
    task = TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM
    torch.manual_seed(1)
    adapted = get_peft_model(load_plainly(served), config_type(task_type=task, num_virtual_tokens=3, **config)).eval()
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize(
    ("config_type", "config"),
    [
        (PromptTuningConfig, {}),
        (PromptEncoderConfig, {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 16}),
        (PromptEncoderConfig, {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16}),
    ],
    ids=["prompt tuning", "P-tuning, MLP", "P-tuning, LSTM"],
)
def test_an_adapter_saved_by_peft_is_imported_and_serves_as_it_did_there(served, tmp_path, config_type, config):
    adapted = tuned_by_peft(served, tmp_path / "peft", config_type, num_transformer_submodules=1, **config)
    array = import_peft(tmp_path / "peft")
    assert array.tobytes() == adapted.get_prompt_embedding_to_save("default").numpy().tobytes()
    new = imported_prompt(
        "theirs", array, task="film", template=TEMPLATE, labels=LABELS, metric="accuracy", source="PEFT"
    )
    served.bank.publish([new], served.identity, "import", {}, "latest")
    prompt = served.bank.load("theirs", backbone=served.identity)
    by_peft = theirs(adapted, input_ids=input_ids(served))
    torch.testing.assert_close(ours(served, prompt.array), by_peft, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config_type", [PromptTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("served", ["t5"], indirect=True)
def test_of_an_adapter_with_both_halves_the_encoders_is_imported_on_request(served, tmp_path, config_type):
    config = {"encoder_hidden_size": 16} if config_type is PromptEncoderConfig else {}
    adapted = tuned_by_peft(served, tmp_path / "peft", config_type, **config)  # two halves are PEFT's own default
    with pytest.raises(BankError, match="ask for it with half='encoder'"):
        import_peft(tmp_path / "peft")
    both = adapted.get_prompt_embedding_to_save("default").numpy()
    assert len(both) == 6
    np.testing.assert_array_equal(import_peft(tmp_path / "peft", half="encoder"), both[:3])


def test_another_adapter_saved_by_peft_is_refused_by_name(llama, tmp_path):
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"])
    get_peft_model(load_plainly(llama), config).save_pretrained(tmp_path / "lora")
    with pytest.raises(BankError, match="an adapter of the type LORA cannot be imported"):
        import_peft(tmp_path / "lora")


def load_script(folder, name="ask_vllm"):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("served", ["llama", "gpt2"], indirect=True)
def test_the_request_for_vllm_gives_transformers_the_logits_that_we_compute(served, tmp_path):
    """What the script hands to vLLM: a place takes its vector, or the embedding of its id. With vLLM: tests/vllm."""
    prompt = served.bank.load("film")
    script = load_script(export_vllm(prompt, tmp_path / "vllm"))
    model = load_plainly(served)
    ids = script.input_ids({"text": TEXT}, served.tokenizer)
    asked = script.request(ids, torch.float32)
    assert ids == input_ids(served)[0].tolist() and asked["cache_salt"] == prompt.record.digest
    words = model.get_input_embeddings()(torch.tensor(asked["prompt_token_ids"]))
    joined = torch.where(torch.tensor(asked["prompt_is_token_ids"])[:, None], words, asked["prompt_embeds"])
    by_script = theirs(model, inputs_embeds=joined[None])
    torch.testing.assert_close(by_script, ours(served, prompt.array), rtol=1e-4, atol=1e-4)
    assert script.request(ids, torch.bfloat16)["prompt_embeds"].dtype == torch.bfloat16


def test_the_script_for_vllm_leaves_out_an_eos_that_the_tokenizer_adds(llama, tmp_path):
    script = load_script(export_vllm(llama.bank.load("film"), tmp_path / "vllm"))
    plain, ending = (script.input_ids({"text": TEXT}, make_tokenizer(eos)) for eos in (False, True))
    assert ending == plain


@pytest.mark.parametrize("separator", [" ", "", ": ", "\n"])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_script_for_vllm_gives_labels_the_ids_that_they_were_tuned_with(llama, tmp_path, separator, normalised):
    """Also where a tokenizer puts a mark before every text, as Llama 2's does."""
    tokenizer = copy.deepcopy(llama.tokenizer)
    if normalised:
        pieces = [(character, -1.0) for character in "▁abdegimnoprstuvyfl:\n"]
        backend = Tokenizer(models.Unigram([("<unk>", -9.0), ("</s>", 0.0), *pieces, ("▁good", -1.5)], unk_id=0))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    prompt = llama.bank.load("film")
    template = prompt.record.template.model_copy(update={"separator": separator})
    record = prompt.record.model_copy(update={"template": template})
    script = load_script(export_vllm(replace(prompt, record=record), tmp_path / "vllm"))
    for label, ids in zip(LABELS, encode_targets(tokenizer, "decoder-only", separator, LABELS), strict=True):
        assert script.target_ids(separator + label, tokenizer) == ids[:-1]


@pytest.mark.parametrize("served", ["llama", "gpt2"], indirect=True)
def test_the_request_for_sglang_gives_transformers_the_logits_that_we_compute(served, tmp_path):
    prompt = served.bank.load("film")
    script = load_script(export_sglang(prompt, tmp_path / "sglang"), "ask_sglang")
    body = json.loads(json.dumps(script.request({"text": TEXT}, served.identity.model, served.tokenizer, 6)))
    assert set(body) == {"input_embeds", "sampling_params"}
    by_script = theirs(load_plainly(served), inputs_embeds=torch.tensor(body["input_embeds"])[None])
    torch.testing.assert_close(by_script, ours(served, prompt.array), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([], "given: none"),
        (["left=a"], "given: left"),
        (["lift=a", "right=b"], "given: lift, right"),
        (["left=a", "right"], "'right' is no COLUMN=TEXT"),
        (["good film"], "'good film' is no COLUMN=TEXT"),
    ],
)
@pytest.mark.parametrize(("export", "name"), [(export_vllm, "ask_vllm"), (export_sglang, "ask_sglang")])
def test_a_script_without_a_column_ends_with_one_sentence(
    llama, tmp_path, monkeypatch, capsys, export, name, given, found
):
    """Before it loads anything. Of llama.cpp's script: tests/llama_cpp."""
    prompt = llama.bank.load("film")
    template = prompt.record.template.model_copy(update={"input": "{left} is {right}, {left}!"})
    record = prompt.record.model_copy(update={"template": template})
    script = load_script(export(replace(prompt, record=record), tmp_path / "exported"), name)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--model", "no/such/model", *given])
    with pytest.raises(SystemExit) as ended:
        script.main()
    told = f"error: give every column that this prompt needs, left=TEXT right=TEXT ({found})\n"
    assert ended.value.code == 2 and capsys.readouterr() == ("", told)


def test_the_scripts_row_may_have_signs_of_equality_and_columns_that_are_not_needed(llama, tmp_path):
    script = load_script(export_vllm(llama.bank.load("film"), tmp_path / "vllm"))
    assert script.given_row(["text=a=b=", "more=x"], None) == {"text": "a=b=", "more": "x"}
