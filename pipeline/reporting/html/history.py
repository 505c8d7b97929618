"""A task's metric in the last versions of the bank, from their manifests."""

from collections.abc import Mapping

from pipeline.bank import PromptBank
from pipeline.errors import BankError
from pipeline.reporting.html.night import PastVersion

PAST_VERSIONS = 5
"""Number of versions before tonight's that the page shows."""


def past_versions(
    bank: PromptBank, metrics: Mapping[str, str], tonight: int | None, most: int = PAST_VERSIONS
) -> dict[str, list[PastVersion]]:
    """The last versions of each prompt in `metrics` (its name -> its dev metric), oldest first.

    `tonight` is the version that was published, which is added to `most`; later ones do not count. A version in which
    the prompt was measured by another metric has no value; a damaged version is skipped.
    Raises: StorageError.
    """
    numbers = [number for number in bank.versions() if tonight is None or number <= tonight]
    found: dict[str, list[PastVersion]] = {name: [] for name in metrics}
    for number in numbers[-most - (tonight is not None) :]:
        try:
            records = [record for record in bank.at(str(number)).records() if record.name in metrics]
        except BankError:
            continue
        for record in records:
            value = record.metrics.dev_after if record.metric == metrics[record.name] else None
            found[record.name].append(PastVersion(number, value, record.status))
    return found
