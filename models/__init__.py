"""The architectures: model.py's ("nano") and one file each for the others, found by their names.

`architecture` in config/model_config.json names the file. It holds two classes:

    Config(ArchitectureConfig)    its keys, which config/schema.py's class does not have already
    Model(GPT)                    the network, `Model(config)`, made of model.py's parts and its own

doc/extending.md shows how to write one. Names are looked up without importing torch.
"""

import importlib
from pathlib import Path

from config.schema import ModelConfig

FOLDER = Path(__file__).resolve().parent


def names():
    """Of all architectures."""
    return ["nano", *sorted(path.stem for path in FOLDER.glob("[!_]*.py"))]


def config_class(name):
    """The schema of config/model_config.json for one of `names()`."""
    return ModelConfig if name == "nano" else importlib.import_module(f"models.{name}").Config


def build(config):
    """A new model of the shape `config`, whose vocab_size is set."""
    if config.architecture == "nano":
        from model import GPT

        return GPT(config)
    return importlib.import_module(f"models.{config.architecture}").Model(config)
