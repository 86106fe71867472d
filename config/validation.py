"""Checking JSON objects against config/schema.py, and models against what a second implementation can do.

Every mistake is reported with its file, its key and what would be accepted.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from common.config import describe_value, display_path, read_json
from common.errors import UserError
from config.schema import Schema, TrainConfig

EDITOR_KEYS = {"$schema"}  # for editors; ignored here, and allowed in every file

S = TypeVar("S", bound=Schema)


def load(schema: type[S], path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> S:
    """Read the file as a `schema`. Overrides that are keys of the schema replace what the file says."""
    values = renamed(schema, read_json(path), display_path(path))
    overrides = {k: v for k, v in (overrides or {}).items() if k in schema.model_fields}
    return check(schema, {**values, **overrides}, display_path(path), overrides)


def check(schema: type[S], values: Mapping[str, Any], source: str, overrides: Collection[str] = ()) -> S:
    """Validate `values` as a `schema`. Raises UserError naming `source` and the first wrong key.

    overrides: keys that came from --set; a mistake in one of them is reported as one of --set.
    """
    values = renamed(schema, values, source)
    values = {key: value for key, value in values.items() if key not in EDITOR_KEYS}
    try:
        # Through JSON, because pydantic's strict mode accepts a list as a tuple only there.
        return schema.model_validate_json(json.dumps(values, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise UserError(
            f"{source}: contains a lone surrogate (like \\ud800), which is not a character"
        ) from None
    except ValidationError as error:
        # Report an unknown key first: it is the likely cause of a missing one.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = str(first["loc"][0]) if first["loc"] else None
        where = "--set" if key in overrides else source
        known = {*schema.model_fields, *(TrainConfig.model_fields if key in overrides else ())}
        raise UserError(f"{where}: {_explain(schema, key, first, known)}") from None


def renamed(schema: type[Schema], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values with the keys of earlier versions under today's names. Raises UserError naming `source`."""
    try:
        return schema.renamed(values)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


class Anything:
    """A container that contains every value."""

    def __contains__(self, value: object) -> bool:
        return True


ANY = Anything()  # in a whitelist of `unsupported`: all values of this key are implemented


def unsupported(config: Schema, implemented: Mapping[str, Any], name: str) -> str | None:
    """Say why a second implementation of a model cannot run this configuration; None if it can.

    implemented: a whitelist {key: implemented values} over the whole configuration. A key that is not listed
    is refused, because it may mean anything. A key inside a nested object has a name like
    "rope_scaling.factor"; without such entries the nested object is compared as a whole.
    name: what to call the implementation in the message.
    """
    for key, value in _flatten(config):
        outer = key.partition(".")[0]
        if not any(listed.startswith(f"{outer}.") for listed in implemented):
            key = outer
        if key not in implemented:
            return (
                f"{key} is {describe_value(value)} in this model, but {name} does not know this key: "
                "see doc/extending.md for where to add it"
            )
        if value not in implemented[key]:
            choices = [json.dumps(choice) for choice in implemented[key]]
            reason = (
                f"{key} is {describe_value(value)} in this model, but {name} supports only "
                f"{' or '.join(choices)}"
            )
            can_be_set = len(choices) == 1 and key in type(config).model_fields
            return reason + (f": train with --set {key}={choices[0]}" if can_be_set else "")
    return None


def _flatten(config: Schema, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) for every key, also inside nested objects ("rope_scaling.factor")."""
    for key, value in config:
        if isinstance(value, Schema):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _explain(schema: type[Schema], key: str | None, error: Any, known: Iterable[str]) -> str:
    """What is wrong, from one of pydantic's error dictionaries."""
    if key is None:  # an impossible combination of keys; the message is config/schema.py's
        return str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        return f'unknown key "{key}"{_suggest(key, known)}'
    if error["type"] == "missing" and len(error["loc"]) == 1:
        needs = describe_type(schema.model_json_schema(), key)
        return f'key "{key}" is missing: {schema.model_fields[key].description} ({needs})'
    needs, names = describe_type(schema.model_json_schema(), key), [n for n in error["loc"] if type(n) is str]
    if len(names) > 2:  # inside one of a union of objects
        in_list = isinstance(error["loc"][-1], int)
        wrong = "needs two file names, [train, validation]" if in_list else error["msg"].lower()
        is_missing = error["type"] == "missing" and not in_list
        found = "" if is_missing else f", found {describe_value(error['input'])}"
        return f'key "{key}": its key "{names[2]}": {wrong}{found}'
    if error["type"] == "value_error":
        return f'key "{key}": found {describe_value(error["input"])}; {error["ctx"]["error"]}'
    return f'key "{key}": found {describe_value(error["input"])}; needs {needs}'


def describe_type(json_schema: dict[str, Any], key: str) -> str:
    """What a key may hold, in words: 'an integer >= 1', 'one of "adamw", "muon"', ..."""
    spec = json_schema["properties"][key]
    kinds = spec.get("anyOf", [spec])
    return " or ".join(_describe_one(kind) for kind in kinds)


def _describe_one(spec: dict[str, Any]) -> str:
    if "oneOf" in spec:
        kinds = " or ".join(json.dumps(name) for name in spec["discriminator"]["mapping"])
        return f'a JSON object whose "{spec["discriminator"]["propertyName"]}" is {kinds}'
    if "const" in spec:
        return json.dumps(spec["const"])
    if "enum" in spec:
        return "one of " + ", ".join(json.dumps(choice) for choice in spec["enum"])
    if "pattern" in spec:
        return '"auto", "cpu", "mps", "cuda" or "cuda:N"'
    nouns = {"integer": "an integer", "number": "a number", "string": "a string", "boolean": "true or false",
             "object": "a JSON object"}  # fmt: skip
    words = nouns.get(spec.get("type", ""), spec.get("type", "a value"))
    if spec.get("type") == "array":
        pair = "[train, validation] pair"
        words = f"a list of {pair}s of file names, or of the parts of a mixture"
        words = "a list of strings" if spec.get("items", {}).get("type") == "string" else words
        words = f"a {pair} of file names" if "prefixItems" in spec else words
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {spec[name]}" for name, sign in bounds.items() if name in spec]
    return f"{words} {' and '.join(limits)}".strip()


def _suggest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f'; did you mean "{near[0]}"?' if near else f"; known keys: {', '.join(sorted(known))}"
