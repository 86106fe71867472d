"""Which run this is: its name, its lock, and where it begins.

A run is known by its name, the time (UTC) at which it was started, as in pretrain_20260102_030405_step_60.pt
and train_20260102_030405.log. Names are given in the order in which runs are started, whatever the clock
says: a new one is later than all that are here already. While a process trains a run it holds the lock
checkpoint/<name>.lock, which the system lifts when the process ends, however it ends. So runs of one stage
can train beside each other in one folder, each prunes and continues only its own files, and no run is
trained twice at once.

A run goes on with --resume, from its last checkpoint, by one process after another, under its name: within
a run, a higher step is always later. To go on from an earlier one is to begin another run, a branch.
"""

import contextlib
import itertools
import os
import re
import shlex
import socket
import sys
import weakref
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from filelock import FileLock, Timeout

from common.config import check, display_path, resolve_path
from common.errors import UserError
from config.schema import TrainConfig
from config.stages import STAGES
from engine import checkpoint as checkpoints
from engine.checkpoint import TIME, Checkpoint, load, saved, unmeasured
from engine.optimizer import learning_rate_at

CLOCK = "%Y%m%d_%H%M%S"

# ---- names and locks ---------------------------------------------------------------------------------


class Run:
    """A run that this process may train, and no other one, until it is released or forgotten.

    Run() is a new one, Run(name) one that exists. UserError if another process has the run, or if nothing can
    be written to the folder of checkpoints. Processes that it is sent to know its name only.
    """

    def __init__(self, name=None):
        try:
            checkpoints.FOLDER.mkdir(parents=True, exist_ok=True)
            self._take(name)
        except OSError as error:
            folder, why = display_path(checkpoints.FOLDER), error.strerror.lower()
            raise UserError(f"no checkpoint could be written to {folder}/ ({why})") from None

    def _take(self, name):
        while True:
            self.name = name or _next_name()
            lock = _locked(self.name)
            if not lock and name:
                raise UserError(f"run {name} is being trained by another process{_holder(name)}")
            if lock:
                self.release = weakref.finalize(self, _released, lock)
                if name or self.name not in _names():
                    return
                self.release()  # another process was faster, and is done already

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    def __reduce__(self):
        return Name, (self.name,)


@dataclass
class Name:
    """A run that another process trains."""

    name: str


def _lock_file(name):
    return checkpoints.FOLDER / f"{name}.lock"


