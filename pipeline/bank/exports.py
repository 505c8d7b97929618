"""Prompts as other people's tools read them: PEFT, google-research/prompt-tuning, vLLM. The way back: imports.py.

Nothing is overwritten, and an export appears whole or not at all: its files are written into a temporary folder
beside it, whose name begins with a dot, and are then moved.
Shapes: P prompt tokens, T tokens, H hidden.
"""

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from safetensors.numpy import save

from pipeline.bank.manifest import FIXED_DAY, Template
from pipeline.bank.snapshot import Prompt
from pipeline.errors import BankError, PromptBankError, StorageError

DESCRIPTION = "prompt.json"


def export_peft(prompt: Prompt, folder: str | Path, base_model: str) -> Path:
    """Write a PEFT adapter that `PeftModel.from_pretrained(model, folder)` loads; returns the folder.

    `base_model` is a folder or hub name that PEFT shows its users; nothing is read from it. An
    encoder-decoder prompt stands before the encoder alone, as it was tuned. The README.md beside it says that
    rows must be padded on the right, and shows how.
    Raises: BankError when the folder holds anything already, StorageError.
    """
    files = {
        "adapter_config.json": json.dumps(_peft_config(prompt, base_model), indent=2).encode() + b"\n",
        "adapter_model.safetensors": _safetensors(prompt, "prompt_embeddings"),
        "README.md": _peft_readme(prompt, base_model).encode(),
    }
    return _create_folder(folder, prompt, files)


def export_npy(prompt: Prompt, path: str | Path) -> Path:
    """Write `[P, H]` float32 as google-research/prompt-tuning reads it (`prompts.np_load`); returns the file.

    The description of `NAME.npy` is `NAME.prompt.json` beside it.
    Raises: BankError when one of them is there already or the name does not end in .npy, StorageError.
    """
    place = Path(path).expanduser().resolve()
    if place.suffix != ".npy":
        raise BankError(f"{path}: the name of a NumPy file must end in .npy")
    array = io.BytesIO()
    np.save(array, prompt.array, allow_pickle=False)
    # The array comes last: where it is, its description is too.
    files = {f"{place.stem}.{DESCRIPTION}": _description(prompt), place.name: array.getvalue()}
    linked: list[Path] = []
    with _staged(place, files) as staged:
        try:
            for name in files:
                os.link(staged / name, place.with_name(name))  # fails where a rename would replace
                linked.append(place.with_name(name))
        except BaseException:
            for file in linked:
                file.unlink()
            raise
    return place


def export_vllm(prompt: Prompt, folder: str | Path) -> Path:
    """Write `prompt_embeds.safetensors` and a script that asks vLLM behind the prompt; returns the folder.

    vLLM takes no prompt apart from its text: it wants one tensor `[P + T, H]`, the prompt's rows and then
    the text's input embeddings, which `ask_vllm.py` builds. The script follows vLLM's documented interface
    (engine V1, 0.11 or newer) and was never run with vLLM itself: this project's tests put a stand-in in
    its place and feed the tensor to transformers.
    Raises: BankError for an encoder-decoder prompt, which vLLM does not take, or when the folder holds
    anything already; StorageError.
    """
    if prompt.backbone.architecture != "decoder-only":
        raise BankError(
            f"prompt '{prompt.record.name}' belongs to the {prompt.backbone.architecture} model "
            f"{prompt.backbone.model}, for which vLLM takes no prompt embeddings; export it for PEFT"
        )
    files = {
        "prompt_embeds.safetensors": _safetensors(prompt, "prompt_embeds"),
        "ask_vllm.py": _vllm_script(prompt.backbone.model, prompt.record.template).encode(),
    }
    return _create_folder(folder, prompt, files)


