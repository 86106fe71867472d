"""The training loop: its results, interruptions at any moment, and its messages. Where the process matters,
runs are real processes; the others run in this process (`train`)."""

import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pexpect
import pytest
import torch
from lm_pass import lm_pass
from torch.nn.functional import log_softmax

import tokenizer as tokenizers
from data import TokenBatches, TokenFile
from engine.checkpoint import build, load
from preparation.corpus import prepare

LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| ("
    r"Train \| Epoch-Step: \d+-\d+ \| Curriculum: \d+-\d+ \| Loss: \d+\.\d{6} \| LR: \d\.\d\de-\d\d"
    r" \| Grad-Norm: \d+\.\d{3} \| Time: \d+ ms \| Speed: \d+\.\d\d GFLOP/s \| Tokens/s: \d+ \| Remaining: .+"
    r"|Val \| Epoch-Step: \d+-\d+ \| Loss: \d+\.\d{6} \| Best: \d+\.\d{6}( \| BPB: \d+\.\d{4})?"
    r"|Save \| Epoch-Step: \d+-\d+ \| checkpoint/\w+\.pt)"
)


def losses(place):
    """{step: text of its loss}. A step that was trained twice must have the same loss both times."""
    found = {}
    for step, loss, rate in place.logged("Train", "Loss", "LR"):
        assert found.setdefault(step, (loss, rate)) == (loss, rate)
    return found


def settings_of(**settings):
    return [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]


# ---- the loss and the steps ----------------------------------------------------------------------------


def test_the_loss_of_sft_is_a_mean_over_the_words_of_answers(train):
    settings = dict(from_checkpoint="", gradient_accumulation_steps=3, block_size=12)
    done = train("sft", **settings, max_steps=1, decay_lr=False)
    [(_, logged)] = train.logged("Train", "Loss")
    assert "longer than block_size" in done.stdout

    model, tokenizer = build(load(train.checkpoints("sft")[1]), "a test's")
    torch.manual_seed(1337)
    model = type(model)(model.config).double()  # before the step
    path = train.root / "dataset" / "prepared" / "sft_train.bin"
    x, y, _ = map(torch.from_numpy, TokenBatches([TokenFile(path)], 12, 12, 1337)(0).values())
    chances = log_softmax(model(x), -1)
    means, total, count = [], 0.0, 0
    for row, (before, after) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        begin = before.index(tokenizer.response_id) if tokenizer.response_id in before else len(before)
        end = after.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in after else len(after)
        words = [-chances[row, place, after[place]].item() for place in range(begin, end)]
        total, count = total + sum(words), count + len(words)
        means.append(sum(words) / len(words))
    assert abs(float(logged) - total / count) < 2e-6
    assert abs(float(logged) - sum(means) / len(means)) > 1e-3  # as a mean of means would be


