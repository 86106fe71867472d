"""How benchmarks report figures: the commit, the spread of the measurements, and who is ahead."""

import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commit():
    """The commit of this code, with a + if files have changed since; "unknown" if git cannot tell."""

    def git(*arguments):
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        head = git("rev-parse", "--short", "HEAD").strip()
        return head + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
