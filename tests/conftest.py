"""A copy of the project in which a test may do what it likes, and small data to train on."""

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm

# Torch's threads would wait for each other: there are as many workers as cores, and each starts processes.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "common", "engine", "decoding", "server", "objectives", "dataset", "models", "formats", "tasks",
    "sources", "preparation", "benchmark", "evaluation",
)  # fmt: skip
SOURCE = (
    "*.py", "requirements*.txt", "config/*.*", "web/*.*", "evaluation/*.html",
    *(f"{folder}/**/*.py" for folder in FOLDERS),
)  # fmt: skip

# A model and a run that take no longer than they must.
MODEL = {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 32}
RUN = {
    "batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "warmup_iters": 2,
    "eval_interval": 1000,
    "eval_iters": 2,
    "device": "cpu",
    "dtype": "float32",
}


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what training handles


class Workplace:
    """A folder `root` with configurations and data, in which train.py has left logs and checkpoints."""

    def furnish(self, data):
        """Put in the configurations above and the prepared data of the folder `data`."""
        shutil.copytree(data, self.root / "dataset" / "prepared")
        (self.root / "config").mkdir(exist_ok=True)
        contents = {"model_config": MODEL}
        for task in ("pretrain", "sft"):
            paths = [f"dataset/prepared/{task}_{split}.bin" for split in ("train", "val")]
            contents[f"config_{task}"] = {**RUN, "dataset_path": [paths]}
        parts = [{"path": contents[f"config_{task}"]["dataset_path"][0]} for task in ("pretrain", "sft")]
        contents["config_mid"] = {**RUN, "dataset_path": parts}
        for task in ("mid", "sft"):
            contents[f"config_{task}"]["from_checkpoint"] = "auto"
        for name, content in contents.items():
            (self.root / "config" / f"{name}.json").write_text(json.dumps(content), "utf-8")

    def checkpoints(self, task="pretrain"):
        """{step: path} of the checkpoints, in order of their steps."""
        paths = (self.root / "checkpoint").glob(f"{task}_*_step_*.pt")
        return dict(sorted((int(path.stem.rpartition("_")[2]), path) for path in paths))

    def logged(self, kind, *names):
        """[(step, text of field, ...)] of all lines of this kind in all logs, in order."""
        fields = "".join(rf".* \| {re.escape(name)}: ([^|\n]*[^|\n ])" for name in names)
        line = re.compile(rf"[\d: -]+ \| {kind} \| Epoch-Step: \d+-(\d+){fields}")
        logs = [path.read_text("utf-8") for path in sorted(self.root.glob("train_*.log"))]
        return [(int(match[1]), *match.groups()[1:]) for log in logs for match in line.finditer(log)]

    @staticmethod
    def same(one, two):
        """Whether two checkpoints are equal in every bit, but for the time at which their runs began."""
        import torch

        one, two = (leaves({**dataclasses.asdict(checkpoint), "run": ""}) for checkpoint in (one, two))
        return all(
            type(a) is type(b) and (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
            for a, b in itertools.zip_longest(one, two)
        )


def leaves(value):
    """All that lies in nested dictionaries and lists, keys included."""
    if isinstance(value, dict):
        value = itertools.chain.from_iterable(value.items())
    elif not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from leaves(item)


class Project(Workplace):
    """The source at `root`, whose name holds a space and Chinese; its scripts are run from elsewhere."""

    def __init__(self, folder):
        self.root, self.elsewhere = folder / "项目 copy", folder / "elsewhere"
        self.elsewhere.mkdir()
        for pattern in SOURCE:
            for path in ROOT.glob(pattern):
                target = self.root / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)

    def command(self, script, *args):
        return [sys.executable, str(self.root / script), *map(str, args)]

    @property
    def environment(self):
        """No terminal's width or colours; and no step is compiled, which takes longer than most tests."""
        kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
        return kept | {"NUMBA_DISABLE_JIT": "1"}

    def run(self, script, *args, input=None, timeout=120, limits=(), anew=False, **environment):
        """A CompletedProcess with stdout and stderr as text; `input` is what is piped in (str or bytes).
        limits: [(one of resource.RLIMIT_*, amount)].

        Torch is loaded beforehand (tests/warm.py), unless all is to start anew: where asked for, for Python's
        own settings, and for --help, which is to be there without torch.
        """
        if not isinstance(input, bytes):
            input = (input or "").encode()
        command = self.command(script, *args)
        kept = dict(env=self.environment | environment, cwd=self.elsewhere, input=input, timeout=timeout)
        anew = anew or "--help" in args or any(key.startswith("PYTHON") for key in environment)
        if anew or sys.platform != "linux":
            limit = functools.partial(warm.limit, limits)
            process = subprocess.run(command, **kept, capture_output=True, preexec_fn=limit)
        else:
            process = warm.run(command[1:], **kept, limits=limits)
        process.stdout, process.stderr = process.stdout.decode(), process.stderr.decode()
        return process


