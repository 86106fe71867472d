"""Names and locks of runs, which run resumes from what, and that position, best loss and learning rate follow
from what a run has done, not from its present configuration."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest
import torch

import engine.checkpoint
import tokenizer as tokenizers
from common.errors import UserError
from data import TokenBatches, TokenFile
from engine.checkpoint import load
from engine.runs import Run, list_checkpoints, newest
from preparation.corpus import prepare

# ---- names and locks -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.checkpoint, "FOLDER", tmp_path / "checkpoint")
    (tmp_path / "checkpoint").mkdir()
    return tmp_path / "checkpoint"


def test_a_new_run_is_later_than_all_there_are_whatever_the_clock_says(folder, monkeypatch):
    with Run() as run:
        assert abs(time.time() - _utc(run.name)) < 5
    (folder / "sft_20410203_235959_step_3.pt").touch()
    assert Run().name == "20410204_000000"
    (folder.parent / "train_20410204_000000.log").touch()  # a run without a checkpoint
    for strange in ("pretrain_99999999_999999_step_1.pt", "pretrain_20500101_000000_step_x.pt", "x.pt"):
        (folder / strange).touch()
    assert Run().name == "20410204_000001"
    for zone in ("Asia/Shanghai", "America/New_York"):
        with monkeypatch.context() as patch:
            patch.setenv("TZ", zone)
            time.tzset()
            (folder / f"sft_{Run().name}_step_1.pt").touch()
    time.tzset()
    names = [file.run for file in list_checkpoints("sft")]
    assert names == ["20410203_235959", "20410204_000001", "20410204_000002"]


def _utc(name):
    import calendar

    return calendar.timegm(time.strptime(name, "%Y%m%d_%H%M%S"))


@pytest.mark.slow
def test_no_two_processes_get_one_name(folder):
    """Five start in the same second, before any has a log or a checkpoint."""
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "import engine.checkpoint as c; c.FOLDER = pathlib.Path(sys.argv[2])\n"
        "from engine.runs import Run\n"
        "run = Run(); print(run.name, flush=True); sys.stdin.read()\n"
    )
    root = str(engine.checkpoint.ROOT)
    command = [os.sys.executable, "-c", code, root, str(folder)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    names = [process.stdout.readline().strip() for process in processes]
    assert len({*names}) == 3 and all(names)
    here = [Run(), Run()]
    assert not {run.name for run in here} & {*names}
    with pytest.raises(UserError, match=rf"run {names[0]} is being trained by another process, \d+ on "):
        Run(names[0])
    processes[0].kill()  # the operating system releases its lock
    processes[0].wait()
    Run(names[0]).release()
    for process in processes[1:]:
        process.communicate("")
    for run in here:
        run.release()
    assert not [path for path in folder.glob("*.lock") if path.stem in names[1:]]


def test_a_run_is_trained_by_one_process_at_a_time(train):
    settings = dict(max_steps=4, save_interval=2)
    assert train("pretrain", **settings).returncode == 0
    assert train("pretrain", **settings, random_seed=1).returncode == 0
    older, newer = sorted({entry.run for entry in list_checkpoints("pretrain")})
    before = {path: path.read_bytes() for path in (train.root / "checkpoint").iterdir()}
    with Run(newer):
        for which in ([], [newer], [f"pretrain_{newer}"]):
            done = train("pretrain", "--resume", *which, max_steps=6)
            assert done.returncode == 2 and f"run {newer} is being trained by another process" in done.stderr
        assert done.stderr.endswith(" on " + socket.gethostname() + "\n")
        done = train("pretrain", "--resume")
        assert done.stderr.endswith(f"; other runs of pretrain: --resume {older}\n")
        assert before == {path: path.read_bytes() for path in before}
        # Its checkpoints can be continued by a new run, and other runs can be resumed.
        early = list_checkpoints("pretrain", newer)[0].path
        assert "branches off" in train("pretrain", "--resume", early, max_steps=4).stderr
        done = train("pretrain", "--resume", older, max_steps=6)
    assert done.returncode == 0 and f"resuming from checkpoint/pretrain_{older}_step_4.pt" in done.stderr
    assert [entry.step for entry in list_checkpoints("pretrain", newer)] == [2, 4]
    assert len(list(train.root.glob("train_*.log"))) == 3


def test_runs_beside_each_other_keep_to_their_own(tiny_project):
    """One trains endlessly and keeps one checkpoint; others start, end, and are resumed."""
    settings = ["--set", "keep_checkpoints=1", "--set", "save_interval=5", "--set", "decay_lr=false"]
    command = tiny_project.command("train.py", "-t", "pretrain", *settings, "--set", "max_steps=0")
    lasting = subprocess.Popen(
        command, cwd=tiny_project.elsewhere, env=tiny_project.environment, stdout=subprocess.PIPE, text=True
    )
    saves = (re.search(r" \| Save \| .*pretrain_(\w+)_step_", line) for line in lasting.stdout)
    first = next(found[1] for found in saves if found)
    for resume, steps in ([], 7), (["--resume"], 9):
        arguments = ["-t", "pretrain", *settings, *resume, "--set", f"max_steps={steps}"]
        done = tiny_project.run("train.py", *arguments, "--set", "random_seed=7")
        assert done.returncode == 0 and f"Done: step {steps}, {7 if steps == 7 else 2} steps" in done.stdout
    lasting.send_signal(signal.SIGTERM)
    output, _ = lasting.communicate(timeout=60)
    assert lasting.returncode == 0 and f"--resume {first}" in output
    paths = (tiny_project.root / "checkpoint").glob("*.pt")
    runs = {path.stem.partition("_step_")[0] for path in paths}
    assert len(runs) == 2
    assert not list((tiny_project.root / "checkpoint").glob("*.lock"))
    for path in (tiny_project.root / "checkpoint").glob("*.pt"):
        checkpoint = load(path)
        assert checkpoint.train_config["random_seed"] == (1337 if checkpoint.run == first else 7)


# ---- which one goes on -----------------------------------------------------------------------------------


def test_the_run_that_was_started_last_goes_on_not_that_of_the_latest_clock(train):
    settings = dict(max_steps=3)
    assert train("pretrain", **settings).returncode == 0
    [path] = train.checkpoints().values()
    future = path.with_name("pretrain_20410101_000000_step_3.pt")  # from a machine whose clock was wrong
    checkpoint = load(path)
    checkpoint.run = "20410101_000000"
    checkpoint.save()
    path.unlink()
    assert train("pretrain", **settings, random_seed=2).returncode == 0
    os.utime(future)
    done = train("pretrain", "--resume", max_steps=4, random_seed=2)
    assert "resuming from checkpoint/pretrain_20410101_000001_step_3.pt" in done.stderr


def test_what_cannot_be_resumed_is_told(train):
    assert train("pretrain", max_steps=3).returncode == 0
    [path] = train.checkpoints().values()
    run = load(path).run
    for wanted, sentence in (
        ("20200101_000000", rf"no checkpoint of this run; other runs of pretrain: --resume {run}$"),
        ("sft_20200101_000000", "there is no checkpoint sft_20200101_000000"),
        ("nowhere.pt", r"there is no checkpoint nowhere.pt; the newest in checkpoint/ is checkpoint/pre"),
    ):
        done = train("pretrain", "--resume", wanted)
        assert done.returncode == 2 and re.search(sentence, done.stderr.strip()), done.stderr
    done = train("sft", "--resume", path)
    assert done.returncode == 2 and "is a checkpoint of pretrain, not of sft" in done.stderr


def test_a_model_without_a_run_is_passed_over(train):
    """export.py --read and --convert write such models, here after the run that was stopped."""
    assert train("pretrain", max_steps=3).returncode == 0
    [path] = train.checkpoints().values()
    read = load(path)
    with Run() as run:
        read.run, read.step, read.optimizer, read.train_config = run.name, 0, {}, {}
        model = read.save()
    done = train("pretrain", "--resume", max_steps=4)
    assert done.returncode == 0 and f"resuming from checkpoint/{path.name} at step 3" in done.stderr
    done = train("pretrain", "--resume", model)
    advice = re.search("--set (from_checkpoint=)(.*)\n", done.stderr)
    assert done.returncode == 2 and advice[2] == f"checkpoint/{model.name}"
    done = train("pretrain", from_checkpoint=advice[2], max_steps=2, decay_lr=False)
    assert done.returncode == 0 and "2 steps in this session" in done.stdout
    assert "this is a new run" not in done.stderr
    assert newest("pretrain")[0].step == 2


def as_version(version, state):
    """The state as in a file of this version."""
    later = {1: ("consumed", "validation", "data"), 2: ()}[version]
    state = {key: value for key, value in state.items() if key not in ("chat_template", "problem", *later)}
    state["model_config"] = {**state["model_config"], "dropout": 0.1}  # used to be a key of the model, too
    task = state.pop("stage")
    return {**state, "task": task, "version": version}


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_checkpoint_of_version_2_goes_on(train, stage):
    settings = dict(from_checkpoint="", lr_decay_iters=6, dropout=0.1)
    assert train(stage, max_steps=6, **settings).returncode == 0
    whole = load(train.checkpoints(stage)[6])
    shutil.rmtree(train.root / "checkpoint")
    assert train(stage, max_steps=3, **settings).returncode == 0
    [path] = train.checkpoints(stage).values()
    torch.save(as_version(2, torch.load(path, weights_only=True)), path)
    done = train(stage, "--resume", max_steps=6, **settings)
    assert done.returncode == 0 and "keeps the shape" not in done.stderr
    assert train.same(load(train.checkpoints(stage)[6]), whole)


def test_a_checkpoint_of_version_1_goes_on(train):
    assert train("pretrain", max_steps=6, lr_decay_iters=6, dropout=0.1).returncode == 0
    whole = load(train.checkpoints()[6])
    shutil.rmtree(train.root / "checkpoint")
    assert train("pretrain", max_steps=3, lr_decay_iters=6, dropout=0.1, eval_interval=3).returncode == 0
    [path] = train.checkpoints().values()
    torch.save(as_version(1, torch.load(path, weights_only=True)), path)
    old = load(path)
    assert old.consumed == {"sequences": 12, "tokens": None} and old.validation == old.best
    done = train("pretrain", "--resume", max_steps=6, lr_decay_iters=6, dropout=0.1)
    assert done.returncode == 0
    assert "does not record its data: they are assumed to be unchanged\n" in done.stderr
    last = load(train.checkpoints()[6])
    assert last.consumed == {"sequences": 24, "tokens": None} and last.data == whole.data
    for name, weights in last.model.items():
        assert torch.equal(weights, whole.model[name])


# ---- data are known by what they hold --------------------------------------------------------------------


def write_data(train, name, texts):
    tokenizer = tokenizers.load(train.root / "dataset" / "prepared" / "tokenizer.json")
    (train.root / "text.txt").write_text("<|eos|>".join(texts), "utf-8")
    prepare({"pretrain": [train.root / "text.txt"]}, train.root / name, val_fraction=0.2, tokenizer=tokenizer)
    return [[f"{name}/pretrain_{split}.bin" for split in ("train", "val")]]


TEXTS = [f"{i} + {i} = {2 * i}。" * 3 for i in range(60)]
SMALL = dict(batch_size=2, eval_interval=4, learning_rate=1e-2, log_interval=1)


def test_changed_data_are_told_and_begun_anew(train):
    paths = write_data(train, "p", TEXTS)
    settings = dict(dataset_path=paths, **SMALL)
    assert train("pretrain", **settings, max_steps=8).returncode == 0
    first = load(train.checkpoints()[8])
    assert first.consumed["sequences"] == 16 and first.best["loss"]
    write_data(train, "p", ["9 + 9 = 18。", *TEXTS])
    done = train("pretrain", "--resume", **settings, max_steps=12)
    assert done.returncode == 0
    for kind, path in zip(("train", "validation"), paths[0], strict=True):
        old, new = first.data[kind][0]["size"], load(train.checkpoints()[12]).data[kind][0]["size"]
        what = "other content of the same size" if old == new else f"{old} then, {new} now"
        assert f"the data have changed: {path}: {what}\n" in done.stderr
    assert "training restarts at the first sequence of the data: their content has changed\n" in done.stderr
    assert "may hold documents that were trained on before; the best loss is reset\n" in done.stderr
    last = load(train.checkpoints()[12])
    assert last.consumed["sequences"] == 8 and last.consumed["tokens"] > first.consumed["tokens"]
    assert last.best["step"] == 12  # whatever the best loss on the other data was
    assert train.logged("Train", "Curriculum")[8] == (9, "0-0")


def test_the_spelling_of_a_path_does_not_matter(train):
    paths = write_data(train, "p", TEXTS)
    assert train("pretrain", dataset_path=paths, **SMALL, max_steps=8).returncode == 0
    first = load(train.checkpoints()[8])
    shutil.copytree(train.root / "p", train.root / "copy")
    spelled = [["./p/../copy/" + path[2:] for path in paths[0]]]
    done = train("pretrain", "--resume", dataset_path=spelled, **SMALL, max_steps=12, lr_decay_iters=8)
    assert done.returncode == 0 and "data" not in done.stderr.replace("dataset", "")
    last = load(train.checkpoints()[12])
    assert last.consumed["sequences"] == 24 and last.best["loss"] <= first.best["loss"]


def test_a_curriculum_that_only_grows_goes_on(train):
    one, two = write_data(train, "one", TEXTS), write_data(train, "two", TEXTS[::-1])
    assert train("pretrain", dataset_path=one, **SMALL, max_steps=4).returncode == 0
    done = train("pretrain", "--resume", dataset_path=one + two, **SMALL, max_steps=8)
    assert "the data have changed: two/pretrain_train.bin: nothing then, " in done.stderr
    assert "restarts" not in done.stderr and "the best loss is reset" in done.stderr
    assert load(train.checkpoints()[8]).consumed["sequences"] == 16
    # In the other order, the sequences seen so far are elsewhere.
    done = train("pretrain", "--resume", dataset_path=two + one, **SMALL, max_steps=9)
    assert "restarts" in done.stderr
    assert load(train.checkpoints()[9]).consumed["sequences"] == 2


# ---- position, best and rate follow from what was done ----------------------------------------------------


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_an_epoch_is_seen_once_whatever_the_batch_size(train, task, monkeypatch):
    """All sequences of the epoch come in the order of a run with a single batch size."""
    seen, original = [], TokenBatches.__call__

    def spied(self, first):
        if self.parts[0].file.path.stem.endswith("_train"):
            seen.append((first, self.batch_size))
        return original(self, first)

    monkeypatch.setattr(TokenBatches, "__call__", spied)
    settings = dict(from_checkpoint="", decay_lr=False, eval_interval=1000)
    file = TokenFile(train.root / "dataset" / "prepared" / f"{task}_train.bin")
    n = TokenBatches([file], 32, 1).sequences_per_epoch
    consumed, done = 0, 0
    for sizes in (dict(batch_size=4), dict(batch_size=8), dict(batch_size=3, gradient_accumulation_steps=5),
                  dict(batch_size=4)):  # fmt: skip
        done += 2
        assert train(task, "--resume", **settings, **sizes, max_steps=done).returncode == 0
        consumed += 2 * sizes["batch_size"] * sizes.get("gradient_accumulation_steps", 1)
        assert load(train.checkpoints(task)[done]).consumed["sequences"] == consumed
    assert [first for first, _ in seen] == [0, 4, 8, 16, 24, 39, 54, 58]
    assert [first + size for first, size in seen[:-1]] == [first for first, _ in seen[1:]]
    positions = [text for _, text in train.logged("Train", "Curriculum")]
    assert positions == [f"0-{first % n}" for first, _ in seen]


def test_tokens_are_counted(train):
    assert train("sft", from_checkpoint="", max_steps=3).returncode == 0
    batches = TokenBatches([TokenFile(train.root / "dataset" / "prepared" / "sft_train.bin")], 32, 4, 1337)
    counted = sum(int(batches(first)["mask"].sum()) for first in (0, 4, 8))
    assert load(train.checkpoints("sft")[3]).consumed == {"sequences": 12, "tokens": counted}


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"eval_iters": 3}, {"random_seed": 5}])
def test_the_best_of_other_sequences_is_no_best(train, change):
    assert train("pretrain", max_steps=6, eval_interval=2).returncode == 0
    checkpoint = load(train.checkpoints()[6])
    checkpoint.best = {"loss": 0.001, "step": 2}
    checkpoint.save()
    done = train("pretrain", "--resume", max_steps=7, **change)
    assert done.returncode == 0 and "the best loss is reset\n" in done.stderr
    last = load(train.checkpoints()[7])
    assert last.best["step"] == 7
    if "random_seed" in change:
        assert "training restarts at the first sequence of the data: their order has changed" in done.stderr
        assert last.consumed["sequences"] == 4
    done = train("pretrain", "--resume", max_steps=8, **change)
    assert "anew" not in done.stderr and load(train.checkpoints()[8]).best["loss"] <= last.best["loss"]


def test_a_rate_that_jumps_is_told(train):
    schedule = dict(learning_rate=3e-3, min_lr=1e-4, warmup_iters=2)
    assert train("pretrain", **schedule, max_steps=6).returncode == 0
    done = train("pretrain", "--resume", **schedule, max_steps=12)
    rates = re.search(r"the learning rate jumps, at step 6, from (\S+) to (\S+)\n", done.stderr)
    logged = [rate for step, rate in train.logged("Train", "LR") if step in (6, 7)]
    assert rates[1] == "1.00e-04" and rates[2] == logged[1] != logged[0]
    done = train("pretrain", "--resume", **schedule, max_steps=13, lr_decay_iters=12)
    assert done.returncode == 0 and "jumps" not in done.stderr


# ---- the log ---------------------------------------------------------------------------------------------


def test_a_run_has_one_log(train):
    assert train("pretrain", max_steps=4, save_interval=2).returncode == 0
    [path] = train.root.glob("train_*.log")
    run = load(train.checkpoints()[4]).run
    assert path.name == f"train_{run}.log"
    with open(path, "a") as file:  # as left by a process that was killed while writing
        file.write("2026-01-02 03:04:05 | Train | Epo")
    assert train("pretrain", "--resume", max_steps=6).returncode == 0
    early = list_checkpoints("pretrain", run)[0].path
    assert train("pretrain", "--resume", early, max_steps=3).returncode == 0
    text, branch = (path.read_text("utf-8") for path in sorted(train.root.glob("train_*.log")))
    headers = [json.loads(line[2:]) for line in (text + branch).splitlines() if line.startswith("# ")]
    assert [(header["run"] == run, header["resumed_from_step"]) for header in headers] == [
        (True, 0), (True, 4), (False, 2)
    ]  # fmt: skip
    assert headers[2]["branched_from"] == {"run": run, "step": 2} and "branched_from" not in headers[1]
    assert "\n2026-01-02 03:04:05 | Train | Epo\n# {" in text


def test_what_a_launcher_brings_back_goes_on_under_its_name(train):
    """A new run, a branch and a resumed run; before the first checkpoint and after it."""
    from config.schema import TrainConfig
    from config.validation import check
    from engine.runs import starting_point

    settings = dict(max_steps=4, save_interval=2)
    assert train("pretrain", **settings).returncode == 0
    early, last = (entry.path for entry in list_checkpoints("pretrain"))
    config = check(TrainConfig, load(last).train_config, "a test's")
    for resume, step in ((None, 0), (True, 0), (str(early), 2)):
        start = starting_point("pretrain", config, resume, restarted="20410101_000000")
        assert start.run.name == "20410101_000000" and (start.checkpoint.step if step else 0) == step
        assert bool(start.branched_from) == start.resumes == bool(step)
        start.run.release()
    branch = load(early)
    branch.run, branch.step = "20410101_000000", 3
    branch.save()
    start = starting_point("pretrain", config, str(early), restarted="20410101_000000")
    assert start.checkpoint.step == 3 and start.resumes and not start.branched_from
    start.run.release()
