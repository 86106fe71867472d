"""common/files.py and all that writes with it: whatever fails, and whenever, old files stay as they were."""

import contextlib
import errno
import functools
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_tokenizer import CHAR

import common.config
import common.log
import engine.checkpoint
import models
import plot_loss
import problem
from common import files
from common.errors import UserError, run
from common.files import Together, whole, whole_folder
from config.schema import ModelConfig
from data import prepare
from engine.checkpoint import Checkpoint
from formats import gguf, huggingface, llama2c

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "dataset"))
import sample_world

OPERATIONS = {
    "close", "fsync", "link", "makedirs", "mkdir", "open", "rename", "replace", "unlink", "write",
}  # fmt: skip
CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


class System:
    """What common/files.py asks the system for, noted. One operation fails as that of a full disk does:
    what is written is there in part, and what is closed is closed."""

    def __init__(self, failing=None, code=None):
        self.failing, self.code, self.asked = failing, code, []

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in OPERATIONS:
            return real

        def operation(*args, **options):
            self.asked.append((name, *map(str, args)))
            if len(self.asked) - 1 != self.failing:
                return None if name == "fsync" else real(*args, **options)  # which takes long
            if name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            if name == "close":
                real(*args)
            raise OSError(self.code, os.strerror(self.code), *args[:1])

        return operation


def content(folder):
    """{path: bytes} of all files; those of safetensors sorted, as it writes its header in any order."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {name: bytes(sorted(was)) if "safetensors" in name else was for name, was in found.items()}


@functools.cache
def checkpoint(seed=0):
    torch.manual_seed(seed)
    model = models.build(ModelConfig(block_size=8, n_layer=1, n_head=2, n_embd=8, qk_norm=False).resolved(50))
    state = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}
    return Checkpoint(
        "sft", "20260102_030405", 7, model.config.model_dump(), {}, CHAR.to_dict(), model.state_dict(), state
    )


# Each writes into a folder; `new` is 0 for what is there first, and 1 for what is to replace it.


def write_checkpoint(folder, new):
    checkpoint(new).save()


def write_tokenizer(folder, new):
    (CHAR, type(CHAR).train(["other"]))[new].save(folder / "deep" / "er" / "tokenizer.json")


def write_tokens(folder, new):
    prepare([], [folder.parent / "in.jsonl"], folder / "prepared", seed=new, tokenizer=CHAR)


def write_chart(folder, new):
    plot_loss.save([str(new)], folder / "chart.png")


def write_results(folder, new):
    files.append(problem.RESULTS, json.dumps({"run": new}) + "\n")


def write_world(folder, new):
    sample_world.write_world(folder, seed=new, size=0.1)


def write_reference(folder, new):
    for name in ("doc", "config"):
        (folder / name).mkdir(exist_ok=True)
    common.config.write_reference()


def write_huggingface(folder, new):
    huggingface.write(checkpoint(), "the test", folder / "out")


def write_llama2c(folder, new):
    llama2c.write(checkpoint(), "the test", folder / "out", "q8_0")


def write_gguf(folder, new):
    gguf.write(checkpoint(), "the test", folder / "out.gguf", "float32")


def read_huggingface(folder, new):
    huggingface.read_folder(folder.parent / "theirs", None, None)


WRITERS = {
    name: work for name, work in list(globals().items()) if name.startswith(("write_", "read_"))
}  # fmt: skip
# What exists is not written over by these, or has another name each time.
ONCE = ("write_huggingface", "write_llama2c", "write_gguf", "read_huggingface")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to write into, and beside it what is read."""
    folder = tmp_path / "盘 full"
    folder.mkdir()
    lines = (json.dumps({"question": f"{i}?", "answer": f"{i}."}) for i in range(9))
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    huggingface.write(checkpoint(), "the test", tmp_path / "theirs")
    monkeypatch.setattr(engine.checkpoint, "FOLDER", folder / "checkpoint")
    monkeypatch.setattr(common.config, "ROOT", folder)
    monkeypatch.setattr(common.log, "ROOT", folder)
    monkeypatch.setattr(problem, "RESULTS", folder / "checkpoint" / "results.jsonl")
    monkeypatch.setattr("time.strftime", lambda *_: "20260102_030405")
    # To draw, to describe the keys and to invent a world takes long; here it is about writing.
    monkeypatch.setattr(plot_loss, "draw", lambda figure, logs: figure.text(0, 0, *logs))
    monkeypatch.setattr(common.config, "reference", lambda: "the keys")
    monkeypatch.setattr(common.config, "editor_schemas", lambda: {"one": {}, "two": {}})
    monkeypatch.setattr(sample_world, "build_world", functools.cache(sample_world.build_world))
    monkeypatch.setattr(sample_world, "pretraining_documents", lambda world, draw: [str(draw._random())])
    monkeypatch.setattr(sample_world, "conversations", lambda world, draw: [])
    monkeypatch.setattr(sample_world, "held_out_questions", lambda world, draw: [])
    return folder


