"""Paths as users type them, and reading JSON files. config/validation.py checks what is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """Resolve a path that a user typed: relative to the current directory if it exists, else to ROOT."""
    path = Path(os.path.expanduser(path))
    return path if path.is_absolute() or path.exists() else ROOT / path


def display_path(path: str | os.PathLike[str]) -> str:
    """A path as a user would type it: relative to ROOT if it lies inside."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that holds one JSON object. Raises UserError if it is missing, not UTF-8 or malformed."""
    name = display_path(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder; a JSON file is needed") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: byte {error.start} is not UTF-8 text") from None
    try:
        value = json.loads(text, object_pairs_hook=_reject_duplicates, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg.lower()}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name}: found {describe_value(value)}; a JSON object {{...}} is needed")
    return value


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse the "key=value" strings of --set into {key: value}. A value that is not JSON is a string."""
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f'--set {assignment}: write it as key=value, such as "--set batch_size=8"')
        try:
            overrides[key] = json.loads(text, parse_constant=_reject_constant)
        except (ValueError, RecursionError):
            overrides[key] = text
    return overrides


def describe_value(value: object) -> str:
    """The value as JSON, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'key "{duplicate}" appears twice')
    return values


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
