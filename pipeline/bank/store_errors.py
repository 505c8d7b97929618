"""What object stores answer, and obstore's many lines about it, as one sentence: a cause and a mend."""

import re
from dataclasses import dataclass

from pipeline.addresses import hide_credentials

NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>")
NO_CREDENTIALS = re.compile(
    r"source: Missing(AccessKeyId|SecretAccessKey)\b|/latest/api/token|/computeMetadata/|/metadata/identity/"
)
WEB_PAGE = re.compile(r"<!doctype html|<html", re.IGNORECASE)
"""In the answer of what is no store but a web server: there, "not found" says nothing of an object."""
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS or AZURE_STORAGE_ACCOUNT_KEY"
)
_HOST = re.compile(r"Error performing \w+ (https?://[^/\s]+)")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_PASSING = (429, 500, 502, 503, 504)
_NO_STORE = (404, 405, 501)
"""What web servers answer to a store's requests, without a store's code."""


@dataclass(frozen=True)
class CloudNames:
    """By which names a cloud's users know what they can mend."""

    allow_http: str
    endpoint: str
    check: str


AWS = CloudNames("AWS_ALLOW_HTTP", "AWS_ENDPOINT_URL", "the endpoint, the region and the bucket")
GOOGLE = CloudNames("GOOGLE_ALLOW_HTTP", "GOOGLE_BASE_URL", "the endpoint and the bucket")
AZURE = CloudNames(
    "AZURE_ALLOW_HTTP",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT (an emulator's ends with the account's name), the account and the container",
)

# Of obstore's debug output, the first that matches; `HttpError` is the transport's own verdict.
_TRANSPORT = (
    (r"InvalidPath", "there is an object whose name no bank can hold; delete it ({line})"),
    (r"BadScheme", "{host} is plain http; set {cloud.allow_http}=true to allow it, or name an https:// endpoint"),
    (r"BareRedirect", "the bucket is in another region; set AWS_REGION"),
    (r"dns error", "the host of {host} is not known; check the endpoint and the network"),
    (r"InvalidCertificate|InvalidMessage", "{host} does not speak TLS that can be trusted; check its certificate"),
    (r"HttpError \{\s*kind: Connect", "nothing answers at {host}; check the endpoint and the network"),
    (r"HttpError \{\s*kind: Timeout", "{host} does not answer in time; check the endpoint, or try again later"),
    (r"HttpError \{", "the connection to {host} breaks off; check the network, or try again later"),
)


def is_client_error(error: BaseException | None) -> bool:
    """Whether the store said itself that it will not do it."""
    status = _STATUS.search(str(error))
    return status is not None and status[1].startswith("4")


def is_forbidden(error: BaseException | None) -> bool:
    """Whether the store said that these credentials may not do it."""
    status = _STATUS.search(str(error))
    return status is not None and status[1] in ("401", "403")


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: the store is overloaded, or nothing is heard of it."""
    report = str(error)
    if NO_CREDENTIALS.search(report) or "BadScheme" in report:
        return False
    if status := _STATUS.search(report):
        return int(status[1]) in _PASSING
    return any(re.search(pattern, report) for pattern in (r"dns error", r"HttpError \{"))


def explain(error: Exception, cloud: CloudNames) -> str:
    """A cause and a mend, out of the many lines that obstore writes."""
    report = str(error)
    if NO_CREDENTIALS.search(report):
        return f"no credentials were found; set {_CREDENTIALS}, as the store needs"
    found = _HOST.search(report)
    host = hide_credentials(found[1]) if found else "the store"
    if WEB_PAGE.search(report) and "not found" in report.lower():
        return _no_store(host, 404, cloud)
    if status := _STATUS.search(report):
        code = _CODE.search(report)
        return _why_answered(int(status[1]), code[1] if code else "", host, cloud)
    for pattern, cause in _TRANSPORT:
        if re.search(pattern, report):
            return cause.format(host=host, line=first_line(error), cloud=cloud)
    return first_line(error)


def _why_answered(status: int, code: str, host: str, cloud: CloudNames) -> str:
    answer = f"the store answers {status} {code}".rstrip()
    match status:
        case _ if code in ("NoSuchBucket", "ContainerNotFound"):
            return "there is no such bucket; make it, or mend the address"
        case 401 | 403:
            return f"{answer}; check the credentials, and what they are allowed to do there"
        case 409:
            return f"{answer} again and again; see who else writes there"
        case _ if status in _NO_STORE and not code:
            return _no_store(host, status, cloud)
        case 501:
            return f"{answer}; a bank needs a store that can create an object only if it is absent"
        case _ if status in _PASSING:
            return f"{answer}; try again later"
        case _:
            return f"{answer}; check {cloud.check}"


def _no_store(host: str, status: int, cloud: CloudNames) -> str:
    return f"{host} answers {status} as no object store does; mend the endpoint ({cloud.endpoint})"


def first_line(error: Exception) -> str:
    line = str(error).partition("\n")[0]
    return hide_credentials(re.sub(r"^(Generic \w+ error: )?(Error performing \S+ request: )?", "", line))[:200]