@pytest.mark.parametrize("name", WRITERS)
def test_each_operation_fails_once(name, place, monkeypatch, capsys):
    write = WRITERS[name]
    if name not in ONCE:
        write(place, 0)
    shutil.copytree(place, place.parent / "before")
    before = content(place)
    monkeypatch.setattr(files, "os", every := System())
    write(place, 1)
    after = content(place)
    assert not [path for path in after if path.endswith((".part", ".old"))]
    assert {"open", "write"} <= {operation for operation, *_ in every.asked}
    for failing in range(len(every.asked)):
        shutil.rmtree(place)
        shutil.copytree(place.parent / "before", place)
        monkeypatch.setattr(files, "os", system := System(failing, CODES[failing % len(CODES)]))
        try:
            run(lambda: write(place, 1))
        except SystemExit as exit:
            told = capsys.readouterr().err
            assert exit.code == 2 and told.startswith("error: ") and told.count("\n") == 1, told
            assert content(place) == before, system.asked
            monkeypatch.setattr(files, "os", System())
            write(place, 1)
            assert content(place) == after
        else:  # what is on the disk already is closed; or what was there before stays until the next time
            operation, path = system.asked[failing]
            assert (operation, path[-4:]) == ("unlink", ".old") or name == "write_results", system.asked
            assert {path: was for path, was in content(place).items() if not path.endswith(".old")} == after
        capsys.readouterr()


