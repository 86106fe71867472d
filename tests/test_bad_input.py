"""What is wrong from outside, through real command lines: one or two sentences on stderr and exit code 2,
never a traceback, and nothing lost. Single keys and damages are in tests/common and tests/engine,
texts in test_data.py."""

import json
import os
import re
import resource
import subprocess
import sys
import zipfile

import pytest
import torch

import train as script
from common.errors import run
from engine.checkpoint import load
from preparation import data_command
from preparation.corpus import prepare
from tokenizer import CharTokenizer

PAIRS = [[f"dataset/prepared/{{}}_{split}.bin" for split in ("train", "val")]]


def told(done):
    """The error of a finished process, of which there is one and no traceback."""
    *notices, sentence = done.stderr.splitlines()
    assert done.returncode == 2 and sentence.startswith("error: ") and "Traceback" not in done.stderr
    assert not any(line.startswith("error: ") for line in notices)
    return sentence.removeprefix("error: ")


# ---- told before torch is loaded ---------------------------------------------------------------------------


def test_help_needs_no_torch_and_no_half_second(shared_project):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import train; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, shared_project.root], capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "rich", "data", "model"} & set(done.stdout.split())

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        help = shared_project.run("train.py", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert help.returncode == 0 and "python train.py -t sft " in help.stdout and not help.stderr
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5  # a busy machine takes longer for the same


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "the following arguments are required: -t/--task"),
        (["-t", "rl"], "argument -t/--task: invalid choice: 'rl'"),
        (["-t", "sft", "--steps", "3"], "unrecognized arguments: --steps 3"),
        (["-t", "sft", "--set"], "argument --set: expected one argument"),
        (["-t", "sft", "--set", "batch=1"], '--set: unknown key "batch"; did you mean "batch_size"?'),
        (["-t", "sft", "--set", "batch_size=0"], '--set: key "batch_size": found 0; needs an integer >= 1'),
        (["-t", "sft", "--set", "n_kv_head=3"], "model_config.json: n_kv_head=3 does not divide n_head="),
        (["-t", "sft", "-c", "nowhere.json"], "nowhere.json does not exist"),
        (["-t", "sft", "-c", "config"], "config is a folder; a JSON file is needed"),
        (["-t", "sft", "-c", "README/x.json"], "README/x.json does not exist"),
        (["-t", "sft", "-m", "broken.json"], "broken.json: broken JSON at line 3, column 1: expecting"),
        (["-t", "sft", "-c", "~no-one/x.json"], "~no-one/x.json does not exist"),
    ],
)
def test_wrong_arguments(args, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('{\n"n_layer": 4,\n}')
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("torch would have been loaded"))
    with pytest.raises(SystemExit) as exit:
        run(script.main)
    output = capsys.readouterr()
    assert exit.value.code == 2 and sentence in output.err
    assert not output.out and "Traceback" not in output.err


def test_an_error_that_nobody_reads(shared_project):
    reader, writer = os.pipe()
    os.close(reader)
    command = shared_project.command("train.py", "-t", "sft", "-c", "nowhere.json")
    assert subprocess.run(command, stderr=writer).returncode == 2
    os.close(writer)


# ---- files that are not what they should be ----------------------------------------------------------------


