"""How a run is spread over processes. The loop of train.py is the same for all of them.

    SingleProcess      one process: train.py, problem.py
    DataParallel       one process per device, each with the whole model (DDP): train_ddp.py
    Zero               the same with weights, gradients and optimizer state spread out: engine/zero.py

Every process draws the same global batch and computes its own `rows` of it, and the gradient is the sum over
all rows, wherever they were computed. So the number of processes changes how fast a run is and nothing else:
data order, losses (up to rounding) and checkpoint files stay the same.

A strategy wraps the module that computes the loss, says which rows are its own, reduces and gathers. The rest
of a training step is in train.py.
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
from config.schema import TrainConfig
from engine.heartbeat import Heartbeat

warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # its replacement is too new
RETRY_AFTER = datetime.timedelta(seconds=5)
TIMEOUT = datetime.timedelta(minutes=30)  # one process may take long over a validation or a checkpoint
T = TypeVar("T")


class SingleProcess:
    rank, world_size = 0, 1
    muon: Any = None  # the class of Muon that works on this strategy's parameters; None: the usual one

    # ---- one value for all processes

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """What make() returns on rank 0, for all: other machines may lack its files."""
        return make()

    def all_gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of the ranks."""
        return [value]

    def assert_same_on_all_ranks(self, values: dict[str, Any]) -> None:
        """Raises UserError naming the first machine where one of these plain values differs."""

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Each number summed over all processes. Waits for the other hosts, not for the devices."""
        return [float(value) for value in values]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the device, summed over all processes, without waiting for it."""
        return tensor

    # ---- the launcher

    def tell_launcher(self, run: str) -> None:
        """Tell the launcher the run's name, so that processes it restarts can go on with it."""

    def restarted_run(self) -> str | None:
        """The name of the run this launcher has started before; None: it has not."""
        return None

    # ---- training

    def rows(self, config: TrainConfig) -> range:
        """This process's rows of the global batch; the step of the range is the size of a micro-batch."""
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
        self, module: Any, optimizer: Any, config: TrainConfig, compute: ComputeConfig
    ) -> tuple[Any, Any]:
        """(the module to call in training, the optimizer to step with)"""
        return (torch.compile(module) if config.compile else module), optimizer

    def begin_step(self, step: int) -> None:
        """Tell the others that this process begins this step; the first is 1."""

    def micro_batch(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """A context for one forward and backward pass; is_last: the last one of its step."""
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of the loss, which are summed over all processes."""
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        """Clip the gradients in place; max_norm 0: do not. Returns their norm before that."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)

    # ---- checkpoints

    def load_optimizer(self, optimizer: Any, state: dict[int, dict[str, torch.Tensor]]) -> None:
        """Put back what the optimizer kept of each parameter. Its settings stay those of the
        configuration."""
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def state_dicts(self, model: Any, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(of the model, of the optimizer), gathered on rank 0; other ranks may return less."""
        return model.state_dict(), optimizer.state_dict()


def wait_for_name(host: str, seconds: float = 60) -> Any:
    """Wait until this machine can resolve the first machine's name; PyTorch would wait without a word."""
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
    """Every process has the whole model. Gradients are exchanged during the backward pass of the last
    micro-batch of a step only (Li et al. 2020, "PyTorch Distributed", section 3.2)."""

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
        # Plain numbers travel between the hosts: through NCCL they would have to wait for the devices.
        self.hosts = dist.new_group(backend="gloo", timeout=TIMEOUT) if backend == "nccl" else None

    def _store(self) -> Any:
        """The key-value store through which the processes find each other; None: PyTorch's default.

        torch.distributed.run has a store that outlives the processes. After a restart it still holds the
        addresses of the processes that have ended, and PyTorch 2.13 connects to those. So rank 0 opens a new
        store each time, and only its address goes through the launcher's.
        """
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.launcher_store = launcher = dist.TCPStore(*address, is_master=False, timeout=TIMEOUT)
        if not self.rank:
            with socket.create_connection(address) as connection:
                host = connection.getsockname()[0]  # the address under which the others reach this machine
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
                "this launcher restarts processes but cannot tell them which run they had: "
                "start it again with --resume RUN"
            )
        return None

    def __enter__(self) -> "DataParallel":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if not kind:
            dist.barrier()  # nobody leaves while another process still needs it ...
            self.heartbeat.stop()
            dist.barrier()  # ... or needs the store, which may live in rank 0
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
        self, module: Any, optimizer: Any, config: TrainConfig, compute: ComputeConfig
    ) -> tuple[Any, Any]:
        module, optimizer = super().wrap(module, optimizer, config, compute)
        devices = [torch.device(compute.device)] if compute.device_type == "cuda" else None
        # Buffers change in the same way in all processes: no need to send them with every pass.
        self.ddp = torch.nn.parallel.DistributedDataParallel(
            module, device_ids=devices, broadcast_buffers=False
        )
        return self.ddp, optimizer

    def begin_step(self, step: int) -> None:
        self.heartbeat.step = step

    def micro_batch(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if is_last else self.ddp.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss * self.world_size)  # DDP takes the mean over the processes
