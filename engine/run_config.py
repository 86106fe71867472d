"""The configuration of a run, from the command line."""

from __future__ import annotations

import argparse

from common.config import display_path, read_json
from common.errors import UserError
from config.schema import ArchitectureConfig, TrainConfig
from config.validation import load, renamed
from models import check_config


def load_run(args: argparse.Namespace) -> tuple[TrainConfig, ArchitectureConfig]:
    """Read the files of --config and --model, with the overrides of --set.

    A key of --set that is not one of the training configuration belongs to the model. Raises UserError.
    """
    overrides = renamed(TrainConfig, args.set, "--set")
    config = load(TrainConfig, args.config, overrides)
    for part in config.mixture:
        if part.task:
            import tasks

            tasks.parse(part.task)  # a name that does not exist is told before torch is imported
    others = {k: v for k, v in overrides.items() if k not in TrainConfig.model_fields}
    shape = read_json(args.model)
    # The model's configuration used to have this key, too.
    if shape.pop("dropout", config.dropout) != config.dropout:
        raise UserError(
            f'{display_path(args.model)}: key "dropout" belongs to the run: remove it here, and set it in '
            f"{display_path(args.config)}, where it is {config.dropout}"
        )
    return config, check_config({**shape, **others}, display_path(args.model), others)
