"""The settings of a service."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.errors import SettingsError
from pipeline.settings.fields import Address, SettingsModel
from pipeline.settings.models import MOST_SECONDS


class ServiceSettings(SettingsModel):
    """Settings of a service; each is an option of `jobs/serve_prompts.py` and an argument of `serve run`."""

    bank: Address
    """The bank's folder or object store."""
    model: Address
    """The backbone that the prompts were tuned on: a folder, hub name, .gguf file or packaged name."""
    alias: str = "latest"
    """The alias that is served and followed."""
    trusted_keys: tuple[str, ...] = ()
    """Public keys (PEM files, separated by commas); with them, a version that none of them signed is not served."""
    token_file: str | None = None
    """A file of the tokens that are let in, one a line; it is read again when it changes. Without it, the environment's
    PROMPT_BANK_TOKEN is the token."""
    no_authentication: bool = False
    """Let everybody in who reaches the service."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of activations; auto is float32 on a CPU and bfloat16 on a GPU."""
    products: Literal["auto", "exact", "int16", "int8"] = "auto"
    """How int8 layers multiply: `exact` by floats, `int16` or `int8` with activations rounded to whole numbers of so
    many bits. `auto` is int16 where the processor has it (a CPU with AVX2), and exact elsewhere."""
    ray: bool = True
    """Whether Ray Serve stands between callers and the model. Without it there is one replica, in the process that was
    started, and a request costs a fraction of the CPU time around the model."""
    replicas: int = Field(default=1, ge=1, le=10_000)
    """Copies of the model."""
    cpus_per_replica: float = Field(default=1, ge=0.0001, le=10_000)
    """Also the threads of each replica's model, on a CPU."""
    watch_every: float = Field(default=10, gt=0, le=MOST_SECONDS)
    """Seconds between two refreshes of the alias."""
    max_rows: int = Field(default=256, ge=1, le=10**7)
    """Most rows of a request, and of a batch over all requests."""
    max_body_bytes: int = Field(default=2**20, ge=1, le=2**40)
    """Largest body of a request."""
    max_new_tokens: int = Field(default=256, ge=1, le=10**7)
    """Longest answer that a request may ask for, in tokens."""
    max_waiting: int = Field(default=1000, ge=1, le=10**9)
    """Most requests that may wait for the model; further ones are refused with 503 and Retry-After."""
    batch_wait_s: float = Field(default=0.003, ge=0, le=MOST_SECONDS)
    """How long a first request waits for others while the model is idle, in seconds."""
    token_budget: int = Field(default=8192, ge=1, le=10**9)
    """Most tokens that the model runs at once, and most tokens of a row with its prompt and answer."""
    cache_mib: int = Field(default=512, ge=0, le=2**30)
    """Memory for the keys and values of prompts, in MiB."""
    request_s: float = Field(default=30, gt=0, le=MOST_SECONDS)
    """How long a client may take to send a request's body, in seconds. A service without Ray or with a local one also
    limits the request's head to this; without Ray, also how long a client may take nothing of a stream."""
    shutdown_s: float = Field(default=60, ge=0, le=MOST_SECONDS)
    """How long requests may still run when the service is told to end, in seconds. If one hangs, the end takes twice
    as long: the proxy waits for its answer, and then Serve for its replica."""

    @field_validator("trusted_keys", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of_two(self) -> "ServiceSettings":
        if self.no_authentication and self.token_file is not None:
            raise ValueError("token_file names who is let in, and no_authentication lets in everybody: give one")
        return self

    @model_validator(mode="after")
    def _one_without_ray(self) -> "ServiceSettings":
        if not self.ray and self.replicas > 1:
            raise ValueError("several replicas need Ray: leave out ray=false, or start one service for each replica")
        return self

    @field_validator("cpus_per_replica")
    @classmethod
    def _as_ray_counts(cls, value: float) -> float:
        if round(value, 4) != value:
            raise ValueError(f"{value:g} has more than four decimals, which Ray does not count; round it")
        return value


def make_settings(given: Mapping[str, Any]) -> ServiceSettings:
    """Settings from names and values. Raises: SettingsError that names the wrong one."""
    try:
        return ServiceSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"the service has no such setting; it has {', '.join(ServiceSettings.model_fields)}"
        told = f"{message[:1].lower()}{message[1:]}"
        raise SettingsError(f"{where}: {told}" if where else told) from error
