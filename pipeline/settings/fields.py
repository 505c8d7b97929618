"""What every group of settings is: frozen, without unknown keys, its keys explained below themselves."""

import os
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pipeline.addresses import holds_credentials

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
"""Of a run, a task, an alias: fit to be a file's name."""
LARGEST = 10**12
"""Of what is counted: steps, rows, evaluations. More is a slip of the hand, and no array could be indexed by it."""
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Tokens = Annotated[int, Field(ge=1, le=10**7)]
"""Of one row, or of what a rank computes at once: no context of a model is as long."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""As much as torch takes."""


def _fit_to_be_written_down(value: str | list[str]) -> str | list[str]:
    # pydantic puts no input into this message, and neither do we.
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


Address = Annotated[str, AfterValidator(_fit_to_be_written_down)]
Paths = Annotated[str | list[str], AfterValidator(_fit_to_be_written_down)]


class SettingsModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_number_is_no_yes(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if bool not in kinds and kinds & {int, float}:
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, bool):
                    raise ValueError(f"{str(one).lower()} (or yes, no, on, off) is no number; give one")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that a field's annotation names, those in its lists too."""
    inner = get_args(annotation)
    if not inner or getattr(annotation, "__origin__", None) is dict:
        return {annotation}
    return set().union(*map(_kinds, inner))
