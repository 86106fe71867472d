"""Checkpoints: one file that holds all that is needed to resume a run or to talk.

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
    tokenizer         JSON as text: PyTorch takes 0.3 s to read 32,000 merges one by one
    model, optimizer, scaler      state dictionaries (scaler: float16's loss scaling); optimizer is empty in a
                      model that was not trained by a run here (export.py --read)

Files of versions 1 and 2 are read, too.

The random state needs no tensors: the data's order follows from random_seed and the sequences consumed,
dropout from random_seed and the step.

It is written beside its final name, flushed, then renamed, so a file that has the name is whole.
It is read without trust: every record's checksum is verified, nothing in it is run.
"""

import contextlib
import itertools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

import models
import tokenizer as tokenizers
from common.config import ROOT, display_path
from common.errors import UserError
from common.files import atomic_write
from config.schema import LAST_STEP
from config.stages import STAGES
from engine import archive

FORMAT, VERSION = "nano-checkpoint", 3
TIME = r"[0-9]{8}_[0-9]{6}"  # a run's name
FOLDER = ROOT / "checkpoint"


def unmeasured():
    return {"loss": None, "step": None}


@dataclass
class Checkpoint:
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
    def path(self):
        return FOLDER / f"{self.stage}_{self.run}_step_{self.step}.pt"

    @property
    def can_resume(self):
        """Whether a run has left it, and not a program that only made a model's file."""
        return "state" in self.optimizer

    @property
    def is_sound(self):
        """Whether its plain values are such as training writes; `build` and `restore` check the tensors."""
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
            # Stage and run become part of a file's name.
            re.fullmatch("[a-z]+", self.stage)
            and re.fullmatch(TIME, self.run)
            and type(self.step) is int
            and 0 <= self.step <= LAST_STEP
            and all(losses)
            and consumed.keys() == {"sequences", "tokens"}
            and _is_count(consumed["sequences"])
            and (consumed["tokens"] is None or _is_count(consumed["tokens"]))
            and self.data.keys() in ({"train", "validation"}, set())
            and all(isinstance(kind, list) and all(map(_is_data, kind)) for kind in files)
            and all(
                re.fullmatch("[a-z_]{1,40}", str(name)) and type(n) is int for name, n in self.problem.items()
            )
        )

    def save(self):
        """Write the file, whole or not at all; returns its path."""
        state = {**vars(self), "tokenizer": json.dumps(self.tokenizer)}
        try:
            with atomic_write(self.path) as file:
                torch.save({"format": FORMAT, "version": VERSION, **state}, file)
        except OSError as error:
            raise UserError(
                f"the checkpoint {display_path(self.path)} could not be written ({error.strerror}); "
                "earlier checkpoints are untouched"
            ) from None
        return self.path


@dataclass(frozen=True, order=True)
class Saved:
    """A checkpoint's file. They are ordered as they were written."""

    run: str
    step: int
    stage: str
    path: Path


def saved(stage=None, run=None):
    """All checkpoints that are here [of a stage] [of a run], oldest first."""
    pattern = re.compile(rf"([a-z]+)_({TIME})_step_([0-9]{{1,15}})\.pt")
    found = [(pattern.fullmatch(path.name), path) for path in FOLDER.glob("*_step_*.pt")]
    entries = [Saved(match[2], int(match[3]), match[1], path) for match, path in found if match]
    return sorted(entry for entry in entries if stage in (None, entry.stage) and run in (None, entry.run))


def load(path):
    """The checkpoint in the file. UserError if it is missing, damaged, foreign or hostile."""
    path, name = Path(path), display_path(path)
    if not path.is_file():
        hint = f"; the newest in checkpoint/ is {display_path(near[-1].path)}" if (near := saved()) else ""
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
        state = _updated(state, version)
    elif type(version) is not int or version != VERSION:
        raise UserError(f"{name} was written by another version of Nano")
    text = state.get("tokenizer")  # in older files it is the dictionary
    if isinstance(text, str) and len(text) <= tokenizers.MAX_JSON_LENGTH:
        with contextlib.suppress(ValueError, RecursionError):
            state["tokenizer"] = json.loads(text)
    types = {key: f.type for key, f in Checkpoint.__dataclass_fields__.items()}
    typed = state.keys() == types.keys() and all(isinstance(state[k], t) for k, t in types.items())
    if not typed or not (checkpoint := Checkpoint(**state)).is_sound:
        raise UserError(f"{name} lacks parts of a checkpoint of Nano")
    if checkpoint.chat_template not in (None, tokenizers.CHAT_TEMPLATE):
        raise UserError(
            f"{name} uses the chat template {checkpoint.chat_template!r}, which this version of Nano lacks"
        )
    if shared := _shared(checkpoint):
        raise UserError(f"{name} is not a checkpoint of Nano: {shared} shares numbers with another tensor")
    return checkpoint


