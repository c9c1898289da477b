"""Numbers as text."""

from __future__ import annotations

import numpy as np


def short(value: float) -> str:
    """Returns a number with one decimal, or two digits where it is below 1."""
    if value >= 1:
        return f"{value:.1f}"
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")


def duration(seconds: float) -> str:
    """Returns a duration as text, in seconds or in hours and minutes."""
    if seconds < 10:
        return f"{short(seconds)} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def short_duration(seconds: float) -> str:
    """Returns a duration as text in one unit, from milliseconds to days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def percent(accuracies: np.ndarray | list[float]) -> str:
    """Returns mean ± standard deviation in per cent, of accuracies in [0, 1]."""
    return f"{100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies):.2f}"


def settings(values: dict[str, object]) -> str:
    """Returns settings as `name=value`, or "none"."""
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "none"
