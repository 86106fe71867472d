"""Checkpoints: one file that holds all that is needed to resume a run or to talk.

A checkpoint is a dictionary of tensors and plain JSON values, in PyTorch's zip container:

    format, version   "nano-checkpoint", 1
    task, run         "pretrain" or "sft", and the time at which the run began
    step              optimizer steps done
    best              {"loss": best validation loss or None, "step": where it was reached}
    model_config, train_config    plain JSON
    tokenizer         JSON as text: PyTorch takes 0.3 s to read 32,000 merges one by one
    model, optimizer, scaler                  state dictionaries (scaler: float16's loss scaling)

The random state needs no tensors: data order and dropout of step N follow from random_seed and N.

It is written beside its final name, flushed, then renamed, so a file that has the name is whole.
It is read without trust: every record's checksum is verified, nothing in it is run.
"""

import contextlib
import itertools
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

import models
import tokenizer as tokenizers
from config.schema import LAST_STEP
from engine import archive
from engine.config import ROOT, check_model, find, shown
from engine.errors import UserError
from engine.files import whole

FORMAT, VERSION = "nano-checkpoint", 1
TIME = r"[0-9]{8}_[0-9]{6}"  # a run's name
FOLDER = ROOT / "checkpoint"


@dataclass
class Checkpoint:
    task: str
    run: str
    step: int
    model_config: dict
    train_config: dict
    tokenizer: dict
    model: dict
    optimizer: dict
    scaler: dict = field(default_factory=dict)
    best: dict = field(default_factory=lambda: {"loss": None, "step": None})

    @property
    def path(self):
        return FOLDER / f"{self.task}_{self.run}_step_{self.step}.pt"

    @property
    def is_sound(self):
        """Whether its plain values are such as training writes; `build` and `restore` check the tensors."""
        try:
            json.dumps([self.task, self.run, self.best, self.model_config, self.train_config, self.tokenizer])
        except (TypeError, ValueError, RecursionError):
            return False
        loss, step = self.best.get("loss"), self.best.get("step")
        return bool(
            # Task and run become part of a file's name.
            re.fullmatch("[a-z]+", self.task)
            and re.fullmatch(TIME, self.run)
            and type(self.step) is int
            and 0 <= self.step <= LAST_STEP
            and self.best.keys() == {"loss", "step"}
            and (loss is None or type(loss) is float)
            and (step is None or type(step) is int)
        )

    def save(self):
        """Write the file, whole or not at all; returns its path."""
        state = {**vars(self), "tokenizer": json.dumps(self.tokenizer)}
        try:
            with whole(self.path) as file:
                torch.save({"format": FORMAT, "version": VERSION, **state}, file)
        except OSError as error:
            raise UserError(
                f"the checkpoint {shown(self.path)} could not be written ({error.strerror}); "
                "earlier checkpoints are untouched"
            ) from None
        return self.path


def load(path):
    """The checkpoint in the file. UserError if it is missing, damaged, foreign or hostile."""
    path, name = Path(path), shown(path)
    if not path.is_file():
        near = sorted(FOLDER.glob("*.pt"), key=os.path.getmtime)
        hint = f"; the newest in checkpoint/ is {shown(near[-1])}" if near else ""
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
    if type(version) is not int or version != VERSION:
        raise UserError(f"{name} was written by another version of Nano")
    text = state.get("tokenizer")  # in older files it is the dictionary
    if isinstance(text, str) and len(text) <= tokenizers.LARGEST:
        with contextlib.suppress(ValueError, RecursionError):
            state["tokenizer"] = json.loads(text)
    types = {key: f.type for key, f in Checkpoint.__dataclass_fields__.items()}
    typed = state.keys() == types.keys() and all(isinstance(state[k], t) for k, t in types.items())
    if not typed or not (checkpoint := Checkpoint(**state)).is_sound:
        raise UserError(f"{name} lacks parts of a checkpoint of Nano")
    if shared := _shared(checkpoint):
        raise UserError(f"{name} is not a checkpoint of Nano: {shared} shares numbers with another tensor")
    return checkpoint


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


def build(checkpoint, source, dropout=0.0):
    """(model, tokenizer) of a checkpoint, on the CPU, in eval mode. `source`: its name, for errors."""
    try:
        tokenizer = tokenizers.from_dict(checkpoint.tokenizer)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    config = check_model({**checkpoint.model_config, "dropout": dropout}, f"{source}: model_config")
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
    """Within it, torch.nn.init leaves weights as they are: they will be read from a file."""

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


def differences(found, wanted):
    """One sentence if the model of a checkpoint is not the configured one, none if it is."""
    if found.architecture != wanted.architecture:
        return [f"the model stays {found.architecture}, as in the checkpoint, not {wanted.architecture}"]
    differ = [f"{key} {value} (configured: {getattr(wanted, key)})" for key, value in found
              if key != "dropout" and value != getattr(wanted, key)]  # fmt: skip
    return [f"the model keeps the shape it has in the checkpoint: {', '.join(differ)}"] if differ else []


