"""Checkpoints: one file that holds all that is needed to resume a run or to talk.

A checkpoint is a dictionary of tensors and plain JSON values, in PyTorch's zip container:

    format, version   "nano-checkpoint", 1
    task, run         "pretrain" or "sft", and the time at which the run began
    step              optimizer steps done
    best              {"loss": best validation loss or None, "step": where it was reached}
    model_config, train_config, tokenizer     plain JSON
    model, optimizer, scaler                  state dictionaries (scaler: float16's loss scaling)

The random state needs no tensors: data order and dropout of step N follow from random_seed and N.

It is written beside its final name, flushed, then renamed, so a file that has the name is whole.
It is read without trust: every record's checksum is verified, nothing in it is run.
"""

import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

import tokenizer as tokenizers
from config.schema import ModelConfig
from engine.config import ROOT, check, find, shown
from engine.errors import UserError
from model import GPT

FORMAT, VERSION = "nano-checkpoint", 1
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

    def save(self):
        """Write the file, whole or not at all; returns its path."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".pt.part")
        try:
            with open(beside, "wb") as file:
                torch.save({"format": FORMAT, "version": VERSION, **vars(self)}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
        except (OSError, RuntimeError) as error:
            beside.unlink(missing_ok=True)
            # PyTorch reports a full disk as a RuntimeError of its zip writer.
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            reason = error.strerror if isinstance(error, OSError) else "the disk is full"
            raise UserError(
                f"the checkpoint {shown(self.path)} could not be written ({reason}); "
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
        with zipfile.ZipFile(path) as archive:
            # PyTorch stores without compression; anything else could unfold without bound.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
    except PermissionError:
        raise UserError(f"no permission to read {name}") from None
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError):
        raise UserError(f"{name} is damaged, or is not a checkpoint of Nano") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception:
        # weights_only refuses all but tensors and plain values, in many kinds of exception.
        raise UserError(f"{name} is not a checkpoint of Nano: nothing in it was run") from None
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise UserError(f"{name} is a PyTorch file, but not a checkpoint of Nano")
    if state.pop("version", None) != VERSION:
        raise UserError(f"{name} was written by another version of Nano")
    types = {key: f.type for key, f in Checkpoint.__dataclass_fields__.items()}
    if state.keys() != types.keys() or any(not isinstance(state[k], t) for k, t in types.items()):
        raise UserError(f"{name} lacks parts of a checkpoint of Nano")
    return Checkpoint(**state)


def build(checkpoint, source, dropout=0.0):
    """(model, tokenizer) of a checkpoint, on the CPU, in eval mode. `source`: its name, for errors."""
    tokenizer = tokenizers.from_dict(checkpoint.tokenizer)
    config = check(ModelConfig, {**checkpoint.model_config, "dropout": dropout}, f"{source}: model_config")
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    found = {name: getattr(tensor, "shape", None) for name, tensor in checkpoint.model.items()}
    if expected != found or tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{source}: its weights do not fit its own configuration")
    model = GPT(config)
    model.load_state_dict(checkpoint.model)
    return model.eval(), tokenizer


@dataclass
class Start:
    """Where a run begins: `checkpoint` None is from scratch; `run` is set if it goes on with one."""

    checkpoint: Checkpoint | None = None
    name: str = ""
    run: str | None = None
    notices: tuple = ()


def starting_point(task, config, resume):
    """What the run starts from, by --resume and the key from_checkpoint.

    A checkpoint of the same task and the same data is gone on with: its step, optimizer and data
    order. Of any other, only model and tokenizer are taken.
    """
    if resume:
        if found := newest(task):
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
    changes = [f"{key}: {checkpoint.train_config.get(key)} -> {now[key]}" for key in now
               if key != "from_checkpoint" and checkpoint.train_config.get(key) != now[key]]  # fmt: skip
    notices = [*notices, f"going on with {shown(path)} at step {checkpoint.step}"]
    if changes:
        notices.append("changed since then: " + ", ".join(changes))
    return Start(checkpoint, shown(path), checkpoint.run, notices)


def restore(optimizer, scaler, start):
    """Put the optimizer's moments, and float16's loss scale, back."""
    try:
        optimizer.load_state_dict(start.checkpoint.optimizer)
        scaler.load_state_dict(start.checkpoint.scaler or scaler.state_dict())
    except (ValueError, KeyError, RuntimeError, TypeError):
        raise UserError(
            f"{start.name}: its optimizer state does not fit this optimizer; "
            "set from_checkpoint to it in a new run to take its weights alone"
        ) from None


def of_task(task, run=None):
    """[(run, step, path)] of the checkpoints of a task (and run), oldest first."""
    pattern = re.compile(rf"{re.escape(task)}_(\d{{8}}_\d{{6}})_step_(\d+)\.pt")
    found = [(match[1], int(match[2]), path) for path in FOLDER.glob(f"{task}_*.pt")
             if (match := pattern.fullmatch(path.name))]  # fmt: skip
    return sorted(entry for entry in found if run in (None, entry[0]))


def newest(task):
    """The newest good checkpoint of the newest run of a task: (checkpoint, path, notices) or None."""
    entries, notices = of_task(task), []
    for _, _, path in reversed([entry for entry in entries if entry[0] == entries[-1][0]]):
        try:
            return load(path), path, notices
        except UserError as error:
            notices.append(f"{error}; trying the one before it")
    if notices:
        raise UserError("; ".join(notices))
    return None


def prune(checkpoint, keep):
    """Delete all but the `keep` newest checkpoints of this run and its best one; 0 keeps all."""
    entries = of_task(checkpoint.task, checkpoint.run)
    for _, step, path in entries[:-keep] if keep else []:
        if step != checkpoint.best["step"]:
            path.unlink(missing_ok=True)
