"""The base class of all settings, and the types of fields that several of them share."""

import os
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pipeline.addresses import holds_credentials

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
"""Name of a run, task or alias, which must be valid as a file's name."""
LARGEST = 10**12
"""Largest count of steps, rows or evaluations. A larger one is a typing error, and no array has such an index."""
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Tokens = Annotated[int, Field(ge=1, le=10**7)]
"""Tokens of one row, or of one forward pass; no model's context is longer."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""The range that torch accepts."""


def _check_address(value: str | list[str]) -> str | list[str]:
    # Neither pydantic nor this message shows the input, which holds the password.
    if any(map(holds_credentials, [value] if isinstance(value, str) else value)):
        raise ValueError(
            "the address holds a password, which would end up in logs; take it out, and set it in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY, "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
        )
    for address in [value] if isinstance(value, str) else value:
        longest = max(len(os.fsencode(part)) for part in address.split("/")) if "\0" not in address else 0
        if "\0" in address or ("://" not in address and (longest > 255 or len(address) > 4000)):
            raise ValueError("it is longer than any file's name, or holds a zero byte; give a path or an address")
    return value


Address = Annotated[str, AfterValidator(_check_address)]
Paths = Annotated[str | list[str], AfterValidator(_check_address)]


class SettingsModel(BaseModel):
    # Frozen, without unknown keys; the docstring below a key describes it in the JSON Schema.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read true as 1."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if bool not in kinds and kinds & {int, float}:
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, bool):
                    raise ValueError(f"{str(one).lower()} (or yes, no, on, off) is not a number; give one")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types in a field's annotation, also those within lists."""
    inner = get_args(annotation)
    if not inner or getattr(annotation, "__origin__", None) is dict:
        return {annotation}
    return set().union(*map(_kinds, inner))
