"""Train a model on several devices at once, each of which holds all of it (DDP).

    python -m torch.distributed.run --nproc_per_node 4 train_ddp.py -t pretrain
    python -m torch.distributed.run --nproc_per_node 2 train_ddp.py -t sft --resume

Configuration, data order, losses and checkpoint files are those of train.py: a run can go on with any
number of devices. The global batch, batch_size x gradient_accumulation_steps, is divided among them.
"""

import os

import train
from config.schema import ModelConfig, TrainConfig
from engine import log
from engine.config import load
from engine.errors import UserError, run


def main():
    args = train.parse_arguments(__doc__)
    if "RANK" not in os.environ:
        raise UserError(
            "this needs a launcher, here for two processes: "
            "python -m torch.distributed.run --nproc_per_node 2 train_ddp.py -t pretrain"
        )
    if args.plan:
        raise UserError("--plan is for one device: python train.py --plan")
    rank, local_rank, local_world = (int(os.environ[n]) for n in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if rank:
        log.mute()
    config = load(TrainConfig, args.config, args.set)
    model_config = load(ModelConfig, args.model, args.set)
    from engine import hardware
    from engine.parallel import DataParallel

    choice = hardware.prepare(config, (local_rank, local_world))
    with DataParallel(config.backend, choice) as parallel:
        train.train(train.text_job(args, config, model_config, choice), parallel)


if __name__ == "__main__":
    run(main)
