"""Estimate what a run needs before it starts: size, memory, speed and time (`train.py --plan`)."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

import models
from common import hardware
from common.errors import UserError, is_out_of_memory
from common.metrics import duration
from config.schema import number
from engine.speed import Speedometer

if TYPE_CHECKING:
    from common.hardware import ComputeConfig
    from config.schema import ArchitectureConfig, TrainConfig
    from config.stages import Stage
    from data import BatchSource
    from engine.setup import TrainSetup
    from model import GPT

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class RunEstimate:
    """The numbers that follow from a run's configuration, its data and its machine.

    train, val: the sources of its batches. Without them, only memory can be estimated.
    """

    def __init__(
        self,
        stage: Stage,
        config: TrainConfig,
        compute: ComputeConfig,
        model: GPT,
        train: BatchSource | None = None,
        val: Sequence[BatchSource] = (),
    ):
        self.stage, self.config, self.compute, self.model = stage, config, compute, model
        self.val = val
        self._train = train
        self.flops_per_token = model.flops_per_token()

    @property
    def train(self) -> BatchSource:
        assert self._train, "the estimate was made without the data"
        return self._train

    @classmethod
    def of(cls, setup: TrainSetup) -> RunEstimate:
        """The estimate for a TrainSetup (engine/setup.py)."""
        return cls(setup.stage, setup.config, setup.compute, setup.model, setup.train, setup.val)

    @property
    def steps_per_epoch(self) -> float:
        return self.train.sequences_per_epoch / self.train.batch_size

    def header(self) -> dict[str, Any]:
        """The log's first line: the configuration and the machine."""
        compute = self.compute
        machine = {"name": compute.name, "torch": compute.machine.torch, "device": compute.device,
                   "dtype": compute.dtype, "sdp_kernel": compute.sdp_kernel}  # fmt: skip
        return {
            "task": self.stage.name,
            "model_config": self.model.config.model_dump(),
            "train_config": self.config.model_dump(mode="json"),
            "machine": machine,
            "n_params": self.model.n_params,
            "flops_per_token": self.flops_per_token,
        }

    def summary(self) -> str:
        """A few lines for the start of a run."""
        max_steps = number(self.config.max_steps)
        steps = f"{max_steps} steps" if max_steps else "until stopped"
        if max_steps and self.steps_per_epoch < math.inf:
            steps += f" = {max_steps / self.steps_per_epoch:.1f} epochs"
        size, flops = self.model.n_params / 1e6, self.flops_per_token / 1e6
        lines = [
            f"{self.stage.name} {size:.2f} M parameters, {flops:.1f} MFLOP a token",
            f"data {self.train.description}; {steps}",
        ]
        n_sequences = max_steps * self.train.batch_size or math.inf
        lines += [f"data {note}" for note in self.train.notes(n_sequences)]
        lines += [f"validation {note}" for source in self.val for note in source.notes(n_sequences)]
        return "\n".join(lines)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """The validation loss in a unit that does not depend on the tokenizer."""
        sizes = [(source.loss_weight, source.text_size) for source in self.val if source.text_size]
        n_bytes = sum(weight * n_bytes / n_tokens for weight, (n_tokens, n_bytes) in sizes)
        return nats_per_token / math.log(2) * (sum(weight for weight, _ in sizes) / n_bytes)

    def memory(self, batch_size: int | None = None) -> dict[str, float]:
        """Memory on the device in training, {part: bytes}. batch_size: the run's if None.

        Activations, which the backward pass needs, are counted from the shapes. This is an estimate, because
        kernels keep copies of their own.
        """
        c = self.model.config
        parameters = self.model.n_params
        weight = 4 if self.compute.autocast else BYTES[self.compute.dtype]
        tokens = (batch_size or number(self.config.batch_size)) * c.block_size
        costs = self.model.costs(c.block_size, training=True)
        keeps_scores = self.compute.sdp_kernel == "math" or (
            self.model.custom_kernels and c.block_size >= 256
        )
        numbers = costs.activations + costs.attention_scores * keeps_scores
        per_token = numbers * BYTES[self.compute.dtype] + 3 * 4 * c.vocab_size + 2 * 4 * c.n_embd
        return {
            "weights": parameters * weight,
            "gradients": parameters * weight,
            "optimizer": n_moments(self.model, self.config.optimizer) * weight,
            "activations": tokens * per_token,
        }

    @property
    def checkpoint_bytes(self) -> float:
        """About the size of a checkpoint: weights and optimizer state."""
        sizes = self.memory()
        return sizes["weights"] + sizes["optimizer"]

    def memory_per_process(self, world: int) -> dict[str, float]:
        """{strategy: bytes of weights, gradients and optimizer state in each of `world` processes}.

        Rajbhandari et al. 2020 (ZeRO), figure 1. With DeepSpeed, the optimizer state includes a copy of the
        weights, in float32, too. doc/several_machines.md compares these formulas with measurements.
        """
        sizes = self.memory()
        weights, gradients, moments = sizes["weights"], sizes["gradients"], sizes["optimizer"]
        optimizer = weights + moments
        return {
            "DDP": weights + gradients + moments,
            "ZeRO-1": weights + gradients + optimizer / world,
            "ZeRO-2": weights + (gradients + optimizer) / world,
            "ZeRO-3": (weights + gradients + optimizer) / world,
        }

    def exchange_seconds(self, world: int, link: float) -> float:
        """Seconds to sum the gradients of `world` processes over a link of `link` Gbit/s.

        In a ring all-reduce, each process sends and receives 2 (N - 1) / N times the size of the gradients
        (Patarasuk & Yuan 2009).
        """
        return 2 * (world - 1) / world * self.memory()["gradients"] * 8 / (link * 1e9)

    def speed_up(self, world: int, link: float, seconds: float) -> tuple[float, float]:
        """(least, most): how much faster `world` processes are than one.

        seconds: what a step takes with one process. Least: gradients are exchanged after the backward pass.
        Most: the exchange overlaps with the backward pass of the last micro-batch, which takes two thirds of
        that micro-batch's time.
        """
        exchange, computing = self.exchange_seconds(world, link), seconds / world
        micro_batches = max(1, number(self.config.gradient_accumulation_steps) / world)
        hidden = min(exchange, computing / micro_batches * 2 / 3)
        return seconds / (computing + exchange), seconds / (computing + exchange - hidden)

    def largest_batch(self) -> int | None:
        """The largest batch_size that leaves a tenth of the device's memory free, by the estimate.

        0 if none does, None if the device's memory is unknown.
        """
        if not self.compute.memory:
            return None
        fixed = sum(self.memory(1).values()) - self.memory(1)["activations"]
        return max(0, int((0.9 * self.compute.memory - fixed) // self.memory(1)["activations"]))

    @property
    def too_large(self) -> str | None:
        """A warning if by the estimate the run does not fit in the device's memory, else None."""
        needs, available, fits = sum(self.memory().values()), self.compute.memory, self.largest_batch()
        if fits is None or fits >= number(self.config.batch_size) or not available or needs <= available:
            return None
        return (
            f"by estimate this needs {format_gib(needs)} of memory, and there are {format_gib(available)}: "
            f"batch_size {fits} would fit"
        )

    @contextlib.contextmanager
    def advice_when_out_of_memory(self) -> Iterator[None]:
        """Turn an out-of-memory error into a UserError that says what to lower."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            fits = self.largest_batch()
            batch_size = number(self.config.batch_size)
            would = f" By estimate batch_size {fits} fits." if fits and fits < batch_size else ""
            raise UserError(
                f"out of memory with batch_size {batch_size} and block_size "
                f"{self.model.config.block_size}.{would} Lower batch_size and raise "
                "gradient_accumulation_steps by the same factor: the result stays the same."
            ) from None


def n_moments(model: GPT, optimizer: str) -> int:
    """Size of the optimizer state: AdamW keeps two numbers per parameter, Muon one per matrix parameter."""
    return 2 * model.n_params - (model.n_matrix_params if optimizer == "muon" else 0)


def check_model_fits(shape: ArchitectureConfig, compute: ComputeConfig, optimizer: str = "adamw") -> None:
    """Raises UserError if weights, gradients and optimizer state alone do not fit in the device's memory."""
    with torch.device("meta"):
        model = models.build(shape)
    numbers = 2 * model.n_params + n_moments(model, optimizer)
    needs = numbers * (4 if compute.autocast else BYTES[compute.dtype])
    if compute.memory and needs > compute.memory:
        raise UserError(
            f"a model of {model.n_params:,} parameters needs {format_gib(needs)} of memory in training, and "
            f"there are {format_gib(compute.memory)}; lower n_layer or n_embd"
        )


def print_plan(
    estimate: RunEstimate, one_step: Callable[[], tuple[int, ...]], world: int, link: float
) -> None:
    """Print the estimates above, and this machine's speed, measured on a few real steps.

    one_step: does a step, waits for its end, and returns the shape of its batch. world: plan for this many
    machines of the same kind. link: Gbit/s between them.
    """
    config, model, compute = estimate.config, estimate.model, estimate.compute
    console = Console(highlight=False)
    with console.status("measuring ..."), estimate.advice_when_out_of_memory():
        peak = hardware.measure_matmul_flops(compute.device, compute.dtype)
        one_step()  # the first step also loads libraries
        speed = Speedometer(model)
        began = time.perf_counter()
        while speed.steps < 3 or (speed.steps < 50 and time.perf_counter() - began < 3):
            speed.add(one_step())
        seconds = (time.perf_counter() - began) / speed.steps
        flops, tokens = speed.flops / speed.steps / seconds, speed.tokens / speed.steps / seconds
    c, memory, n_steps = model.config, estimate.memory(), estimate.steps_per_epoch
    needed = [
        f"{format_gib(size)} {part}" for part, size in {**memory, "in all": sum(memory.values())}.items()
    ]
    if compute.memory:
        needed[-1] += f" of {format_gib(compute.memory)}; batch_size up to {estimate.largest_batch()} fits"
    rows = [
        ("model", f"{c.architecture}: {c.n_layer} layers, width {c.n_embd}, {c.n_head} heads"
                  f"{f' ({c.n_kv_head} key/value)' if hasattr(c, 'n_kv_head') else ''}, "
                  f"context {c.block_size}, vocabulary {c.vocab_size}"),
        ("parameters", f"{model.n_params:,}"),
        ("FLOPs per token", f"{estimate.flops_per_token:,} (training)"),
        ("chosen", "\n".join(compute.reasons)),
        ("memory, estimated", "\n".join(needed)),
        ("data", estimate.train.description + (f" = {n_steps:,.1f} steps" if n_steps < math.inf else "")),
        ("speed, measured", f"{1000 * seconds:.0f} ms a step, {tokens:,.0f} tokens/s\n"
                            f"{flops / 1e9:,.1f} GFLOP/s = {flops / peak:.0%} of a matrix product here "
                            f"({peak / 1e9:,.0f} GFLOP/s in {compute.dtype})"),
    ]  # fmt: skip
    if n_steps < math.inf:
        rows.append(("time for an epoch", duration(n_steps * seconds)))
    if max_steps := number(config.max_steps):
        rows.append((f"time for {max_steps} steps", duration(max_steps * seconds)))
    if world > 1:
        exchange, computing = estimate.exchange_seconds(world, link), seconds / world
        least, most = estimate.speed_up(world, link, seconds)
        sizes = "\n".join(f"{format_gib(n)} {name}" for name, n in estimate.memory_per_process(world).items())
        rows += [
            (f"{world} of them, {link:g} Gbit/s",
             f"{computing * 1000:.0f} ms of computing a step, {exchange * 1000:.0f} ms to exchange "
             f"{memory['gradients'] / 2**20:,.1f} MiB of gradients\n"
             f"{least:.2f} to {most:.2f} times as fast as one"),
            ("memory in each, without\nactivations", sizes),
        ]  # fmt: skip
    table = Table(title=f"plan: {estimate.stage.name}", show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def format_gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
