"""Checkpoints: one file with everything that is needed to resume a run or to generate text.

A checkpoint is a dictionary of tensors and plain JSON values, in PyTorch's zip container:

    format, version   "nano-checkpoint", 3
    stage             the stage of training (config/stages.py), or the toy problem (tasks/)
    chat_template     the template the model answers in; None: it only continues text
    problem           the sizes of a toy problem; empty for a stage
    run               the name of the run (engine/runs.py)
    step              optimizer steps done
    consumed          {"sequences": of the present data, "tokens": whose loss counted, in all}
    data              {"train": [{"fingerprint", "size"} of each file], "validation": the same}
    validation        {"loss": the last validation loss or None, "step": where it was measured}
    best              the same for the lowest one, on the present data
    model_config, train_config    plain JSON, every "auto" replaced by what was chosen
    tokenizer         JSON as one string: PyTorch needs 0.3 s to read 32,000 merges one by one
    model, optimizer, scaler      state dictionaries (scaler: float16's loss scaling); optimizer is empty if
                      the model was not trained here (export.py --read)

Files of versions 1 and 2 can still be read.

No random state is stored: the order of the data follows from random_seed and the sequences consumed, and
dropout from random_seed and the step.

A file is written under a temporary name, flushed, and then renamed, so a file with the final name is always
complete. Reading does not trust the file: every record's checksum is verified, and nothing in it is run.
"""

import contextlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch.overrides import TorchFunctionMode

import models
import tokenizer as tokenizers
from common.config import ROOT, display_path
from common.errors import UserError
from common.files import atomic_write
from config.schema import LAST_STEP, ArchitectureConfig
from config.stages import STAGES
from engine import archive

if TYPE_CHECKING:
    from engine.runs import StartPoint
    from model import GPT

FORMAT, VERSION = "nano-checkpoint", 3
TIME = r"[0-9]{8}_[0-9]{6}"  # a run's name
FOLDER = ROOT / "checkpoint"


def unmeasured() -> dict[str, Any]:
    """The entry for a validation loss that has not been measured."""
    return {"loss": None, "step": None}


@dataclass
class Checkpoint:
    """The content of a checkpoint file. `load` checks the fields against their types."""

    stage: str
    run: str
    step: int
    model_config: dict
    train_config: dict
    tokenizer: dict
    model: dict
    optimizer: dict
    scaler: dict = field(default_factory=dict)
    best: dict = field(default_factory=unmeasured)
    validation: dict = field(default_factory=unmeasured)
    consumed: dict = field(default_factory=lambda: {"sequences": 0, "tokens": 0})
    data: dict = field(default_factory=dict)
    chat_template: str | None = None
    problem: dict = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where `save` writes it."""
        return FOLDER / f"{self.stage}_{self.run}_step_{self.step}.pt"

    @property
    def can_resume(self) -> bool:
        """Whether training wrote it: a model converted from another format has no optimizer state."""
        return "state" in self.optimizer

    @property
    def is_valid(self) -> bool:
        """Whether its plain values could come from training; `build` and `restore` check the tensors."""
        tensors = ("model", "optimizer", "scaler")
        try:
            json.dumps({key: value for key, value in vars(self).items() if key not in tensors})
        except (TypeError, ValueError, RecursionError):
            return False
        losses = [
            kept == unmeasured()
            or (kept.keys() == {"loss", "step"} and type(kept["loss"]) is float and type(kept["step"]) is int)
            and math.isfinite(kept["loss"])
            for kept in (self.best, self.validation)
        ]
        consumed, files = self.consumed, [*self.data.values()]
        return bool(
            # Stage and run become part of file names.
            re.fullmatch("[a-z]+", self.stage)
            and re.fullmatch(TIME, self.run)
            and type(self.step) is int
            and 0 <= self.step <= LAST_STEP
            and all(losses)
            and consumed.keys() == {"sequences", "tokens"}
            and _is_count(consumed["sequences"])
            and (consumed["tokens"] is None or _is_count(consumed["tokens"]))
            and self.data.keys() in ({"train", "validation"}, set())
            and all(isinstance(kind, list) and all(map(_is_fingerprint, kind)) for kind in files)
            and all(
                re.fullmatch("[a-z_]{1,40}", str(name)) and type(n) is int for name, n in self.problem.items()
            )
        )

    def save(self) -> Path:
        """Write the file, completely or not at all. Returns its path."""
        state = {**vars(self), "tokenizer": json.dumps(self.tokenizer)}
        try:
            with atomic_write(self.path) as file:
                torch.save({"format": FORMAT, "version": VERSION, **state}, cast(IO[bytes], file))
        except OSError as error:
            raise UserError(
                f"the checkpoint {display_path(self.path)} could not be written ({error.strerror}); "
                "earlier checkpoints are untouched"
            ) from None
        return self.path


@dataclass(frozen=True, order=True)
class CheckpointFile:
    """A file in checkpoint/, as its name describes it. Sorting puts the oldest first."""

    run: str
    step: int
    stage: str
    path: Path


def list_checkpoints(stage: str | None = None, run: str | None = None) -> list[CheckpointFile]:
    """The files in checkpoint/ (of one stage, of one run), oldest first."""
    pattern = re.compile(rf"([a-z]+)_({TIME})_step_([0-9]{{1,15}})\.pt")
    found = [(pattern.fullmatch(path.name), path) for path in FOLDER.glob("*_step_*.pt")]
    entries = [CheckpointFile(match[2], int(match[3]), match[1], path) for match, path in found if match]
    return sorted(entry for entry in entries if stage in (None, entry.stage) and run in (None, entry.run))


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint. Raises UserError if the file is missing, damaged, malicious or something else."""
    path, name = Path(path), display_path(path)
    if not path.is_file():
        hint = (
            f"; the newest in checkpoint/ is {display_path(near[-1].path)}"
            if (near := list_checkpoints())
            else ""
        )
        raise UserError(f"there is no checkpoint {name}{hint}")
    try:
        state = archive.read(path)
    except PermissionError:
        raise UserError(f"no permission to read {name}") from None
    except archive.Damaged:
        raise UserError(f"{name} is damaged, or is not a checkpoint of Nano") from None
    except archive.Refused as error:
        raise UserError(f"{name} is not a checkpoint of Nano: {error}") from None
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise UserError(f"{name} is a PyTorch file, but not a checkpoint of Nano")
    version = state.pop("version", None)
    if type(version) is int and version in (1, 2):
        state = _upgrade(state, version)
    elif type(version) is not int or version != VERSION:
        raise UserError(f"{name} was written by another version of Nano")
    text = state.get("tokenizer")  # older files hold the dictionary itself
    if isinstance(text, str) and len(text) <= tokenizers.MAX_JSON_LENGTH:
        with contextlib.suppress(ValueError, RecursionError):
            state["tokenizer"] = json.loads(text)
    types: dict[str, Any] = {key: f.type for key, f in Checkpoint.__dataclass_fields__.items()}
    typed = state.keys() == types.keys() and all(isinstance(state[k], t) for k, t in types.items())
    if not typed or not (checkpoint := Checkpoint(**state)).is_valid:
        raise UserError(f"{name} lacks parts of a checkpoint of Nano")
    if checkpoint.chat_template not in (None, tokenizers.CHAT_TEMPLATE):
        raise UserError(
            f"{name} uses the chat template {checkpoint.chat_template!r}, which this version of Nano lacks"
        )
    if shared := _overlapping_tensor(checkpoint):
        raise UserError(f"{name} is not a checkpoint of Nano: {shared} shares numbers with another tensor")
    return checkpoint


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_fingerprint(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"fingerprint", "size"}
        and all(isinstance(text, str) for text in value.values())
    )


