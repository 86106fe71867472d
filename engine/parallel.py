"""How a run is spread over processes. The loop of train.py is the same for all; what differs is here.

    SingleProcess()            one process: train.py, problem.py
    DataParallel()     one process a device, each with the whole model: train_ddp.py
    Zero()             the same, with weights, gradients and moments spread out: engine/zero.py

Every process draws the same global batch and computes its own rows of it (`rows`), and the gradient is
the sum over all rows, wherever they were computed. So the number of processes changes how fast a run
is, and nothing else: the same data order, the same losses up to rounding, the same checkpoint file.

A strategy has these parts, in the order in which the loop uses them:

    rank, world                      which process this is, of how many
    first(make)                      make() of the first process, for all: others may lack its files
    gather(value) -> list            everybody's value, in the order of their ranks
    agree(facts)                     refuses to start if these are not the same everywhere
    rows(config) -> range            its rows of the global batch; the step of the range is its micro-batch
    prepare(model, config, compute)   builds the optimizer; `forward` is then the model to call in training
    restore(start)                   puts the optimizer's state back
    reached(step)                    tells the others that the loop begins this step, counted from 1
    micro_batch(last)                a context for one forward and backward pass; `last`: of this step
    backward(loss)                   adds its gradients
    step(multiplier, sound) -> norm  clips, updates the weights if the loss was `sound`, clears the gradients;
                                     multiplier: of all peak learning rates
    sum(values) -> values            numbers, each summed over all processes
    states() -> {...}                model, optimizer and scaler as a checkpoint stores them
    hand_on(run)                     the launcher is told the run's name, and tells it to the processes that
    run_of_this_launch() -> run      follow when it brings the run back; None: nothing was handed on
"""

import contextlib
import datetime
import math
import os
import re
import socket
import time
import warnings

import torch
import torch.distributed as dist

from common.errors import UserError
from engine import checkpoint as checkpoints
from engine.heartbeat import Heartbeat
from engine.optimizer import make_optimizer, state_shapes

warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # its successor is too new
PATIENCE = datetime.timedelta(seconds=5)
TIMEOUT = datetime.timedelta(minutes=30)  # one process may be long over a validation or a checkpoint


class SingleProcess:
    rank, world = 0, 1

    def first(self, make):
        return make()

    def gather(self, value):
        return [value]

    def agree(self, facts):
        pass

    def hand_on(self, run):
        pass

    def run_of_this_launch(self):
        return None

    def rows(self, config):
        """Its part of the rows of a global batch, cut into micro-batches of equal size."""
        global_batch = config.batch_size * config.gradient_accumulation_steps
        share, rest = divmod(global_batch, self.world)
        if rest:
            raise UserError(
                f"the global batch, batch_size {config.batch_size} x gradient_accumulation_steps "
                f"{config.gradient_accumulation_steps} = {global_batch}, does not divide by "
                f"{self.world} processes"
            )
        micro_batch = next(size for size in range(min(config.batch_size, share), 0, -1) if share % size == 0)
        return range(self.rank * share, (self.rank + 1) * share, micro_batch)

    def prepare(self, model, config, compute):
        self.model, self.clip = model, config.grad_clip or math.inf
        self.optimizer = make_optimizer(model, config, compute.dtype)
        # float16 underflows: the loss is multiplied up before the backward pass, the gradients down after it.
        self.scaler = torch.amp.GradScaler(compute.device_type, enabled=compute.grad_scaling)
        self.forward = torch.compile(model) if config.compile else model

    def restore(self, start):
        groups = self.optimizer.param_groups
        state = checkpoints.moments(start, [state_shapes(g, p.shape) for g in groups for p in g["params"]])
        try:
            # The optimizer's settings stay those of the configuration.
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
            self.scaler.load_state_dict(start.checkpoint.scaler or self.scaler.state_dict())
        except (ValueError, KeyError, RuntimeError, TypeError):
            raise checkpoints.unfit(start) from None

    def reached(self, step):
        pass

    def micro_batch(self, last):
        return contextlib.nullcontext()

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self, multiplier, sound):
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip))
        if sound and (self.scaler.is_enabled() or math.isfinite(norm)):
            self.scaler.step(self.optimizer)  # skips a step whose float16 gradients overflowed
            self.scaler.update()
        self.clear()
        return norm

    def clear(self):
        self.optimizer.zero_grad(set_to_none=True)

    def sum(self, *values):
        return [float(value) for value in values]

    def states(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }


