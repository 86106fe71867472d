"""How benchmarks report figures: the commit, the spread of the measurements, and who is ahead."""

import statistics

from common import provenance


def commit():
    """The commit of this code; "unknown" if git cannot tell."""
    return provenance.commit() or "unknown"


def spread(values, spec=""):
    """The median of the values, with their range if they differ: 5.1 (4.9–5.6)."""
    text = format(statistics.median(values), spec)
    low, high = format(min(values), spec), format(max(values), spec)
    return text if low == high else f"{text} ({low}–{high})"


def ahead(ours, theirs):
    """The ratio of paired measurements, ours / theirs, with its range.

    "level" if the pairs disagree: one ratio is above 1, and another below.
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    if min(ratios) <= 1 <= max(ratios):
        return f"level ({min(ratios):.2f}–{max(ratios):.2f})"
    return spread(ratios, ".2f")
