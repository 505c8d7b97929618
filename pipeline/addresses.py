"""Finds credentials in addresses of stores: a password in a URI would end up in logs, reports and process lists."""

import re

# A user before a host is not secret by itself (`abfs://container@account`). In these schemes it can only be a token,
# except in Arrow's spelling of access without an account (`gs://anonymous@bucket`).
_TOKEN_SCHEMES = "".join(f"(?<={scheme}://)|" for scheme in ("https", "http", "s3", "s3a", "s3n", "gs", "gcs"))
_USER = re.compile(
    rf"(?<=://)[^/?#@\s]*:[^@?#\s]*(?=@)|(?:{_TOKEN_SCHEMES[:-1]})(?!(?<=gs://|cs://)anonymous@)[^/?#@\s]+(?=@)", re.I
)
_NAMES = (
    r"[\w.%-]*(?:secret|token|passw|passphrase|signature|credential|bearer|"
    r"(?:access|account|api|auth|private|shared|subscription)[_.-]?key)[\w.%-]*"
)
# At the start of a text, `token=…/` is a folder of a Hive column, unless the text is a connection string.
_CONNECTION = r"\A(?=account_?key=|shared_?access|\S*;\s*\w+=)"
_QUERY = re.compile(
    rf"(?:(?<=[?&#;])|{_CONNECTION})({_NAMES})=[^&\s]*"
    r"|(?<=[?&#])(sig|sas|key|auth|authorization|jwt|pwd|pass)=[^&\s]*",
    re.I,
)


def holds_credentials(uri: str) -> bool:
    """Whether a URI holds a password (`s3://key:secret@bucket`), a token in a user's place (`https://token@host`), or a
    query or connection string that looks like one (`?sig=…`, `;AccountKey=…`)."""
    return bool(_USER.search(uri) or _QUERY.search(uri))


def hide_credentials(text: str) -> str:
    """The same text with such parts of the URIs in it replaced by `***`."""
    return _QUERY.sub(lambda found: f"{found[1] or found[2]}=***", _USER.sub("***", text))