def extend_context(start, wanted):
    """Give the checkpoint that a new run starts from the configured block_size and rope_scaling, where that
    stretches its positions, or stretches them otherwise. Returns what to tell of it.

    UserError if the checkpoint is of another architecture; `build` refuses one with learned positions.
    """
    if start.run or not wanted.rope_scaling:
        return []
    shape, scaling = start.checkpoint.model_config, wanted.rope_scaling.model_dump()
    if shape.get("rope_scaling") == scaling:
        return []
    if (found := shape.get("architecture")) != wanted.architecture:
        raise UserError(
            f"rope_scaling is to stretch the context of {start.name}, but the model there is {found}, "
            f"not {wanted.architecture}: set architecture to it, or rope_scaling to null"
        )
    told = (
        f"the context of {start.name} is stretched as rope_scaling says ({scaling['rope_type']}, "
        f"factor {scaling['factor']:g}): block_size {shape.get('block_size')} -> {wanted.block_size}"
    )
    shape.update(block_size=wanted.block_size, rope_scaling=scaling)
    return [told]


@dataclass
class Start:
    """Where a run begins: `checkpoint` None is from scratch; `run` is set if it goes on with one."""

    checkpoint: Checkpoint | None = None
    name: str = ""
    run: str | None = None
    notices: tuple = ()


def starting_point(task, config, resume, since=None):
    """What the run starts from, by --resume and the key from_checkpoint.

    since: --resume is also meant if there is a checkpoint written after this time (see `newest`).

    A checkpoint of the same task and the same data is gone on with: its step, optimizer and data
    order. Of any other, only model and tokenizer are taken.
    """
    if resume or since is not None:
        if found := newest(task, since or 0.0):
            checkpoint, path, notices = found
            return _continued(checkpoint, path, config, notices)
    notices = [f"there is no {task} checkpoint to resume from: starting a new run"] if resume else []
    path = config.from_checkpoint
    if path == "auto":
        if not (found := newest("pretrain")):
            raise UserError(
                "from_checkpoint is \"auto\", but checkpoint/ holds no pretrained model; run "
                '`python train.py -t pretrain` first, or set from_checkpoint to "" to start from nothing'
            )
        checkpoint, path, more = found
        notices += more
    elif path:
        path = find(path)
        checkpoint = load(path)
    else:
        return Start(notices=notices)
    same_data = [list(p) for p in config.dataset_path] == checkpoint.train_config.get("dataset_path")
    if checkpoint.task == task and same_data:
        return _continued(checkpoint, path, config, notices)
    return Start(checkpoint, shown(path), None, [*notices, f"starting from the weights of {shown(path)}"])


def _continued(checkpoint, path, config, notices):
    """Go on with the run of a checkpoint; say where the configuration has changed meanwhile."""
    now = config.model_dump(mode="json")
    changes = [f"{key}: {checkpoint.train_config.get(key)} -> {value}" for key, value in now.items()
               if key not in ("from_checkpoint", *config.automatic)
               and checkpoint.train_config.get(key) != value]  # fmt: skip
    notices = [*notices, f"going on with {shown(path)} at step {checkpoint.step}"]
    if changes:
        notices.append("changed since then: " + ", ".join(changes))
    return Start(checkpoint, shown(path), checkpoint.run, notices)


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


def unfit(start):
    return UserError(
        f"{start.name}: its optimizer state does not fit this optimizer; "
        "set from_checkpoint to it in a new run to take its weights alone"
    )


def of_task(task, run=None):
    """[(run, step, path)] of the checkpoints of a task (and run), oldest first."""
    pattern = re.compile(rf"{re.escape(task)}_({TIME})_step_([0-9]+)\.pt")
    found = [(match[1], int(match[2]), path) for path in FOLDER.glob(f"{task}_*.pt")
             if (match := pattern.fullmatch(path.name))]  # fmt: skip
    return sorted(entry for entry in found if run in (None, entry[0]))


def newest(task, since=0.0):
    """The newest good checkpoint of the newest run of a task: (checkpoint, path, notices) or None.

    since: only of those written after this time, in seconds since 1970.
    """
    entries = [entry for entry in of_task(task) if os.path.getmtime(entry[2]) >= since]
    notices = []
    for _, _, path in reversed([entry for entry in entries if entry[0] == entries[-1][0]]):
        try:
            return load(path), path, notices
        except UserError as error:
            notices.append(f"{error}; trying the one before it")
    if notices:
        raise UserError("; ".join(notices))
    return None


def prune(checkpoint, keep, since):
    """Delete all but the `keep` newest checkpoints of this run and its best one; 0 keeps all.

    Later ones are left alone: they are there when a run goes on from an earlier step. What killed runs
    of this task have left half written is deleted, too: files that nobody has written to since a time,
    in seconds since 1970, at which this process ran already.
    """
    entries = [entry for entry in of_task(checkpoint.task, checkpoint.run) if entry[1] <= checkpoint.step]
    for _, step, path in entries[:-keep] if keep else []:
        if step != checkpoint.best["step"]:
            path.unlink(missing_ok=True)
    for path in FOLDER.glob(f"{checkpoint.task}_*.pt.part"):
        with contextlib.suppress(OSError):  # another process was faster
            if path.stat().st_mtime < since:
                path.unlink()
