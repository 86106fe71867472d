"""What a run takes, before it starts: size, memory, speed and time (`train.py --plan`)."""

import contextlib
import math
import time

import torch
from rich.console import Console
from rich.table import Table

import models
from common import hardware
from common.errors import UserError, is_out_of_memory
from common.metrics import duration
from engine.speed import Speedometer

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class RunEstimate:
    """The numbers of a run that follow from its configuration, its data and its machine.

    train, val: the sources of its batches, where they are known already.
    """

    def __init__(self, stage, config, compute, model, train=None, val=()):
        self.stage, self.config, self.compute, self.model = stage, config, compute, model
        self.train, self.val = train, val
        self.flops_per_token = model.flops_per_token()

    @classmethod
    def of(cls, setup):
        """The estimate of a TrainSetup (engine/setup.py)."""
        return cls(setup.stage, setup.config, setup.compute, setup.model, setup.train, setup.val)

    @property
    def steps_per_epoch(self):
        return self.train.sequences_per_epoch / self.train.batch_size

    def header(self):
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

    def summary(self):
        """Two lines for the start of a run."""
        steps = f"{self.config.max_steps} steps" if self.config.max_steps else "until stopped"
        if self.config.max_steps and self.steps_per_epoch < math.inf:
            steps += f" = {self.config.max_steps / self.steps_per_epoch:.1f} epochs"
        size, flops = self.model.n_params / 1e6, self.flops_per_token / 1e6
        lines = [
            f"{self.stage.name} {size:.2f} M parameters, {flops:.1f} MFLOP a token",
            f"data {self.train.description}; {steps}",
        ]
        lines += [f"data {note}" for note in self.train.notes]
        lines += [f"validation {note}" for source in self.val for note in source.notes]
        return "\n".join(lines)

    def bits_per_byte(self, nats_per_token):
        """Loss in a unit that does not depend on the tokenizer."""
        tokens, n_bytes = zip(*(source.text_size for source in self.val), strict=True)
        tokens_per_byte = sum(tokens) / sum(n_bytes)
        return nats_per_token / math.log(2) * tokens_per_byte

    def memory(self, batch_size=None):
        """{part: bytes} on the device while training with this batch_size (default: the run's).

        Weights, gradients and the optimizer's moments per parameter; activations are what the backward
        pass needs again, counted from the shapes (an estimate: kernels keep copies of their own).
        """
        c = self.model.config
        parameters = self.model.n_params
        weight = 4 if self.compute.autocast else BYTES[self.compute.dtype]
        tokens = (batch_size or self.config.batch_size) * c.block_size
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
    def checkpoint_bytes(self):
        """Of one checkpoint, about: weights and moments."""
        sizes = self.memory()
        return sizes["weights"] + sizes["optimizer"]

    def memory_spread(self, world):
        """{way to spread: bytes of weights, gradients and moments in each of `world` processes}.

        Rajbhandari et al. 2020 (ZeRO), figure 1. DeepSpeed has a copy of the weights among what the
        optimizer needs, in float32, too; doc/several_machines.md has these formulas beside measured numbers.
        """
        sizes = self.memory()
        weights, gradients, moments = sizes["weights"], sizes["gradients"], sizes["optimizer"]
        spread = weights + moments
        return {
            "DDP": weights + gradients + moments,
            "ZeRO-1": weights + gradients + spread / world,
            "ZeRO-2": weights + (gradients + spread) / world,
            "ZeRO-3": (weights + gradients + spread) / world,
        }

    def exchange_seconds(self, world, link):
        """Time to sum the gradients of `world` processes over a link of so many Gbit/s.

        Each sends and receives 2 (N - 1) / N times the gradients' size: a ring (Patarasuk & Yuan 2009).
        """
        return 2 * (world - 1) / world * self.memory()["gradients"] * 8 / (link * 1e9)

    def speed_up(self, world, link, seconds):
        """(least, most): how much faster `world` processes are than one, whose step takes so many seconds.

        Least if the exchange waits for the backward pass, most if it hides behind it: behind that of the
        last micro-batch, two thirds of whose time are backward.
        """
        exchange, computing = self.exchange_seconds(world, link), seconds / world
        micro_batches = max(1, self.config.gradient_accumulation_steps / world)
        hidden = min(exchange, computing / micro_batches * 2 / 3)
        return seconds / (computing + exchange), seconds / (computing + exchange - hidden)

    def largest_batch(self):
        """The largest batch_size whose estimate leaves a tenth of the device's memory free; 0: none."""
        if not self.compute.memory:
            return None
        fixed = sum(self.memory(1).values()) - self.memory(1)["activations"]
        return max(0, int((0.9 * self.compute.memory - fixed) // self.memory(1)["activations"]))

    @property
    def too_large(self):
        """A sentence if by estimate the run does not fit in the device's memory, else None."""
        needs, fits = sum(self.memory().values()), self.largest_batch()
        if fits is None or fits >= self.config.batch_size or needs <= self.compute.memory:
            return None
        return (
            f"by estimate this needs {gib(needs)} of memory, and there are {gib(self.compute.memory)}: "
            f"batch_size {fits} would fit"
        )

    @contextlib.contextmanager
    def advice_when_out_of_memory(self):
        """Turns running out of memory into a sentence that says what to lower."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            fits = self.largest_batch()
            would = f" By estimate batch_size {fits} fits." if fits and fits < self.config.batch_size else ""
            raise UserError(
                f"out of memory with batch_size {self.config.batch_size} and block_size "
                f"{self.model.config.block_size}.{would} Lower batch_size and raise "
                "gradient_accumulation_steps by the same factor: the result stays the same."
            ) from None


def n_moments(model, optimizer):
    """How many numbers the optimizer keeps: AdamW two per parameter, Muon one per parameter of a matrix."""
    return 2 * model.n_params - (model.n_matrix_params if optimizer == "muon" else 0)


def refuse_too_large(shape, compute, optimizer="adamw"):
    """UserError if not even the weights, gradients and moments of a model of this shape fit in memory."""
    with torch.device("meta"):
        model = models.build(shape)
    numbers = 2 * model.n_params + n_moments(model, optimizer)
    needs = numbers * (4 if compute.autocast else BYTES[compute.dtype])
    if compute.memory and needs > compute.memory:
        raise UserError(
            f"a model of {model.n_params:,} parameters needs {gib(needs)} of memory in training, and there "
            f"are {gib(compute.memory)}; lower n_layer or n_embd"
        )


def show(estimate, one_step, world, link):
    """Print the plan: everything above, and this machine's speed, measured on a few real steps.

    one_step(): does a step, waits for it, and returns the shape of its batch. world, link: how many such
    machines, and the Gbit/s between them.
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
    c, memory = model.config, estimate.memory()
    needed = [f"{gib(size)} {part}" for part, size in {**memory, "in all": sum(memory.values())}.items()]
    if compute.memory:
        needed[-1] += f" of {gib(compute.memory)}; batch_size up to {estimate.largest_batch()} fits"
    rows = [
        ("model", f"{c.architecture}: {c.n_layer} layers, width {c.n_embd}, {c.n_head} heads"
                  f"{f' ({c.n_kv_head} key/value)' if hasattr(c, 'n_kv_head') else ''}, "
                  f"context {c.block_size}, vocabulary {c.vocab_size}"),
        ("parameters", f"{model.n_params:,}"),
        ("FLOPs per token", f"{estimate.flops_per_token:,} (training)"),
        ("chosen", "\n".join(compute.reasons)),
        ("memory, estimated", "\n".join(needed)),
        ("data", f"{estimate.train.description} = {estimate.steps_per_epoch:,.1f} steps"),
        ("speed, measured", f"{1000 * seconds:.0f} ms a step, {tokens:,.0f} tokens/s\n"
                            f"{flops / 1e9:,.1f} GFLOP/s = {flops / peak:.0%} of a matrix product here "
                            f"({peak / 1e9:,.0f} GFLOP/s in {compute.dtype})"),
        ("time for an epoch", duration(estimate.steps_per_epoch * seconds)),
    ]  # fmt: skip
    if config.max_steps:
        rows.append((f"time for {config.max_steps} steps", duration(config.max_steps * seconds)))
    if world > 1:
        exchange, computing = estimate.exchange_seconds(world, link), seconds / world
        least, most = estimate.speed_up(world, link, seconds)
        spread = estimate.memory_spread(world).items()
        rows += [
            (f"{world} of them, {link:g} Gbit/s",
             f"{computing * 1000:.0f} ms of computing a step, {exchange * 1000:.0f} ms to exchange "
             f"{memory['gradients'] / 2**20:,.1f} MiB of gradients\n"
             f"{least:.2f} to {most:.2f} times as fast as one"),
            ("memory in each, without\nactivations", "\n".join(f"{gib(size)} {way}" for way, size in spread)),
        ]  # fmt: skip
    table = Table(title=f"plan: {estimate.stage.name}", show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def gib(n_bytes):
    return f"{n_bytes / 2**30:.2f} GiB"
