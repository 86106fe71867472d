"""Train with optimizer state, gradients or weights sharded over several devices (DeepSpeed ZeRO).

    deepspeed train_deepspeed.py -t pretrain
    deepspeed train_deepspeed.py -t pretrain --deepspeed_config config/deepspeed_zero3.json
    deepspeed --hostfile=config/hostfile.txt train_deepspeed.py -t pretrain
    deepspeed --num_gpus 2 train_deepspeed.py -t sft --resume
    python train_deepspeed.py -t pretrain --convert checkpoint/ds

Configuration, order of the data, losses and checkpoint files are those of train.py, so a run can be resumed
with any number of devices, with or without DeepSpeed. The stage of ZeRO, and what is offloaded to the CPU,
is set in DeepSpeed's own file.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import train
from common.config import display_path, resolve_path
from common.errors import UserError, run_launched
from common.packages import require
from config.schema import DeepSpeedConfig
from config.validation import load
from engine.launch import local_rank_and_size
from engine.run_config import load_run

if TYPE_CHECKING:
    from common.hardware import ComputeConfig
    from config.schema import TrainConfig
    from engine.zero import Zero

EXAMPLE = "deepspeed --num_gpus 2 train_deepspeed.py -t pretrain"


def main() -> None:
    args = train.parse_arguments(__doc__ or "", add_arguments)
    require("deepspeed")
    if args.convert:
        return convert(args)
    local = local_rank_and_size(EXAMPLE)
    if args.hostfile:
        check_hosts(resolve_path(args.hostfile))
    path = resolve_path(args.deepspeed_config)
    settings = load(DeepSpeedConfig, path)

    def strategy(config: TrainConfig, compute: ComputeConfig) -> Zero:
        os.environ.setdefault("DS_ACCELERATOR", compute.device_type)
        from engine.zero import Zero

        return Zero(settings, display_path(path), config.backend, compute)

    train.train_launched(args, strategy, local, loss_scaling=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.add_argument("--deepspeed_config", default="config/deepspeed_config.json", metavar="FILE",
                        help="DeepSpeed's settings (default: %(default)s)")
    parser.add_argument("--convert", metavar="FOLDER",
                        help="do not train: convert a folder written by DeepSpeed to an ordinary checkpoint")
    parser.add_argument("--deepspeed", action="store_true", help="no effect; other scripts need it")
    parser.add_argument("--hostfile", help="belongs before the script's name, for the launcher")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    # fmt: on


def check_hosts(path: Path) -> None:
    """Raises UserError if the launcher has not read this --hostfile, and so started fewer processes."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{display_path(path)} cannot be read, or is not text") from None
    wanted, started = 0, int(os.environ["WORLD_SIZE"])
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            if not (found := re.match(r"\S+\s+slots=([0-9]{1,5})(?!\S)", line)):
                raise UserError(f"{display_path(path)}, line {number}: write it as HOST slots=N")
            wanted += int(found[1])
    if wanted != started:
        raise UserError(
            f"{display_path(path)} has {wanted} slots, but {started} processes were started: the launcher "
            "reads it only before the script's name: "
            f"deepspeed --hostfile={display_path(path)} train_deepspeed.py ..."
        )


def convert(args: argparse.Namespace) -> None:
    """Convert a folder written by DeepSpeed (--convert)."""
    config, model_config = load_run(args)
    os.environ["DS_ACCELERATOR"] = "cpu"
    from engine import zero
    from formats import load_tokenizer

    tokenizer = load_tokenizer(resolve_path(config.tokenizer_path))
    shape = model_config.resolved(tokenizer.vocab_size)
    path = zero.convert(resolve_path(args.convert), args.stage, config, shape, tokenizer)
    print(f"Written: {display_path(path)}")
    print(f"Try it: python inference.py -m {display_path(path)}")


if __name__ == "__main__":
    run_launched(main)
