"""Which run this is: its name, its lock, and where it starts.

A run is named after the time (UTC) at which it was started, as in pretrain_20260102_030405_step_60.pt and
train_20260102_030405.log. Names grow with every new run, even if the clock was set back: a new name is later
than all that exist. While a process trains a run, it holds the lock checkpoint/<name>.lock, which the
operating system releases when the process ends, however it ends. So several runs of one stage can train in
one folder: each prunes and continues only its own files, and no run is trained twice at the same time.

--resume continues a run under its name from its last checkpoint, in one process after another. Within a run,
a higher step is always later. To continue from an earlier checkpoint is to start another run, a branch.
"""

import contextlib
import itertools
import os
import re
import shlex
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.config import display_path, resolve_path
from common.errors import UserError
from config.schema import ArchitectureConfig, TrainConfig
from config.stages import STAGES
from config.validation import check
from engine import checkpoint as checkpoints
from engine.checkpoint import TIME, Checkpoint, list_checkpoints, load, unmeasured
from engine.optimizer import learning_rate_at

CLOCK = "%Y%m%d_%H%M%S"

# ---- names and locks ---------------------------------------------------------------------------------


class Run:
    """The right to train a run. No other process has it until it is released or garbage-collected.

    Run() starts a new run, Run(name) continues an existing one. Raises UserError if another process trains
    the run, or if the folder of checkpoints cannot be written to. Pickled, it becomes a `RunName`.
    """

    name: str

    def __init__(self, name: str | None = None):
        try:
            checkpoints.FOLDER.mkdir(parents=True, exist_ok=True)
            self._acquire(name)
        except OSError as error:
            folder, why = display_path(checkpoints.FOLDER), (error.strerror or str(error)).lower()
            raise UserError(f"no checkpoint could be written to {folder}/ ({why})") from None

    def _acquire(self, name: str | None) -> None:
        while True:
            self.name = name or _new_name()
            lock = _try_lock(self.name)
            if not lock and name:
                raise UserError(f"run {name} is being trained by another process{_lock_owner(name)}")
            if lock:
                self.release = weakref.finalize(self, _unlock, lock)
                if name or self.name not in _existing_names():
                    return
                self.release()  # another process took this name first, and has ended already

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return RunName, (self.name,)


@dataclass
class RunName:
    """What other processes of a distributed run get instead of the `Run`, which rank 0 holds."""

    name: str


def _lock_file(name: str) -> Path:
    return checkpoints.FOLDER / f"{name}.lock"


