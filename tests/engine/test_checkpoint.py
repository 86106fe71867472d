"""Checkpoints: when they are written, which are kept, how runs resume; and that damaged, foreign or malicious
files are refused."""

import errno
import json
import math
import os
import random
import re
import shutil
import signal

import pytest
import torch
from lm_pass import lm_pass

from common.errors import UserError
from config.schema import ModelConfig
from data import TokenBatches, TokenFile
from engine.checkpoint import load
from engine.runs import Run
from model import GPT

# ---- policies --------------------------------------------------------------------------------------------


def test_when_checkpoints_are_written_and_which_are_kept(train):
    done = train("pretrain", max_steps=11, save_interval=4, eval_interval=3, keep_checkpoints=2)
    assert done.returncode == 0
    validated = [(step, float(loss)) for step, loss in train.logged("Val", "Loss")]
    assert [step for step, _ in validated] == [3, 6, 9, 11]
    fell = {step for i, (step, loss) in enumerate(validated) if all(loss < v for _, v in validated[:i])}
    saved = [step for (step,) in train.logged("Save")]
    assert saved == sorted({4, 8, 11} | fell) and 3 in fell
    best = min(validated, key=lambda entry: entry[1])
    assert list(train.checkpoints()) == sorted({*saved[-2:], best[0]})
    last = load(train.checkpoints()[11])
    assert (last.stage, last.step, last.best["step"]) == ("pretrain", 11, best[0])
    assert last.best["loss"] == pytest.approx(best[1], abs=1e-6)


def test_zero_keeps_all_and_a_far_interval_only_the_last(train):
    train("pretrain", max_steps=5, save_interval=1, keep_checkpoints=0, eval_interval=100)
    assert list(train.checkpoints()) == [1, 2, 3, 4, 5]
    train("sft", max_steps=3, eval_interval=100)
    assert list(train.checkpoints("sft")) == [3]


def test_the_best_stays_when_validation_rises(train):
    rising = dict(learning_rate=1, min_lr=0.1, save_interval=1, eval_interval=1, keep_checkpoints=1)
    train("pretrain", max_steps=3)
    done = train("pretrain", "--resume", max_steps=8, **rising)
    assert done.returncode == 0
    best = load(train.checkpoints()[8]).best["step"]
    assert best < 8 and list(train.checkpoints()) == [best, 8]


# ---- going on --------------------------------------------------------------------------------------------


def test_resuming(train):
    fresh = train("pretrain", "--resume")
    assert fresh.returncode == 0
    assert fresh.stderr == "there is no pretrain run to resume: starting a new one\n"
    [path] = train.checkpoints().values()
    content, name = path.read_bytes(), f"checkpoint/{path.name}"

    finished = train("pretrain", "--resume")
    assert (finished.returncode, finished.stderr) == (0, f"resuming from {name} at step 6\n")
    assert finished.stdout.endswith(f"Nothing to do: {name} has all of its 6 steps.\n")
    assert path.read_bytes() == content and len(list(train.root.glob("train_*.log"))) == 1

    changes = dict(max_steps=7, weight_decay=0.5, beta1=0.5, n_layer=2)
    changed = train("pretrain", "--resume", **changes)
    assert changed.returncode == 0 and changed.stderr == (
        f"resuming from {name} at step 6\n"
        "changed since then: max_steps: 6 -> 7, weight_decay: 0.1 -> 0.5, beta1: 0.9 -> 0.5\n"
        "the model keeps the shape it has in the checkpoint: n_layer 1 (configured: 2)\n"
        "the learning rate jumps, at step 6, from 1.00e-03 to 1.86e-03\n"
    )
    last = load(train.checkpoints()[7])
    assert last.run == load(path).run
    # Settings of the command line win over those in the checkpoint.
    groups = last.optimizer["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0] and groups[0]["betas"][0] == 0.5


@pytest.mark.parametrize(
    "precision",
    [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "use_amp": False}, {"optimizer": "muon"},
     {"optimizer": "muon", "dtype": "bfloat16"}],
)  # fmt: skip
def test_resuming_changes_nothing(train, precision):
    settings = dict(lr_decay_iters=6, dropout=0.1, gradient_accumulation_steps=2, **precision)
    for steps in (3, 6):
        assert train("sft", "--resume", from_checkpoint="", max_steps=steps, **settings).returncode == 0
    resumed = load(train.checkpoints("sft")[6])
    half = resumed.model["wte.weight"].dtype == torch.bfloat16
    assert half is ("use_amp" in precision)
    shutil.rmtree(train.root / "checkpoint")
    assert train("sft", from_checkpoint="", **settings).returncode == 0
    assert train.same(resumed, load(train.checkpoints("sft")[6]))