class Trainer(Workplace):
    """train.py's command line without the seconds that a new process takes to load torch."""

    def __init__(self, root, capsys):
        self.root, self.capsys = root, capsys

    def __call__(self, task, *args, **settings):
        """`settings` go to --set. Returns what `Project.run` does; a bug's exception is raised."""
        import train
        from common.errors import run

        sets = [part for item in settings.items() for part in ("--set", f"{item[0]}={json.dumps(item[1])}")]
        handlers = {number: signal.getsignal(number) for number in ENDING}
        returncode = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", "-t", task, *map(str, args), *sets])
            try:
                run(train.main)
            except SystemExit as exit:
                returncode = exit.code
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        output = self.capsys.readouterr()
        return SimpleNamespace(returncode=returncode, stdout=output.out, stderr=output.err)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture
def small_problems(project):
    """A project whose problem.py ends with a test of a few questions, which takes no seconds."""
    path = project.root / "problem.py"
    source, usual = path.read_text("utf-8"), "N_TEST, N_VALIDATION = 10_000, 2_000"
    assert usual in source
    path.write_text(source.replace(usual, "N_TEST, N_VALIDATION = 200, 100"), "utf-8")
    return project


@pytest.fixture(scope="session")
def shared_project(tmp_path_factory):
    """For tests that only read, or write where no other test looks."""
    return Project(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Token files of a few thousand tokens, for pretraining and for SFT, in one folder."""
    from preparation.corpus import prepare

    folder = tmp_path_factory.mktemp("tiny")
    texts = [f"{i} + {j} = {i + j}。" * 3 for i in range(12) for j in range(9)]
    (folder / "pretrain.txt").write_text("<|eos|>".join(texts), "utf-8")
    chats = [{"question": f"{i} + 1?", "answer": f"{i + 1}。" * (1 + i % 3)} for i in range(60)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")
    inputs = {"pretrain": [folder / "pretrain.txt"], "sft": [folder / "sft.jsonl"]}
    prepare(inputs, folder / "prepared", val_fraction=0.1)
    return folder / "prepared"


@pytest.fixture
def tiny_project(project, tiny_data):
    """A project whose configurations are small enough for tests, with data."""
    project.furnish(tiny_data)
    return project


@pytest.fixture
def train(tmp_path, tiny_data, monkeypatch, capsys):
    """train("pretrain", "--resume", max_steps=8): train.py in this process, in a project of its own."""
    import common.config
    import common.log
    import decoding.compile_cache  # noqa: F401  # reads its own source, so before ROOT changes
    import engine.checkpoint

    root = tmp_path / "项目"
    for module in (common.config, common.log):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(engine.checkpoint, "FOLDER", root / "checkpoint")
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(root, capsys)
    trainer.furnish(tiny_data)
    return trainer


@pytest.fixture
def other_project(tmp_path_factory, tiny_data):
    """A second one, to compare with."""
    other = Project(tmp_path_factory.mktemp("other"))
    other.furnish(tiny_data)
    return other


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no chromium here")
    with playwright.sync_playwright() as opened:
        chromium = opened.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command("--read", folder): export.py's command line, in a folder that holds only what a test makes."""
    import engine.checkpoint
    import export
    from common.errors import run

    monkeypatch.setattr(engine.checkpoint, "FOLDER", tmp_path / "检查 point")
    monkeypatch.chdir(tmp_path)

    def command(*args, main=export.main):
        returncode = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["export.py", *map(str, args)])
            try:
                run(main)
            except SystemExit as exit:
                returncode = exit.code
        output = capsys.readouterr()
        return SimpleNamespace(returncode=returncode, stdout=output.out, stderr=output.err)

    return command
