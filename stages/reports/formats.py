"""Numbers as people read them."""

from typing import Any

ALL_LABELS = "100pct"
NOTHING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def percent(share: float | None, decimals: int = 1) -> str:
    """0.5523 -> '55.2%'."""
    return NOTHING if share is None else f"{100 * share:.{decimals}f}%"


def points(share: float, decimals: int = 1) -> str:
    """0.5523 -> '55.2': percentage points."""
    return f"{100 * share:.{decimals}f}"


def signed(difference: float) -> str:
    """0.042 -> '+4.2': percentage points; what rounds to nothing has no minus."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def count(number: int) -> str:
    """50000 -> '50,000'."""
    return f"{number:,}"


def significant(number: float, digits: int = 4) -> str:
    """1.23456e-7 -> '1.235e-07'; 12.3456 -> '12.35'."""
    return f"{number:.{digits}g}"


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """(1, 'image') -> '1 image'; (2000, 'image') -> '2,000 images'."""
    return f"{count(number)} {noun if number == 1 else nouns or noun + 's'}"


def share_name(key: str) -> str:
    """'0.5pct' -> '0.5%'."""
    return f"{key.removesuffix('pct')}%"


def share_value(key: str) -> float:
    """'0.5pct' -> 0.5: percent of the labels, for sorting."""
    return float(key.removesuffix("pct"))


def value(thing: Any) -> str:
    """A value of the settings or of a protocol, as text."""
    if thing is None:
        return NOTHING
    if isinstance(thing, bool):
        return "yes" if thing else "no"
    if isinstance(thing, int):
        return count(thing)
    if isinstance(thing, float):
        return significant(thing)
    if isinstance(thing, dict):
        return ", ".join(f"{key} {value(item)}" for key, item in thing.items())
    if isinstance(thing, list | tuple):
        return ", ".join(value(item) for item in thing)
    return str(thing)


def capitalised(text: str) -> str:
    """'pixels of 8' -> 'Pixels of 8'; the rest stays as it is."""
    return text[:1].upper() + text[1:]
