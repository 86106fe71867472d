"""evaluate.py through its command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_models import TEXT, checkpoint, polite, small_model

import engine.checkpoint
import evaluate
from evaluation import runner
from tasks import problems
from tokenizer import CharTokenizer

QUESTIONS = [
    {"question": "你" * n, "answer": "好吗" if n % 4 else "好", "kind": f"kind {n % 2}"} for n in range(1, 51)
]


@pytest.fixture
def score(command, tmp_path, monkeypatch):
    """score("--tasks", ...): evaluate.py in this process, with a model that always answers 好吗."""
    state = polite(CharTokenizer.train([TEXT]))
    path = state.save()
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), "utf-8")
    monkeypatch.setenv("COLUMNS", "120")

    def score(*args, **options):
        return command(*args, main=evaluate.main, **options)

    score.path, score.state = path, state
    return score


def results(folder):
    return sorted((folder / "检查 point" / "evaluation").iterdir())


# ---- scores ------------------------------------------------------------------------------------------------


def test_a_table_of_scores(score, tmp_path):
    done = score("--tasks", "my.jsonl")
    assert (done.returncode, done.stderr) == (0, "(my.jsonl: 50 conversations of question and answer)\n")
    assert "sft step 7" in done.stdout and "asked in its chat template" in done.stdout
    assert re.search(r"my\.jsonl +│ +exact +│ +76\.0 % ± 6\.1 +│ +76\.0 % +│ +50 │", done.stdout)
    assert re.search(r"kind 0 .* 52\.0 % ± 10\.2 ", done.stdout) and re.search(
        r"kind 1 .* 100\.0 % ± 0\.0 ", done.stdout
    )
    assert done.stdout.count("✓") + done.stdout.count("✗") == 10 and "not: 好" in done.stdout
    (file,) = results(tmp_path)
    assert len(file.read_text("utf-8").splitlines()) == 52


def test_metrics_and_several_tasks(score):
    done = score(
        "--tasks",
        "my.jsonl",
        "arithmetic:digits=3,steps=false,my.jsonl",
        "--metric",
        "contains",
        "--limit",
        "30",
    )
    assert done.returncode == 0
    assert re.search(r"my\.jsonl +│ +contains +│ +100\.0 % ± 0\.0 .* 30 of 50 │", done.stdout)
    assert re.search(r"arithmetic:digits=3 +│ +contains .* 30 drawn │", done.stdout)
    assert "characters that are unknown to this model" in done.stderr
    done = score("--tasks", "my.jsonl", "--metric", "perplexity")
    assert "bits per byte" in done.stdout and "✓" not in done.stdout


def test_nanos_own_tasks(score):
    done = score("--limit", "3")
    assert done.returncode == 0, done.stderr
    assert all(
        name in done.stdout + done.stderr for name in ("arithmetic", "copying", "recall", "spelling", "world")
    )
    assert "left out: recall" in done.stderr and "sort" not in done.stdout


def test_a_model_that_continues_texts(score):
    state = polite(CharTokenizer.train([TEXT]), stage="pretrain", chat_template=None, run="20260103_000000")
    done = score("--tasks", "my.jsonl", "-m", state.save())
    assert done.returncode == 0 and "it has no chat template" in done.stdout


@pytest.mark.parametrize("name", ["sort", "q"])
def test_a_toy_problem_is_its_own_task(score, name):
    problem = problems.make(name, {"digits": 3})
    tokenizer = problem.tokenizer()
    model = small_model(tokenizer, block_size=problem.block_size, is_causal=problem.is_causal)
    state = checkpoint(tokenizer, model.config, model, stage=name, chat_template=None, problem=problem.sizes,
                       run="20260104_000000")  # fmt: skip
    path = state.save()
    done = score("-m", path)
    assert done.returncode == 0, done.stderr
    assert f"{name}:digits=3" in done.stdout and "asked as in its training" in done.stdout
    assert score("-m", path, "--tasks", f"{name}:digits=3", "--resume").returncode == 0
    for tasks in f"{name}:digits=4", "arithmetic":
        done = score("-m", path, "--tasks", tasks)
        assert (done.returncode, done.stdout) == (2, "") and f"has learned {name}:digits=3" in done.stderr
    done = score("--compare", path, score.path)
    assert done.returncode == 2 and "have no task in common" in done.stderr
    done = score("-m", path, "--tasks", f"{name}:digits=3", "--metric", "perplexity")
    assert done.returncode == 2 and "its metric is exact" in done.stderr


# ---- side by side ----------------------------------------------------------------------------------------


def test_models_side_by_side(score, tmp_path):
    worse = polite(CharTokenizer.train([TEXT]), run="20260105_000000")
    tokenizer = CharTokenizer.train([TEXT])
    hao, ma = tokenizer.encode("好吗").tolist()
    worse.model["lm_head.weight"][ma, hao] = 0  # so it says just 好
    worse.model["lm_head.weight"][tokenizer.eos_id, hao] = 100
    other = worse.save()
    done = score("--compare", score.path, other, score.path, "--tasks", "my.jsonl")
    assert (done.returncode, done.stderr) == (0, "(my.jsonl: 50 conversations of question and answer)\n")
    assert re.search(r"│ a +│ +76\.0 % │ +\[6\d\.\d, 8\d\.\d\]", done.stdout)
    assert re.search(r"│ b +│ +24\.0 % ", done.stdout)
    assert re.search(r"│ b - a +│ +-52\.0 % │ +\[-7\d\.\d, -2\d\.\d\] .* a is better", done.stdout)
    assert re.search(r"│ c - a +│ +\+0\.0 % │ +\[0\.0, 0\.0\] .* level", done.stdout)
    assert len(results(tmp_path)) == 2
    before = [path.stat().st_mtime_ns for path in results(tmp_path)]
    again = score("--compare", score.path, other, score.path, "--tasks", "my.jsonl")
    assert again.stdout == done.stdout
    assert before == [path.stat().st_mtime_ns for path in results(tmp_path)]
    done = score("--compare", score.path, other, "--tasks", "my.jsonl", "--metric", "perplexity")
    assert "bits per byte" in done.stdout


# ---- stopped ---------------------------------------------------------------------------------------------


def test_ctrl_c_shows_what_was_scored_and_resume_goes_on(score, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GROUP", 8)
    args = "--tasks", "my.jsonl,arithmetic", "--limit", "39"
    whole = score(*args)
    files = {path.name: path.read_text("utf-8") for path in results(tmp_path)}
    for path in results(tmp_path):
        path.unlink()
    usual, calls = runner.answer_greedily, []

    def stops(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return usual(*args, **options)

    monkeypatch.setattr(runner, "answer_greedily", stops)
    done = score(*args)
    assert done.returncode == 130 and "--resume goes on" in done.stderr
    assert re.search(r"my\.jsonl .* 24 of 50 │", done.stdout) and "arithmetic" not in done.stdout
    done = score(*args, "--resume")
    assert done.returncode == 0
    scores = re.compile(r"[0-9.]+ % ± [0-9.]+")
    assert scores.findall(done.stdout) == scores.findall(whole.stdout)
    times = re.compile(r'"(time|seconds)": [^,}]*')
    assert files.keys() == {path.name for path in results(tmp_path)}
    for path in results(tmp_path):
        assert times.sub("", path.read_text("utf-8")) == times.sub("", files[path.name])


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        pytest.param(["--tasks", "arithmetik"], "did you mean arithmetic", marks=pytest.mark.slow),
        (["--tasks", "arithmetic:digit=2"], "has no option digit"),
        (["--tasks", " ,"], "--tasks names no task"),
        (["--tasks", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--tasks", "empty.jsonl"], "empty.jsonl"),
        (["--tasks", "broken.jsonl"], "broken.jsonl, line 2"),
        (["--tasks", "sort", "--metric", "numeric"], "sort scores its answers itself"),
        (["--tasks", "my.jsonl", "--metric", "choice"], "choice"),
        (["--tasks", "my.jsonl", "--metric", "best"], "invalid choice"),
        (["--tasks", "my.jsonl", "--metric", "numeric"], "holds no number"),
        (["--metric", "exact"], "--metric needs --tasks"),
        (["--limit", "0"], "--limit must be 1 or more, not 0"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--device", "tpu"], "--device must be auto, cpu"),
        (["-m", "nowhere.pt"], "there is no file nowhere.pt"),
        (["--compare", "my.jsonl"], "--compare needs two models"),
        (["--compare", "my.jsonl", "nowhere.pt"], "there is no file nowhere.pt"),
        (["--compare", "a", "b", "-m", "c"], "not allowed with"),
        (
            ["--tasks", "recall:length=800", "--limit", "9"],
            "do not fit in the context of 64 tokens; lower length",
        ),
        (["--tasks", "long.jsonl"], 'long.jsonl: "why" has an answer of 100 tokens'),
    ],
)
def test_wrong_input_is_one_sentence(score, args, sentence, tmp_path):
    good = '{"question": "a", "answer": "b"}\n'
    for name, text in (
        ("empty.jsonl", ""),
        ("broken.jsonl", good + "{"),
        ("long.jsonl", json.dumps({"question": "why", "answer": "a" * 100})),
    ):
        (tmp_path / name).write_text(text, "utf-8")
    done = score(*args)
    assert done.returncode == 2 and sentence in done.stderr.replace("\n", " "), done.stderr
    assert not (tmp_path / "检查 point" / "evaluation").exists()


def test_weights_that_are_no_numbers_are_refused(score):
    score.state.model["wte.weight"][0, 0] = torch.nan
    score.state.run = "20260109_000000"
    done = score("--tasks", "my.jsonl", "-m", score.state.save())
    assert done.returncode == 2 and "not finite" in done.stderr


def test_help_does_not_wait_for_torch(shared_project):
    code = (
        "import sys, runpy; sys.argv = ['evaluate.py', '--help']\n"
        f"try: runpy.run_path({str(shared_project.root / 'evaluate.py')!r}, run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=shared_project.root
    )
    assert done.stdout.endswith("False\n") and "--compare" in done.stdout


def test_the_script_itself(shared_project, monkeypatch):
    """From elsewhere, in a folder with a space and Chinese in its name."""
    monkeypatch.setattr(engine.checkpoint, "FOLDER", shared_project.root / "checkpoint")
    path = polite(CharTokenizer.train([TEXT])).save()
    questions = shared_project.elsewhere / "我的 q,1.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), "utf-8")
    done = shared_project.run("evaluate.py", "--tasks", questions.name, "-m", path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "76.0 %" in done.stdout and "好吗" in done.stdout and "Traceback" not in done.stderr
    (file,) = (shared_project.root / "checkpoint" / "evaluation").iterdir()
    assert file.name.startswith("sft_20260102_030405_step_7_") and file.suffix == ".jsonl"


# ---- public benchmarks -------------------------------------------------------------------------------------

HARNESS_TASKS = Path(__file__).parent / "evaluation" / "harness_tasks"


def test_public_benchmarks_join_the_table_and_the_results(score, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    own = ("--include_path", HARNESS_TASKS, "--limit", 8)
    done = score("--tasks", "my.jsonl,made_up", *own)
    assert done.returncode == 0, done.stderr
    assert re.search(r"my\.jsonl +│ +exact ", done.stdout)
    row = re.search(r"made_up +│ +acc +│ +(\d.*?) +│ +25\.0 % +│ +16 of 28 ", done.stdout)
    assert row and re.search(r"made_up_letters .* 8 ", done.stdout)
    assert len(results(tmp_path)) == 2

    def never(*args, **options):
        raise AssertionError("was run again")

    monkeypatch.setattr("evaluation.harness.run", never)
    again = score("--tasks", "my.jsonl,made_up", *own, "--resume")
    assert again.returncode == 0 and row[0] in again.stdout
    compared = score("--tasks", "made_up", *own, "--compare", score.path, score.path)
    assert compared.returncode == 0 and "level" in compared.stdout
    with pytest.raises(AssertionError, match="run again"):
        score("--tasks", "made_up", *own[:3], "7", "--resume")


def test_what_public_benchmarks_lack_is_told(score, tmp_path, monkeypatch):
    def told(*args):
        done = score("--tasks", *args)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    assert "there is no eval_bundle/core.yaml; --core_data names" in told("core")
    assert "there is no folder nowhere" in told("made_up_letters", "--include_path", "nowhere")
    assert "--metric is for tasks of Nano" in told("arc_easy", "--metric", "exact")
    assert "no option x" in told("world:x=1") and "no task arc_easy" in told("arc_easy:x=1")
    own = ("--include_path", HARNESS_TASKS)
    assert "--run_generated_code allows it" in told("made_up_code", *own)
    monkeypatch.setattr("common.packages.find_spec", lambda name: None)
    assert 'lm_eval is not installed: python -m pip install "lm_eval>=0.4.13"; arc_easy' in told("arc_easy")