def _vllm_script(model: str, template: Template) -> str:
    constants: dict[str, Any] = {"MODEL": model}
    if template.chat is None:
        constants |= {"TEMPLATE": template.input, "SEPARATOR": template.separator}
        input_ids = TEXT_IDS
    else:
        constants |= {"MESSAGES": json.loads(template.input), "OPTIONS": dict(template.chat.options)}
        constants |= {"LEAD": template.chat.lead, "END": template.chat.end, "SEPARATOR": template.separator}
        constants |= {"CHAT_TEMPLATE": template.chat.template, "FIXED_DAY": FIXED_DAY}
        input_ids = CHAT_IDS
    lines = "\n".join(f"{name} = {value!r}" for name, value in constants.items())
    return ASK_VLLM.replace("CONSTANTS", lines).replace("INPUT_IDS", input_ids.strip())


ASK_VLLM = '''\
"""Ask vLLM behind the soft prompt that lies beside this file: python ask_vllm.py text='a fine film'

One COLUMN=TEXT for each column that the template names. Needs vLLM 0.11 or newer, and transformers.
"""

import argparse
import hashlib
from pathlib import Path
from string import Formatter

import torch
from safetensors.torch import load_file

CONSTANTS


def filled(template, row):
    pieces = Formatter().parse(template)
    return "".join(literal + ("" if column is None else str(row[column])) for literal, column, _, _ in pieces)


INPUT_IDS


def prompt_embeds(row, embedding, tokenizer):
    """[P + T, H]: the prompt's rows, then the input embeddings of the template filled with a row's columns."""
    ids = input_ids(row, tokenizer)
    prompt = load_file(Path(__file__).with_name("prompt_embeds.safetensors"))["prompt_embeds"]
    with torch.no_grad():
        embedded = embedding(torch.tensor(ids, dtype=torch.long))
    return torch.cat([prompt.to(embedded), embedded])


def main():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=MODEL, help="the model that the prompt was tuned on, as vLLM loads it")
    parser.add_argument("columns", nargs="*", metavar="COLUMN=TEXT")
    options = parser.parse_args()
    row = dict(column.split("=", 1) for column in options.columns)
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=False)
    tensor = prompt_embeds(row, model.get_input_embeddings(), tokenizer)
    llm = LLM(model=options.model, enable_prompt_embeds=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=64, **ending(tokenizer))
    (answer,) = llm.generate({"prompt_embeds": tensor}, sampling)
    # The model was tuned to write the separator itself, before its answer.
    print(answer.outputs[0].text.removeprefix(SEPARATOR).strip())


if __name__ == "__main__":
    main()
'''


TEXT_IDS = """
def input_ids(row, tokenizer):
    ids = tokenizer(filled(TEMPLATE, row)).input_ids
    if tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]  # the answer goes on from the text
    return ids


def ending(tokenizer):
    return {}  # the tokenizer's eos
"""

CHAT_IDS = """
def input_ids(row, tokenizer):
    template = tokenizer.get_chat_template()
    if hashlib.sha256(template.encode()).hexdigest() != CHAT_TEMPLATE:
        raise SystemExit("this model has another chat template than the one that the prompt was tuned with")
    if "strftime_now" in template:
        template = FIXED_DAY + template  # the day that the prompt was tuned with, not today
    messages = [{**message, "content": filled(message["content"], row)} for message in MESSAGES]
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False, **OPTIONS
    )
    return tokenizer(text + LEAD, add_special_tokens=False).input_ids


def ending(tokenizer):
    return {"stop_token_ids": [tokenizer.convert_tokens_to_ids(END)]}
"""


def _peft_config(prompt: Prompt, base_model: str) -> dict[str, Any]:
    """The fields that PEFT needs to load a prompt; it fills in what depends on the model alone."""
    encoder_decoder = prompt.backbone.architecture == "encoder-decoder"
    return {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_attention_heads": None,
        "num_layers": None,
        "num_transformer_submodules": 1,  # PEFT's own choice for T5 is 2: a prompt before the decoder as well
        "num_virtual_tokens": prompt.array.shape[0],
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",  # "TEXT" would have PEFT ask for a tokenizer
        "task_type": "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM",
        "token_dim": prompt.array.shape[1],
    }


