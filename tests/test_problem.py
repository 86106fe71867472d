"""The command line of problem.py: training, testing, the table of results, and testing again."""

import json
import re
import subprocess

import pytest
from conftest import Project

import problem
from common.errors import run
from engine.checkpoint import load
from tasks import problems


def small(project, name="sort", *arguments, **keywords):
    return project.run("problem.py", name, "--steps", 4, *arguments, **keywords)


def test_help_names_the_problems_and_their_sizes(shared_project):
    done = shared_project.run("problem.py", "--help")
    assert done.returncode == 0 and all(name in done.stdout for name in problems.names())
    done = shared_project.run("problem.py", "calculator", "--help")
    assert done.returncode == 0 and "--depth" in done.stdout and "--digits" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name a problem"),
        (["chess"], "chess"),
        (["sort", "--digits", "0"], "--digits must be a whole number from 1"),
        (["sort", "--steps", "-1"], "max_steps"),
        (["sort", "--device", "tpu"], "device"),
        (["sort", "-m", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["--results"], "no problem was trained yet"),
    ],
)
def test_mistakes_are_told(shared_project, arguments, says):
    done = shared_project.run("problem.py", *arguments)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


GOOD = {"time": "2026-01-02 03:04:05", "problem": "sort", "sizes": {"digits": 6}, "parameters": 1234,
        "steps": 5, "seconds": 6.5, "accuracy": 0.75, "base rate": 0.25, "seed": 7,
        "checkpoint": "sort.pt"}  # fmt: skip
HALF = json.dumps(GOOD).encode()[:60]
DAMAGED = [
    b"{", HALF, HALF + json.dumps(GOOD).encode(), b"[" * 100_000, b'{"time":' * 100_000, b"null", b"[]",
    b"5", b'"x"', b"{}", b"\xff\xfe", bytes(50), json.dumps(GOOD).replace("1234", "9" * 5000).encode(),
    json.dumps(GOOD).replace("0.75", "1e400").encode(),
    *(json.dumps({key: value for key, value in GOOD.items() if key != gone}).encode() for gone in GOOD
      if gone != "checkpoint"),
    *(json.dumps({**GOOD, key: wrong}).encode() for key in GOOD if key != "checkpoint"
      for wrong in ("²", -1, float("nan"), [], {"[/x]": "[/x]"}, True, 10**30)),
]  # fmt: skip


def results_of(lines, tmp_path, monkeypatch, capsys):
    """Run `problem.py --results` in this process on these lines. Returns (code, stdout, stderr)."""
    monkeypatch.setattr(problem, "RESULTS", tmp_path / "results.jsonl")
    problem.RESULTS.write_bytes(b"\n".join(lines))
    monkeypatch.setattr("sys.argv", ["problem.py", "--results"])
    monkeypatch.setenv("COLUMNS", "80")
    code = 0
    try:
        run(problem.main)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("line", DAMAGED)
def test_damaged_results_are_left_out_and_named(line, tmp_path, monkeypatch, capsys):
    good = json.dumps(GOOD).encode()
    code, table, errors = results_of([good, line, b"", good, b""], tmp_path, monkeypatch, capsys)
    assert code == 0 and table.count("sort 6") == 2 and table.count("75.00%") == 2
    assert re.fullmatch(r".*results.jsonl: cannot read line 2; the table leaves them out\n", errors)
    code, table, errors = results_of([line, b""], tmp_path, monkeypatch, capsys)
    assert code == 2 and not table and errors.startswith("error: ") and "move the file away" in errors


def test_what_is_left_out_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    good = json.dumps({**GOOD, "seconds": None}).encode()
    code, table, errors = results_of([b"x"] * 1000 + [good], tmp_path, monkeypatch, capsys)
    assert code == 0 and "resumed" in table and errors.count("\n") == 1 and "line 1, 2, 3" in errors
    code, _, errors = results_of([], tmp_path, monkeypatch, capsys)
    assert code == 2 and "no problem was trained yet" in errors


def test_a_run_from_start_to_end(small_problems):
    project = small_problems
    done = small(project, "sort", "--digits", 3, "--play", input="321\n32\n\n123")
    assert done.returncode == 0, done.stderr
    [path] = project.root.glob("checkpoint/sort_*_step_4.pt")
    picture = path.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG") and "step_4.png" in done.stdout
    shares = re.findall(r"(accuracy|base rate) +│ +([\d.]+)%", done.stdout)
    assert [name for name, _ in shares] == ["accuracy", "base rate"]
    [log] = project.root.glob("train_*.log")
    assert re.search(r"\| Val \|.*\| Accuracy: [\d.]+%", log.read_text("utf-8"))
    played = done.stdout.partition("step_4.png\n")[2].splitlines()
    assert len(played) == 2 and all(re.fullmatch(r"\d{3} (✓|✗ right answer: \d{3})", line) for line in played)
    assert "32 is not a string of 3 digits" in done.stderr

    table = (project.root / "checkpoint" / "results.jsonl").read_text("utf-8")
    result = json.loads(table)
    assert result["sizes"] == {"digits": 3} and result["steps"] == 4 and result["checkpoint"] == path.name
    done = project.run("problem.py", "--results", COLUMNS="80")
    assert done.returncode == 0 and re.search(r"[\d-]+ [\d:]+ +sort 3 +[\d,]+ +4 +[\d.]+ ", done.stdout)

    again = project.run("problem.py", "sort", "-m", path)
    assert again.returncode == 0
    assert f"{result['accuracy']:.2%}" in again.stdout and f"{result['base rate']:.2%}" in again.stdout
    for arguments, says in ((["sort", "--digits", 4], "has learned --digits 3"), (["q"], "has learned sort")):
        wrong = project.run("problem.py", *arguments, "-m", path)
        assert wrong.returncode == 2 and says in wrong.stderr


def test_a_causal_problem_with_answers_of_several_lengths(small_problems):
    done = small(small_problems, "q")
    assert done.returncode == 0 and "base rate" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(project, tmp_path_factory):
    whole = Project(tmp_path_factory.mktemp("whole"))
    arguments = ("problem.py", "sort", "--digits", 3, "--steps", 60, "--seed", 7)
    assert whole.run(*arguments).returncode == 0
    process = subprocess.Popen(
        project.command(*arguments), cwd=project.elsewhere, env=project.environment, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    next(line for line in process.stdout if " | Train | " in line)
    process.terminate()
    assert re.search(r" --resume \d{8}_\d{6}\n$", process.stdout.read()) and process.wait() == 0
    for size in ((), ("--digits", 4)):
        other = project.run("problem.py", "sort", *size, "--resume")
        assert other.returncode == 2 and re.search("has learned (sort )?--digits 3", other.stderr)
    done = project.run(*arguments, "--resume")
    assert done.returncode == 0 and "resumed" in done.stdout, done.stderr
    one, two = (load(place.checkpoints("sort")[60]) for place in (whole, project))
    assert project.same(one, two)
    assert "resumed" in project.run("problem.py", "--results", COLUMNS="200").stdout