def _try_lock(name: str) -> FileLock | None:
    """Lock a run. Returns None if another process holds the lock."""
    lock = FileLock(_lock_file(name), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    with contextlib.suppress(OSError):  # only information for `_lock_owner`; Windows does not allow it
        _lock_file(name).write_text(f"{os.getpid()} on {socket.gethostname()}", "utf-8")
    return lock


def _unlock(lock: FileLock) -> None:
    with contextlib.suppress(OSError):  # Windows cannot delete an open file
        os.unlink(lock.lock_file)
    lock.release()


def _lock_owner(name: str) -> str:
    """ ", <process id> on <host>" of the process that trains this run, or nothing if that is unknown."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if text := _lock_file(name).read_text("utf-8"):
            return f", {text}"
    return ""


def _existing_names() -> set[str]:
    """The names of all runs that have left a log or a checkpoint."""
    folder = checkpoints.FOLDER
    logs = rf"train_({TIME})\.(?:log|metrics\.jsonl)"
    found = [re.fullmatch(logs, path.name) for path in folder.parent.glob("train_*")]
    return {match[1] for match in found if match} | {file.run for file in list_checkpoints()}


def _new_name() -> str:
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    for name in _existing_names():
        with contextlib.suppress(ValueError, OverflowError):  # not a valid time
            now = max(now, datetime.strptime(name, CLOCK) + timedelta(seconds=1))
    return now.strftime(CLOCK)


# ---- which checkpoint -----------------------------------------------------------------------

Found = tuple[Checkpoint, Path, list[str]]  # (checkpoint, its file, notices for the user)


def newest(stage: str, run: str | None = None) -> Found | None:
    """The last undamaged checkpoint of a run: the newest run of a stage, or this one. None if it has none.

    Raises UserError if all checkpoints of the run are damaged.
    """
    notices: list[str] = []
    files = list_checkpoints(stage, run)
    for file in reversed([file for file in files if file.run == files[-1].run]):
        try:
            return load(file.path), file.path, notices
        except UserError as error:
            notices.append(f"{error}; trying the one before it")
    if notices:
        raise UserError("; ".join(notices))
    return None


def best(stage: str) -> Found | None:
    """The checkpoint with the lowest validation loss of the newest run. None if there is no run.

    Raises UserError if the run was never validated, or the file is gone.
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


def prune(checkpoint: Checkpoint, keep: int) -> None:
    """Delete all checkpoints of this run except the `keep` newest and the best; keep=0 deletes none."""
    files = list_checkpoints(checkpoint.stage, checkpoint.run)
    for file in files[:-keep] if keep else []:
        if file.step != checkpoint.best["step"]:
            file.path.unlink(missing_ok=True)


def remove_partial_files(run: Run) -> None:
    """Delete half-written checkpoints that killed processes have left, of this run and of idle runs."""
    for path in checkpoints.FOLDER.glob("*.part"):
        name = re.match(rf"[a-z]+_({TIME})_step_", path.name)
        if not name:
            continue
        lock = None if name[1] == run.name else _try_lock(name[1])
        if name[1] == run.name or lock:
            with contextlib.suppress(OSError):
                path.unlink()
        if lock:
            _unlock(lock)


# ---- where a run starts --------------------------------------------------------------------------------


@dataclass
class StartPoint:
    """Where a run starts.

    checkpoint     whose model and tokenizer it takes; None: a new model
    name           the name of the checkpoint's file
    run            the existing Run that continues; None: a new one
    resumes        step, optimizer and position in the data are the checkpoint's, too
    branched_from  {"run", "step"} if it continues what another run has left
    notices        what the user should know about it
    """

    checkpoint: Checkpoint | None = None
    name: str = ""
    run: Run | None = None
    resumes: bool = False
    branched_from: dict[str, Any] | None = None
    notices: list[str] = field(default_factory=list)

    @property
    def origin(self) -> str:
        """The checkpoint in which the run began, as a value of from_checkpoint; "" for a new model."""
        if self.checkpoint and self.resumes and not self.branched_from:
            return str(self.checkpoint.train_config.get("from_checkpoint", ""))
        return self.name


def starting_point(
    stage: str, config: TrainConfig, resume: str | bool | None = None, restarted: str | None = None
) -> StartPoint:
    """Find out where a run starts.

    resume: None for a new run; True for the newest run of the stage; else a run's name, or the file of a
    checkpoint. restarted: the name of the run that this launcher started before and now restarts: it
    continues, whatever else is asked for.

    A new run takes the model and the tokenizer of the key from_checkpoint, and nothing else of it.
    """
    if restarted:
        run = Run(restarted)
        if found := newest(stage, restarted):
            return _resume_from(*found, run, config)
        # It was new and has saved nothing yet: start it again under the same name.
        start = starting_point(stage, config, None if resume is True else resume)
        start.run = run
        return start
    if resume is True:
        for name in sorted({file.run for file in list_checkpoints(stage)}, reverse=True):
            run = _available_run(stage, name)
            found = newest(stage, name)
            if found and found[0].can_resume:  # not a model that was only converted
                return _resume_from(*found, run, config)
            run.release()
        start = _new_run(stage, config)
        start.notices.insert(0, f"there is no {stage} run to resume: starting a new one")
        return start
    return _resume_named(stage, resume, config) if resume else _new_run(stage, config)


def _new_run(stage: str, config: TrainConfig) -> StartPoint:
    """The StartPoint of a run at step 0."""
    if not config.from_checkpoint:
        return StartPoint()
    notices: list[str] = []
    if config.from_checkpoint == "auto":
        before = stage in STAGES and STAGES[stage].follows or (stage,)
        files = [files[-1] for name in before if (files := list_checkpoints(name))]
        if not files:
            raise UserError(
                f'from_checkpoint is "auto", but checkpoint/ holds no model of {" or ".join(before)}; run '
                f'`python train.py -t {before[0]}` first, or set from_checkpoint to "" to start from nothing'
            )
        found = newest(max(files).stage)
        assert found, "a checkpoint disappeared"
        checkpoint, path, notices = found
    else:
        path = resolve_path(config.from_checkpoint)
        checkpoint = load(path)
    notices.append(f"starting from the weights of {display_path(path)}")
    if checkpoint.stage == stage and checkpoint.can_resume:
        notices.append(f"this is a new run; to continue the other one: --resume {checkpoint.run}")
    return StartPoint(checkpoint, display_path(path), notices=notices)


def _resume_named(stage: str, wanted: str, config: TrainConfig) -> StartPoint:
    """The StartPoint for --resume with a run's name or the file of a checkpoint."""
    path, name = resolve_path(wanted), re.fullmatch(rf"(?:{stage}_)?({TIME})", wanted)
    run: Run | None = None
    notices: list[str] = []
    if name and not path.is_file():
        if not list_checkpoints(stage, name[1]):
            hint = _other_runs(stage, name[1])
            raise UserError(f"--resume {wanted}: there is no checkpoint of this run{hint}")
        run = Run(name[1])
        found = newest(stage, run.name)
        assert found, "a checkpoint disappeared"
        checkpoint, path, notices = found
    else:
        checkpoint = load(path)
    if checkpoint.stage != stage:
        raise UserError(
            f"--resume {display_path(path)} is a checkpoint of {checkpoint.stage}, not of {stage}"
        )
    if not checkpoint.can_resume:
        raise UserError(
            f"--resume {display_path(path)} is a model without the state of a run; to start a run from it: "
            f"--set from_checkpoint={display_path(path)}"
        )
    if not run:
        later = [file for file in list_checkpoints(stage, checkpoint.run) if file.step > checkpoint.step]
        if later or path.resolve() != checkpoint.path.resolve():
            notices = [
                f"{display_path(path)} is not where its run ended: this is a new run that branches off there"
            ]
        else:
            run = Run(checkpoint.run)
    return _resume_from(checkpoint, path, notices, run, config)


def _available_run(stage: str, name: str) -> Run:
    """The Run of this name. Raises UserError, with other runs to resume, if another process trains it."""
    try:
        return Run(name)
    except UserError as error:
        raise UserError(f"{error}{_other_runs(stage, name)}") from None


def _other_runs(stage: str, name: str) -> str:
    """The end of an error message: the last runs of the stage except this one."""
    others = sorted({file.run for file in list_checkpoints(stage)} - {name})[-5:]
    return f"; other runs of {stage}: --resume {' or --resume '.join(others)}" if others else ""


def _resume_from(
    checkpoint: Checkpoint, path: Path, notices: list[str], run: Run | None, config: TrainConfig
) -> StartPoint:
    """Continue from a checkpoint, with a notice of what has changed in the configuration since then."""
    before, now = _in_todays_keys(checkpoint.train_config), config.model_dump(mode="json")
    # Data is compared by content, in `initial_progress`.
    changes = [f"{key}: {before.get(key)} -> {value}" for key, value in now.items()
               if key not in ("from_checkpoint", "dataset_path") and value not in ("auto", before.get(key))
    ]  # fmt: skip
    notices = [*notices, f"resuming from {display_path(path)} at step {checkpoint.step}"]
    if changes:
        notices.append("changed since then: " + ", ".join(changes))
    branched_from = None if run else {"run": checkpoint.run, "step": checkpoint.step}
    return StartPoint(checkpoint, display_path(path), run, True, branched_from, notices)


def _in_todays_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's train_config, with the defaults of keys that came later."""
    defaults = {key: field.default for key, field in TrainConfig.model_fields.items()}
    with contextlib.suppress(ValueError):
        config = TrainConfig.renamed(config)
    return {**defaults, **config}


# ---- how far it has come -------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run has come, as its checkpoints record it: see engine/checkpoint.py."""

    step: int = 0
    consumed: dict[str, Any] = field(default_factory=lambda: {"sequences": 0, "tokens": 0})
    best: dict[str, Any] = field(default_factory=unmeasured)
    validation: dict[str, Any] = field(default_factory=unmeasured)


def initial_progress(
    start: StartPoint,
    config: TrainConfig,
    data: dict[str, list[dict[str, str]]],
    position: Callable[[int], tuple[int, int, int]],
) -> tuple[Progress, list[str]]:
    """The Progress that a run starts with, and notices for the user.

    data: as in a checkpoint. position: the method of the BatchSource. If the training data or their order
    have changed, the run starts again at their first sequence. If the validation data have changed, the best
    loss is reset.
    """
    saved = start.checkpoint
    if not start.resumes or not saved:
        return Progress(), []
    before, notices = saved.train_config, []
    # The best checkpoint of a branch must be one of its own.
    best = unmeasured() if start.branched_from else dict(saved.best)
    progress = Progress(saved.step, dict(saved.consumed), best, dict(saved.validation))
    if not saved.data:
        notices.append(f"{start.name} does not record its data: they are assumed to be unchanged")
        saved.data = data
    train, validation = ([pair[i] for pair in config.data_names] for i in (0, 1))
    train = ["the mixture"] if len(config.mixture) > 1 else train  # it is one whole
    for kind, names in {"train": train, "validation": validation}.items():
        notices += _changed_files(names, saved.data[kind], data[kind])
    # If a curriculum has only grown, or changed further on, what was consumed so far is still the same.
    same_seed = before.get("random_seed") == config.random_seed
    epoch, file, sequence = position(progress.consumed["sequences"])
    n_seen = file + (sequence > 0)
    if saved.data["train"] != data["train"] or not same_seed:
        if not same_seed or epoch or saved.data["train"][:n_seen] != data["train"][:n_seen]:
            progress.consumed["sequences"] = 0
            what = "content has changed" if same_seed else "order has changed, with random_seed"
            notices.append(f"training restarts at the first sequence of the data: their {what}")
    sample = ("random_seed", "batch_size", "eval_iters")
    if saved.data != data:
        notices.append("validation may hold documents that were trained on before; the best loss is reset")
    elif any(before.get(key) != getattr(config, key) for key in sample):
        notices.append("validation takes other sequences than before: the best loss is reset")
    else:
        return progress, notices
    progress.best, progress.validation = unmeasured(), unmeasured()
    return progress, notices


def _changed_files(
    paths: list[str], before: list[dict[str, str]], now: list[dict[str, str]]
) -> Iterator[str]:
    """One notice for each file whose content has changed."""
    for path, old, new in itertools.zip_longest(paths, before, now):
        if old != new:
            old, new = ((file or {"size": "nothing"})["size"] for file in (old, new))
            what = "other content of the same size" if old == new else f"{old} then, {new} now"
            yield f"the data have changed: {path or 'a further file'}: {what}"


def learning_rate_jump(start: StartPoint, config: TrainConfig) -> list[str]:
    """A notice if a resumed run's next learning rate is not the one of its previous configuration."""
    checkpoint = start.checkpoint
    assert checkpoint, "only for a run that is resumed"
    try:
        before = check(TrainConfig, checkpoint.train_config, start.name)
    except UserError:  # written by a version with other keys
        return []
    step = checkpoint.step
    old, new = learning_rate_at(step, before), learning_rate_at(step, config)
    if abs(new - old) <= 0.01 * old:
        return []
    return [f"the learning rate jumps, at step {step}, from {old:.2e} to {new:.2e}"]


# ---- the model it starts with --------------------------------------------------------------------------


def model_differences(found: ArchitectureConfig, wanted: ArchitectureConfig) -> list[str]:
    """A notice if the model of a checkpoint is not the configured one."""
    if found.architecture != wanted.architecture:
        return [f"the model stays {found.architecture}, as in the checkpoint, not {wanted.architecture}"]
    differ = [f"{key} {value} (configured: {getattr(wanted, key)})" for key, value in found
              if value != getattr(wanted, key)]  # fmt: skip
    return [f"the model keeps the shape it has in the checkpoint: {', '.join(differ)}"] if differ else []


def extend_context(start: StartPoint, wanted: ArchitectureConfig) -> list[str]:
    """Extend the context of the checkpoint that a new run starts from to the configured block_size.

    Happens if the configured rope_scaling is not the checkpoint's. Returns a notice for the user. Raises
    UserError if the checkpoint has another architecture; `build` refuses one with learned positions.
    """
    if start.resumes or not start.checkpoint or not wanted.rope_scaling:
        return []
    shape, scaling = start.checkpoint.model_config, wanted.rope_scaling.model_dump()
    if shape.get("rope_scaling") == scaling:
        return []
    if (found := shape.get("architecture")) != wanted.architecture:
        raise UserError(
            f"rope_scaling is to stretch the context of {start.name}, but the model there is {found}, "
            f"not {wanted.architecture}: set architecture to it, or rope_scaling to null"
        )
    notice = (
        f"the context of {start.name} is stretched as rope_scaling says ({scaling['rope_type']}, "
        f"factor {scaling['factor']:g}): block_size {shape.get('block_size')} -> {wanted.block_size}"
    )
    shape.update(block_size=wanted.block_size, rope_scaling=scaling)
    return [notice]


def resume_command(run_name: str, is_launched: bool) -> str:
    """The command, for a shell, that resumes this run: what was typed, with --resume and the run's name.

    is_launched: a launcher started this process, so what was typed is unknown.
    """
    if is_launched:
        return f"the same command and --resume {run_name}"
    typed = sys.argv[:]
    if "--resume" in typed:
        at = typed.index("--resume")
        has_value = at + 1 < len(typed) and not typed[at + 1].startswith("-")
        del typed[at : at + 1 + has_value]
    typed = [word for word in typed if not word.startswith("--resume=")]
    return shlex.join(["python", *typed, "--resume", run_name])