def test_a_few_conversations_can_be_learned_by_heart(train, tiny_data):
    tokenizer = tokenizers.CharTokenizer.train(["0123456789?=。"])
    lines = [json.dumps({"question": f"{i}?", "answer": f"{7 * i % 10}{3 * i % 10}"}) for i in range(5)]
    (train.root / "few.jsonl").write_text("\n".join(lines), "utf-8")
    out = train.root / "dataset" / "prepared"
    prepare({"sft": [train.root / "few.jsonl"]}, out, val_fraction=0.01, tokenizer=tokenizer)
    done = train("sft", from_checkpoint="", max_steps=150, log_interval=50)
    assert done.returncode == 0
    logged = train.logged("Train", "Loss")
    assert [step for step, _ in logged] == [50, 100, 150] and float(logged[-1][1]) < 0.01


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_accumulated_gradients_are_those_of_the_whole_batch(train, task):
    parts = [train(task, from_checkpoint="", batch_size=2, gradient_accumulation_steps=4, max_steps=4)]
    path = train.checkpoints(task)[4]
    model = load(path).model
    path.unlink()
    parts += [train(task, from_checkpoint="", batch_size=8, max_steps=4)]
    whole = load(train.checkpoints(task)[4]).model
    logged = [float(loss) for _, loss in train.logged("Train", "Loss")]
    assert [part.returncode for part in parts] == [0, 0] and len(logged) == 8
    assert logged[:4] == pytest.approx(logged[4:], abs=1e-5)
    for name, weights in model.items():
        torch.testing.assert_close(weights, whole[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_compiling_without_a_compiler(tiny_project):
    settings = settings_of(compile=True)
    cache = str(tiny_project.elsewhere / "cache")
    done = tiny_project.run("train.py", "-t", "pretrain", *settings, PATH="", TORCHINDUCTOR_CACHE_DIR=cache)
    assert done.returncode == 2
    why = r"error: torch\.compile failed: .*[Cc]ompiler.*; set compile to false\n"
    assert re.fullmatch(why, done.stderr), done.stderr
    assert not tiny_project.checkpoints() and not list(tiny_project.root.glob("train_*.log"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_step_computes_the_same_and_resumes(tiny_project, train):
    settings = dict(max_steps=8, save_interval=4, gradient_accumulation_steps=2, n_layer=2)
    assert train("pretrain", **settings).returncode == 0
    arguments = ["-t", "pretrain", *settings_of(**settings, compile=True)]
    done = [tiny_project.run("train.py", *arguments, timeout=400)]
    whole = load(tiny_project.checkpoints()[8])
    tiny_project.checkpoints()[8].unlink()
    done += [tiny_project.run("train.py", *arguments, "--resume", timeout=400)]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "Compiling the training step" in done[0].stdout and "4 steps in this session" in done[1].stdout
    assert train.same(load(tiny_project.checkpoints()[8]), whole) and losses(tiny_project)
    for step, (loss, _) in losses(train).items():
        assert float(losses(tiny_project)[step][0]) == pytest.approx(float(loss), abs=1e-5)
    eager = load(train.checkpoints()[8]).model
    for name, weights in whole.model.items():
        # AdamW makes a full step of up to 0.01 even for the smallest gradient, such as a rounding error.
        torch.testing.assert_close(weights, eager[name], atol=1e-3, rtol=0)


def test_a_curriculum_is_trained_in_order(train, tiny_data):
    second = train.root / "dataset" / "second"
    (train.root / "second.txt").write_text("<|eos|>".join(f"{i} + 0 = {i}。" * 9 for i in range(40)), "utf-8")
    prepare(
        {"pretrain": [train.root / "second.txt"]},
        second,
        tokenizer=tokenizers.load(tiny_data / "tokenizer.json"),
    )
    pairs = [[f"dataset/{name}/pretrain_{split}.bin" for split in ("train", "val")]
             for name in ("second", "prepared")]  # fmt: skip
    files = [TokenFile(train.root / pair[0]) for pair in pairs]
    counts = [TokenBatches([file], 32, 16).sequences_per_epoch for file in files]
    steps = sum(counts) // 16 + 2
    assert train("pretrain", dataset_path=pairs, batch_size=16, max_steps=steps).returncode == 0
    logged = [tuple(map(int, text.split("-"))) for _, text in train.logged("Train", "Curriculum")]
    places = [divmod(16 * step, sum(counts)) for step in range(steps)]
    assert logged == [(int(at >= counts[0]), at - counts[0] * (at >= counts[0])) for _, at in places]
    assert {stage for stage, _ in logged} == {0, 1} and places[-1][0] == 1
    assert [line["train_config"]["dataset_path"] for line in headers(train)] == [pairs]


def test_large_seeds_and_one_step(train):
    assert train("pretrain", random_seed=2**63 - 1, max_steps=1, warmup_iters=0).returncode == 0
    assert [loss for _, loss in train.logged("Train", "Loss")] != ["3.151924"]


# ---- interrupted at any instant --------------------------------------------------------------------------


def kill_and_resume(project, kills, steps, random):
    """Train, with `kills` times kill -9 at random moments; then let it finish."""
    args = ["-t", "pretrain", *settings_of(**settings_for(steps))]
    for number in range(kills):
        began = time.monotonic()
        process = subprocess.Popen(
            project.command("train.py", *args, *["--resume"] * (number > 0)),
            cwd=project.elsewhere,
            env=project.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        # Most moments are in training, a few before it: loading, building, resuming.
        lines = random.randrange(7, 7 + steps // (2 * kills))
        for line, _ in zip(process.stdout, range(lines), strict=False):
            assert " | " in line or time.monotonic() - began < 60
        time.sleep(random.random() * 0.02)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = project.run("train.py", *args, "--resume")
    assert done.returncode == 0 and f"Done: step {steps}" in done.stdout, done.stderr


def settings_for(steps):
    return dict(max_steps=steps, dropout=0.2, gradient_accumulation_steps=2, save_interval=7,
                eval_interval=10, keep_checkpoints=2, n_layer=2)  # fmt: skip


@pytest.mark.parametrize(
    ("kills", "steps"), [(2, 60), pytest.param(10, 400, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_a_run_killed_at_random_moments_ends_bit_for_bit_the_same(tiny_project, train, kills, steps):
    undisturbed = train("pretrain", **settings_for(steps))
    assert undisturbed.returncode == 0
    kill_and_resume(tiny_project, kills, steps, random.Random(1))
    one, two = (load(place.checkpoints()[steps]) for place in (train, tiny_project))
    assert one.best["loss"] is not None and train.same(one, two)
    assert losses(train) == losses(tiny_project) and len(losses(train)) == steps
    assert set(train.logged("Val", "Loss", "BPB")) == set(tiny_project.logged("Val", "Loss", "BPB"))
    assert not list((tiny_project.root / "checkpoint").glob("*.part"))
    # The two newest and the best are kept.
    assert len(tiny_project.checkpoints()) <= 3 and one.best["step"] in tiny_project.checkpoints()


# ---- signals -----------------------------------------------------------------------------------------------


def hangups(handler):
    """preexec_fn of a child: handle SIGHUP as in a terminal, or as under nohup."""
    return lambda: signal.signal(signal.SIGHUP, handler)


def start(project, *args, **settings):
    """A training process in the middle of its steps, which would take long to finish."""
    settings = {"max_steps": 10**6, **settings}
    process = subprocess.Popen(
        project.command("train.py", *args, *settings_of(**settings)),
        cwd=project.elsewhere,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hangups(signal.SIG_DFL),
    )
    for line in process.stdout:
        if " | Train | " in line:
            return process
    pytest.fail(process.stderr.read())


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_training_after_its_step(tiny_project, number):
    config = tiny_project.elsewhere / "my run.json"
    config.write_bytes((tiny_project.root / "config" / "config_pretrain.json").read_bytes())
    process = start(tiny_project, "-t", "pretrain", "-c", config.name, decay_lr=False)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    [(step, path)] = tiny_project.checkpoints().items()
    *_, saved, last = stdout.splitlines()
    assert re.search(rf" \| Save \| Epoch-Step: \d+-{step} \| checkpoint/{path.name}$", saved)
    stopped, command = last.split(" Resume with: ")
    assert stopped == f"Stopped after step {step}."
    assert list(losses(tiny_project)) == list(range(1, step + 1))

    # The printed command works; here with only a few more steps.
    python, script, *words = shlex.split(command)
    assert python == "python" and "--resume" in words
    resumed = tiny_project.run(tiny_project.elsewhere / script, *words, *settings_of(max_steps=step + 2))
    assert resumed.returncode == 0 and f"Done: step {step + 2}, 2 steps in this session." in resumed.stdout
    assert f"resuming from checkpoint/{path.name} at step {step}\n" in resumed.stderr
    assert f"changed since then: max_steps: 1000000 -> {step + 2}\n" in resumed.stderr


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, -signal.SIGTERM)],
)
def test_a_second_signal_ends_it_at_once(tiny_project, number, code):
    an_hour_long = settings_of(gradient_accumulation_steps=10**5)
    process = subprocess.Popen(
        tiny_project.command("train.py", "-t", "pretrain", *an_hour_long),
        cwd=tiny_project.elsewhere,
        env=tiny_project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not any(path.stat().st_size for path in tiny_project.root.glob("train_*.log")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    time.sleep(1)  # in the first step; before it, one signal is enough
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code and "Traceback" not in stderr
    assert not tiny_project.checkpoints()


@pytest.mark.parametrize(
    "handler", [signal.SIG_DFL, pytest.param(signal.SIG_IGN, marks=pytest.mark.slow)], ids=["", "nohup"]
)
def test_a_terminal_that_is_closed_breaks_nothing_off(tiny_project, handler):
    command, *args = tiny_project.command("train.py", "-t", "pretrain")
    args += settings_of(max_steps=10**6, decay_lr=False, log_interval=1)
    child = pexpect.spawn(
        command, args, cwd=str(tiny_project.elsewhere), env=tiny_project.environment, timeout=60,
        preexec_fn=hangups(handler),
    )  # fmt: skip
    child.expect("loss ")
    reached = len(losses(tiny_project))
    os.close(child.child_fd)
    if handler == signal.SIG_IGN:  # it continues, with only its log file
        until = time.monotonic() + 30
        while len(losses(tiny_project)) < reached + 50:
            assert time.monotonic() < until and child.isalive()
            time.sleep(0.1)
        child.kill(signal.SIGTERM)
    child.wait()
    assert child.exitstatus == 0
    [(step, path)] = tiny_project.checkpoints().items()
    assert load(path).step == step == len(losses(tiny_project))


def test_a_reader_that_leaves_ends_training_after_its_step(tiny_project):
    """As in `train.py | head`, or if Ctrl-C ends `tee` first."""
    process = start(tiny_project, "-t", "pretrain", decay_lr=False)
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(30) == 0
    [(step, path)] = tiny_project.checkpoints().items()
    assert load(path).step == step == len(losses(tiny_project))
    assert f" | Save | Epoch-Step: 0-{step} | " in re.sub(r"Epoch-Step: \d+-", "Epoch-Step: 0-", stderr)
    assert f"Stopped after step {step}. Resume with: python " in stderr and "Traceback" not in stderr


def test_output_that_is_closed_from_the_start(tiny_project):
    command = shlex.join(tiny_project.command("train.py", "-t", "pretrain"))
    done = subprocess.run(["sh", "-c", f"{command} >&- 2>&-"], cwd=tiny_project.elsewhere)
    assert done.returncode == 0 and len(losses(tiny_project)) == 6


# ---- divergence --------------------------------------------------------------------------------------------


DIVERGING = dict(learning_rate=10, weight_decay=10, decay_lr=False, grad_clip=0, max_steps=100)


def test_training_stops_where_the_loss_is_no_number(train):
    done = train("pretrain", **DIVERGING, save_interval=1, keep_checkpoints=0)
    assert done.returncode == 2 and "Loss: nan" not in done.stdout
    step, good = re.fullmatch(
        r"error: step (\d+): loss \S+, gradient norm \S+; training stopped and nothing was overwritten\."
        r" The last good checkpoint is checkpoint/(\S+): use --resume with a lower learning_rate, .*\n",
        done.stderr,
    ).groups()
    last = len(losses(train))
    assert int(step) == last + 1 == len(train.checkpoints()) + 1
    # The newest has the weights that made the loss NaN; the one before it does not.
    assert good == train.checkpoints()[last - 1].name
    again = train("pretrain", "--resume", **DIVERGING)
    assert again.returncode == 2 and f"step {step}: loss" in again.stderr and good in again.stderr
    assert len(train.checkpoints()) == last
    # Its advice works.
    lower = {**DIVERGING, "learning_rate": 1e-5, "min_lr": 1e-6, "weight_decay": 0, "max_steps": last + 3}
    done = train("pretrain", "--resume", f"checkpoint/{good}", **lower)
    assert done.returncode == 0 and f"Done: step {last + 3}" in done.stdout


def test_a_validation_loss_that_is_no_number_is_never_the_best(train):
    assert train("pretrain", max_steps=4, tie_embeddings=False).returncode == 0
    good = train.checkpoints()[4]
    content = good.read_bytes()
    # A token that occurs only in the validation text makes the model fail.
    checkpoint = load(good)
    tokenizer = tokenizers.from_dict(checkpoint.tokenizer)
    checkpoint.model["wte.weight"][tokenizer.encode("?")] = math.inf
    checkpoint.step = 5
    checkpoint.save()
    (train.root / "odd.txt").write_text("1 + 1 = ?" * 20, "utf-8")
    prepare({"pretrain": [train.root / "odd.txt"]}, train.root / "odd", tokenizer=tokenizer)
    paths = [["dataset/prepared/pretrain_train.bin", "odd/pretrain_val.bin"]]
    done = train("pretrain", "--resume", max_steps=8, eval_interval=2, save_interval=3, dataset_path=paths)
    assert done.returncode == 2
    assert re.search(r"\nerror: after step 6: validation loss (nan|inf); training stopped", done.stderr)
    assert (
        f" The last good checkpoint is checkpoint/{train.checkpoints()[5].name}: use --resume" in done.stderr
    )
    assert list(train.checkpoints()) == [4, 5] and good.read_bytes() == content


# ---- what is told ------------------------------------------------------------------------------------------


def headers(place):
    """The first lines of all logs, parsed."""
    lines = [path.read_text("utf-8").splitlines()[0] for path in sorted(place.root.glob("train_*.log"))]
    assert all(line.startswith("# {") for line in lines)
    return [json.loads(line[2:]) for line in lines]


def test_the_log_and_plain_output(train):
    done = train("pretrain", max_steps=5, log_interval=2, eval_interval=2)
    assert (done.returncode, done.stderr) == (0, "")
    [path] = train.root.glob("train_*.log")
    [header] = headers(train)
    assert (header["format"], header["task"], header["resumed_from_step"]) == ("nano-log", "pretrain", 0)
    assert header["train_config"]["max_steps"] == 5 and header["model_config"]["vocab_size"] > 7
    assert header["machine"]["device"] == "cpu" and header["n_params"] > 10_000
    lines = path.read_text("utf-8").splitlines()[1:]
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert [line for line in done.stdout.splitlines() if " | " in line] == lines
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    assert [step for step, _ in train.logged("Train", "Loss")] == [2, 4, 5]
    assert [step for step, _ in train.logged("Val", "Loss")] == [2, 4, 5]
    *_, done_line, chart = done.stdout.splitlines()
    assert done_line == "Done: step 5, 5 steps in this session."
    assert chart == f"Loss chart: python plot_loss.py -n {path.name}"
    # Bits per byte: the loss in nats per token, in bits, times tokens per byte of text.
    meta = TokenFile(train.root / "dataset" / "prepared" / "pretrain_val.bin").meta
    for _, loss, bits in train.logged("Val", "Loss", "BPB"):
        expected = float(loss) / math.log(2) * meta["n_tokens"] / meta["n_bytes"]
        assert float(bits) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("colour", [{}, pytest.param({"NO_COLOR": "1"}, marks=pytest.mark.slow)])
def test_one_line_moves_in_a_terminal(tiny_project, colour):
    command, *args = tiny_project.command("train.py", "-t", "pretrain", "--set", "max_steps=30")
    environment = {**tiny_project.environment, **colour, "TERM": "xterm-256color"}
    if not colour:
        environment.pop("NO_COLOR", None)
    child = pexpect.spawn(
        command, args, cwd=str(tiny_project.elsewhere), env=environment, dimensions=(24, 120), timeout=60
    )
    child.expect(pexpect.EOF)
    child.close()
    text = child.before.decode()
    assert child.exitstatus == 0 and " | Train | " not in text
    assert "\x1b[2K" in text and re.search(r"30/30.*loss \d.*lr .*speed .*tokens/s \d+.*remaining 0 s", text)
    assert " | Val | " in text and " | Save | " in text and "Done: step 30" in text
    assert bool(re.search(r"\x1b\[[\d;]*3[\d;]*m", text)) is not bool(colour)
    assert len(losses(tiny_project)) == 30  # all of them are in the log


# ---- what a model gives to watch -------------------------------------------------------------------------


def test_metrics_of_a_model_land_in_the_log_the_chart_and_tensorboard(train, monkeypatch):
    """One mean over the passes of a step, with one curve per name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from common.log_reader import Log
    from model import GPT

    passes = itertools.count(1)

    def auxiliary_loss(self, x, targets, mask):
        load = torch.tensor(float(next(passes)))
        return None, {"expert_load/2": load, "mtp_loss": load.exp()}

    monkeypatch.setattr(GPT, "auxiliary_loss", auxiliary_loss)
    assert train("pretrain", max_steps=3, gradient_accumulation_steps=2, tensorboard=True).returncode == 0
    assert train.logged("Train", "expert_load/2") == [(1, "1.5"), (2, "3.5"), (3, "5.5")]
    [path] = train.root.glob("train_*.log")
    (log := Log(path)).read()
    watched = log.run.model_metrics
    assert watched["expert_load"] == {2: [(1, 1.5), (2, 3.5), (3, 5.5)]}
    assert watched["mtp_loss"][None][0] == (1, pytest.approx((math.e + math.e**2) / 2, rel=1e-3))

    events = EventAccumulator(str(train.root / "runs" / path.stem)).Reload()
    logged = dict(train.logged("Train", "Loss"))
    scalars = {event.step: event.value for event in events.Scalars("Train/Loss")}
    assert scalars == {step: pytest.approx(float(loss)) for step, loss in logged.items()}
    assert [event.value for event in events.Scalars("Train/expert_load/2")] == [1.5, 3.5, 5.5]
    assert {"Train/LR", "Train/Speed", "Train/Time", "Val/Loss", "Val/BPB"} <= {*events.Tags()["scalars"]}
    assert "Train/Remaining" not in events.Tags()["scalars"]


def test_tensorboard_that_is_missing_is_named(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    done = train("pretrain", tensorboard=True)
    told = 'tensorboard is not installed: python -m pip install "tensorboard>=2.15", or set the key '
    assert done.returncode == 2 and told in done.stderr
    assert train("pretrain").returncode == 0 and not (train.root / "runs").exists()


# ---- several validation files, and conversations that are cut ----------------------------------------------


def test_every_validation_file_counts_by_its_size(train, tiny_data):
    """One file can be memorized, the other is noise: both show in the result."""
    tokenizer = tokenizers.load(tiny_data / "tokenizer.json")
    dice = random.Random(1)
    texts = {"easy": ["1 + 1 = 2。" * 4] * 40, "hard": []}
    texts["hard"] = ["".join(dice.choices("0123456789", k=40)) for _ in range(120)]
    pairs, files = [], []
    for name, lines in texts.items():
        (train.root / f"{name}.txt").write_text("<|eos|>".join(lines), "utf-8")
        prepare(
            {"pretrain": [train.root / f"{name}.txt"]},
            train.root / name,
            val_fraction=0.3,
            tokenizer=tokenizer,
        )
        pairs.append([f"{name}/pretrain_{split}.bin" for split in ("train", "val")])
        files.append(TokenFile(train.root / pairs[-1][1]))
    settings = dict(dataset_path=pairs, max_steps=60, eval_interval=20, batch_size=2, eval_iters=12)
    assert train("pretrain", **settings).returncode == 0
    *_, (step, *logged) = train.logged("Val", "Loss", "Best", "Loss/0", "Loss/1", "BPB")
    whole, best, easy, hard, bits = map(float, logged)
    sizes = [file.meta["n_tokens"] for file in files]
    assert step == 60 and abs(easy - hard) > 0.3
    assert whole == pytest.approx((easy * sizes[0] + hard * sizes[1]) / sum(sizes), abs=2e-6)
    tokens_per_byte = sum(sizes) / sum(file.meta["n_bytes"] for file in files)
    assert bits == pytest.approx(whole / math.log(2) * tokens_per_byte, abs=1e-4)
    checkpoint = load(train.checkpoints()[60])
    assert checkpoint.validation["loss"] == pytest.approx(whole, abs=1e-6) and best <= whole
    # The expected batches: the first sequences of each file, at least one batch, more of the larger file.
    model, _ = build(checkpoint, "a test's")
    counts = [TokenBatches([file], 32, 2).sequences_per_epoch for file in files]
    for file, loss, count in zip(files, (easy, hard), counts, strict=True):
        batches, total, weight = TokenBatches([file], 32, 2, 1337), 0.0, 0
        n = min(max(1, round(12 * count / sum(counts))), -(-count // 2))
        for first in range(0, 2 * n, 2):
            x, y, mask = map(torch.from_numpy, batches(first).values())
            total += float(lm_pass(model, x, y, mask, divisor=1)[1])
            weight += float(mask.sum())
        assert loss == pytest.approx(total / weight, abs=1e-5) and n > 1


def write_chats(train, name, n_long, n_short, tokenizer):
    """Chats with questions of 80 and of 5 characters, and answers of two."""
    questions = ["1" * 80] * n_long + ["1" * 5] * n_short
    chats = [{"question": question, "answer": f"{i % 10}。"} for i, question in enumerate(questions)]
    (train.root / f"{name}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")
    prepare({"sft": [train.root / f"{name}.jsonl"]}, train.root / name, val_fraction=0.2, tokenizer=tokenizer)
    return [f"{name}/sft_{split}.bin" for split in ("train", "val")]


def test_conversations_cut_before_their_answers_are_left_out(train, tiny_data):
    """So no step divides by zero tokens, and these conversations do not count."""
    tokenizer = tokenizers.load(tiny_data / "tokenizer.json")
    settings = dict(from_checkpoint="", max_steps=20, eval_interval=10)
    mixed = write_chats(train, "mixed", 30, 30, tokenizer)
    done = train("sft", dataset_path=[mixed], **settings)
    assert done.returncode == 0
    n_cut = [int((TokenFile(train.root / path).min_block_sizes > 32).sum()) for path in mixed]
    assert sum(n_cut) == 30 and min(n_cut) > 0
    for what, count in zip(("data", "validation"), n_cut, strict=True):
        told = f"{what} {count} conversations are left out: block_size ends before their answer\n"
        assert told in done.stdout
    assert all(float(loss) > 0 for _, loss in train.logged("Train", "Loss")) and len(losses(train)) == 20

    long = write_chats(train, "long", 30, 0, tokenizer)
    for data in ([mixed[0], long[1]], [long[0], mixed[1]]):
        done = train("sft", dataset_path=[data], **settings)
        [path] = [path for path in data if path in long]
        assert done.returncode == 2 and done.stderr.endswith(
            f"{path}: block_size=32 cuts every conversation before its answer; "
            "the first answer needs a model whose block_size is 82 or more\n"
        )
    assert train("sft", dataset_path=[long], **settings, block_size=82).returncode == 0
    assert train("sft", dataset_path=[long], **settings, block_size=81).returncode == 2
