"""Programs that show the numbers of runs, the key "tracker": TensorBoard, Weights & Biases, trackio, SwanLab.

A tracker is told the name of the run, its header (the configuration and the machine) and the step it goes on
from, and then the numbers and texts of each event. A run that is resumed stays one run there.

Steps that a killed process had logged are trained again after --resume. In TensorBoard and trackio the later
values replace the earlier ones. Weights & Biases and SwanLab ignore values for a step they already have, so
the earlier ones stay; they are the same, unless the configuration has changed.

Only Weights & Biases and SwanLab send anything over the network: if the user has logged in there, or asks for
it with WANDB_MODE or SWANLAB_MODE. Otherwise they write files, which can be sent later.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common.config import display_path
from common.errors import UserError
from common.packages import require

PROJECT = "nano"


@dataclass
class Tracker:
    """The base class of all trackers.

    run         its name
    header      the configuration and the machine: plain values
    first_step  the step that the run goes on from, 0 for a new one
    folder      where files may be written
    notice      tells the user something
    """

    offline: ClassVar[str] = ""  # what to set for no network, if there is a choice

    run: str
    header: dict[str, Any]
    first_step: int
    folder: Path
    notice: Callable[[str], None]

    def open(self) -> None:
        """Start the run there, or go on with it."""
        raise NotImplementedError

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Take numbers and texts by their names. Steps never fall."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """`tensorboard --logdir runs` shows them."""

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Drop what a killed process wrote about later steps.
        self.writer = SummaryWriter(
            self.folder / "runs" / f"train_{self.run}", purge_step=self.first_step + 1
        )

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            else:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB(Tracker):
    """Weights & Biases: online after `wandb login`; else in wandb/, for `wandb sync` later."""

    offline = "WANDB_MODE=offline"

    def open(self) -> None:
        import wandb

        mode: Any = None if "WANDB_MODE" in os.environ or self.has_login() else "offline"
        if mode:
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # it would be sent over the network
            self.notice(
                f"tracker wandb: no login was found (`wandb login`), so nothing is sent; it writes to "
                f"{display_path(self.folder / 'wandb')}, for `wandb sync`"
            )
        settings = wandb.Settings(silent=True, console="off")  # the run's own log has the output
        self.session = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=self.run, name=self.run, resume="allow",
            mode=mode, config=self.header, dir=self.folder, settings=settings,
        )  # fmt: skip

    @staticmethod
    def has_login() -> bool:
        """Whether a key is set, or `wandb login` has stored one. Without this, wandb would ask for it."""
        import wandb
        from wandb.sdk.lib import wbauth

        host = wandb.setup().settings.base_url
        return bool(
            wbauth.authenticate_session(host=host, source="tracker", prompt=False, update_session=False)
        )

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        self.session.log(dict(values), step=step)

    def close(self) -> None:
        self.session.finish()


class Trackio(Tracker):
    """`trackio show --project nano` shows them. They lie in TRACKIO_DIR, one SQLite file a project."""

    def open(self) -> None:
        import trackio

        with contextlib.redirect_stdout(None):  # it greets
            self.session = trackio.init(
                project=PROJECT, name=self.run, resume="allow", embed=False, config=self.header,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        self._forget_after(self.first_step)

    def _forget_after(self, step: int) -> None:
        """Drop what a killed process has logged about later steps."""
        import sqlite3

        from trackio.sqlite_storage import SQLiteStorage

        path = SQLiteStorage.get_project_db_path(PROJECT)
        if path.exists():
            with contextlib.closing(sqlite3.connect(path, timeout=30)) as database, database:
                where = "run_id = ? AND step > ?"
                database.execute(f"DELETE FROM metrics WHERE {where}", (self.session.id, step))

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        self.session.log(dict(values), step=step)

    def close(self) -> None:
        import trackio

        with contextlib.redirect_stdout(None):
            trackio.finish()


class SwanLab(Tracker):
    """SwanLab: online after `swanlab login`; else in swanlog/, for `swanlab sync` later."""

    offline = "SWANLAB_MODE=offline"

    def open(self) -> None:
        import swanlab

        settings = swanlab.Settings(terminal={"proxy_type": "none"})  # the run's own log has the output
        mode: Any = None if "SWANLAB_MODE" in os.environ or settings.api_key else "offline"
        if mode:
            self.notice(
                f"tracker swanlab: no login was found (`swanlab login`), so nothing is sent; it writes to "
                f"{display_path(self.folder / 'swanlog')}, for `swanlab sync`"
            )
        self.session = swanlab.init(
            project=PROJECT, id=self.run, name=self.run, resume="allow", mode=mode, config=self.header,
            log_dir=str(self.folder / "swanlog"), settings=settings,
        )  # fmt: skip
        self.text = swanlab.Text

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        self.session.log(
            {name: self.text(v) if isinstance(v, str) else v for name, v in values.items()}, step=step
        )

    def close(self) -> None:
        self.session.finish()


# Each needs the package of its name.
TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "swanlab": SwanLab,
}  # fmt: skip


def start(
    name: str,
    run: str,
    header: Mapping[str, Any],
    first_step: int,
    folder: Path,
    notice: Callable[[str], None],
) -> Tracker:
    """Start a run in the tracker of this name, or go on with it. Raises UserError if that is not possible."""
    require(name, otherwise=', or set the key "tracker" to null')
    tracker = TRACKERS[name](run, dict(header), first_step, folder, notice)
    try:
        tracker.open()
    except Exception as error:  # of the tracker's own kind: no login, no network, no space, ...
        why = " ".join(str(error).split()) or type(error).__name__
        alone = f" or run with {tracker.offline}" if tracker.offline else ""
        raise UserError(
            f'the tracker {name} does not start ({why}); set the key "tracker" to null{alone}'
        ) from None
    return tracker
