"""Prompts as others read them: PEFT, google-research/prompt-tuning, vLLM, llama.cpp, SGLang. The way back: imports.py.

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

from pipeline.bank.export_scripts import llama_cpp_script, peft_readme, sglang_script, vllm_script
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
        "README.md": peft_readme(prompt, base_model),
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
    # The array comes last: where it is, its description is too.
    files = {f"{place.stem}.{DESCRIPTION}": _description(prompt), place.name: _npy(prompt)}
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


def export_vllm(prompt: Prompt, folder: str | Path, model: str | None = None) -> Path:
    """Write `prompt_embeds.safetensors` and `ask_vllm.py`, which asks vLLM behind the prompt; returns the folder.

    `model` is the folder or hub name of the model in safetensors, for the script's option `--model`; without it the
    option must be given. The text goes to vLLM as token ids, so that no second model is loaded to embed it.
    Raises: BankError for an encoder-decoder prompt, which vLLM does not take, or when the folder holds
    anything already; StorageError.
    """
    _check_decoder_only(prompt, "vLLM takes no prompt embeddings")
    files = {
        "prompt_embeds.safetensors": _safetensors(prompt, "prompt_embeds"),
        "ask_vllm.py": vllm_script(model, prompt.record),
    }
    return _create_folder(folder, prompt, files)


def export_llama_cpp(prompt: Prompt, folder: str | Path, model: str | None = None) -> Path:
    """Write `soft_prompt.npy` and `ask_llama_cpp.py`, which asks llama.cpp behind the prompt; returns the folder.

    `model` is the GGUF file, for the script's option `--model`; without it the option must be given.
    Raises: BankError for an encoder-decoder prompt, for one that was tuned on a chat, or when the folder holds anything
    already; StorageError.
    """
    _check_decoder_only(prompt, "llama.cpp takes no vectors before an encoder's text")
    _check_text(prompt, "llama.cpp's script")
    files = {"soft_prompt.npy": _npy(prompt), "ask_llama_cpp.py": llama_cpp_script(model, prompt.record)}
    return _create_folder(folder, prompt, files)


def export_sglang(prompt: Prompt, folder: str | Path, model: str | None = None) -> Path:
    """Write `soft_prompt.npy` and `ask_sglang.py`, which sends rows to SGLang's `/generate`; returns the folder.

    SGLang takes a whole row as vectors, so the script reads the model's table of embeddings from its safetensors.
    `model` is the model's folder, for the script's option `--model`; without it the option must be given.
    Raises: as `export_llama_cpp`.
    """
    _check_decoder_only(prompt, "SGLang takes no vectors before an encoder's text")
    _check_text(prompt, "SGLang's script")
    files = {"soft_prompt.npy": _npy(prompt), "ask_sglang.py": sglang_script(model, prompt.record)}
    return _create_folder(folder, prompt, files)


def _check_decoder_only(prompt: Prompt, why: str) -> None:
    if prompt.backbone.architecture != "decoder-only":
        raise BankError(
            f"prompt '{prompt.record.name}' belongs to the {prompt.backbone.architecture} model "
            f"{prompt.backbone.model}, for which {why}; export it for PEFT"
        )


def _check_text(prompt: Prompt, who: str) -> None:
    if prompt.record.template.chat is not None:
        raise BankError(
            f"prompt '{prompt.record.name}' was tuned on a chat, which {who} does not write; export it for vLLM"
        )


def _npy(prompt: Prompt) -> bytes:
    array = io.BytesIO()
    np.save(array, prompt.array, allow_pickle=False)
    return array.getvalue()


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
