"""Prompts that other people's tools have made, for this bank: PEFT adapters and NumPy files.

Nothing is unpickled, and no file above 1 GiB is read.
Shapes: P prompt tokens, H hidden.
"""

import hashlib
import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, deserialize

from pipeline.bank.manifest import LabelScore, Metrics, Template, check_name
from pipeline.bank.publish import NewPrompt
from pipeline.errors import BankError, StorageError

MAX_FILE_BYTES = 2**30
MAX_CONFIG_BYTES = 2**20
PEFT_KEY = "prompt_embeddings"
_PEFT_KINDS = ("PROMPT_TUNING", "P_TUNING")
"""P-tuning's encoder is thrown away when PEFT saves it: what is stored is what it gives, a prompt as any other."""
_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "V2"}


def import_peft(folder: str | Path, half: Literal["encoder"] | None = None) -> np.ndarray:
    """The prompt `[P, H]` float32 of a PEFT adapter of prompt tuning or P-tuning that was saved as safetensors.

    T5 trained by PEFT has a prompt before the encoder and another before the decoder; models here take
    the encoder's only, so that half must be asked for, and the task checked again with it.
    Raises: BankError for another kind of adapter, both halves, or a file that is missing, damaged or too
    large; StorageError.
    """
    place = Path(folder).expanduser()
    tokens, halves = _read_peft_config(place / "adapter_config.json")
    if halves == 2 and half is None:
        raise BankError(
            f"{place} holds a prompt for the encoder and one for the decoder (num_transformer_submodules=2), of which "
            "only the encoder's can be imported: ask for it with half='encoder'"
        )
    weights = place / "adapter_model.safetensors"
    if not weights.exists() and (place / "adapter_model.bin").exists():
        raise BankError(f"{place} has only pickled weights (adapter_model.bin): save the adapter again as safetensors")
    array = _as_prompt(_read_peft_tensor(weights), str(weights))
    if len(array) != tokens * halves:
        raise BankError(
            f"{weights} is refused: it holds {len(array)} rows where adapter_config.json says {tokens} × {halves}"
        )
    return array[:tokens].copy()


def import_npy(path: str | Path) -> np.ndarray:
    """The prompt `[P, H]` float32 of a NumPy file with floats of 64, 32 or 16 bits (bfloat16 too).

    Raises: BankError when it is missing, damaged, too large, of another shape or type, or not finite;
    StorageError.
    """
    place = Path(path).expanduser()
    _check_file(place, MAX_FILE_BYTES)
    try:
        # A mapped file cannot claim to be larger than it is.
        mapped = np.lib.format.open_memmap(place, mode="r")
    except OSError as error:
        raise StorageError(f"cannot read {place}: {error.strerror or error}") from error
    except Exception as error:  # NumPy parses the header as Python, which may raise anything
        reason = str(error).partition("\n")[0].rstrip(".")
        raise BankError(f"{place} is damaged or not a NumPy file (.npy) of numbers: {reason}") from error
    return _as_prompt(mapped, str(place))


def imported_prompt(
    name: str,
    array: np.ndarray,
    *,
    task: str,
    template: Template,
    labels: Sequence[str] | None,
    metric: str,
    source: str,
    label_score: LabelScore = "sum",
    label_offsets: Sequence[float] | None = None,
) -> NewPrompt:
    """An imported prompt `[P, H]`, ready for `PromptBank.publish`; `template` is the one that it was tuned with.

    `label_score` and `label_offsets` (nats, one a label) are what its labels were compared by, as `export` tells them.

    Its metrics are unknown, steps and seed 0. `corpus_digest` is the SHA-256 of nothing, since the corpus
    is unknown, and `settings_digest` that of the array's bytes, which are all that made it.
    Raises: BankError for a bad name, shape, type or value.
    """
    check_name("prompt", name)
    prompt = _as_prompt(array, f"prompt '{name}'")
    return NewPrompt(
        name=name,
        array=prompt,
        task=task,
        template=template,
        labels=labels,
        metric=metric,
        metrics=Metrics(),
        label_score=label_score,
        label_offsets=label_offsets,
        initialisation=f"imported from {source}",
        length=len(prompt),
        steps=0,
        seed=0,
        corpus_digest=hashlib.sha256().hexdigest(),
        settings_digest=hashlib.sha256(prompt.tobytes()).hexdigest(),
    )


def _read_peft_config(file: Path) -> tuple[int, int]:
    """Number of virtual tokens, and how many halves of the model (encoder, decoder) get them."""
    data = _read(file, MAX_CONFIG_BYTES)
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BankError(f"{file} is damaged: not valid JSON ({error})") from error
    fields: dict[str, Any] = config if isinstance(config, dict) else {}
    kind = fields.get("peft_type")
    if kind not in _PEFT_KINDS:
        known = " or ".join(_PEFT_KINDS)
        raise BankError(f"{file}: an adapter of the type {kind} cannot be imported, only one of {known}")
    tokens, halves = fields.get("num_virtual_tokens"), fields.get("num_transformer_submodules")
    if halves is None:  # PEFT's own rule
        halves = 2 if fields.get("task_type") == "SEQ_2_SEQ_LM" else 1
    if type(tokens) is not int or tokens < 1 or halves not in (1, 2):
        raise BankError(
            f"{file} is refused: num_virtual_tokens {tokens!r} must be a number above 0, and "
            f"num_transformer_submodules {halves!r} 1 or 2"
        )
    return tokens, halves


def _read_peft_tensor(file: Path) -> np.ndarray:
    data = _read(file, MAX_FILE_BYTES)
    try:
        tensors = dict(deserialize(data))
    except SafetensorError as error:
        raise BankError(f"{file} is damaged: not a valid safetensors file ({error})") from error
    if set(tensors) != {PEFT_KEY}:
        # More tensors would be layers tuned together with the prompt, which does not work without them.
        raise BankError(f"{file} is refused: it must hold the one tensor '{PEFT_KEY}' and holds {sorted(tensors)[:3]}")
    tensor = tensors[PEFT_KEY]
    if tensor["dtype"] not in _SAFETENSORS:
        raise BankError(
            f"{file} is refused: its numbers are {tensor['dtype']} where floats of 16 to 64 bits can be read"
        )
    return np.frombuffer(tensor["data"], dtype=_SAFETENSORS[tensor["dtype"]]).reshape(tensor["shape"])


def _as_prompt(array: np.ndarray, where: str) -> np.ndarray:
    """A copy as float32 in C order."""
    if array.ndim != 2 or 0 in array.shape:
        raise BankError(f"{where} is refused: its shape is {list(array.shape)} where a prompt's is [P, H]")
    if array.dtype == np.dtype("V2"):  # bfloat16, which NumPy does not know: the upper half of a float32
        floats = (array.view("<u2").astype(np.uint32, order="C") << 16).view(np.float32)
    elif array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        with np.errstate(over="ignore"):
            floats = array.astype(np.float32, order="C", subok=False)
    else:
        raise BankError(f"{where} is refused: its numbers are {array.dtype} where floats of 16 to 64 bits can be read")
    if not np.isfinite(floats).all():
        raise BankError(f"{where} is refused: it holds values that are not finite in float32 (NaN or infinite)")
    return floats


def _read(file: Path, limit: int) -> bytes:
    _check_file(file, limit)
    try:
        return file.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}") from error


def _check_file(file: Path, limit: int) -> None:
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BankError(f"{file} is missing; fix the path") from error
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BankError(f"{file} is refused: it is not a file")
    if status.st_size > limit:
        raise BankError(f"{file} is refused: {status.st_size:,} bytes, above the limit of {limit:,}")
