"""The manifest of one version: what it holds, how it is written, and its JSON Schema. See FORMAT.md."""

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.bank.sealed import Signature, canonical, seal
from pipeline.errors import UnknownNameError

MAX_MANIFEST_BYTES = 256 * 2**20
PROMPTS_OPEN, PROMPTS_CLOSE = b',"prompts":{\n', b"\n}}\n"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
UtcTime = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
LabelScore = Literal["sum", "mean"]
Status = Literal["tuned", "carried_forward", "kept", "failed"]
NOT_LEARNED = "not_learned"


class StoredModel(BaseModel):
    # Unknown fields are ignored: `format` is raised only when old readers would misread a file.
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class BackboneId(StoredModel):
    """The frozen model that a bank's prompts belong to."""

    fingerprint: str
    """Equal exactly when the four parts below are equal."""
    config: str
    tokenizer: str
    weights: str
    quantization: str
    model: str
    """For people; not part of the fingerprint."""
    architecture: Literal["decoder-only", "encoder-decoder"]
    hidden_size: int = Field(ge=1)

    def differing_parts(self, other: "BackboneId") -> tuple[str, ...]:
        """Names of the parts that make another fingerprint; empty when the fingerprints are equal."""
        if self.fingerprint == other.fingerprint:
            return ()
        parts = ("config", "tokenizer", "weights", "quantization")
        return tuple(part for part in parts if getattr(self, part) != getattr(other, part)) or ("fingerprint",)


# A chat template that writes today's date writes this one instead, the one that Llama 3's own falls back on. A prompt
# would otherwise be tuned behind another input than it is served behind.
_DAY = {
    **{"%Y": "2024", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri", "%y": "24"},
    **{"%F": "2024-07-26", "%H": "00", "%M": "00", "%S": "00"},
}
FIXED_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in _DAY.items())
    + " }}{%- endmacro %}\n"  # the line break is trimmed, and the template begins on a line of its own
)
"""Jinja that stands before a chat template in which `strftime_now` occurs."""


class ChatForm(StoredModel):
    """How a chat template made a prompt's input of messages."""

    template: Digest
    """SHA-256 of the chat template's text; with another one the prompt is not answered."""
    options: Mapping[str, Any]
    """What the template was given besides the messages."""
    lead: str
    """What stood between the template's generation prompt and the answer; empty for most models."""
    end: str
    """The token that ended every target."""


class Template(StoredModel):
    """How the prompt's input and target were written while it was tuned."""

    input: str
    """A template; of a chat its messages as JSON, a list of `{"role": …, "content": <template>}`."""
    target: str
    separator: str
    chat: ChatForm | None = None
    """Written only where the input was a chat."""


class Metrics(StoredModel):
    """Figures of the prompt on its splits; None where it was not measured or was not finite."""

    dev_before: float | None = None
    dev_after: float | None = None
    test: float | None = None
    dev_loss_before: float | None = None
    dev_loss_after: float | None = None
    dev_constant: float | None = None
    """Of always giving the train split's most frequent target, on the rows of `dev_after`; for `f1` of a guess, where
    that has more."""
    test_constant: float | None = None

    @field_validator("*")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None  # JSON has no NaN


class TableState(StoredModel):
    """The state of a table, or of a repository of the hub, that rows were read from."""

    address: str
    """Without a version."""
    version: str
    """A version, a snapshot's id or a commit."""
    table: str | None = None
    """The table's own id, where it has one: another one means that the table was made anew."""
    time: str | None = None
    """When the version was written, where the table tells."""

    @property
    def written(self) -> str:
        """As an address of the settings."""
        return f"{self.address}@{self.version}"


