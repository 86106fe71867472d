"""Put together everything that a training run needs before its first step.

The configuration is resolved once, here: every "auto" is replaced by a number or a choice, and the result is
frozen in a `TrainSetup`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import models
import objectives
import tasks
from common import hardware
from common.config import display_path, resolve_path
from common.errors import UserError, is_out_of_memory
from common.hardware import ComputeConfig
from common.log import notice
from config.resolved import ResolvedTrainConfig
from config.schema import ArchitectureConfig, MixturePart, TrainConfig
from config.stages import STAGES, Stage
from data import BatchSource, Part, TokenFile
from engine import checkpoint as checkpoints
from engine import plan, runs, scaling_laws
from engine.runs import StartPoint
from objectives import LossModule, Objective
from tasks.parts import TaskPart
from tokenizer import Tokenizer


@dataclass(frozen=True)
class TrainSetup:
    """A training run before its first step.

    config      the run's configuration without any "auto"
    compute     device, precision and attention kernel
    start       where it starts: with a new model, from a checkpoint's weights, or where a run ended
    model       the model, on the device
    train, val  where batches come from: for training, global batches; for validation, one source per part
    problem     the sizes of a toy problem (tasks/)
    """

    stage: Stage
    config: ResolvedTrainConfig
    compute: ComputeConfig
    start: StartPoint
    model: Any
    tokenizer: Tokenizer
    objective: Objective
    train: BatchSource
    val: list[BatchSource]
    problem: dict[str, int] = field(default_factory=dict)

    @property
    def data(self) -> dict[str, list[dict[str, str]]]:
        """The data as a checkpoint records them."""
        val = [fingerprint for source in self.val for fingerprint in source.fingerprints]
        return {"train": self.train.fingerprints, "validation": val}


def stage_setup(
    stage: Stage, config: TrainConfig, shape: ArchitectureConfig, compute: ComputeConfig, parallel: Any,
    load_tokenizer: Callable[[Path], Tokenizer], resume: str | bool | None = None,
) -> TrainSetup:  # fmt: skip
    """The setup of a stage that trains on token files and tasks.

    shape: the model's configuration. load_tokenizer: reads the file of tokenizer_path, if a new model needs
    it. resume: the value of --resume.
    Raises UserError if a file is missing or something does not fit together.
    """
    start = parallel.broadcast_from_rank0(
        lambda: runs.starting_point(stage.name, config, resume, parallel.restarted_run())
    )
    path = resolve_path(config.tokenizer_path)
    model, tokenizer = starting_model(start, config, shape, compute, lambda: load_tokenizer(path))
    written = config.model_dump(mode="json")
    resolved = parallel.broadcast_from_rank0(
        lambda: scaling_laws.resolved(config, model, compute, stage, start)
    )
    resolved = resolved.model_copy(update={"from_checkpoint": start.origin})
    objective, block_size = objectives.find(stage.objective), model.config.block_size
    train_parts, val_parts = data_parts(stage, config, tokenizer, block_size)
    seed, global_batch = config.random_seed, resolved.batch_size * resolved.gradient_accumulation_steps
    weights = [part.weight for part in config.mixture]
    train = objective.source(train_parts, block_size, global_batch, seed, weights)
    val = [
        objective.source([part], block_size, resolved.batch_size, seed, weights[i : i + 1])
        for i, part in enumerate(val_parts)
    ]
    setup = TrainSetup(stage, resolved, compute, start, model, tokenizer, objective, train, val)
    data = {f"dataset_path ({kind})": content for kind, content in setup.data.items()}
    parallel.assert_same_on_all_ranks({**written, **model.config.model_dump(), **data})
    return on_device(setup, parallel)


def data_parts(
    stage: Stage, config: TrainConfig, tokenizer: Tokenizer, block_size: int
) -> tuple[list[TokenFile | Part], list[TokenFile | Part]]:
    """What is trained on and what is validated with: the files and tasks of dataset_path, in its order."""
    if not config.dataset_path:
        raise UserError("dataset_path is empty: give at least one [train, validation] pair of token files")
    train: list[TokenFile | Part] = []
    val: list[TokenFile | Part] = []
    for part in config.dataset_path:
        if isinstance(part, MixturePart) and part.task:
            if stage.documents == "text":
                raise UserError(
                    f"task {part.task} is made of questions and answers, but {stage.name} learns from text; "
                    f"use one of {', '.join(s.name for s in STAGES.values() if s.documents != 'text')}"
                )
            task = tasks.parse(part.task)
            train.append(TaskPart(task, tokenizer, block_size))
            val.append(TaskPart(task, tokenizer, block_size, is_test=True))
            continue
        pair = part.path if isinstance(part, MixturePart) else part
        assert pair, "a part is a pair of files or a task"
        files = [TokenFile(resolve_path(path), tokenizer.fingerprint) for path in pair]
        for file in files:
            if stage.documents not in (file.documents, "any"):
                raise UserError(
                    f"{display_path(file.path)} was prepared for {file.kind}, not for {stage.name}"
                )
        train.append(files[0])
        val.append(files[1])
    return train, val


def starting_model(
    start: StartPoint, config: TrainConfig, shape: ArchitectureConfig, compute: ComputeConfig,
    make_tokenizer: Callable[[], Tokenizer],
) -> tuple[Any, Tokenizer]:  # fmt: skip
    """(model, tokenizer) of the checkpoint to start from, or new ones. Prints the notices of the start."""
    for line in start.notices:
        notice(line)
    if start.checkpoint:
        for line in runs.extend_context(start, shape):
            notice(line)
        model, tokenizer = checkpoints.build(start.checkpoint, start.name)
        for line in runs.model_differences(model.config, shape.resolved(tokenizer.vocab_size)):
            notice(line)
        return model.set_dropout(config.dropout), tokenizer
    tokenizer = make_tokenizer()
    shape = shape.resolved(tokenizer.vocab_size)
    if (shape.vocab_size or 0) < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size={shape.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} tokens; "
            "set it to null"
        )
    plan.check_model_fits(shape, compute, config.optimizer)
    torch.manual_seed(config.random_seed)
    return models.build(shape).set_dropout(config.dropout), tokenizer


def on_device(setup: TrainSetup, parallel: Any) -> TrainSetup:
    """The setup with its model on the device and its dtype decided, if necessary by measuring."""
    compute = setup.compute
    dtype = torch.float32 if compute.autocast else getattr(torch, compute.dtype)
    setup.model.to(compute.device, dtype)
    compute = same_dtype_on_all_ranks(setup, parallel)
    setup.model.use_custom_kernels(compute.custom_kernels)
    config = setup.config.model_copy(update={"dtype": compute.dtype})
    return TrainSetup(**{**vars(setup), "compute": compute, "config": config})


def same_dtype_on_all_ranks(setup: TrainSetup, parallel: Any) -> ComputeConfig:
    """The ComputeConfig with a dtype that is the same in all processes.

    If the dtype is undecided, a resumed run keeps the one it had. For a new run, rank 0 measures which is
    faster on its first micro-batch.
    """
    config, compute, start = setup.config, setup.compute, setup.start
    before = start.checkpoint.train_config.get("dtype") if start.checkpoint and start.resumes else None
    found = parallel.all_gather((compute.dtype, compute.undecided))
    if any(other != found[0] for other in found):
        dtype, why = "float32", "the machines of this run differ, and all of them support it"
    elif not compute.undecided:
        return compute
    elif before in ("float32", "bfloat16"):
        dtype, why = before, "as in this run so far"
    else:
        rows = parallel.rows(config)
        dtype, why = parallel.broadcast_from_rank0(lambda: measured_dtype(setup, rows))
    compute = hardware.with_dtype(compute, config, dtype, why)
    print(compute.reasons[1])
    return compute


def measured_dtype(setup: TrainSetup, rows: range) -> tuple[str, str]:
    """(dtype, why): which is faster for forward and backward passes of the run's first micro-batch."""
    config, model = setup.config, setup.model
    batch = to_device(setup.train(0), range(rows.start, rows.start + rows.step), setup.compute.device)
    module: Any = LossModule(model, setup.objective)
    module = torch.compile(module) if config.compile else module
    model.train()

    def one_pass(compute: ComputeConfig) -> None:
        model.use_custom_kernels(compute.custom_kernels)
        with hardware.forward_context(compute):
            module(batch)[0].backward()
        model.zero_grad(set_to_none=True)
        hardware.synchronize(compute.device)

    trials = [hardware.with_dtype(setup.compute, config, dtype, "") for dtype in ("float32", "bfloat16")]
    with compiling(config.compile):
        found = hardware.measure_dtype({c.dtype: functools.partial(one_pass, c) for c in trials})
    model.zero_grad(set_to_none=True)  # a pass that ran out of memory may have left gradients
    reset_counts(model)
    return found


def to_device(batch: dict[str, Any], rows: range, device: str) -> dict[str, torch.Tensor]:
    """Copy these rows of a batch to the device: to a GPU from pinned memory, without waiting."""
    tensors = {key: torch.from_numpy(array[rows.start : rows.stop]) for key, array in batch.items()}
    if device.startswith("cuda"):
        tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
    return {key: tensor.to(device, non_blocking=True) for key, tensor in tensors.items()}


def reset_counts(model: Any) -> None:
    """Discard what the model counted (such as tokens per expert) in passes that are not training."""
    model.after_step(torch.zeros_like)


@contextlib.contextmanager
def compiling(on: bool) -> Iterator[None]:
    """A context for the first passes of a compiled module: says that they take time, and reports errors."""
    if on:
        print("Compiling the training step: about a minute, this once.", flush=True)
    try:
        yield
    except RuntimeError as error:
        if not on or is_out_of_memory(error):
            raise
        why = str(error).strip().partition("\n")[0]
        raise UserError(f"torch.compile failed: {why}; set compile to false") from None
