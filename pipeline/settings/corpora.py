"""Where a split's rows come from, and what is taken of them."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from pipeline.settings.fields import Count, Paths, SettingsModel


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