def wait_for_name(host, seconds=60):
    """Until this machine knows the address of the first one; PyTorch would wait without a word."""
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.getaddrinfo(host, None)
        except (OSError, UnicodeError):
            if time.monotonic() > until:
                raise UserError(
                    f"MASTER_ADDR is {host[:100]!r}, and {socket.gethostname()} cannot find the address of a "
                    f"machine of this name; use its IP address"
                ) from None
            time.sleep(1)


class DataParallel(SingleProcess):
    """Every process has the whole model. Gradients are exchanged while the backward pass goes on, in the last
    micro-batch of a step only (Li et al. 2020, "PyTorch Distributed", section 3.2)."""

    launchers = None  # the launcher's store, which outlives the processes

    def __init__(self, backend, compute):
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = compute.device
        if compute.device_type == "cuda":
            torch.cuda.set_device(compute.device)
        automatic = "nccl" if compute.device_type == "cuda" else "gloo"
        backend = automatic if backend == "auto" else backend
        wait_for_name(os.environ["MASTER_ADDR"])
        self.heartbeat = Heartbeat(self.rank, self.world)
        dist.init_process_group(
            backend, store=self._store(), rank=self.rank, world_size=self.world, timeout=TIMEOUT
        )

    def _store(self):
        """Where the processes find each other; None: PyTorch's own compute.

        torch.distributed.run has a store that outlives the processes. When it brings a run back, the
        addresses of those that have ended still stand in it, and PyTorch 2.13 connects to them. So each
        time the first process opens a store of its own, and only its address goes through the launcher's.
        """
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.launchers = launchers = dist.TCPStore(*address, is_master=False, timeout=TIMEOUT)
        if not self.rank:
            with socket.create_connection(address) as connection:
                host = connection.getsockname()[0]  # by which the others reach this machine
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
            launchers.set("first process", f"{host} {store.port}")
            return store
        until = time.monotonic() + TIMEOUT.total_seconds()
        while True:
            host, port = launchers.get("first process").decode().split()
            try:
                store = dist.TCPStore(host, int(port), is_master=False, timeout=PATIENCE)
                store.set_timeout(TIMEOUT)
                return store
            except dist.DistError:  # that was the address of one that has ended
                if time.monotonic() > until:
                    raise

    def hand_on(self, run):
        if self.launchers:
            self.launchers.set("run", run)

    def run_of_this_launch(self):
        if self.launchers:
            return self.launchers.get("run").decode() if self.launchers.check(["run"]) else None
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            raise UserError(
                "this launcher brings processes back, but cannot tell them which run they had: "
                "start it again with --resume RUN"
            )
        return None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if not kind:
            dist.barrier()  # none leaves while another one still needs it,
            self.heartbeat.stop()
            dist.barrier()  # nor the store, which may be in the first process
        elif issubclass(kind, RuntimeError) and re.search("gloo|nccl|peer", str(error), re.IGNORECASE):
            raise UserError("the connection to another process of this run was lost") from None

    def first(self, make):
        made = [None if self.rank else make()]
        dist.broadcast_object_list(made)
        return made[0]

    def gather(self, value):
        everyone = [None] * self.world
        dist.all_gather_object(everyone, value)
        return everyone

    def agree(self, facts):
        """facts: {name: plain value}. UserError naming the first machine that differs, and in what."""
        everyone = self.gather((socket.gethostname(), facts))
        for rank, (host, theirs) in enumerate(everyone):
            for name, value in everyone[0][1].items():
                if theirs[name] != value:
                    raise UserError(
                        f"process {rank} on {host} differs from the first one: {name} is "
                        f"{theirs[name]} there and {value} here; copy configuration and data to all machines"
                    )

    def prepare(self, model, config, compute):
        super().prepare(model, config, compute)
        devices = [torch.device(compute.device)] if compute.device_type == "cuda" else None
        # What is no parameter changes in all processes alike: it need not be sent with every pass.
        self.spread = torch.nn.parallel.DistributedDataParallel(
            self.forward, device_ids=devices, broadcast_buffers=False
        )
        self.forward = self.spread

    def reached(self, step):
        self.heartbeat.step = step

    def micro_batch(self, last):
        return contextlib.nullcontext() if last else self.spread.no_sync()

    def backward(self, loss):
        super().backward(loss * self.world)  # it takes the mean over the processes

    def sum(self, *values):
        total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()