def _locked(name):
    """The lock of a run, held; None if another process holds it."""
    lock = FileLock(_lock_file(name), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    with contextlib.suppress(OSError):  # for `_holder`; Windows lets nobody write to it
        _lock_file(name).write_text(f"{os.getpid()} on {socket.gethostname()}", "utf-8")
    return lock


def _released(lock):
    with contextlib.suppress(OSError):  # Windows deletes no file that is open
        os.unlink(lock.lock_file)
    lock.release()


def _holder(name):
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if text := _lock_file(name).read_text("utf-8"):
            return f", {text}"
    return ""


def _names():
    """Of all runs that have left a log or a checkpoint."""
    folder = checkpoints.FOLDER
    logs = rf"train_({TIME})\.(?:log|metrics\.jsonl)"
    found = [re.fullmatch(logs, path.name) for path in folder.parent.glob("train_*")]
    return {match[1] for match in found if match} | {entry.run for entry in saved()}


def _next_name():
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    for name in _names():
        with contextlib.suppress(ValueError, OverflowError):  # that is no time
            now = max(now, datetime.strptime(name, CLOCK) + timedelta(seconds=1))
    return now.strftime(CLOCK)


# ---- which checkpoint -----------------------------------------------------------------------


def newest(stage, run=None):
    """The last good checkpoint of the newest run of a stage, or of this run: (checkpoint, path, notices).

    None if there is none; UserError if all of that run are damaged.
    """
    notices, entries = [], saved(stage, run)
    for entry in reversed([entry for entry in entries if entry.run == entries[-1].run]):
        try:
            return load(entry.path), entry.path, notices
        except UserError as error:
            notices.append(f"{error}; trying the one before it")
    if notices:
        raise UserError("; ".join(notices))
    return None


def best(stage):
    """The checkpoint of that run with the lowest validation loss, in the form of `newest`.

    UserError if nothing was validated, or the file is gone.
    """
    if not (found := newest(stage)):
        return None
    checkpoint, path, notices = found
    step = checkpoint.best["step"]
    if step is None:
        raise UserError(
            f"nothing was validated up to {display_path(path)}, so none is best; take it with -m newest"
        )
    if step == checkpoint.step:
        return found
    path = path.with_name(f"{checkpoint.stage}_{checkpoint.run}_step_{step}.pt")
    return load(path), path, notices


def prune(checkpoint, keep):
    """Delete all but the `keep` newest checkpoints of this run and its best one; 0 keeps all."""
    entries = saved(checkpoint.stage, checkpoint.run)
    for entry in entries[:-keep] if keep else []:
        if entry.step != checkpoint.best["step"]:
            entry.path.unlink(missing_ok=True)


def sweep(run):
    """Delete what killed processes have left half written, of this run and of all that nobody trains."""
    for path in checkpoints.FOLDER.glob("*.part"):
        name = re.match(rf"[a-z]+_({TIME})_step_", path.name)
        lock = name and name[1] != run.name and _locked(name[1])
        if name and (name[1] == run.name or lock):
            with contextlib.suppress(OSError):
                path.unlink()
        if lock:
            _released(lock)


# ---- where a run begins --------------------------------------------------------------------------------


@dataclass
class Start:
    """Where a run begins.

    checkpoint     whose model and tokenizer it has; None: it starts from nothing
    name           of the checkpoint's file
    run            a Run that exists already; None: a new one
    resumes        step, optimizer and position are the checkpoint's, too
    branched_from  {"run", "step"}, if it resumes what another run has left behind
    notices        what to tell of it
    """

    checkpoint: Checkpoint | None = None
    name: str = ""
    run: Run | None = None
    resumes: bool = False
    branched_from: dict | None = None
    notices: list = field(default_factory=list)


def starting_point(stage, config, resume=None, launched=None):
    """What a run starts from.

    resume: None: a new run; True: the newest run of the stage goes on; else a run's name, or the file of a
    checkpoint to go on from. launched: the name of the run that the launcher has started before and brings
    back; it goes on, whatever else is asked for.

    A new run takes model and tokenizer of the key from_checkpoint, and nothing else of it.
    """
    if launched:
        run = Run(launched)
        if saved(stage, launched):
            return _resumed(*newest(stage, launched), run, config)
        # It was new, and has left nothing yet: once more, under the same name.
        start = starting_point(stage, config, None if resume is True else resume)
        start.run = run
        return start
    if resume is True:
        for name in sorted({entry.run for entry in saved(stage)}, reverse=True):
            run = _available(stage, name)
            found = newest(stage, name)
            if found and found[0].can_resume:  # no model that was only read in or converted
                return _resumed(*found, run, config)
            run.release()
        start = _new(stage, config)
        start.notices.insert(0, f"there is no {stage} run to resume: starting a new one")
        return start
    return _resume(stage, resume, config) if resume else _new(stage, config)


def _new(stage, config):
    """The Start of a run that has not done a step."""
    notices, path = [], config.from_checkpoint
    if path == "auto":
        before = stage in STAGES and STAGES[stage].follows or stage
        if not (found := newest(before)):
            raise UserError(
                f'from_checkpoint is "auto", but checkpoint/ holds no model of stage {before}; run '
                f'`python train.py -t {before}` first, or set from_checkpoint to "" to start from nothing'
            )
        checkpoint, path, notices = found
    elif path:
        path = resolve_path(path)
        checkpoint = load(path)
    else:
        return Start()
    notices.append(f"starting from the weights of {display_path(path)}")
    if checkpoint.stage == stage and checkpoint.can_resume:
        notices.append(f"this is a new run; that one goes on with --resume {checkpoint.run}")
    return Start(checkpoint, display_path(path), notices=notices)


def _resume(stage, wanted, config):
    """The Start for --resume with a run's name or a checkpoint's file."""
    path, name = resolve_path(wanted), re.fullmatch(rf"(?:{stage}_)?({TIME})", wanted)
    if name and not path.is_file():
        if not saved(stage, name[1]):
            raise UserError(f"--resume {wanted}: there is no checkpoint of this run{_others(stage, name[1])}")
        run = Run(name[1])
        checkpoint, path, notices = newest(stage, run.name)
    else:
        checkpoint, run, notices = load(path), None, []
    if checkpoint.stage != stage:
        raise UserError(
            f"--resume {display_path(path)} is a checkpoint of {checkpoint.stage}, not of {stage}"
        )
    if not checkpoint.can_resume:
        raise UserError(
            f"--resume {display_path(path)} is a model that no run has left; to start a run from it: "
            f"--set from_checkpoint={display_path(path)}"
        )
    if not run:
        later = [entry for entry in saved(stage, checkpoint.run) if entry.step > checkpoint.step]
        if later or path.resolve() != checkpoint.path.resolve():
            notices = [
                f"{display_path(path)} is not where its run ended: this is a new run that branches off there"
            ]
        else:
            run = Run(checkpoint.run)
    return _resumed(checkpoint, path, notices, run, config)


def _available(stage, name):
    """The Run of this name; UserError, with what else could be resumed, if another process has it."""
    try:
        return Run(name)
    except UserError as error:
        raise UserError(f"{error}{_others(stage, name)}") from None


def _others(stage, name):
    others = sorted({entry.run for entry in saved(stage)} - {name})[-5:]
    return f"; other runs of {stage} go on with --resume {' or --resume '.join(others)}" if others else ""


def _resumed(checkpoint, path, notices, run, config):
    """Go on from a checkpoint; say where the configuration has changed meanwhile."""
    before, now = checkpoint.train_config, config.model_dump(mode="json")
    # Data are known by what they hold: see `progress`.
    changes = [f"{key}: {before.get(key)} -> {value}" for key, value in now.items()
               if key not in ("from_checkpoint", "dataset_path") and value not in ("auto", before.get(key))
    ]  # fmt: skip
    notices = [*notices, f"going on with {display_path(path)} at step {checkpoint.step}"]
    if changes:
        notices.append("changed since then: " + ", ".join(changes))
    branched_from = None if run else {"run": checkpoint.run, "step": checkpoint.step}
    return Start(checkpoint, display_path(path), run, True, branched_from, notices)


# ---- how far it has come -------------------------------------------------------------------------------


@dataclass
class Progress:
    """What of a run its checkpoints remember beside model and optimizer: see engine/checkpoint.py."""

    step: int = 0
    consumed: dict = field(default_factory=lambda: {"sequences": 0, "tokens": 0})
    best: dict = field(default_factory=unmeasured)
    validation: dict = field(default_factory=unmeasured)


def progress(start, config, data, position):
    """(the Progress with which a run starts, what to tell of it).

    data: as a checkpoint has it; position: of a BatchSource. Where the data, or their order, are other ones
    than before, the run begins them anew; where what it is validated on is, so does its best loss.
    """
    if not start.resumes:
        return Progress(), []
    saved, before, notices = start.checkpoint, start.checkpoint.train_config, []
    # The best checkpoint of a branch is one of its own.
    best = unmeasured() if start.branched_from else dict(saved.best)
    state = Progress(saved.step, dict(saved.consumed), best, dict(saved.validation))
    if not saved.data:
        notices.append(f"{start.name} does not say what its data held: they are taken to be the same")
        saved.data = data
    paths = {
        kind: [pair[i] for pair in config.dataset_path] for i, kind in enumerate(("train", "validation"))
    }
    for kind, files in paths.items():
        notices += _changed(files, saved.data[kind], data[kind])
    # A curriculum that only grows, or changes further on, has been consumed so far as it is now.
    same_seed = before.get("random_seed") == config.random_seed
    epoch, stage, place = position(state.consumed["sequences"])
    n_seen = stage + (place > 0)
    if saved.data["train"] != data["train"] or not same_seed:
        if not same_seed or epoch or saved.data["train"][:n_seen] != data["train"][:n_seen]:
            state.consumed["sequences"] = 0
            what = "content has changed" if same_seed else "order has changed, with random_seed"
            notices.append(f"the data begin anew, at their first sequence: their {what}")
    sample = ("random_seed", "batch_size", "eval_iters")
    if saved.data != data:
        notices.append("validation may hold documents that were trained on before; the best loss counts anew")
    elif any(before.get(key) != getattr(config, key) for key in sample):
        notices.append("other sequences are validated than before: the best loss counts anew")
    else:
        return state, notices
    state.best, state.validation = unmeasured(), unmeasured()
    return state, notices


def _changed(paths, before, now):
    for path, old, new in itertools.zip_longest(paths, before, now):
        if old != new:
            old, new = ((file or {"size": "nothing"})["size"] for file in (old, new))
            what = "other content of the same size" if old == new else f"{old} then, {new} now"
            yield f"the data have changed: {path or 'a further file'}: {what}"


def jump_of_the_rate(start, config):
    """One sentence if the learning rate of the next step is not the one the configuration had before, else
    none."""
    try:
        before = check(TrainConfig, start.checkpoint.train_config, start.name)
    except UserError:  # of a version that had other keys
        return []
    step = start.checkpoint.step
    old, new = learning_rate_at(step, before), learning_rate_at(step, config)
    if abs(new - old) <= 0.01 * old:
        return []
    return [f"the learning rate jumps, at step {step}, from {old:.2e} to {new:.2e}"]


# ---- the model it starts with --------------------------------------------------------------------------


def differences(found, wanted):
    """One sentence if the model of a checkpoint is not the configured one, none if it is."""
    if found.architecture != wanted.architecture:
        return [f"the model stays {found.architecture}, as in the checkpoint, not {wanted.architecture}"]
    differ = [f"{key} {value} (configured: {getattr(wanted, key)})" for key, value in found
              if value != getattr(wanted, key)]  # fmt: skip
    return [f"the model keeps the shape it has in the checkpoint: {', '.join(differ)}"] if differ else []


def extend_context(start, wanted):
    """Give the checkpoint that a new run starts from the configured block_size and rope_scaling, where that
    stretches its positions, or stretches them otherwise. Returns what to tell of it.

    UserError if the checkpoint is of another architecture; `build` refuses one with learned positions.
    """
    if start.resumes or not wanted.rope_scaling:
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


def resume_command(run_name: str, is_launched: bool) -> str:
    """What was typed, with --resume and the run's name, for a shell; a launcher does not say what was
    typed."""
    if is_launched:
        return f"the same command and --resume {run_name}"
    typed = sys.argv[:]
    if "--resume" in typed:
        at = typed.index("--resume")
        has_value = at + 1 < len(typed) and not typed[at + 1].startswith("-")
        del typed[at : at + 1 + has_value]
    typed = [word for word in typed if not word.startswith("--resume=")]
    return shlex.join(["python", *typed, "--resume", run_name])
