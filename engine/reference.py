"""Write doc/configuration.md and the JSON Schemas for editors from the classes that check the JSON files.

Run it with `python -m engine.reference` after a change to a key.
"""

from __future__ import annotations

import functools
import json
import operator
from typing import Any

from pydantic import TypeAdapter

import models
from common.config import ROOT
from common.errors import run
from common.files import AtomicFiles
from config.schema import DeepSpeedConfig, Llama3Rope, MixturePart, Schema, TrainConfig, YarnRope
from config.validation import describe_type


def reference_page() -> str:
    """The content of doc/configuration.md: one table per file, one row per key."""
    lines = [
        "# Configuration reference",
        "",
        "Generated from the schemas in `config/schema.py` and `models/` by `python -m engine.reference`;",
        "do not edit by hand. Every key except those of DeepSpeed can also be given on the command line:",
        "`python train.py -t pretrain --set batch_size=8`.",
    ]
    sections: dict[str, type[Schema]] = {
        "config/config_pretrain.json, config/config_mid.json, config/config_sft.json": TrainConfig,
        "dataset_path, a part of a mixture": MixturePart,
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


def editor_schemas() -> dict[str, dict[str, Any]]:
    """{name: JSON Schema} of the files. model_config accepts the keys of any architecture."""
    model_config = functools.reduce(operator.or_, map(models.config_class, models.names()))
    return {
        "model_config": TypeAdapter(model_config).json_schema(),
        "train_config": TrainConfig.model_json_schema(),
        "deepspeed_config": DeepSpeedConfig.model_json_schema(),
    }


def write_reference() -> None:
    """Write all of it."""
    with AtomicFiles() as files:
        files.open(ROOT / "doc" / "configuration.md").write(reference_page().encode())
        for name, schema in editor_schemas().items():
            text = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
            files.open(ROOT / "config" / f"{name}.schema.json").write(text.encode())


if __name__ == "__main__":
    run(write_reference)