class PromptRecord(StoredModel):
    """What a manifest tells about one prompt. `digest`, `shape` and `dtype` are None when it has no blob."""

    name: Name
    status: Status
    reason: str | None
    """Why it was kept or has failed, or why it has not learned."""
    digest: Digest | None
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None
    """[P, H]"""
    dtype: Literal["float32"] | None
    tuned_in: int | None = Field(ge=1)
    """The version that first held this tuning of the prompt, and whose run made it."""
    task: str
    template: Template
    labels: tuple[str, ...] | None
    metric: str
    metrics: Metrics
    metrics_previous: Metrics | None
    """The metrics of this name in the parent version."""
    initialisation: str
    length: int = Field(ge=1)
    steps: int = Field(ge=0)
    seed: int
    corpus_digest: str
    settings_digest: str
    inputs_digest: str | None = None
    """Of all that the last run with this task tuned it from, but for the prompt that it started from: corpus,
    templates and settings. Equal, and there is nothing to tune again. Of a prompt that was kept because the new one was
    worse, what that new one was tuned from."""
    learned: bool | None = None
    """Whether the prompt was better on dev than its start and than an answer that never looks at the row; None where
    nobody judged. Of a kept or carried prompt it tells about the blob."""
    tuned_on: BackboneId | None = None
    """The backbone that the blob was tuned on, where a statement alone says that it is the version's; else None.
    Written only where there is one."""
    rows_run: Literal["packed", "shared", "padded"] | None = None
    """How the model's rows ran while the prompt was tuned, which was found out by proof (docs/models.md). Written only
    where it is known."""
    label_score: LabelScore = "sum"
    """What labels were compared by: their tokens' log-likelihoods summed, or averaged. Written only where averaged."""
    label_offsets: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None = None
    """Nats that are taken off each label's score, in the order of `labels`. Written only where there are any."""
    tables: Mapping[str, tuple[TableState, ...]] | None = None
    """By split, the versions of the tables that the prompt was tuned and measured on. Written only where its corpus is
    in tables."""

    @property
    def state(self) -> str:
        """The status, for people, and of a prompt that has not learned that too."""
        if self.learned is not False or self.digest is None:
            return self.status
        return NOT_LEARNED if self.status == "tuned" else f"{self.status}, {NOT_LEARNED}"

    @model_validator(mode="after")
    def _consistent(self) -> "PromptRecord":
        without_blob = self.status == "failed"
        if {self.digest is None, self.shape is None, self.dtype is None, self.tuned_in is None} != {without_blob}:
            raise ValueError(f"status '{self.status}' contradicts digest, shape, dtype or tuned_in")
        if self.shape is not None and self.shape[0] != self.length:
            raise ValueError(f"length {self.length} contradicts shape {list(self.shape)}")
        if self.label_offsets is not None and len(self.label_offsets) != len(self.labels or ()):
            raise ValueError(f"{len(self.label_offsets)} label offsets contradict {len(self.labels or ())} labels")
        if self.status in ("kept", "failed") and not self.reason:
            raise ValueError(f"status '{self.status}' needs a reason")
        return self


class ManifestHeader(StoredModel):
    """All of a manifest but its prompts."""

    format: Literal[1] = 1
    version: int = Field(ge=1)
    parent: int | None = Field(ge=1)
    time: UtcTime
    run: str
    id: Id
    """Random: tells two publications of the same prompts, by the same run, in the same second, apart."""
    backbone: BackboneId
    libraries: Mapping[str, str]
    removed: Mapping[Name, str] = {}
    """Prompts of the parent that are not carried forward, and why. Written only where there are any."""


class Manifest(ManifestHeader):
    """A version of the bank, whole."""

    prompts: Mapping[Name, PromptRecord]

    @model_validator(mode="after")
    def _keyed_by_name(self) -> "Manifest":
        wrong = [key for key, record in self.prompts.items() if key != record.name]
        if wrong:
            raise ValueError(f"prompt '{wrong[0]}' holds the record of another")
        return self


def encode_manifest(manifest: Manifest, sign: Callable[[str], Signature] | None = None) -> bytes:
    """The bytes of `versions/<N>.json`: sealed JSON with one prompt per line, sorted by name."""
    left_out = {"prompts"} if manifest.removed else {"prompts", "removed"}
    header = canonical(manifest.model_dump(mode="json", exclude=left_out))
    lines = []
    for name, record in sorted(manifest.prompts.items()):
        absent: dict[str, Any] = {} if record.tuned_on else {"tuned_on": True}
        absent |= {} if record.rows_run else {"rows_run": True}
        absent |= {} if record.label_score != "sum" else {"label_score": True}
        absent |= {} if record.label_offsets is not None else {"label_offsets": True}
        absent |= {} if record.tables else {"tables": True}
        absent |= {} if record.template.chat else {"template": {"chat"}}
        lines.append(b'"%s":%s' % (name.encode(), canonical(record.model_dump(mode="json", exclude=absent))))
    return seal(header[1:-1] + PROMPTS_OPEN + b",\n".join(lines) + PROMPTS_CLOSE, sign)


def manifest_schema() -> str:
    """JSON Schema of `versions/<N>.json`, as shipped in manifest.schema.json."""
    schema: dict[str, Any] = Manifest.model_json_schema()
    digest = {"pattern": "^[0-9a-f]{64}$", "type": "string", "description": "SHA-256 of the bytes after line 1."}
    signature = {
        "type": "object",
        "description": "Ed25519 over the digest; see FORMAT.md.",
        "properties": {
            "ed25519": {"type": "string", "pattern": "^[A-Za-z0-9+/]{86}==$"},
            "key": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        },
        "required": ["ed25519", "key"],
    }
    schema["properties"] = {"digest": digest, "signature": signature, **schema["properties"]}
    schema["required"] = ["digest", "format", *schema["required"]]
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def check_name(kind: str, name: str) -> None:
    """Raises: UnknownNameError when `name` could not be one segment of a key."""
    if not NAME.fullmatch(name):
        raise UnknownNameError(
            f"the {kind} name {name!r} is refused: use letters, digits, '.', '_' and '-' (128 at most)"
        )


def new_id() -> str:
    return uuid4().hex


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
