"""Numbers as people read them."""

from datetime import UTC, datetime

ABSENT = "–"


def figure(value: float | None) -> str:
    """A metric: `0.871`; large ones without needless digits."""
    if value is None:
        return ABSENT
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.4g}"


def signed(value: float | None) -> str:
    """`+0.012`, `−0.012`, `±0.000`."""
    if value is None:
        return ABSENT
    shown = figure(abs(value))
    return ("±" if float(shown.replace(",", "")) == 0 else "+" if value > 0 else "−") + shown


def chance(value: float | None) -> str:
    """A p-value: `p = 0.031`, `p < 0.001`."""
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def duration(seconds: float) -> str:
    """`0.3 s`, `48 s`, `2 min 13 s`, `1 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def about(seconds: float) -> str:
    """`45 s`, `12 min`, `1 h 07 min`: for ages and estimates."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"


def size(count: int | None) -> str:
    """Bytes in binary units: `1.50 GiB`."""
    if count is None:
        return "not measured"
    for unit, bound in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bound:
            return f"{count / bound:.2f} {unit}" if unit == "GiB" else f"{count / bound:.0f} {unit}"
    return f"{count} B"


def millions(count: int) -> str:
    """`135 M`; of less than ten, one decimal: `0.6 M`."""
    return f"{count / 1e6:,.0f} M" if count >= 10e6 else f"{count / 1e6:.1f} M"


def moment(seconds: float) -> str:
    """Unix seconds as `2026-03-05 02:13 UTC`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def counted(number: int, one: str, more: str | None = None) -> str:
    """`1 blob`, `2 blobs`."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def share(part: float, whole: float) -> str:
    """`3.4 %`; `< 0.1 %` for a share that is small but not zero."""
    if not whole or not part:
        return "0 %"
    percent = 100 * part / whole
    return "< 0.1 %" if percent < 0.1 else f"{percent:.1f} %"