def _is_count(value):
    return type(value) is int and 0 <= value < 1 << 63


def _is_data(value):
    return (
        isinstance(value, dict)
        and value.keys() == {"fingerprint", "size"}
        and all(isinstance(text, str) for text in value.values())
    )


def _updated(state, version):
    """The state of a file of an earlier version with the fields that it lacks, as far as they follow from
    others."""
    stage, config = state.pop("task", None), state.get("train_config")
    state["stage"] = stage
    if version == 1:
        state |= _not_in_version_1(state)
    stage = STAGES.get(stage) if isinstance(stage, str) else None
    # A toy problem used to keep its sizes in dataset_path, as JSON.
    sizes = {}
    with contextlib.suppress(KeyError, IndexError, TypeError, ValueError, RecursionError):
        ((_, text),) = config["dataset_path"]
        sizes = json.loads(text) if stage is None else {}
    return state | {"chat_template": stage and stage.chat_template, "problem": sizes}


def _not_in_version_1(state):
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


def _shared(checkpoint):
    """The name of a tensor that overlaps another one of the checkpoint, or None.

    A network may have one under two names, as embedding and head; all else would change with each other.
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


def _tensors(value, name):
    """(name, tensor) of all within."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{name} {key}")


def build(checkpoint, source):
    """(model, tokenizer) of a checkpoint, on the CPU, in eval mode. `source`: its name, for errors."""
    try:
        tokenizer = tokenizers.from_dict(checkpoint.tokenizer)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    shape = {key: value for key, value in checkpoint.model_config.items() if key != "dropout"}
    config = models.check_config(shape, f"{source}: model_config")
    config = config.resolved(tokenizer.vocab_size)
    if tokenizer.vocab_size > config.vocab_size or not _belong_to(checkpoint.model, config):
        raise UserError(f"{source}: its weights do not fit its own configuration")
    with Uninitialized():
        model = models.build(config)
    model.load_state_dict(dict(checkpoint.model))  # without what else a state dictionary of PyTorch's may say
    return model.eval(), tokenizer


LARGEST_TABLES = 1 << 28  # bytes of what a network computes for itself; of large ones, 8 times their weights


def _belong_to(weights, config):
    """Whether these are the weights of such a model, which takes no more memory than they let expect."""
    layers = {name.split(".")[1] for name in map(str, weights) if name.startswith("blocks.")}
    if len(layers) != config.n_layer:  # or to find out would take long
        return False
    with torch.device("meta"):
        model = models.build(config)
    expected = model.state_dict()
    if not _fit(weights, {name: tensor.shape for name, tensor in expected.items()}):
        return False
    names = {}  # of each parameter; embedding and head may be one
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, *others in names.values():
        if not all(torch.equal(weights[name], weights[other]) for other in others):
            return False
    places = {weights[name].data_ptr() for name, *_ in names.values()}
    tables = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in expected)
    largest = max(LARGEST_TABLES, 8 * sum(tensor.nbytes for tensor in weights.values()))
    return len(places) == len(names) and tables <= largest


class Uninitialized(TorchFunctionMode):
    """Within it, torch.nn.init leaves weights as they are: they will be read from a file.

    By hand, because `load_state_dict(assign=True)` into a model on the "meta" device would leave the buffers
    that an architecture computes for itself (rotary tables) without values.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _fit(tensors, shapes):
    """Whether `tensors` is {name: plain tensor of floats} with just these names and shapes."""
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


def moments(start, shapes):
    """What the optimizer keeps of each parameter, {number: {name: tensor}}, as `optimizer` has it.

    shapes: {name: shape} of each parameter, in the optimizer's order. Empty if there is none yet: all of
    the first steps in float16 may have been skipped. UserError if the state is not one of these parameters.
    """
    state, shapes = start.checkpoint.optimizer.get("state"), dict(enumerate(shapes))
    fits = state == {} or (
        isinstance(state, dict)
        and state.keys() == shapes.keys()
        and all(_fit(state[number], kept) for number, kept in shapes.items())
    )
    if not fits:
        raise unfit(start)
    return state


def restore(start, shapes, load_optimizer, scaler):
    """Put back the state of the optimizer, load_optimizer(state), and of the loss scaling.

    shapes: see `moments`. Raises UserError if they do not fit.
    """
    state = moments(start, shapes)
    try:
        load_optimizer(state)
        scaler.load_state_dict(start.checkpoint.scaler or scaler.state_dict())
    except (ValueError, KeyError, RuntimeError, TypeError):
        raise unfit(start) from None


def unfit(start):
    before = start.checkpoint.train_config.get("optimizer", "unknown")
    return UserError(
        f'{start.name}: its optimizer state, of "{before}", does not fit this optimizer; to take its weights '
        f"alone, start a new run: without --resume, with --set from_checkpoint={start.name}"
    )
