"""Reading the JSON files: every mistake is named with its file, its key and what would do.

`python -m common.config` writes doc/configuration.md and the JSON Schemas beside the
configurations, from the classes in config/schema.py and models/.
"""

import difflib
import functools
import json
import operator
import os
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

import models
from common.errors import UserError
from config.schema import DeepSpeedConfig, Llama3Rope, Schema, TrainConfig, YarnRope

ROOT = Path(__file__).resolve().parent.parent

# The keys are read by editors and not by us: they may stand in any of the files.
EDITOR_KEYS = {"$schema"}


def find(path):
    """A path a user typed: taken from the current directory, else from the project's."""
    path = Path(os.path.expanduser(path))
    return path if path.is_absolute() or path.exists() else ROOT / path


def shown(path):
    """A path as a user would type it: relative to the project where it lies inside."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def read_json(path):
    """The JSON object in the file. UserError if it is missing, not UTF-8, broken, or no object."""
    name = shown(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder; a JSON file is needed") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: byte {error.start} is not UTF-8 text") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg.lower()}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name}: found {_show(value)}; a JSON object {{...}} is needed")
    return value


def parse_overrides(assignments):
    """["key=value", ...] of --set -> {key: value}; a value that is not JSON is taken as a string."""
    overrides = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f'--set {assignment}: write it as key=value, such as "--set batch_size=8"')
        try:
            overrides[key] = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            overrides[key] = text
    return overrides


def load(schema, path, overrides=None):
    """The file as an instance of `schema`, with those of the `overrides` that are its keys."""
    values = read_json(path)
    overrides = {k: v for k, v in (overrides or {}).items() if k in schema.model_fields}
    return check(schema, {**values, **overrides}, shown(path), overrides)


def load_run(args):
    """(TrainConfig, the configuration of the model) of a command line: its --config, --model and --set."""
    config = load(TrainConfig, args.config, args.set)
    others = {k: v for k, v in args.set.items() if k not in TrainConfig.model_fields}
    shape = read_json(args.model)
    # It used to be a key of the model's configuration, too.
    if shape.pop("dropout", config.dropout) != config.dropout:
        raise UserError(
            f'{shown(args.model)}: key "dropout" belongs to the run: remove it here, and set it in '
            f"{shown(args.config)}, where it is {config.dropout}"
        )
    return config, check_model({**shape, **others}, shown(args.model), others)


def check_model(values, source, overrides=()):
    """`values` as an instance of the schema of their architecture; see `check`."""
    name = values.get("architecture", "nano")
    if name not in models.names():
        where = "--set" if "architecture" in overrides else source
        choices = ", ".join(f'"{name}"' for name in models.names())
        raise UserError(f'{where}: key "architecture": found {_show(name)}; needs one of {choices}')
    return check(models.config_class(name), values, source, overrides)


def check(schema, values, source, overrides=()):
    """`values` as an instance of `schema`. UserError naming `source` and the first wrong key."""
    values = {key: value for key, value in values.items() if key not in EDITOR_KEYS}
    try:
        # By way of JSON, whose arrays pydantic takes for tuples without loosening any other type.
        return schema.model_validate_json(json.dumps(values, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise UserError(f"{source}: holds half a surrogate pair (like \\ud800), no character") from None
    except ValidationError as error:
        # An unknown key first: it is the likely cause of a missing one.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = str(first["loc"][0]) if first["loc"] else None
        where = "--set" if key in overrides else source
        known = {**schema.model_fields, **(TrainConfig.model_fields if key in overrides else {})}
        raise UserError(f"{where}: {_explain(schema, key, first, known)}") from None


class Anything:
    """The values that a key may have where all are implemented: see `unsupported`."""

    def __contains__(self, value):
        return True


ANY = Anything()


def unsupported(config, implemented, name):
    """Why something that does what a model does, under this name, cannot do it for this configuration, in
    words; None if it can.

    implemented: {key: the values of it that are}, for every key, as one that is not there may mean anything.
    A key of an object within has a name such as "rope_scaling.factor", or is as the object itself is.
    """
    for key, value in _leaves(config):
        whole = key.partition(".")[0]
        if not any(known.startswith(f"{whole}.") for known in implemented):
            key = whole
        if key not in implemented:
            return (
                f"{key} is {_show(value)} in this model, and {name} does not know the key: "
                "doc/extending.md has where to say what it does"
            )
        if value not in implemented[key]:
            values = [*map(json.dumps, implemented[key])]
            what = f"{key} is {_show(value)} in this model, and {name} has only {' or '.join(values)}"
            can_be_set = len(values) == 1 and key in type(config).model_fields
            return what + (f": train with --set {key}={values[0]}" if can_be_set else "")
    return None


def _leaves(config, prefix=""):
    """(key, value) of all that a configuration says; see `unsupported` for the names."""
    for key, value in config:
        if isinstance(value, Schema):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _explain(schema, key, error, known):
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        return f'unknown key "{key}"{_nearest(key, known)}'
    if error["type"] == "missing" and len(error["loc"]) == 1:
        needs = describe_type(schema.model_json_schema(), key)
        return f'key "{key}" is missing: {schema.model_fields[key].description} ({needs})'
    if key is None:  # an impossible combination, in our own words
        return str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
    needs = describe_type(schema.model_json_schema(), key)
    if len(error["loc"]) > 2 and isinstance(error["loc"][2], str):  # inside one of several kinds of objects
        found = "" if error["type"] == "missing" else f", found {_show(error['input'])}"
        return f'key "{key}": its key "{error["loc"][2]}": {error["msg"].lower()}{found}'
    return f'key "{key}": found {_show(error["input"])}; needs {needs}'


def describe_type(json_schema, key):
    """What a key may hold, in words: 'an integer >= 1', 'one of "adamw"', ..."""
    spec = json_schema["properties"][key]
    kinds = spec.get("anyOf", [spec])
    return " or ".join(_describe_one(kind) for kind in kinds)


def _describe_one(spec):
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
    words = nouns.get(spec.get("type"), spec.get("type", "a value"))
    if spec.get("type") == "array":
        words = "a list of [train, validation] pairs of file names"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {spec[name]}" for name, sign in bounds.items() if name in spec]
    return f"{words} {' and '.join(limits)}".strip()


def _nearest(key, known):
    near = difflib.get_close_matches(key, known, n=1)
    return f'; did you mean "{near[0]}"?' if near else f"; known keys: {', '.join(sorted(known))}"


def _show(value):
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _unique(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'key "{twice}" stands twice')
    return values


def _refuse_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def reference():
    """doc/configuration.md: every key of every file, as Markdown."""
    lines = [
        "# Configuration reference",
        "",
        "Made from the schemas in `config/schema.py` and `models/` by `python -m common.config`; do not edit",
        "by hand. Every key but those of DeepSpeed may also be given on the command line:",
        "`python train.py -t pretrain --set batch_size=8`.",
    ]
    sections = {
        "config/config_pretrain.json, config/config_sft.json": TrainConfig,
        **{f"config/model_config.json, architecture {name}": models.config_class(name)
           for name in models.names()},
        "rope_scaling, llama3": Llama3Rope,
        "rope_scaling, yarn": YarnRope,
        "config/deepspeed_config.json": DeepSpeedConfig,
    }  # fmt: skip
    for title, schema in sections.items():
        json_schema = schema.model_json_schema()
        lines += ["", f"## {title}", "", "| key | value | default | meaning |", "|-|-|-|-|"]
        for key, field in schema.model_fields.items():
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            lines.append(f"| `{key}` | {describe_type(json_schema, key)} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def editor_schemas():
    """{name: JSON Schema} of the files, for editors. A model's is that of any architecture."""
    shapes = functools.reduce(operator.or_, map(models.config_class, models.names()))
    return {
        "model_config": TypeAdapter(shapes).json_schema(),
        "train_config": TrainConfig.model_json_schema(),
        "deepspeed_config": DeepSpeedConfig.model_json_schema(),
    }


def write_reference():
    from common.files import Together

    with Together() as files:
        files.open(ROOT / "doc" / "configuration.md").write(reference().encode())
        for name, schema in editor_schemas().items():
            text = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
            files.open(ROOT / "config" / f"{name}.schema.json").write(text.encode())


if __name__ == "__main__":
    write_reference()
