"""The benchmarks against peers: what they can be held to without a peer and in little time."""

import contextlib
import io
import json
import math
import multiprocessing
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark import ablation, calculator_plateau, recipe_race, train_speed
from config.schema import ModelConfig
from data import TokenFile
from model import GPT

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPE = ModelConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
SCRIPTS = ("train_speed.py", "recipe_race.py")


def benchmark(script, *arguments):
    command = [sys.executable, str(ROOT / "benchmark" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def printed_by(module, *arguments):
    """What a benchmark's command line prints, called in this process, where it can be made small."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        module.main()
    return output.getvalue()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_examples(script):
    process = benchmark(script, "--help")
    assert process.returncode == 0 and f"python benchmark/{script} --nanogpt nanoGPT" in process.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_is_no_clone_is_named(script, tmp_path):
    arguments = ("--text", __file__) if script == "recipe_race.py" else ()
    process = benchmark(script, "--nanogpt", tmp_path, *arguments)
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: {tmp_path} holds no model.py")
    assert process.stderr.count("\n") == 1


def test_every_model_is_counted_by_the_formula_of_ours():
    for shape in (*train_speed.MODELS.values(), SHAPE):
        model = GPT(shape)
        assert train_speed.flops_per_token(model, shape) == model.flops_per_token()


def measure(implementation):
    train_speed.MATRIX_SIZES = (256, 512)  # the usual ones take seconds
    return train_speed.measure(implementation, SHAPE, 2, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "has_own_process"),
    [("Nano", True), ("Llama", False), pytest.param("Llama", True, marks=pytest.mark.slow)],
)
def test_a_measurement(implementation, has_own_process, monkeypatch):
    monkeypatch.setattr(train_speed, "MATRIX_SIZES", None)  # undone at the end
    if has_own_process:
        result = train_speed.in_fresh_process(measure, implementation)
    else:
        result = measure(implementation)
    model = GPT(SHAPE.model_copy(update={"qk_norm": implementation == "Nano"}))  # which Llama has not
    assert result["params"] == model.n_params
    assert result["GFLOP/s"] * 1e9 == pytest.approx(result["tokens/s"] * model.flops_per_token())
    assert result["share"] == pytest.approx(result["GFLOP/s"] / result["matmul"])
    assert 0 < result["share"] < 1


def test_both_trainers_get_the_same_text_and_split(tmp_path):
    text = "一二三 <|eos|> four five\n" * 100
    ids = recipe_race.prepare(text, tmp_path)
    cut = int(len(text) * 0.9)
    letters = sorted(set(text))
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        theirs = np.fromfile(tmp_path / f"{name}.bin", np.uint16)
        assert "".join(letters[i] for i in theirs) == part
        ours = TokenFile(tmp_path / f"pretrain_{name}.bin").tokens
        assert (ours[1:-1] - ours[1:-1].min() == theirs - theirs.min()).all()
        assert len(ours) == len(part) + 2
    assert len(ids["Nano"]) == len(text) - cut
    assert (ids["nanoGPT"].numpy() == theirs).all()


def test_the_validation_loss_is_over_every_token_once():
    torch.manual_seed(0)
    shape = SHAPE.model_copy(update={"block_size": recipe_race.BLOCK})
    model, ids = GPT(shape), torch.randint(50, (recipe_race.BLOCK * 70 + 10,))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, recipe_race.BLOCK):
            x = ids[start : start + recipe_race.BLOCK + 1]
            losses = model(x[None, :-1]).log_softmax(-1)[0].gather(-1, x[1:, None])
            total -= losses.sum().item()
    assert recipe_race.validation_loss(model, ids) == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert recipe_race.validation_loss(model, ids[: recipe_race.BLOCK * 2 + 1]) < 2 * math.log(50)


@pytest.mark.slow
def test_our_side_of_the_race_trains_in_a_copy(tmp_path):
    ids = recipe_race.prepare("a small text to learn by heart\n" * 100, tmp_path)
    model, seconds = recipe_race.train_nano(2, tmp_path)
    assert recipe_race.validation_loss(model, ids["Nano"]) < math.log(model.config.vocab_size)
    assert seconds > 0 and len(list(tmp_path.glob("*/train_*.log"))) == 1


def test_our_model_is_no_larger_than_nanogpts():
    c, hidden = recipe_race.NANOGPT, 4 * 128
    for vocab_size in (65, 2113):
        block = 4 * c["n_embd"] ** 2 + 2 * hidden * c["n_embd"] + 2 * c["n_embd"]
        theirs = vocab_size * c["n_embd"] + c["n_layer"] * block + c["n_embd"]
        assert GPT(ModelConfig(vocab_size=vocab_size + 7, **recipe_race.OUR_MODEL)).n_params <= theirs


def test_the_verdict_is_of_all_rounds_and_checks_the_loss():
    runs = {
        "Nano": [(1, 700, 1.8, 30.0), (1, 700, 1.8, 40.0), (1, 700, 1.8, 35.0)],
        "nanoGPT": [(1, 2000, 1.9, 100.0)] * 3,
    }
    assert recipe_race.verdict(runs).endswith("nanoGPT's time: 0.35 (0.30–0.40).")
    assert "35.0 (30.0–40.0)" in as_text(recipe_race.result_table("", runs))
    runs["Nano"][2] = (1, 700, 1.95, 40.0)
    assert "0.0500" in recipe_race.verdict(runs)


def as_text(table):
    from rich.console import Console

    with io.StringIO() as file:
        Console(file=file, width=100).print(table)
        return file.getvalue()


def test_the_table_of_speeds_has_the_spread_and_says_who_is_level():
    def rounds(*shares):
        return [{"params": 5, "ms/step": 100 / share, "tokens/s": 1e3 * share, "GFLOP/s": 100 * share,
                 "matmul": 100.0, "share": share, "of fastest": share / 2} for share in shares]  # fmt: skip

    found = {"Nano": rounds(0.8, 0.9, 0.7), "nanoGPT": rounds(0.7, 0.91, 0.7)}
    found["Llama"] = rounds(0.4, 0.5, 0.35)
    table = as_text(train_speed.comparison("", found))
    assert re.search(r"share +│ 80% \(70%–90%\) +│ 70% \(70%–91%\) +│ 40%", table)
    assert re.search(r"params +│ 5 ", table) and "125.0 (111.1–142.9)" in table
    assert re.search(r"share, Nano / this +│ +│ level \(0.99–1.14\) +│ 2.00 \(1.80–2.00\)", table)


def test_ablation_measures_with_and_without(monkeypatch):
    # Copies of this process have torch already; new ones would be loading it for ten seconds.
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(ablation.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(ablation, "TURN", 0.1)
    measured = ablation.compare(0.1, ablation.LEFT_OUT["both kernels"], SHAPE, 2, False)
    assert len(measured) == 2 and all(time > 0 and faults >= 0 for time, faults in measured)
    assert benchmark("ablation.py", "--seconds", "0").returncode == 2


def test_what_can_be_right_about_an_expression_whose_lower_levels_are_guessed():
    known = calculator_plateau.right_if_guessed_below
    assert [known("(*(+01)1)", levels) for levels in (0, 1, 2)] == [0.5, 0.5, 1.0]
    assert known("(*(+01)0)", 1) == known("1", 0) == 1.0  # whatever the rest is
    assert known("(*(+01)(+00))", 1) == 0.75


def test_the_lowest_loss_over_text_that_is_random_itself():
    chance, problem = random.Random(1), calculator_plateau.Original()

    def nats(question):
        """-log of the probability of all but the first token, from how `Original` draws."""
        total, depth = 0.0, 0
        for i, token in enumerate(question):
            depth -= token == ")"
            if token in "01" and i > 0:
                total += math.log(2) - (math.log(0.2) if depth < problem.depth else 0)
            elif token in "+*":
                total += math.log(2)
            elif token == "(":
                total -= math.log(0.8) * (i > 0)
                depth += 1
        return total

    mean = np.mean([nats(problem.draw(chance)) for _ in range(20_000)]) / 64
    assert abs(mean - calculator_plateau.entropy_per_position()) < 0.003


@pytest.mark.slow
def test_the_limits_of_toy_problems_are_measured_and_drawn(small_problems):
    project = small_problems
    done = project.run("benchmark/toy_limits.py", "sort", "--sizes", 0, "-o", project.root / "limits.png")
    assert done.returncode == 2 and "--digits must be" in done.stderr
    table = project.root / "checkpoint" / "results.jsonl"
    for sizes, n_known in (((2,), 0), ((2, 3), 2)):  # what is in the table is not trained again
        arguments = ("sort", "--sizes", *sizes, "--steps", 2, "-o", project.root / "limits.png")
        done = project.run("benchmark/toy_limits.py", *arguments)
        assert done.returncode == 0 and done.stdout.count("already in") == n_known, done.stderr
        assert n_known or "base rate" in done.stdout
        assert (project.root / "limits.png").read_bytes().startswith(b"\x89PNG")
        line, *others = table.read_text("utf-8").splitlines()
        assert len(others) == len(sizes) - 1
        if not others:  # one of another size, without the seconds that training takes
            (project.root / "limits.png").unlink()
            other = json.loads(line) | {"sizes": {"digits": 3}}
            table.write_text(line + "\n" + json.dumps(other) + "\n", "utf-8")


def test_why_a_calculator_stops_is_told_by_a_table_and_a_chart(tmp_path, monkeypatch):
    small = {"n_layer": 1, "n_head": 2, "n_embd": 16}
    monkeypatch.setattr(calculator_plateau.Calculator, "model", lambda self: small)
    monkeypatch.setattr(calculator_plateau, "BATCH_SIZE", 10)
    monkeypatch.setattr(calculator_plateau, "N_TEST", 50)
    printed = printed_by(calculator_plateau, "--steps", 1, "-o", tmp_path / "chart.png")
    assert all(name in printed for name in calculator_plateau.VARIANTS)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_why_a_calculator_stops_in_its_own_sizes(tmp_path):
    process = benchmark("calculator_plateau.py", "--steps", 1, "-o", tmp_path / "chart.png")
    assert process.returncode == 0, process.stderr
    assert all(name in process.stdout for name in calculator_plateau.VARIANTS)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_result_holds_for_all_ways_to_train(tiny_project):
    chart = tiny_project.root / "curves.png"
    done = tiny_project.run("benchmark/one_result.py", "-o", chart, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"│ +(DDP|ZeRO-\d|ZeRO-3, offload) │ +(\S+) │ +(\S+) │", done.stdout)
    assert len(rows) == 5
    for way, *differences in rows:
        assert all(float(difference) <= (1e-5 if way == "DDP" else 1e-4) for difference in differences), way
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_memory_of_zero_follows_its_formula(tiny_project):
    done = tiny_project.run("benchmark/spread_cost.py", "memory", timeout=300, COLUMNS="120")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"│ +(DDP|ZeRO-\d) │ .* │ +(\S+) │ +(\S+) │ +(\S+) │", done.stdout)
    found = {way: (float(formula), float(backward)) for way, formula, backward, _ in rows}
    assert len(found) == 4
    for way in ("DDP", "ZeRO-2", "ZeRO-3"):
        assert found[way][1] == pytest.approx(found[way][0], abs=0.3)
    assert found["ZeRO-1"][1] <= found["ZeRO-1"][0]  # DeepSpeed frees what the formula counts


@pytest.mark.slow
def test_time_and_link_are_measured(tiny_project):
    done = tiny_project.run("benchmark/spread_cost.py", "time", "--rounds", 1, "--steps", 2, timeout=600)
    assert done.returncode == 0 and done.stdout.count("21 M") == 2, done.stderr