def _upgrade(state: dict[str, Any], version: int) -> dict[str, Any]:
    """Add the fields that a file of an earlier version lacks, as far as they follow from others."""
    stage, config = state.pop("task", None), state.get("train_config")
    state["stage"] = stage
    if version == 1:
        state |= _fields_missing_in_version_1(state)
    known = STAGES.get(stage) if isinstance(stage, str) else None
    # A toy problem used to store its sizes in dataset_path, as JSON.
    sizes: Any = {}
    with contextlib.suppress(KeyError, IndexError, TypeError, ValueError, RecursionError):
        ((_, text),) = config["dataset_path"]  # type: ignore[index]  # not a dictionary: see suppress
        sizes = json.loads(text) if known is None else {}
    return state | {"chat_template": known and known.chat_template, "problem": sizes}


def _fields_missing_in_version_1(state: dict[str, Any]) -> dict[str, Any]:
    """The fields that files of version 1 lack, as far as they follow from the others."""
    config, step, best = (state.get(key) for key in ("train_config", "step", "best"))
    config = config if isinstance(config, dict) else {}
    factors = step, config.get("batch_size", 1), config.get("gradient_accumulation_steps", 1)
    known = all(type(factor) is int for factor in factors)
    is_last = isinstance(best, dict) and best.get("step") == step
    return {
        "consumed": {"sequences": math.prod(factors) if known else 0, "tokens": None},
        "validation": best if is_last else unmeasured(),
        "data": {},
    }


def _overlapping_tensor(checkpoint: Checkpoint) -> str | None:
    """The name of a tensor that shares memory with another one of the checkpoint, or None.

    A model may hold the same tensor under two names (a tied embedding and head). Other tensors that share
    memory would change each other.
    """
    places = []
    for key, value in vars(checkpoint).items():
        for name, tensor in _tensors(value, key):
            start = tensor.data_ptr()
            places.append((start, start + tensor.nbytes, key == "model", name))
    places = sorted(place for place in places if place[0] < place[1])
    for before, after in itertools.pairwise(places):
        if after[0] < before[1] and not (after[:3] == before[:3] and after[2]):
            return after[3]
    return None