def _peft_readme(prompt: Prompt, base_model: str) -> str:
    rows = PEFT_ROWS if prompt.backbone.architecture == "decoder-only" else PEFT_ENCODER_ROWS
    return PEFT_README.format(
        name=prompt.record.name,
        version=prompt.version,
        length=len(prompt.array),
        model=base_model,
        input=json.dumps(prompt.record.template.input, ensure_ascii=False),
        rows=rows.strip(),
    )


PEFT_README = """\
# {name}

A soft prompt of {length} vectors for {model}, from version {version} of a prompt bank. `prompt.json` holds its
template, labels and metrics. A row must be written as the template says:

```json
{input}
```

## Pad on the right

PEFT answers otherwise in a batch that is padded on the left. The padding then stands between the prompt and the text,
and PEFT drops `position_ids`, so that every word behind it has another position. On the right, padding changes nothing:

```python
{rows}
```
"""

PEFT_ROWS = """
tokenizer.padding_side = "right"
batch = tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits  # [B, P + T, V]: the prompt's positions come first
last = logits.shape[1] - batch.attention_mask.shape[1] + batch.attention_mask.sum(1) - 1
next_token = logits[torch.arange(len(texts)), last]  # [B, V]

# An answer cannot go on behind padding, so rows are generated one by one.
rows = [tokenizer(text, return_tensors="pt") for text in texts]
answers = [model.generate(**row, do_sample=False, max_new_tokens=64)[0, row.input_ids.shape[1] :] for row in rows]
"""

PEFT_ENCODER_ROWS = """
tokenizer.padding_side = "right"
batch = tokenizer(texts, padding=True, return_tensors="pt")
answers = model.generate(**batch, do_sample=False, max_new_tokens=64)
"""


def _description(prompt: Prompt) -> bytes:
    """What a user of the array must know: a prompt works only with the template that it was tuned with."""
    record, backbone = prompt.record, prompt.backbone
    fields = {
        "name": record.name,
        "version": prompt.version,
        "task": record.task,
        "shape": prompt.array.shape,
        "template": record.template.model_dump(exclude_none=True),
        "labels": record.labels,
        **({"label_score": record.label_score} if record.label_score != "sum" else {}),
        **({"label_offsets": record.label_offsets} if record.label_offsets is not None else {}),
        "metric": record.metric,
        "metrics": record.metrics.model_dump(),
        "backbone": backbone.model_dump(
            include={"fingerprint", "model", "quantization", "architecture", "hidden_size"},
        ),
    }
    return json.dumps(fields, indent=2, ensure_ascii=False).encode() + b"\n"


def _safetensors(prompt: Prompt, key: str) -> bytes:
    return save({key: np.ascontiguousarray(prompt.array)}, metadata={"format": "pt"})


def _create_folder(folder: str | Path, prompt: Prompt, files: Mapping[str, bytes]) -> Path:
    place = Path(folder).expanduser().resolve()
    with _staged(place, {**files, DESCRIPTION: _description(prompt)}) as staged:
        os.rename(staged, place)  # replaces an empty folder, and nothing else
    return place


@contextmanager
def _staged(place: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary folder beside `place` that holds the files; it is removed with all that was not moved out of it."""
    staged = place.parent / f".{uuid4().hex}.tmp"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
        for name, data in files.items():
            with (staged / name).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        yield staged
    except OSError as error:
        raise _refusal(place, error) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _refusal(place: Path, error: OSError) -> PromptBankError:
    match error.errno:
        case errno.EEXIST | errno.ENOTEMPTY | errno.ENOTDIR:
            taken = error.filename2 or error.filename
            return BankError(f"{taken} is there already, and nothing is overwritten: remove it or name another place")
        case errno.ENOSPC | errno.EDQUOT:
            why = "the disk is full; free some space and export again"
        case errno.EACCES | errno.EROFS | errno.EPERM:
            why = "permission denied; let this user write there, or name another place"
        case _:
            why = error.strerror or str(error)
    return StorageError(f"cannot write {place}: {why}")
