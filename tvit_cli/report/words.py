"""Numbers as people read them."""

from __future__ import annotations


def number(value: float) -> str:
    """Three digits. 0.12345 -> 0.123"""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """Whole percent where that says it all. 0.5 -> 50 %, 0.875 -> 87.5 %"""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def count(value: int) -> str:
    """1234567 -> 1.23 M"""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return str(value)


def duration(seconds: float) -> str:
    """75 -> 1.2 min"""
    for limit, unit in ((3600, "h"), (60, "min")):
        if seconds >= limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.1f} s"


def plural(value: int, noun: str) -> str:
    """1, group -> 1 group; 3, class -> 3 classes"""
    ending = "" if value == 1 else "es" if noun.endswith("s") else "s"
    return f"{value:,} {noun}{ending}"
