"""What every page is: one file with its own style and script, which forbids the browser all others."""

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES: BaseLoader = PackageLoader("pipeline.reporting.html", "templates")


def environment(templates: BaseLoader) -> Environment:
    """All texts that a template is given are escaped."""
    return Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def own_texts(templates: BaseLoader, styles: Sequence[str], scripts: Sequence[str]) -> dict[str, Any]:
    """Style and script of a page, and the policy that allows these very texts and nothing else."""
    style, script = (_joined(templates, names) for names in (styles, scripts))
    allowed = (f"'sha256-{_digest(text)}'" for text in (style, script))
    policy = "default-src 'none'; img-src data:; style-src {}; script-src {}; base-uri 'none'".format(*allowed)
    return {"style": Markup(style), "script": Markup(script), "policy": policy}


def _joined(templates: BaseLoader, names: Sequence[str]) -> str:
    texts = [templates.get_source(Environment(), name)[0] for name in names]
    assert not any("</" in text for text in texts), "it would end its own element"
    return "\n".join(texts)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