def _tensors(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{name} {key}")


def build(checkpoint: Checkpoint, source: str) -> "tuple[GPT, tokenizers.Tokenizer]":
    """(model, tokenizer) of a checkpoint, on the CPU, in eval mode. source: the file's name, for errors.

    Raises UserError if the weights do not belong to the model's configuration.
    """
    try:
        tokenizer = tokenizers.from_dict(checkpoint.tokenizer)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    shape = {key: value for key, value in checkpoint.model_config.items() if key != "dropout"}
    config = models.check_config(shape, f"{source}: model_config")
    config = config.resolved(tokenizer.vocab_size)
    if tokenizer.vocab_size > (config.vocab_size or 0) or not _weights_match(checkpoint.model, config):
        raise UserError(f"{source}: its weights do not fit its own configuration")
    with SkipInitialization():
        model = models.build(config)
    model.load_state_dict(dict(checkpoint.model))  # a plain dictionary, without PyTorch's metadata
    return model.eval(), tokenizer


# Bytes that the tables which a model computes (such as cos and sin of RoPE) may take. For a large model the
# limit is 8 times the size of its weights.
LARGEST_TABLES = 1 << 28


def _weights_match(weights: dict[Any, Any], config: ArchitectureConfig) -> bool:
    """Whether these are the weights of a model of this shape, and the model needs no unreasonable memory."""
    layers = {name.split(".")[1] for name in map(str, weights) if name.startswith("blocks.")}
    if len(layers) != config.n_layer:  # building a model of a billion layers would take forever
        return False
    with torch.device("meta"):
        model = models.build(config)
    expected = model.state_dict()
    if not _have_shapes(weights, {name: tensor.shape for name, tensor in expected.items()}):
        return False
    names: dict[torch.Tensor, list[str]] = {}  # of each parameter: a tied embedding and head have one
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, *others in names.values():
        if not all(torch.equal(weights[name], weights[other]) for other in others):
            return False
    places = {weights[name].data_ptr() for name, *_ in names.values()}
    tables = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in expected)
    largest = max(LARGEST_TABLES, 8 * sum(tensor.nbytes for tensor in weights.values()))
    return len(places) == len(names) and tables <= largest


class SkipInitialization(TorchFunctionMode):
    """A context in which torch.nn.init does nothing, because the weights will be read from a file.

    `load_state_dict(assign=True)` into a model on the "meta" device would not do: the buffers that an
    architecture computes for itself, such as rotary tables, would have no values.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _have_shapes(tensors: object, shapes: Mapping[str, torch.Size]) -> bool:
    """Whether `tensors` is {name: plain tensor of floats} with exactly these names and shapes."""
    return (
        isinstance(tensors, dict)
        and tensors.keys() == shapes.keys()
        and all(
            isinstance(tensor := tensors[name], torch.Tensor)
            and tensor.shape == shape
            and tensor.layout == torch.strided
            and tensor.device.type == "cpu"
            and tensor.is_floating_point()
            and tensor.is_contiguous()  # so that the file holds all of its numbers
            for name, shape in shapes.items()
        )
    )


OptimizerState = dict[int, dict[str, torch.Tensor]]  # {number of the parameter: {name: tensor}}


def _optimizer_state(
    checkpoint: Checkpoint, shapes: Iterable[Mapping[str, torch.Size]]
) -> OptimizerState | None:
    """The optimizer's tensors for each parameter; None if they do not have these shapes.

    shapes: {name: shape} for each parameter, in the optimizer's order. The state may be empty: with float16,
    all of the first steps may have been skipped.
    """
    state, expected = checkpoint.optimizer.get("state"), dict(enumerate(shapes))
    if not isinstance(state, dict) or not state:
        return {} if state == {} else None
    matches = state.keys() == expected.keys() and all(
        _have_shapes(state[number], tensors) for number, tensors in expected.items()
    )
    return state if matches else None


def restore(
    start: "StartPoint",
    shapes: Iterable[Mapping[str, torch.Size]],
    load_optimizer: Callable[[OptimizerState], None],
    scaler: torch.amp.GradScaler,
) -> None:
    """Restore the state of the optimizer, with load_optimizer(state), and of the loss scaling.

    shapes: {name: shape} of the optimizer's tensors for each parameter, in the optimizer's order.
    Raises UserError if the checkpoint's tensors do not fit.
    """
    checkpoint = start.checkpoint
    assert checkpoint, "only a run that starts from a checkpoint can be restored"
    with contextlib.suppress(ValueError, KeyError, RuntimeError, TypeError):
        if (state := _optimizer_state(checkpoint, shapes)) is not None:
            load_optimizer(state)
            scaler.load_state_dict(checkpoint.scaler or scaler.state_dict())
            return
    before = checkpoint.train_config.get("optimizer", "unknown")
    raise UserError(
        f'{start.name}: its optimizer state, of "{before}", does not fit this optimizer; to use its weights '
        f"alone, start a new run without --resume and with --set from_checkpoint={start.name}"
    )