def test_the_state_of_another_optimizer_is_refused(train):
    for before, now in (("adamw", "muon"), ("muon", "adamw")):
        shutil.rmtree(train.root / "checkpoint", ignore_errors=True)
        assert train("pretrain", max_steps=3, optimizer=before).returncode == 0
        done = train("pretrain", "--resume", max_steps=4, optimizer=now)
        refusal = rf'its optimizer state, of "{before}", does not fit .* with --set from_checkpoint=(\S+)\n'
        [path] = re.findall(refusal, done.stderr)
        assert done.returncode == 2
        # Its advice works.
        done = train("pretrain", max_steps=4, optimizer=now, from_checkpoint=path)
        assert done.returncode == 0 and "4 steps in this session" in done.stdout
        notices = f"starting from the weights of {path}\nthis is a new run; to continue the other one:"
        assert notices in done.stderr


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(train):
    settings = dict(max_steps=6, save_interval=2, dropout=0.1, keep_checkpoints=2)
    train("pretrain", **settings)
    assert list(train.checkpoints()) == [4, 6]
    four, six = train.checkpoints().values()
    whole = load(six)
    six.write_bytes(six.read_bytes()[:-100])
    done = train("pretrain", "--resume", **settings)
    assert done.returncode == 0 and done.stderr == (
        f"checkpoint/{six.name} is damaged, or is not a checkpoint of Nano; trying the one before it\n"
        f"resuming from checkpoint/{four.name} at step 4\n"
    )
    assert train.same(load(six), whole)
    for path in (four, six):
        path.write_bytes(b"")
    done = train("pretrain", "--resume", **settings)
    assert done.returncode == 2 and done.stderr.count(" is damaged") == 2


def test_going_back_to_an_earlier_step_loses_nothing(train):
    settings = dict(max_steps=6, save_interval=2, dropout=0.1)
    train("pretrain", **settings)
    before = {path: path.read_bytes() for path in train.checkpoints().values()}
    early, _, last = before
    done = train("pretrain", "--resume", early, **settings, keep_checkpoints=1)
    assert done.returncode == 0 and done.stderr.startswith(
        f"checkpoint/{early.name} is not where its run ended: this is a new run that branches off there\n"
        f"resuming from checkpoint/{early.name} at step 2\n"
    )
    assert all(path.read_bytes() == content for path, content in before.items())
    [branch] = {*train.checkpoints().values()} - before.keys()
    one, two = load(last), load(branch)
    assert one.run < two.run
    one.train_config, one.best = (
        two.train_config,
        two.best,
    )  # keep_checkpoints; a branch has its own best checkpoint
    assert train.same(one, two)


def test_fine_tuning_starts_from_the_newest_pretrained_model(train):
    none = train("sft")
    assert none.returncode == 2 and none.stderr.startswith('error: from_checkpoint is "auto", but ')
    assert "python train.py -t pretrain" in none.stderr and none.stderr.count("\n") == 1
    train("pretrain")
    done = train("sft", max_steps=1, decay_lr=False, learning_rate=1e-9, min_lr=0, weight_decay=0)
    [(pretrained, [tuned])] = [(train.checkpoints()[6], train.checkpoints("sft").values())]
    assert done.stderr == f"starting from the weights of checkpoint/{pretrained.name}\n"
    tuned, pretrained = load(tuned), load(pretrained)
    assert tuned.tokenizer == pretrained.tokenizer and tuned.run != pretrained.run
    for name, weights in tuned.model.items():
        torch.testing.assert_close(weights, pretrained.model[name], atol=1e-8, rtol=0)
    # The optimizer starts from scratch.
    assert {float(state["step"]) for state in tuned.optimizer["state"].values()} == {1}