def test_files_of_another_kind(train, tiny_data, tmp_path):
    pretrain, sft = ([[path.format(task) for path in PAIRS[0]]] for task in ("pretrain", "sft"))
    settings = {"from_checkpoint": ""}
    wrong = told(train("sft", dataset_path=pretrain, **settings))
    assert wrong == "dataset/prepared/pretrain_train.bin was prepared for pretrain, not for sft"
    wrong = told(train("pretrain", dataset_path=sft))
    assert wrong == "dataset/prepared/sft_train.bin was prepared for sft, not for pretrain"

    other = train.root / "other"
    (tmp_path / "x.txt").write_text("other words<|eos|>" * 99)
    prepare({"pretrain": [tmp_path / "x.txt"]}, other)
    wrong = told(train("pretrain", dataset_path=[[pretrain[0][0], "other/pretrain_val.bin"]]))
    assert "/pretrain_val.bin was made with another tokenizer than this run's" in wrong
    assert "`python data.py --tokenizer FILE`" in wrong
    wrong = told(train("pretrain", tokenizer_path="other/tokenizer.json"))
    assert "pretrain_train.bin was made with another tokenizer" in wrong
    small = CharTokenizer.train(["ab"]).vocab_size
    assert f"vocab_size={small} is less than the tokenizer's" in told(train("pretrain", vocab_size=small))
    assert "cuts every conversation before its answer" in told(train("sft", block_size=2, **settings))

    for path, sentence in (
        ("config/model_config.json", "is not a sound Nano tokenizer"),
        ("dataset/prepared/sft_val.bin", "is not valid JSON"),
        ("nowhere.json", "does not exist; `python data.py` writes a tokenizer"),
        ("config", "config/tokenizer.json does not exist"),
    ):
        assert sentence in told(train("pretrain", tokenizer_path=path))
    for path, sentence in (
        ("dataset/prepared/pretrain_train", "the name of a token file ends in .bin"),
        ("nowhere.bin", "does not exist; run `python data.py` first"),
        ("dataset/prepared/pretrain_train.bin/x.bin", "not a directory"),
        ("a\0b.bin", "damaged"),
        ("x" * 300 + ".bin", "file name too long"),
    ):
        assert sentence in told(train("pretrain", dataset_path=[[path, path]]))
    cut = train.root / "dataset" / "prepared" / "pretrain_train.bin"
    cut.write_bytes(cut.read_bytes()[:-2])
    assert "pretrain_train.bin is truncated" in told(train("pretrain"))
    assert not list(train.root.glob("train_*")) and not train.checkpoints()


def test_what_is_said_about_another_tokenizer_helps(train, tmp_path, monkeypatch):
    """New text prepared by itself has a tokenizer of its own, however often; --tokenizer is what helps."""
    assert train("pretrain", max_steps=3).returncode == 0
    [checkpoint] = train.checkpoints().values()
    path, out = tmp_path / "new.jsonl", train.root / "new"
    path.write_text("".join(f'{{"question": "{i}?", "answer": "new {i}"}}\n' for i in range(9)))
    settings = {"from_checkpoint": str(checkpoint), "max_steps": 3,
                "dataset_path": [["new/sft_train.bin", "new/sft_val.bin"]]}  # fmt: skip
    for advised, returncode in (([], 2), (["--tokenizer", str(checkpoint)], 0)):
        monkeypatch.setattr(sys, "argv", ["data.py", "--sft", str(path), "--out", str(out), *advised])
        data_command.main()
        done = train("sft", **settings)
        assert done.returncode == returncode
        if returncode:
            assert "`python data.py --tokenizer FILE`, where FILE is the checkpoint" in told(done)


