"""Train a model on several devices, each of which holds the whole model (DDP).

    python -m torch.distributed.run --nproc_per_node 4 train_ddp.py -t pretrain
    python -m torch.distributed.run --nproc_per_node 2 train_ddp.py -t sft --resume

Configuration, order of the data, losses and checkpoint files are those of train.py, so a run can be resumed
with any number of devices. They share the global batch of batch_size x gradient_accumulation_steps sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import train
from common.errors import run_launched
from engine.launch import local_rank_and_size

if TYPE_CHECKING:
    from common.hardware import ComputeConfig
    from config.schema import TrainConfig
    from engine.parallel import DataParallel

EXAMPLE = "python -m torch.distributed.run --nproc_per_node 2 train_ddp.py -t pretrain"


def main() -> None:
    args = train.parse_arguments(__doc__ or "")
    train.train_launched(args, strategy, local_rank_and_size(EXAMPLE))


def strategy(config: TrainConfig, compute: ComputeConfig) -> DataParallel:
    from engine.parallel import DataParallel

    return DataParallel(config.backend, compute)


if __name__ == "__main__":
    run_launched(main)
