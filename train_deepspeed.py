"""Train a model whose weights, gradients or moments are spread over several devices (DeepSpeed ZeRO).

    deepspeed train_deepspeed.py -t pretrain
    deepspeed train_deepspeed.py -t pretrain --deepspeed_config config/deepspeed_zero3.json
    deepspeed --hostfile=config/hostfile.txt train_deepspeed.py -t pretrain
    deepspeed --num_gpus 2 train_deepspeed.py -t sft --resume

Configuration, data order, losses and checkpoint files are those of train.py: a run can go on with any
number of devices, with or without DeepSpeed. The stage of ZeRO, and what is offloaded to the CPU, is
read from DeepSpeed's own file. Without a GPU, write `DS_ACCELERATOR=cpu deepspeed --num_gpus 2 ...`.
"""

import train
from config.schema import DeepSpeedConfig
from engine.config import find, load, shown
from engine.errors import run

EXAMPLE = "deepspeed --num_gpus 2 train_deepspeed.py -t pretrain"


def main():
    args = train.parse_arguments(__doc__, more_arguments)
    train.enter_launch(EXAMPLE)
    path = find(args.deepspeed_config)
    settings = load(DeepSpeedConfig, path)

    def strategy(config, choice):
        from engine.zero import Zero

        return Zero(settings, shown(path), config.backend, choice)

    train.main_launched(args, strategy)


def more_arguments(parser):
    # fmt: off
    parser.add_argument("--deepspeed_config", default="config/deepspeed_config.json", metavar="FILE",
                        help="DeepSpeed's settings (default: %(default)s)")
    parser.add_argument("--deepspeed", action="store_true", help="may be given, as to other scripts")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    # fmt: on


if __name__ == "__main__":
    run(main)