STRETCH = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
           "beta_fast": 4.0, "beta_slow": 1.0}  # fmt: skip


def test_a_new_run_stretches_the_context_of_the_weights_it_starts_from(train):
    train("pretrain", max_steps=3)
    [before] = train.checkpoints().values()
    wanted = dict(block_size=64, rope_scaling=STRETCH)
    done = train("sft", **wanted, max_steps=2, decay_lr=False)
    assert done.returncode == 0 and done.stderr == (
        f"starting from the weights of checkpoint/{before.name}\n"
        f"the context of checkpoint/{before.name} is stretched as rope_scaling says (yarn, factor 4): "
        "block_size 32 -> 64\n"
    )
    after = load(train.checkpoints("sft")[2])
    assert {key: after.model_config[key] for key in wanted} == wanted
    shape = ModelConfig(**{**load(before).model_config, **wanted})
    model = GPT(shape)
    model.load_state_dict(load(before).model)
    data = TokenFile(train.root / "dataset" / "prepared" / "sft_train.bin")
    loss = lm_pass(model, *map(torch.from_numpy, TokenBatches([data], 64, 4, 1337)(0).values()))[1]
    assert float(train.logged("Train", "Loss")[3][1]) == pytest.approx(loss.item(), abs=2e-6)

    # Its own checkpoints stay as they are: resumed with the same settings or others, and started from.
    done = train("sft", "--resume", **wanted, max_steps=3, decay_lr=False)
    assert done.returncode == 0 and "stretched" not in done.stderr and "keeps the shape" not in done.stderr
    done = train("sft", "--resume", block_size=128, rope_scaling=STRETCH, max_steps=4, decay_lr=False)
    assert "keeps the shape it has in the checkpoint: block_size 64 (configured: 128)" in done.stderr
    again = {"from_checkpoint": f"checkpoint/{next(iter(train.checkpoints('sft').values())).name}"}
    done = train("pretrain", **again, max_steps=1, decay_lr=False)
    assert done.returncode == 0 and "stretched" not in done.stderr
    assert load(train.checkpoints()[1]).model_config["rope_scaling"] == STRETCH


def test_a_context_that_cannot_be_stretched_is_refused(train):
    train("pretrain", max_steps=1, decay_lr=False, use_rope=False)
    [path] = train.checkpoints().values()
    done = train("sft", rope_scaling=STRETCH)
    assert done.returncode == 2 and done.stderr.endswith(
        f"error: checkpoint/{path.name}: model_config: rope_scaling is for rotary positions, "
        "but use_rope is false\n"
    )
    done = train("sft", architecture="nanochat", rope_scaling=STRETCH)
    assert done.returncode == 2 and done.stderr.endswith(
        f"error: rope_scaling is to stretch the context of checkpoint/{path.name}, but the model there is "
        "nano, not nanochat: set architecture to it, or rope_scaling to null\n"
    )
    assert not train.checkpoints("sft")


# ---- killed while it is written ----------------------------------------------------------------------------