def test_what_the_machine_cannot_do_is_refused(train):
    assert "float16" in told(train("pretrain", dtype="float16"))
    assert "no dropout" in told(train("pretrain", sdp_kernel="flash", dropout=0.1))
    if not torch.cuda.is_available():
        assert 'device is "cuda:3", but torch' in told(train("pretrain", device="cuda:3"))


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_run(tiny_project, tiny_data):
    proof, folder = tiny_project.root / "was run", tiny_project.root / "checkpoint"
    folder.mkdir()
    harmful = folder / "pretrain_20260102_030405_step_1.pt"
    torch.save({"format": "nano-checkpoint", "version": 1, "model": Payload(proof)}, harmful)
    refusal = f"checkpoint/{harmful.name} is not a checkpoint of Nano: nothing in it was run"
    from_it = ["-t", "pretrain", "--set", f"from_checkpoint=checkpoint/{harmful.name}"]
    assert told(tiny_project.run("train.py", *from_it)) == refusal
    assert told(tiny_project.run("train.py", "-t", "pretrain", "--resume")).startswith(refusal)
    talk = ["inference.py", "-m", f"checkpoint/{harmful.name}", "--prompt", "1"]
    assert told(tiny_project.run(*talk)) == refusal

    # The same as plain pickles, old and new, compressed, and hidden behind what is sound.
    torch.load(harmful, weights_only=False)
    assert proof.is_dir(), "the payload works"
    proof.rmdir()
    variants = {}
    for name, options in (("old", {"_use_new_zipfile_serialization": False}), ("new", {})):
        variants[name] = folder / f"{name}.pt"
        torch.save({"format": "nano-checkpoint", "best": Payload(proof)}, variants[name], **options)
    variants["compressed"] = folder / "compressed.pt"
    with zipfile.ZipFile(variants["new"]) as source:
        with zipfile.ZipFile(variants["compressed"], "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
    variants["hidden"] = folder / "hidden.pt"
    variants["hidden"].write_bytes(variants["old"].read_bytes() + variants["new"].read_bytes())
    for path in variants.values():
        with pytest.raises(Exception, match="checkpoint of Nano"):
            load(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "name", ["nowhere.pt", "empty.pt", "text.pt", "foreign.pt", "picture.zip", "folder.pt"]
)
def test_missing_and_foreign_checkpoints(train, name):
    path = train.root / name
    match name:
        case "empty.pt":
            path.touch()
        case "text.pt":
            path.write_text("a model")
        case "foreign.pt":
            torch.save({"wte.weight": torch.zeros(3)}, path)
        case "picture.zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("x.png", "x")
        case "folder.pt":
            path.mkdir()
    sentence = told(train("pretrain", from_checkpoint=str(path)))
    assert name in sentence and re.search("there is no checkpoint|not a checkpoint of Nano", sentence)


# ---- what the system refuses -------------------------------------------------------------------------------


def test_no_room_for_a_checkpoint(tiny_project):
    """A limit on the size of files stands for a disk that is full: writing fails in the same places."""
    assert tiny_project.run("train.py", "-t", "pretrain").returncode == 0
    [path] = tiny_project.checkpoints().values()
    content = path.read_bytes()
    command = ["train.py", "-t", "pretrain", "--resume", "--set", "max_steps=8"]
    wrong = told(tiny_project.run(*command, limits=[(resource.RLIMIT_FSIZE, len(content) // 2)]))
    assert "step_8.pt could not be written (" in wrong and "earlier checkpoints are untouched" in wrong
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == content
    wrong = told(tiny_project.run(*command, limits=[(resource.RLIMIT_FSIZE, 100)], anew=True))
    assert wrong.startswith("file too large")
    done = tiny_project.run(*command)
    assert done.returncode == 0 and list(tiny_project.checkpoints()) == [6, 8]


def test_a_full_disk_under_the_output(tiny_project):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            tiny_project.command("train.py", "-t", "pretrain"),
            stdout=full,
            stderr=subprocess.PIPE,
            env=tiny_project.environment,
            text=True,
        )
    assert told(done) == "the disk is full; free some space and run the same command again"


def test_a_full_disk_under_the_log(train, monkeypatch):
    monkeypatch.setattr("common.log.RunLog._open", lambda *_: open("/dev/full", "w", 1))
    assert told(train("pretrain")) == "the disk is full; free some space and run the same command again"
    assert not train.checkpoints()


def test_no_permission(train, monkeypatch):
    train("pretrain", max_steps=2, decay_lr=False)
    [path] = train.checkpoints().values()

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZipFile", forbidden)
        assert told(train("pretrain", from_checkpoint=str(path))).startswith("no permission to read ")
    with monkeypatch.context() as patch:
        patch.setattr("common.log.RunLog._open", forbidden)
        assert told(train("pretrain", "--resume")) == f"permission denied ({path})"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", forbidden)
        assert "could not be written (Permission denied)" in told(train("pretrain", "--resume"))


def test_out_of_memory(tiny_project):
    limits = [(resource.RLIMIT_AS, 4 << 30)]
    settings = ["--set", "batch_size=50000", "--set", "n_embd=1024"]  # too large at once: none is filled
    wrong = told(tiny_project.run("train.py", "-t", "pretrain", *settings, limits=limits))
    assert wrong.startswith("out of memory with batch_size 50000 and block_size 32.")
    assert "Lower batch_size and raise gradient_accumulation_steps by the same factor" in wrong
    settings = ["--set", "n_embd=32768", "--set", "n_layer=1"]
    wrong = told(tiny_project.run("train.py", "-t", "pretrain", *settings, limits=limits))
    assert "out of memory; lower batch_size" in wrong or "lower n_layer or n_embd" in wrong


@pytest.mark.parametrize("size", ["²", "-1", "abc", "", "9" * 30])
def test_a_terminal_of_an_odd_size(shared_project, size):
    """rich takes ² for a number, and any number for a width."""
    environment = {"COLUMNS": size, "LINES": size, "FORCE_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    text = shared_project.root / "train.py"
    for words in (["dataset/download.py", "--list"], ["tokenizer.py", "stats", text]):
        done = shared_project.run(*words, **environment)
        assert done.returncode == 0 and not done.stderr, done.stderr


def test_an_output_that_lacks_characters(shared_project):
    """As a pipe on Windows does: what cannot be written is escaped."""
    text = shared_project.elsewhere / "文.txt"
    text.write_text("文" * 99, "utf-8")
    done = shared_project.run("tokenizer.py", "stats", text, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "\\u6587" in done.stdout and not done.stderr, done.stderr


def test_elsewhere_with_relative_paths(tiny_project):
    """Paths are taken from the current folder first; the rest comes from the project."""
    (tiny_project.elsewhere / "my config.json").write_text(
        json.dumps({"dataset_path": [[path.format("pretrain") for path in PAIRS[0]]], "decay_lr": False})
    )
    done = tiny_project.run(
        "train.py", "-t", "pretrain", "-c", "my config.json", "--set", "max_steps=2", "--set", "batch_size=2"
    )
    assert (done.returncode, done.stderr) == (0, "") and "\x1b" not in done.stdout
    assert list(tiny_project.checkpoints()) == [2] and len(list(tiny_project.root.glob("train_*.log"))) == 1
    assert [path.name for path in tiny_project.elsewhere.iterdir()] == ["my config.json"]


# ---- exceptions --------------------------------------------------------------------------------------------


SHARED = r"""
import importlib, json, pathlib, sys, types

root = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(root))
names = [path.relative_to(root).with_suffix("") for path in root.rglob("*.py") if "tests" not in path.parts]
names = [".".join(name.parts).removesuffix(".__init__") for name in names]
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert not error.name.partition(".")[0] in names, error
ours = {name for name in names if name in sys.modules}
seen, found, left = set(), [], [(name, vars(sys.modules[name])) for name in ours]
while left:
    where, value = left.pop()
    if id(value) in seen:
        continue
    seen.add(id(value))
    if isinstance(value, BaseException):
        found.append(f"{where}: {value!r}")
    elif isinstance(value, dict):
        left += [(f"{where}.{key}", part) for key, part in value.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        left += [(where, part) for part in value]
    elif isinstance(value, types.FunctionType) and value.__module__ in ours:
        left += [(where, part) for part in (value.__defaults__, value.__kwdefaults__, vars(value))]
        left += [(where, cell.cell_contents) for cell in value.__closure__ or ()]
    elif getattr(value if isinstance(value, type) else type(value), "__module__", None) in ours:
        left.append((where, dict(getattr(value, "__dict__", {}))))
print(json.dumps([len(ours), found]))
"""


def test_no_exception_is_made_before_it_is_raised(shared_project, tmp_path):
    """One that is kept refers, by its traceback, to all that those who raised it had in hand."""
    (tmp_path / "look.py").write_text(SHARED)
    done = shared_project.run(tmp_path / "look.py", shared_project.root)
    assert done.returncode == 0, done.stderr
    n_modules, found = json.loads(done.stdout.splitlines()[-1])
    assert n_modules > 30 and found == []
