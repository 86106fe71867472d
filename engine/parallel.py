"""How a run is distributed over processes. The loop in train.py is the same for all strategies:

    SingleProcess      one process: train.py, problem.py
    DataParallel       one process per device, each with the whole model (DDP): train_ddp.py
    Zero               also shards optimizer state, gradients and weights (ZeRO): engine/zero.py

All processes read the same global batch, and each computes its own `rows` of it. The gradient is the sum over
all rows, wherever they were computed. So the number of processes changes only the speed: the order of the
data, the losses (up to rounding) and the checkpoint files stay the same.

A strategy wraps the module that computes the loss, assigns rows to processes, and reduces and gathers values.
The rest of a training step is in train.py.
"""

import contextlib
import datetime
import math
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from common.errors import UserError
from common.hardware import ComputeConfig
from config.resolved import ResolvedTrainConfig
from engine.heartbeat import Heartbeat

warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # its replacement is too new
RETRY_AFTER = datetime.timedelta(seconds=5)
TIMEOUT = datetime.timedelta(minutes=30)  # one process may spend a long time on a validation or a checkpoint
T = TypeVar("T")


class SingleProcess:
    """One process. The other strategies are subclasses, which override what differs."""

    rank, world_size = 0, 1
    muon: Any = None  # the class of Muon for this strategy's parameters; None: engine/optimizer.py's

    # ---- values of several processes

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """What make() returns on rank 0. It is called only there: other machines may lack the files."""
        return make()

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        return [value]

    def assert_same_on_all_ranks(self, values: dict[str, Any]) -> None:
        """Raises UserError if one of these plain values differs on any rank, naming the machine."""

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Each number summed over all processes, between the hosts: without waiting for the devices."""
        return [float(value) for value in values]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the device, summed over all processes, without waiting for the result."""
        return tensor

    # ---- the launcher

    def tell_launcher(self, run: str) -> None:
        """Tell the launcher the run's name, so that processes that it restarts can continue the run."""

    def restarted_run(self) -> str | None:
        """The name of the run that this launcher started before a restart; None if there was none."""
        return None

    # ---- training

    def rows(self, config: ResolvedTrainConfig) -> range:
        """This process's rows of the global batch. The step of the range is the size of a micro-batch."""
        global_batch = config.batch_size * config.gradient_accumulation_steps
        share, rest = divmod(global_batch, self.world_size)
        if rest:
            raise UserError(
                f"the global batch, batch_size {config.batch_size} x gradient_accumulation_steps "
                f"{config.gradient_accumulation_steps} = {global_batch}, does not divide by "
                f"{self.world_size} processes"
            )
        micro_batch = next(size for size in range(min(config.batch_size, share), 0, -1) if share % size == 0)
        return range(self.rank * share, (self.rank + 1) * share, micro_batch)

    def wrap(
        self, module: Any, optimizer: Any, config: ResolvedTrainConfig, compute: ComputeConfig
    ) -> tuple[Any, Any]:
        """The module to call in training, and the optimizer to step."""
        return (torch.compile(module) if config.compile else module), optimizer

    def begin_step(self, step: int) -> None:
        """Called when this process begins a step; the first is 1."""

    def micro_batch(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """A context for one forward and backward pass. is_last: whether it is the last one of its step."""
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of the loss, summed over all processes."""
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        """Clip the gradients in place, unless max_norm is 0. Returns their norm before clipping."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)

    def whole_model(self, model: Any) -> Any:
        """The model with all of its weights, for this process to call on its own; None if it has only a part.

        Rank 0 always has one. All processes must call it.
        """
        return model

    # ---- checkpoints

    def load_optimizer(self, optimizer: Any, state: dict[int, dict[str, torch.Tensor]]) -> None:
        """Restore the optimizer's tensors of each parameter. Its settings are the configuration's."""
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def state_dicts(self, model: Any, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """State dictionaries of model and optimizer, gathered on rank 0; other ranks may return less."""
        return model.state_dict(), optimizer.state_dict()


def wait_for_name(host: str, seconds: float = 60) -> Any:
    """Wait until the name of rank 0's machine can be resolved. PyTorch would wait without a message."""
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.getaddrinfo(host, None)
        except (OSError, UnicodeError):
            if time.monotonic() > until:
                raise UserError(
                    f"MASTER_ADDR is {host[:100]!r}, and {socket.gethostname()} cannot resolve this name; "
                    "use its IP address"
                ) from None
            time.sleep(1)


class DataParallel(SingleProcess):
    """Every process has the whole model (DDP). Gradients are all-reduced only during the backward pass of the
    last micro-batch of a step (Li et al. 2020, "PyTorch Distributed", section 3.2)."""

    launcher_store: Any = None  # the launcher's key-value store, which outlives the processes

    def __init__(self, backend: str, compute: ComputeConfig):
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = compute.device
        if compute.device_type == "cuda":
            torch.cuda.set_device(compute.device)
        automatic = "nccl" if compute.device_type == "cuda" else "gloo"
        backend = automatic if backend == "auto" else backend
        wait_for_name(os.environ["MASTER_ADDR"])
        self.heartbeat = Heartbeat(self.rank, self.world_size)
        dist.init_process_group(
            backend, store=self._store(), rank=self.rank, world_size=self.world_size, timeout=TIMEOUT
        )
        # Plain numbers are reduced with gloo: NCCL would have to wait for the devices.
        self.hosts = dist.new_group(backend="gloo", timeout=TIMEOUT) if backend == "nccl" else None

    def _store(self) -> Any:
        """The key-value store through which the processes find each other; None for PyTorch's default.

        The store of torch.distributed.run outlives the processes. After a restart it still holds addresses of
        processes that have ended, and PyTorch 2.13 connects to those. So rank 0 opens a new store each time,
        and the launcher's store only passes on its address.
        """
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.launcher_store = launcher = dist.TCPStore(*address, is_master=False, timeout=TIMEOUT)
        if not self.rank:
            with socket.create_connection(address) as connection:
                host = connection.getsockname()[0]  # how the others reach this machine
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
            launcher.set("first process", f"{host} {store.port}")
            return store
        until = time.monotonic() + TIMEOUT.total_seconds()
        while True:
            host, port = launcher.get("first process").decode().split()
            try:
                store = dist.TCPStore(host, int(port), is_master=False, timeout=RETRY_AFTER)
                store.set_timeout(TIMEOUT)
                return store
            except dist.DistError:  # the address of a process that has ended
                if time.monotonic() > until:
                    raise

    def tell_launcher(self, run: str) -> None:
        if self.launcher_store:
            self.launcher_store.set("run", run)

    def restarted_run(self) -> str | None:
        if self.launcher_store:
            return self.launcher_store.get("run").decode() if self.launcher_store.check(["run"]) else None
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            raise UserError(
                "this launcher restarts processes but cannot tell them which run to continue: "
                "start it again with --resume RUN"
            )
        return None

    def __enter__(self) -> "DataParallel":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if not kind:
            dist.barrier()  # no process leaves while another one still needs it ...
            self.heartbeat.stop()
            dist.barrier()  # ... or the store, which may be in rank 0
        elif issubclass(kind, RuntimeError) and re.search("gloo|nccl|peer", str(error), re.IGNORECASE):
            raise UserError("the connection to another process of this run was lost") from None

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        made: list[Any] = [None if self.rank else make()]
        dist.broadcast_object_list(made)
        return made[0]

    def all_gather(self, value: T) -> list[T]:
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value)
        return everyone

    def assert_same_on_all_ranks(self, values: dict[str, Any]) -> None:
        everyone = self.all_gather((socket.gethostname(), values))
        for rank, (host, theirs) in enumerate(everyone):
            for name, value in everyone[0][1].items():
                if theirs[name] != value:
                    raise UserError(
                        f"process {rank} on {host} differs from the first one: {name} is "
                        f"{theirs[name]} there and {value} here; copy configuration and data to all machines"
                    )

    def all_reduce_sum(self, *values: float) -> list[float]:
        total = torch.tensor([float(value) for value in values], dtype=torch.float64)
        dist.all_reduce(total, group=self.hosts)
        return total.tolist()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    def wrap(
        self, module: Any, optimizer: Any, config: ResolvedTrainConfig, compute: ComputeConfig
    ) -> tuple[Any, Any]:
        module, optimizer = super().wrap(module, optimizer, config, compute)
        devices = [torch.device(compute.device)] if compute.device_type == "cuda" else None
        # Buffers change in the same way in all processes, so they need not be sent in every pass.
        self.ddp = torch.nn.parallel.DistributedDataParallel(
            module, device_ids=devices, broadcast_buffers=False
        )
        return self.ddp, optimizer

    def begin_step(self, step: int) -> None:
        self.heartbeat.step = step

    def micro_batch(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if is_last else self.ddp.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss * self.world_size)  # DDP averages over the processes
