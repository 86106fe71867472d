"""ZeRO (Rajbhandari et al. 2020): DeepSpeed shards optimizer state, gradients and weights over the processes.

The loop, the data and the checkpoint files are those of train.py. A checkpoint is gathered parameter by
parameter in the main memory of rank 0. The devices and the other processes never hold more than their own
shard and one full parameter.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.utils import (
    fragment_address,
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
    set_log_level_from_string,
)
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from pydantic import ValidationError

import models
from common.config import display_path
from common.errors import UserError, is_out_of_memory
from common.hardware import ComputeConfig
from config.resolved import ResolvedTrainConfig
from config.schema import LAST_STEP, ArchitectureConfig, DeepSpeedConfig, TrainConfig
from config.stages import Stage
from engine import archive, runs
from engine import checkpoint as checkpoints
from engine.optimizer import Muon, orthogonal, state_shapes
from engine.parallel import DataParallel
from tokenizer import Tokenizer

# A shared-memory helper for CPUs: building it takes a compiler and a minute, and gloo works without it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)  # raised by DeepSpeed's code


class Zero(DataParallel):
    """The strategy of train_deepspeed.py (see engine/parallel.py).

    settings: DeepSpeed's configuration. name: that of its file, for errors.
    """

    def __init__(self, settings: DeepSpeedConfig, name: str, backend: str, compute: ComputeConfig):
        self.settings: dict[str, Any] = settings.model_dump()
        self.name = name
        try:
            self.stage = int(DeepSpeedZeroConfig(**settings.zero_optimization).stage)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"{name}: zero_optimization: {key}: {first['msg'].lower()}") from None
        self.muon = functools.partial(ShardedMuon, zero=self) if self.stage else None
        super().__init__(backend, compute)

    def rows(self, config: ResolvedTrainConfig) -> range:
        rows = super().rows(config)
        given = {key: value for key, value in self.settings.items() if type(value) is int}
        accumulation = given.get("gradient_accumulation_steps")
        micro_batch = given.get("train_micro_batch_size_per_gpu") or (
            len(rows) * rows.step // accumulation if accumulation else rows.step
        )
        accumulation = accumulation or len(rows) * rows.step // micro_batch
        product = micro_batch * accumulation * self.world_size
        global_batch = config.batch_size * config.gradient_accumulation_steps
        batch = given.get("train_batch_size", global_batch)
        if not batch == product == global_batch:
            raise UserError(
                f"{self.name}: train_batch_size {batch} must be train_micro_batch_size_per_gpu "
                f"{micro_batch} x gradient_accumulation_steps {accumulation} x {self.world_size} processes = "
                f'{product}, and the global batch of the run, {global_batch}; "auto" is always right'
            )
        self.settings |= {
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
        }
        return range(rows.start, rows.stop, micro_batch)

    def wrap(
        self, module: Any, optimizer: Any, config: ResolvedTrainConfig, compute: ComputeConfig
    ) -> tuple[Any, Any]:
        self.rows(config)  # fills in DeepSpeed's batch sizes
        if config.compile:
            raise UserError("compile is for train.py and train_ddp.py; set it to false")
        if compute.dtype != "float32" and not compute.autocast:
            raise UserError("with DeepSpeed the weights stay in float32: set use_amp to true")
        if self.settings["gradient_clipping"] not in ("auto", config.grad_clip):
            raise UserError(
                f"{self.name}: gradient_clipping is {self.settings['gradient_clipping']}, "
                f'but grad_clip of the run is {config.grad_clip}; "auto" is always right'
            )
        offloads = self.settings["zero_optimization"].get("offload_optimizer") or {}
        if config.optimizer == "muon" and offloads.get("device", "none") != "none":
            raise UserError(
                f'{self.name}: optimizer "muon" needs whole matrices on the device: remove '
                'offload_optimizer, or set optimizer to "adamw"'
            )
        if self.stage == 3:
            # The kernel reads the output head's weights, which exist only while its layer runs.
            module.model.use_custom_kernels(False)
        self.groups = optimizer.state_dict()["param_groups"]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.shapes = [state_shapes(g, p.shape) for g in optimizer.param_groups for p in g["params"]]
        set_log_level_from_string("error")
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config={
                **self.settings,
                "gradient_clipping": config.grad_clip,
                # Gradients are summed in float32, as with every other strategy.
                "torch_autocast": {
                    "enabled": compute.autocast,
                    "dtype": compute.dtype,
                    "lower_precision_safe_modules": [],
                },
                "zero_force_ds_cpu_optimizer": False,  # use PyTorch's AdamW; DeepSpeed's needs a compiler
                "zero_allow_untested_optimizer": True,  # ShardedMuon
            },
        )
        self.optimizer = self.engine.optimizer
        return self.engine, EngineOptimizer(self)

    def micro_batch(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        self.engine.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)  # DeepSpeed averages over ranks

    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> torch.Tensor:
        if not self.stage:  # DeepSpeed would clip, too, but not report the norm
            self.grad_norm = super().clip_grad_norm_(self.parameters, max_norm)
        else:
            self.grad_norm = torch.zeros(())  # DeepSpeed clips in EngineOptimizer.step, which sets this
        return self.grad_norm

    def load_optimizer(self, optimizer: Any, state: dict[int, dict[str, torch.Tensor]]) -> None:
        if not self.stage:
            return super().load_optimizer(self.optimizer, state)
        if not state:
            return None
        # DeepSpeed allocates the state in its first step. A step with zero gradients and learning rate
        # changes no weight.
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.micro_batch(is_last=True)
        mask = torch.zeros(1, 1, device=self.device)
        self.backward(0 * self.engine({"x": token, "y": token, "mask": mask})[0])
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.engine.step()
        self._link_state()
        for counter in self._step_counters():
            counter.fill_(next(float(kept["step"]) for kept in state.values() if "step" in kept))
        for number, parameter in enumerate(self.parameters):
            for key in sorted(state[number].keys() - {"step"}):
                self._set_state(parameter, state[number][key].to(self.device), key)

    def _step_counters(self) -> list[torch.Tensor]:
        return [state["step"] for state in self.optimizer.optimizer.state.values() if "step" in state]

    def _set_state(self, parameter: Any, value: torch.Tensor, key: str) -> None:
        if self.stage < 3:
            return safe_set_full_optimizer_state(parameter, value, key)
        # safe_set_full_optimizer_state fails if the size is not divisible by the number of processes.
        share = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, share * self.world_size - value.numel()))
        return safe_set_local_optimizer_state(parameter, padded[self.rank * share :][:share], key)

    def _link_state(self) -> None:
        """Link every parameter to its optimizer state. DeepSpeed links only the first parameter group."""
        if self.stage < 3:
            zero = self.optimizer
            for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)

    def state_dicts(self, model: Any, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if not self.stage:
            return super().state_dicts(model, self.optimizer)
        self._link_state()
        step = self._step_counters()[0]
        weights, states = {}, {}
        for number, (parameter, kept) in enumerate(zip(self.parameters, self.shapes, strict=True)):
            weight, state = safe_get_full_fp32_param(parameter), {}
            for key in kept:
                full = step.clone() if key == "step" else safe_get_full_optimizer_state(parameter, key)
                state[key] = full.cpu()
            if not self.rank:
                weights[parameter], states[number] = weight.cpu(), state
        return self._by_name(model, weights), {"state": states, "param_groups": self.groups}

    def _by_name(self, model: Any, weights: dict[Any, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state_dict on rank 0, from the weights of the parameters; elsewhere only the buffers."""
        names = model.named_parameters(remove_duplicate=False) if not self.rank else ()
        persistent = model.state_dict().keys()
        buffers = {n: buffer.cpu().clone() for n, buffer in model.named_buffers() if n in persistent}
        return {name: weights[parameter] for name, parameter in names} | buffers

    def whole_model(self, model: Any) -> Any:
        """With ZeRO-3, rank 0 gets a copy, gathered as for a checkpoint; on the CPU if it does not fit."""
        if self.stage < 3:
            return model
        weights = {}
        for parameter in self.parameters:
            weight = safe_get_full_fp32_param(parameter)
            if not self.rank:
                weights[parameter] = weight.cpu()
        state = self._by_name(model, weights)
        if self.rank:
            return None
        with checkpoints.SkipInitialization():
            copy = models.build(model.config)
        copy.load_state_dict(state)
        try:
            return copy.to(self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return copy.to("cpu")


class EngineOptimizer:
    """The optimizer that the training loop sees. DeepSpeed's engine clips, steps and clears gradients."""

    def __init__(self, zero: Zero):
        self.zero = zero

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.zero.optimizer.param_groups

    def step(self) -> None:
        self.zero.engine.step()
        if self.zero.stage:
            self.zero.grad_norm.fill_(float(self.zero.engine.get_global_grad_norm()))

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass  # the engine has done it


class ShardedMuon(Muon):
    """Muon on DeepSpeed's flat shards, each of which holds parts of many matrices.

    DeepSpeed's own Muon orthogonalizes updates before gradients are clipped, so its steps differ from those
    of a single process. Here momentum stays sharded, and the updates of a group are gathered for a moment.
    """

    def __init__(self, groups: list[dict[str, Any]], zero: Zero):
        super().__init__(groups)
        self.zero = zero

    def direction(self, parameter: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """Orthogonalize this process's shard of the updates, which is flat."""
        zero, size = self.zero, update.numel()
        engine, first = zero.optimizer, zero.rank * size
        shares = update.new_empty(zero.world_size, size)
        dist.all_gather_into_tensor(shares.view(-1), update)
        if zero.stage == 3:  # each matrix is sharded over all processes
            at = _index_of(engine.fp32_partitioned_groups_flat, parameter)
            start = 0
            for matrix in engine.fp16_groups[at]:
                share = matrix.ds_tensor.numel()
                whole = shares[:, start : start + share].flatten()
                numbers = whole[: matrix.ds_numel]  # without padding
                numbers.copy_(orthogonal(numbers.view(matrix.ds_shape)).flatten())
                update[start : start + share] = whole[zero.rank * share :][:share]
                start += share
            return update
        at, start, flat = _index_of(engine.single_partition_of_fp32_groups, parameter), 0, shares.view(-1)
        for matrix in engine.round_robin_bit16_groups[at]:
            end = start + matrix.numel()
            low, high = max(start, first), min(end, first + size)
            if low < high:
                whole = orthogonal(flat[start:end].view(matrix.shape)).flatten()
                update[low - first : high - first] = whole[low - start : high - start]
            start = end
        return update


def _index_of(tensors: Iterable[torch.Tensor], wanted: torch.Tensor) -> int:
    return next(i for i, tensor in enumerate(tensors) if tensor is wanted)


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], int]:
    """Read a folder written by DeepSpeed's save_checkpoint. Returns ({name: float32 tensor}, step).

    Its files are pickles. They are read with engine/archive.py, so nothing in them is run.
    Raises UserError if the folder is missing, damaged, or something else.
    """
    folder = Path(folder)
    plain = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]
    names = [f"{kind.__module__} {kind.__name__}" for kind in plain]
    names += ["torch Size", "torch Tensor", archive.TYPED_TENSOR]
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed asks torch.load for the opposite
    try:
        with open(folder / "latest", encoding="utf-8") as file:
            tag = file.read(300).strip()
        if Path(tag).name != tag:
            raise ValueError(f"latest names {tag!r}, which is not a folder in it")
        with torch.serialization.safe_globals(plain), contextlib.redirect_stdout(None):
            for path in (folder / tag).glob("*_optim_states.pt"):
                archive.read(path, names)
            states = {}
            for path in sorted((folder / tag).glob("*model_states.pt")):
                states = archive.read(path, names)
            weights, step = states["module"], states["global_steps"]
            if type(step) is not int or not 0 <= step <= LAST_STEP:
                raise ValueError(f"global_steps is {step!r}")
            if any((folder / tag).glob("*_optim_states.pt")):  # ZeRO has a copy of the weights in float32
                weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag)
            # The module that was trained is a `LossModule`, in which the network is `model`.
            return {name.removeprefix("model."): weight.float() for name, weight in weights.items()}, step
    except MemoryError:
        raise
    except Exception as error:  # every kind of damage raises another one
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{display_path(folder)} is not a valid checkpoint folder of DeepSpeed: {why}"
        ) from None
    finally:
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def convert(
    folder: str | os.PathLike[str],
    stage: Stage,
    config: TrainConfig,
    shape: ArchitectureConfig,
    tokenizer: Tokenizer,
) -> Path:
    """Write the model of such a folder as an ordinary checkpoint, without optimizer state. Returns its path.

    Raises UserError if the model in the folder does not have this shape.
    """
    weights, step = read_folder(folder)
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in models.build(shape).state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{display_path(folder)} holds another model than the configuration: {name} is "
                f"{found.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
            )
    with runs.Run() as run:
        return checkpoints.Checkpoint(
            stage.name, run.name, step, shape.model_dump(), config.model_dump(mode="json"),
            tokenizer.to_dict(),
            weights, optimizer={}, chat_template=stage.chat_template,
        ).save()  # fmt: skip
