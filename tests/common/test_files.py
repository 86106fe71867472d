"""common/files.py and everything that writes with it: whichever call fails, old files stay unchanged."""

import contextlib
import errno
import functools
import json
import os
import resource
import shutil

import pytest
import torch
from test_tokenizer import CHAR

import common.config
import common.log
import engine.checkpoint
import engine.reference
import models
import plot_loss
import problem
from common import files
from common.errors import UserError, run
from common.files import AtomicFiles, atomic_folder, atomic_write
from config.schema import ModelConfig
from dataset import sample_world
from engine.checkpoint import Checkpoint
from formats import gguf, huggingface, llama2c
from preparation.corpus import prepare

OPERATIONS = {
    "close", "fsync", "link", "makedirs", "mkdir", "open", "rename", "replace", "unlink", "write",
}  # fmt: skip
CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


class System:
    """Stands for `os` in common/files.py and records the calls. One of them fails as on a full disk: a write
    has written a part of the data, and a close has closed the file."""

    def __init__(self, failing=None, code=None):
        self.failing, self.code, self.asked = failing, code, []

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in OPERATIONS:
            return real

        def operation(*args, **options):
            self.asked.append((name, *map(str, args)))
            if len(self.asked) - 1 != self.failing:
                return None if name == "fsync" else real(*args, **options)  # a real fsync is slow
            if name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            if name == "close":
                real(*args)
            raise OSError(self.code, os.strerror(self.code), *args[:1])

        return operation


def content(folder):
    """{path: bytes} of all files. Sorted bytes for safetensors, whose header comes in any order."""
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


# Each writes into a folder: with `new` 0 the old content, with 1 the new one.


def write_checkpoint(folder, new):
    checkpoint(new).save()


def write_tokenizer(folder, new):
    (CHAR, type(CHAR).train(["other"]))[new].save(folder / "deep" / "er" / "tokenizer.json")


def write_tokens(folder, new):
    prepare({"sft": [folder.parent / "in.jsonl"]}, folder / "prepared", seed=new, tokenizer=CHAR)


def write_chart(folder, new):
    plot_loss.save([str(new)], folder / "chart.png")


def write_results(folder, new):
    files.append_line(problem.RESULTS, json.dumps({"run": new}) + "\n")


def write_world(folder, new):
    sample_world.write_world(folder, seed=new, size=0.1)


def write_reference(folder, new):
    for name in ("doc", "config"):
        (folder / name).mkdir(exist_ok=True)
    engine.reference.write_reference()


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
# These do not replace existing files.
ONCE = ("write_huggingface", "write_llama2c", "write_gguf", "read_huggingface")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to write into; its parent holds the input."""
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
    # Replace what is slow (charts, reference, sample world) by something short: only writing matters here.
    monkeypatch.setattr(plot_loss, "draw", lambda figure, logs: figure.text(0, 0, *logs))
    monkeypatch.setattr(engine.reference, "ROOT", folder)
    monkeypatch.setattr(engine.reference, "reference_page", lambda: "the keys")
    monkeypatch.setattr(engine.reference, "editor_schemas", lambda: {"one": {}, "two": {}})
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
        else:  # closing a synced file, or removing a backup, may fail: no harm done
            operation, path = system.asked[failing]
            assert (operation, path[-4:]) == ("unlink", ".old") or name == "write_results", system.asked
            assert {path: was for path, was in content(place).items() if not path.endswith(".old")} == after
        capsys.readouterr()


@contextlib.contextmanager
def room_for(n_bytes):
    """Limit the size of files. The system then writes what fits, like a disk that is nearly full."""
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
    """Also if the library raises another exception instead, but not if the user interrupts."""
    path = tmp_path / "x"
    for disguise in (None, RuntimeError("[enforce fail at inline_container.cc:664]"), OSError("1 requested")):
        with room_for(3), pytest.raises(OSError) as error, atomic_write(path) as file:
            with contextlib.suppress(OSError):
                file.write(b"123456")
            with pytest.raises(OSError):
                file.write(b"")  # after a failed write, nothing more is written
            if disguise:
                raise disguise
        assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
    with room_for(3), pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        with contextlib.suppress(OSError):
            file.write(b"123456")
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"1")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_has_left_is_in_nobodys_way(tmp_path):
    """The last of several files marks the others as valid; without it, none of them counts."""
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
        with pytest.MonkeyPatch.context() as patch, AtomicFiles() as group:
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
    """The process that started last wins; the other one reports it."""
    path = tmp_path / "x"
    with pytest.raises(UserError, match="another process is writing .*x, too; try again"):
        with atomic_write(path) as first:
            first.write(b"11")
            with atomic_write(path) as second:
                second.write(b"2")
                first.write(b"1")
    assert content(tmp_path) == {"x": b"2"}
    with pytest.raises(ZeroDivisionError), atomic_write(path) as second:
        with pytest.raises(UserError), atomic_write(path) as first:
            os.unlink(tmp_path / "x.part")
            (tmp_path / "x.part").write_text("of another one")
        assert content(tmp_path) == {"x": b"2", "x.part": b"of another one"}
        raise ZeroDivisionError


def test_where_files_cannot_be_linked_or_folders_flushed(tmp_path, monkeypatch):
    """As on a memory card (no hard links), or a system that cannot open folders."""
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
        with pytest.raises(IsADirectoryError), AtomicFiles() as group:
            for name in (*more, "x"):
                group.open(tmp_path / name).write(b"1")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_nothing_is_left_of_a_folder_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert content(tmp_path) == {"out/x": b"1"}
    os.mkdir(tmp_path / "usual")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_log_has_whole_lines_only(place, capsys, monkeypatch):
    """A log whose first line could not be written is removed."""
    sizes = set()
    monkeypatch.setattr(common.log, "command", lambda: "python x.py")

    def run_log():
        return common.log.RunLog("20260102_030405", {"task": "x"}, 9, 0)

    for n_bytes in range(0, 1600, 7):
        with room_for(n_bytes), contextlib.suppress(OSError), run_log() as log:
            for step in range(9):
                log.write("val", 0, step, {"loss": step + 0.5})
        logs, metrics = list(place.glob("train_*.log")), list(place.glob("train_*.metrics.jsonl"))
        lines = logs[0].read_text().splitlines(keepends=True) if logs else []
        assert logs or n_bytes < 150
        assert all(line.endswith(end) for line, end in zip(lines, ["\n", *[".500000\n"] * 9], strict=False))
        events = metrics[0].read_text().splitlines(keepends=True) if metrics else []
        assert all(line.endswith("\n") for line in events)
        assert all(json.loads(line)["loss"] for line in events[1:])
        sizes.add(len(events))
        assert len(events) <= len(lines) <= len(events) + 1
        for log in [*logs, *metrics]:
            log.unlink()
    assert sizes == {0, *range(1, 1 + max(sizes))} and max(sizes) > 5
