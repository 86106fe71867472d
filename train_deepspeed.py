"""Train with weights, gradients or optimizer state spread over several devices (DeepSpeed ZeRO).

    deepspeed train_deepspeed.py -t pretrain
    deepspeed train_deepspeed.py -t pretrain --deepspeed_config config/deepspeed_zero3.json
    deepspeed --hostfile=config/hostfile.txt train_deepspeed.py -t pretrain
    deepspeed --num_gpus 2 train_deepspeed.py -t sft --resume
    python train_deepspeed.py -t pretrain --convert checkpoint/ds

Configuration, data order, losses and checkpoint files are those of train.py: a run can go on with any
number of devices, with or without DeepSpeed. The stage of ZeRO, and what is offloaded to the CPU, is
read from DeepSpeed's own file.
"""

import os
import re

import train
from common.config import find, load, load_run, shown
from common.errors import UserError, run_launched
from common.packages import require
from config.schema import DeepSpeedConfig
from engine.launch import launched_place

EXAMPLE = "deepspeed --num_gpus 2 train_deepspeed.py -t pretrain"


def main():
    args = train.parse_arguments(__doc__, more_arguments)
    require("deepspeed")
    if args.convert:
        return convert(args)
    place = launched_place(EXAMPLE)
    if args.hostfile:
        check_hosts(find(args.hostfile))
    path = find(args.deepspeed_config)
    settings = load(DeepSpeedConfig, path)

    def strategy(config, compute):
        os.environ.setdefault("DS_ACCELERATOR", compute.device_type)
        from engine.zero import Zero

        return Zero(settings, shown(path), config.backend, compute)

    train.train_launched(args, strategy, place, loss_scaling=False)


def more_arguments(parser):
    # fmt: off
    parser.add_argument("--deepspeed_config", default="config/deepspeed_config.json", metavar="FILE",
                        help="DeepSpeed's settings (default: %(default)s)")
    parser.add_argument("--convert", metavar="FOLDER",
                        help="no training: make an ordinary checkpoint of a folder written by DeepSpeed")
    parser.add_argument("--deepspeed", action="store_true", help="has no effect; other scripts need it")
    parser.add_argument("--hostfile", help="for the launcher: give it before the script's name")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    # fmt: on


def check_hosts(path):
    """Refuse a --hostfile that the launcher has not seen, rather than train on fewer machines than asked."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{shown(path)} cannot be read, or is no text") from None
    wanted, started = 0, int(os.environ["WORLD_SIZE"])
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            if not (found := re.match(r"\S+\s+slots=([0-9]{1,5})(?!\S)", line)):
                raise UserError(f"{shown(path)}, line {number}: write it as HOST slots=N")
            wanted += int(found[1])
    if wanted != started:
        raise UserError(
            f"{shown(path)} has {wanted} slots, but {started} processes were started: the launcher reads it "
            f"only before the script's name: deepspeed --hostfile={shown(path)} train_deepspeed.py ..."
        )


def convert(args):
    config, model_config = load_run(args)
    os.environ["DS_ACCELERATOR"] = "cpu"
    from engine import zero
    from formats import load_tokenizer

    tokenizer = load_tokenizer(find(config.tokenizer_path))
    shape = model_config.resolved(tokenizer.vocab_size)
    path = zero.convert(find(args.convert), args.task, config, shape, tokenizer)
    print(f"Written: {shown(path)}")
    print(f"Try it: python inference.py -m {shown(path)}")


if __name__ == "__main__":
    run_launched(main)
