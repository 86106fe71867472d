"""Train a model on several devices at once, each of which holds all of it (DDP).

    python -m torch.distributed.run --nproc_per_node 4 train_ddp.py -t pretrain
    python -m torch.distributed.run --nproc_per_node 2 train_ddp.py -t sft --resume

Configuration, data order, losses and checkpoint files are those of train.py: a run can go on with any
number of devices. The global batch, batch_size x gradient_accumulation_steps, is divided among them.
"""

import train
from common.errors import run_launched
from engine.launch import launched_place

EXAMPLE = "python -m torch.distributed.run --nproc_per_node 2 train_ddp.py -t pretrain"


def main():
    args = train.parse_arguments(__doc__)
    train.train_launched(args, strategy, launched_place(EXAMPLE))


def strategy(config, compute):
    from engine.parallel import DataParallel

    return DataParallel(config.backend, compute)


if __name__ == "__main__":
    run_launched(main)
