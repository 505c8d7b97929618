"""Addresses of stores, and what must not be in them: a password in a URI ends up in logs, reports and process lists."""

import re

_USER = re.compile(r"(?<=://)[^/?#@\s]*:[^@?#\s]*(?=@)")
_QUERY = re.compile(
    r"(?<=[?&])([\w.-]*(?:secret|token|password|passwd|signature|credential|access_?key)[\w.-]*|sig|sas)=[^&\s]*", re.I
)


def holds_credentials(uri: str) -> bool:
    """Whether a URI holds a password (`s3://key:secret@bucket`) or a query that looks like one (`?sig=…`)."""
    return bool(_USER.search(uri) or _QUERY.search(uri))


def hide_credentials(text: str) -> str:
    """The same text with such parts of the URIs in it replaced by `***`."""
    return _QUERY.sub(r"\1=***", _USER.sub("***", text))