@contextlib.contextmanager
def room_for(n_bytes):
    """No file can grow beyond this: the system writes what fits, as a disk does that is nearly full."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.parametrize("name", ["write_checkpoint", *ONCE])
def test_a_disk_of_any_size_may_be_full(name, place, capsys):
    write = WRITERS[name]
    write(place, 0)
    size = max(map(len, content(place).values()))
    shutil.rmtree(place)
    place.mkdir()
    capsys.readouterr()
    for n_bytes in range(0, size, size // (50 if name == "write_checkpoint" else 12)):

        def write_less(n_bytes=n_bytes):
            with room_for(n_bytes):
                write(place, 0)

        with pytest.raises(SystemExit) as exit:
            run(write_less)
        told = capsys.readouterr().err.lower()
        assert exit.value.code == 2 and "file too large" in told and told.count("\n") == 1, told
        assert not content(place)
    with room_for(size + 1):
        write(place, 0)
    assert content(place)


def test_an_error_that_a_library_hides_is_told(tmp_path):
    """... and what it makes of one, too; unless somebody wants to leave."""
    path = tmp_path / "x"
    for disguise in (None, RuntimeError("[enforce fail at inline_container.cc:664]"), OSError("1 requested")):
        with room_for(3), pytest.raises(OSError) as error, whole(path) as file:
            with contextlib.suppress(OSError):
                file.write(b"123456")
            with pytest.raises(OSError):
                file.write(b"")  # nor is anything written behind the gap
            if disguise:
                raise disguise
        assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
    with room_for(3), pytest.raises(KeyboardInterrupt), whole(path) as file:
        with contextlib.suppress(OSError):
            file.write(b"123456")
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), whole(path) as file:
        file.write(b"1")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_has_left_is_in_nobodys_way(tmp_path):
    """Of several files the last one makes the others valid: where that is missing, nothing is."""
    names = ("a", "b", "valid")
    for name in names:
        (tmp_path / f"{name}.part").write_text("half")
        (tmp_path / f"{name}.old").write_text("older")
    states = []

    class Watched(System):
        def __getattr__(self, name):
            states.append({name: was for name, was in content(tmp_path).items() if name in names})
            return super().__getattr__(name)

    for text in (b"1", b"2"):
        states.clear()
        with pytest.MonkeyPatch.context() as patch, Together() as group:
            patch.setattr(files, "os", Watched())
            for name in names:
                group.open(tmp_path / name).write(text)
        assert all(len({*state.values()}) == 1 for state in states if "valid" in state)
        assert content(tmp_path) == dict.fromkeys(names, text)


def test_a_single_file_is_never_missing(tmp_path, monkeypatch):
    path = tmp_path / "x"
    files.write_text(path, "1")

    class Watched(System):
        def __getattr__(self, name):
            assert path.read_text() in ("1", "2")
            return super().__getattr__(name)

    monkeypatch.setattr(files, "os", Watched())
    files.write_text(path, "2")
    assert content(tmp_path) == {"x": b"2"}


def test_two_at_once_do_not_mix(tmp_path):
    """The one that began last wins; the other says so."""
    path = tmp_path / "x"
    with pytest.raises(UserError, match="x is being written by another process, too; try again"):
        with whole(path) as first:
            first.write(b"11")
            with whole(path) as second:
                second.write(b"2")
                first.write(b"1")
    assert content(tmp_path) == {"x": b"2"}
    with pytest.raises(ZeroDivisionError), whole(path) as second:
        with pytest.raises(UserError), whole(path) as first:
            os.unlink(tmp_path / "x.part")
            (tmp_path / "x.part").write_text("of another one")
        assert content(tmp_path) == {"x": b"2", "x.part": b"of another one"}
        raise ZeroDivisionError


def test_where_files_cannot_be_linked_or_folders_flushed(tmp_path, monkeypatch):
    """A memory card; a system that opens no folders."""
    files.write_text(tmp_path / "x", "1")
    for operation, code in (("link", errno.EPERM), ("fsync", errno.EINVAL), ("open", errno.EACCES)):

        def refuse(file, *args, code=code, operation=operation):
            if operation == "link" or os.path.isdir(file):
                raise OSError(code, os.strerror(code))
            return getattr(os, operation)(file, *args)

        with monkeypatch.context() as patch:
            patch.setattr(files, "os", system := System())
            setattr(system, operation, refuse)
            files.write_text(tmp_path / "x", operation)
        assert content(tmp_path) == {"x": operation.encode()}


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "x").mkdir()
    for more in ((), ("y",)):
        with pytest.raises(IsADirectoryError), Together() as group:
            for name in (*more, "x"):
                group.open(tmp_path / name).write(b"1")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_nothing_is_left_of_a_folder_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert content(tmp_path) == {"out/x": b"1"}
    os.mkdir(tmp_path / "usual")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_log_has_whole_lines_only(place, capsys):
    """A log without its first line is none."""
    sizes = set()

    def run_log():
        return common.log.RunLog("20260102_030405", {"task": "x"}, 9, 0)

    for n_bytes in range(0, 800, 7):
        with room_for(n_bytes), contextlib.suppress(OSError), run_log() as log:
            for step in range(9):
                log.event("Val", (0, step), {"Loss": f"{step}.0"})
        logs = list(place.glob("train_*.log"))
        lines = logs[0].read_text().splitlines(keepends=True) if logs else []
        assert logs or n_bytes < 60
        assert all(line.endswith("\n") for line in lines) and all(line.endswith(".0\n") for line in lines[1:])
        sizes.add(len(lines))
        for log in logs:
            log.unlink()
    assert sizes == {0, *range(1, 1 + max(sizes))} and max(sizes) > 5
