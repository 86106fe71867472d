"""The architectures: "nano" is in model.py, every other one is a file here.

The key `architecture` in config/model_config.json names the file, which defines two classes:

    Config(ArchitectureConfig)    the keys that ArchitectureConfig (config/schema.py) does not have
    Model(GPT)                    the network, `Model(config)`, from parts of model.py and its own

doc/extending.md shows how to write one. Finding an architecture's name does not import torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import describe_value
from common.errors import UserError
from config.schema import ArchitectureConfig, ModelConfig
from config.validation import check

if TYPE_CHECKING:
    from model import GPT

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """The names of all architectures."""
    return ["nano", *sorted(path.stem for path in FOLDER.glob("[!_]*.py"))]


def config_class(name: str) -> type[ArchitectureConfig]:
    """The schema of config/model_config.json for this architecture."""
    return ModelConfig if name == "nano" else importlib.import_module(f"models.{name}").Config


def check_config(
    values: Mapping[str, Any], source: str, overrides: Collection[str] = ()
) -> ArchitectureConfig:
    """Check `values` with the schema of the architecture that they name. See `config.validation.check`."""
    name = values.get("architecture", "nano")
    if name not in names():
        where = "--set" if "architecture" in overrides else source
        choices = ", ".join(f'"{choice}"' for choice in names())
        raise UserError(f'{where}: key "architecture": found {describe_value(name)}; needs one of {choices}')
    return check(config_class(name), values, source, overrides)


def build(config: ArchitectureConfig) -> GPT:
    """A new model of this shape. config.vocab_size must be set."""
    if config.architecture == "nano":
        from model import GPT

        return GPT(config)
    return importlib.import_module(f"models.{config.architecture}").Model(config)
