"""Where a split's rows come from, and what is taken of them."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from pipeline.addresses import holds_credentials
from pipeline.settings.fields import Count, Paths, SettingsModel

_SECRET = re.compile(
    r"token|secret|password|credential|session|access-key|account-key|sas|authorization|api-?key|^header\."
)
_NO_SECRETS = (
    "oauth2-server-uri",
    "token-refresh-enabled",
    "s3.role-session-name",
    "glue.profile-name",
    "header.x-iceberg-access-delegation",
)


class SplitSettings(SettingsModel):
    """A split's rows, and what is taken of them."""

    path: Paths
    """A file, folder, glob, object-store URI or table, or a list of them."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The columns that have another name than the templates use: `{text: review_body}` lets `{text}` stand for the
    column `review_body`. Others keep their names."""
    where: str | None = Field(None, min_length=1)
    """Only rows of which this is true, such as `lang = 'en' and stars >= 4`, over the names that the corpus has itself.
    Lance takes its own SQL here; all others take comparisons, `in`, `between`, `like 'x%'`, `is null`, `and`, `or` and
    `not`, which need `promptbank[lake]`."""
    limit: Count | None = None
    """The first so many rows, in the order of the files; for trying things out."""
    types: dict[str, Literal["string", "integer", "float", "boolean"]] = Field(default_factory=dict)
    """Types of columns of JSON lines and CSV, in place of those that are inferred."""


def _kind(value: Any) -> str:
    return MAPPING if isinstance(value, dict | SplitSettings) else "str"


MAPPING = "mapping[split]"
"""How the place of a mistake in a mapping names this alternative."""
Split = Annotated[
    Annotated[Paths, Tag("str")] | Annotated[SplitSettings, Tag(MAPPING)],
    Discriminator(_kind),
]
"""A path, a list of paths, or a mapping with a path."""


class CatalogSettings(SettingsModel):
    """A catalog of Iceberg tables by the name that addresses use: `{prod: {type: rest, uri: "https://…"}}`, with all
    properties of pyiceberg's `load_catalog`. Passwords, keys and tokens come from the environment, as pyiceberg reads
    them: `PYICEBERG_CATALOG__PROD__TOKEN`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]

    type: str | None = None
    """`rest`, `sql`, `glue`, `hive`, or another one that pyiceberg knows."""
    uri: str | None = None
    """Where the catalog answers, or the address of its database."""

    @property
    def properties(self) -> dict[str, Any]:
        """What `load_catalog` takes."""
        return self.model_dump(exclude_none=True)

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        for key, value in self.properties.items():
            if not isinstance(value, str | int | float | bool):
                raise ValueError(
                    f"{key} is no single value; what has parts, as pyiceberg's 'auth' has, belongs into its own file, "
                    ".pyiceberg.yaml"
                )
            if (_SECRET.search(key.lower()) and key.lower() not in _NO_SECRETS) or holds_credentials(str(value)):
                raise ValueError(
                    f"{key} holds a secret, which would end up in the run's files; take it out, and set it in the "
                    "environment, such as PYICEBERG_CATALOG__PROD__TOKEN for the token of the catalog 'prod'"
                )
        return self
