"""The architectures: model.py's ("nano") and one file each for the others, found by their names.

`architecture` in config/model_config.json names the file. It holds two classes:

    Config(ArchitectureConfig)    its keys, which config/schema.py's class does not have already
    Model(GPT)                    the network, `Model(config)`, made of model.py's parts and its own

doc/extending.md shows how to write one. Names are looked up without importing torch.
"""

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from common.config import check, describe_value
from common.errors import UserError
from config.schema import ArchitectureConfig, ModelConfig

FOLDER = Path(__file__).resolve().parent


def names():
    """Of all architectures."""
    return ["nano", *sorted(path.stem for path in FOLDER.glob("[!_]*.py"))]


def config_class(name):
    """The schema of config/model_config.json for one of `names()`."""
    return ModelConfig if name == "nano" else importlib.import_module(f"models.{name}").Config


def check_config(
    values: Mapping[str, Any], source: str, overrides: Collection[str] = ()
) -> ArchitectureConfig:
    """Validate `values` with the schema of their architecture. See `common.config.check`."""
    name = values.get("architecture", "nano")
    if name not in names():
        where = "--set" if "architecture" in overrides else source
        choices = ", ".join(f'"{choice}"' for choice in names())
        raise UserError(f'{where}: key "architecture": found {describe_value(name)}; needs one of {choices}')
    return check(config_class(name), values, source, overrides)


def build(config):
    """A new model of the shape `config`, whose vocab_size is set."""
    if config.architecture == "nano":
        from model import GPT

        return GPT(config)
    return importlib.import_module(f"models.{config.architecture}").Model(config)
