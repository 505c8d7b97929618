"""What all pages share: each is one file with its own style and script, and its policy allows no others."""

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES: BaseLoader = PackageLoader("pipeline.reporting.html", "templates")


def environment(templates: BaseLoader) -> Environment:
    """A Jinja environment that escapes all texts given to a template."""
    return Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def own_texts(templates: BaseLoader, styles: Sequence[str], scripts: Sequence[str]) -> dict[str, Any]:
    """Style and script of a page, and the content security policy that allows exactly these texts."""
    texts = []
    for names in (styles, scripts):
        texts.append("\n".join(templates.get_source(Environment(), name)[0] for name in names))
        assert "</" not in texts[-1], "it would end its own element"
    style, script = texts
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    allowed = [f"'sha256-{digest}'" for digest in digests]
    policy = "default-src 'none'; img-src data:; style-src {}; script-src {}; base-uri 'none'".format(*allowed)
    return {"style": Markup(style), "script": Markup(script), "policy": policy}
