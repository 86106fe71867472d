"""Requirements, hooks and guides for developers agree with each other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def requirements(name):
    """{package: {(version range, marker), ...}}"""
    found = {}
    for line in (ROOT / name).read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            package, versions, marker = re.fullmatch(r"([\w-]+)([^;]*)(?:; (.+))?", line).groups()
            found.setdefault(package, set()).add((versions, marker))
    return found


def test_the_core_is_a_part_of_all():
    """Except for torch: small boards bring their own build, and it may need an older NumPy."""
    everything, core = requirements("requirements.txt"), requirements("requirements-edge.txt")
    assert set(core) <= set(everything) - {"torch"}
    for package, ranges in core.items():
        [(versions, _)] = everything[package]
        assert all(own.startswith(versions) for own, _ in ranges), package


def test_ruff_is_the_same_in_make_lint_and_before_a_commit():
    [(version, _)] = requirements("requirements-dev.txt")["ruff"]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert f"ruff-pre-commit\n    rev: v{version.removeprefix('==')} " in hooks


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