def in_a_child(work):
    """Call `work` in a forked process. Returns the status from os.waitpid."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def half_written(state, file):
    file.write(b"PK\x03\x04" + bytes(50_000))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("module", "name", "number", "instead"),
    [(torch, "save", 2, half_written), (os, "fsync", 3, die), (os, "replace", 2, die)],
    ids=["half written", "not flushed", "not renamed"],
)
def test_killed_while_a_checkpoint_is_written(train, monkeypatch, module, name, number, instead):
    """number: at which call the process is killed; the first checkpoint flushes file and folder."""
    settings = dict(max_steps=6, save_interval=3, dropout=0.1)
    assert train("pretrain", **settings).returncode == 0
    whole = load(train.checkpoints()[6])
    for path in train.checkpoints().values():
        path.unlink()
    original, calls = getattr(module, name), []

    def second_time(*args):
        calls.append(args)
        return (original if len(calls) < number else instead)(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, second_time)
        assert in_a_child(lambda: train("pretrain", **settings)) == signal.SIGKILL
    [left_over] = (train.root / "checkpoint").glob("*.part")
    assert list(train.checkpoints()) == [3] and left_over.stat().st_size > 1000
    done = train("pretrain", "--resume", **settings)
    assert done.returncode == 0 and done.stderr.endswith("at step 3\n")
    assert train.same(load(train.checkpoints()[6]), whole)
    assert not left_over.exists()


def test_what_other_runs_write_is_left_alone(train):
    """Unless the process that wrote it is gone. A run killed at its first checkpoint leaves nothing else."""
    assert train("pretrain").returncode == 0
    folder = train.root / "checkpoint"
    names = "pretrain_20260102_030405", "sft_20260102_030406", "sft_20260102_030407", "notes"
    parts = [folder / f"{name}_step_3.pt.part" for name in names]
    for part in parts:
        part.write_bytes(b"x")
    with Run("20260102_030406"):
        assert train("pretrain", "--resume", max_steps=8).returncode == 0
        assert [part.exists() for part in parts] == [False, True, False, True]
    assert not list(folder.glob("*.lock"))


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(train, monkeypatch):
    assert train("pretrain").returncode == 0
    [path] = train.checkpoints().values()
    content = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = train("pretrain", "--resume", max_steps=8)
    name = path.name.replace("step_6", "step_8")
    assert done.returncode == 2 and done.stderr.endswith(
        f"\nerror: the checkpoint checkpoint/{name} could not be written (No space left on device); "
        "earlier checkpoints are untouched\n"
    )
    assert [entry.name for entry in path.parent.iterdir()] == [path.name] and path.read_bytes() == content


def test_a_place_where_nothing_can_be_written(train):
    (train.root / "checkpoint").write_text("no folder")
    done = train("pretrain")
    assert done.returncode == 2
    assert done.stderr == "error: no checkpoint could be written to checkpoint/ (file exists)\n"
    assert " | Train | " not in done.stdout and not list(train.root.glob("train_*.log"))


# ---- damage ------------------------------------------------------------------------------------------------


@pytest.fixture
def sound(train):
    """The path of a valid checkpoint of a run of two steps."""
    assert train("pretrain", max_steps=2, decay_lr=False).returncode == 0
    return train.checkpoints()[2]


def damage(content, random):
    """The bytes with random damage, half of it in the headers of the zip container."""
    content = bytearray(content)
    headers = [match.start() for match in re.finditer(b"PK", content)]
    at = random.randrange(len(content))
    if random.random() < 0.5:
        at = min(random.choice(headers) + random.randrange(64), len(content) - 1)
    length = random.choice((1, 1, 4, 64, 4096))
    match random.randrange(7):
        case 0:
            del content[at:]
        case 1:
            del content[at : at + length]
        case 2:
            content[at:at] = random.randbytes(length)
        case 3:
            content[at : at + length] = random.randbytes(len(content[at : at + length]))
        case 4:
            content[at : at + length] = bytes(len(content[at : at + length]))
        case _:
            content[at] ^= 1 << random.randrange(8)
    return bytes(content)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_damaged_files_are_refused_or_do_no_harm(train, sound, seed):
    content, whole = sound.read_bytes(), load(sound)
    dice, refused = random.Random(seed), 0
    for _ in range(200):
        sound.write_bytes(damage(content, dice))
        try:
            assert train.same(load(sound), whole)
        except UserError as error:
            assert re.match(r"checkpoint/\S+ (is |was |lacks )", str(error)) and "\n" not in str(error)
            refused += 1
    assert refused > 150


def with_path(state, keys, change):
    """A copy of nested dictionaries with one entry replaced by change(entry)."""
    if not keys:
        return change(state)
    return {**state, keys[0]: with_path(state[keys[0]], keys[1:], change)}


def instead(value):
    return lambda _: value


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


TENSOR = torch.zeros(2)
CHANGES = [
    ("format", instead("nano-log")),
    *(("version", instead(value)) for value in (0, 4, None, "2", TENSOR)),
    ("format", instead(TENSOR)),
    ("", without("best")),
    ("", lambda state: {**state, "more": 1}),
    ("", instead([])),
    ("", instead(TENSOR)),
    *(("stage", instead(value)) for value in ("", "../sft", None, 3)),
    *(("chat_template", instead(value)) for value in ("other", "", 3, TENSOR)),
    *(("problem", instead(value)) for value in (None, [], {"digits": "6"}, {"../x": 1}, {1: 1})),
    *(("run", instead(value)) for value in ("../../evil", "20260102_030405/x", "", 20260102)),
    *(("step", instead(value)) for value in (-1, 2.0, "2", True, 1 << 70, None)),
    *(("best", instead(value)) for value in ({}, None, {"loss": 1.0}, {"loss": "1", "step": 1})),
    *(("best", instead({"loss": 1.0, "step": value})) for value in ("../x", TENSOR, 1.5, None)),
    *(("validation", instead(value)) for value in ({}, {"loss": math.nan, "step": 1}, {"loss": None})),
    *(("consumed sequences", instead(value)) for value in (-1, None, 1.0, 1 << 63, TENSOR)),
    *(("consumed tokens", instead(value)) for value in (-1, 1.0)),
    *(("data", instead(value)) for value in ([], {"train": []}, {"train": [{}], "validation": []})),
    ("data train", instead(TENSOR)),
    ("train_config", instead(None)),
    ("train_config dataset_path", instead(TENSOR)),
    ("model_config", instead({})),
    ("model_config", lambda state: {**state, "more": 1}),
    ("model_config", lambda state: {**state, 1: 1}),
    *(("model_config n_layer", instead(value)) for value in (2, 0, 1.0, "1", None, TENSOR, 10**400)),
    ("model_config n_embd", instead(1 << 16)),
    ("model_config architecture", instead("other")),
    ("tokenizer", instead({})),
    *(("tokenizer", instead(text)) for text in ("", "{", "[]", "{}", "3", "[" * 100_000)),
    ("tokenizer", without("fingerprint")),
    ("tokenizer fingerprint", instead("0" * 64)),
    ("tokenizer kind", instead(TENSOR)),
    ("tokenizer special_tokens", instead(None)),
    ("model", instead({})),
    ("model", instead([])),
    ("model", without("norm.weight")),
    ("model", lambda state: {**state, "more": TENSOR}),
    ("model", lambda state: {**state, 7: TENSOR}),
    *(("model norm.weight", instead(value)) for value in (None, 1.0, TENSOR, [1.0] * 32)),
    ("model norm.weight", lambda tensor: tensor.to(torch.int64)),
    ("model norm.weight", lambda tensor: tensor.to(torch.complex64)),
    ("model norm.weight", lambda tensor: tensor.to_sparse()),
    ("model norm.weight", lambda tensor: torch.zeros(1).expand(32)),
    ("model norm.weight", lambda tensor: tensor.to("meta")),
    ("optimizer", instead([])),
    ("optimizer state", instead(None)),
    ("optimizer state", instead([])),
    ("optimizer state", without(0)),
    ("optimizer state", lambda state: {**state, 99: {}}),
    ("optimizer state 0", instead({})),
    ("optimizer state 0", without("exp_avg_sq")),
    *(("optimizer state 0 exp_avg", instead(value)) for value in (TENSOR, None, 1.0)),
    ("optimizer state 0 step", instead(TENSOR)),
    ("scaler", instead(None)),
]


def test_what_was_made_up_is_refused(train, sound):
    """Valid containers whose content training could not have written."""
    state = torch.load(sound, weights_only=True)
    state["tokenizer"] = json.loads(state["tokenizer"])  # as in older files
    before = sorted(train.root.parent.rglob("*"))
    for where, change in CHANGES:
        keys = [int(key) if key.isdecimal() else key for key in where.split()]
        torch.save(with_path(state, keys, change), sound)
        done = train("pretrain", "--resume", max_steps=4, decay_lr=False)
        assert done.returncode == 2, where
        *_, sentence = done.stderr.splitlines()
        assert re.match(r"error: checkpoint/\S+", sentence), sentence
    assert sorted(train.root.parent.rglob("*")) == before
    torch.save(state, sound)
    assert train("pretrain", "--resume", max_steps=4, decay_lr=False).returncode == 0
