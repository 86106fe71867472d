"""Toy problems: what can a tiny transformer learn?

    python problem.py sort                          draw examples, train, test, show
    python problem.py sort --digits 20 --steps 4000
    python problem.py q --play                      then type questions to the trained model
    python problem.py calculator -m checkpoint/calculator_20260102_030405_step_3000.pt --play
    python problem.py --results                     the table of all runs

A problem is a file in tasks/. Training uses the loop of train.py, and the questions for testing never occur
in it. A run writes a log, a checkpoint, a chart next to the checkpoint, and a line in the table of all runs.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError, run  # first, because it explains imports that fail

# isort: split
from common.config import ROOT, display_path, resolve_path
from common.files import append_line
from config.stages import Stage
from evaluation.toys import answers
from tasks import problems

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from model import GPT
    from tokenizer import Tokenizer

RESULTS = ROOT / "checkpoint" / "results.jsonl"
N_TEST, N_VALIDATION = 10_000, 2_000  # questions at the end, and during training
N_EXAMPLES = 10  # to print


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", action="store_true", help="print the table of all runs")
    parsers = parser.add_subparsers(dest="problem", metavar="PROBLEM", title="problems")
    for name in problems.names():
        problem = problems.find(name)
        text = sys.modules[problem.__module__].__doc__ or ""
        one = parsers.add_parser(
            name, help=text.partition("\n")[0].replace("%", "%%"), description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        add = one.add_argument
        for size in fields(problem):  # type: ignore[arg-type]  # a dataclass
            add(f"--{size.name}", type=int, metavar="N", help=f"{size.metadata['help']} ({size.default})")
        add("--steps", type=int, metavar="N", help="optimizer steps (default: depends on the size)")
        add(
            "--seed",
            type=int,
            default=1337,
            metavar="N",
            help="seed of weights, training and test questions (1337)",
        )
        add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N (auto)")
        add("-m", "--model", metavar="FILE", help="do not train; test this checkpoint")
        add("--resume", nargs="?", const=True, metavar="RUN",
            help="continue the newest run of this problem, or this one (name or checkpoint)")  # fmt: skip
        add("--play", action="store_true", help="answer questions that you type, at the end")
    args = parser.parse_args()
    if not args.problem and not args.results:
        parser.error(f"name a problem ({', '.join(problems.names())}), or give --results")
    return args


def main() -> None:
    args = parse_arguments()
    if args.problem and args.model:
        retest(args)
    elif args.problem:
        learn(args)
    if args.results:
        show_results(read_results())


# ---- training and testing ------------------------------------------------------------------------------


def learn(args: argparse.Namespace) -> None:
    """Train a model on a problem, test it, and draw a chart."""
    from config.resolved import ResolvedTrainConfig
    from config.schema import ModelConfig
    from config.validation import check

    problem = problems.make(args.problem, vars(args))
    source = f"tasks/{problem.name}.py"
    values = {
        "log_interval": 10, "eval_interval": 100, "keep_checkpoints": 1, "min_lr": 0.0, **problem.training(),
        "random_seed": args.seed, "device": args.device, "tokenizer_path": source, "dataset_path": [],
    }  # fmt: skip
    values["max_steps"] = values["max_steps"] if args.steps is None else args.steps
    values["warmup_iters"] = max(0, min(100, values["max_steps"] // 10))
    values["eval_iters"] = -(-N_VALIDATION // values["batch_size"])
    config = check(ResolvedTrainConfig, values, "problem.py")
    keys = {"block_size": problem.block_size, "is_causal": problem.is_causal, **problem.model()}
    shape = check(ModelConfig, keys, source)
    # torch is imported only now: errors in the arguments come without a wait.
    from common import hardware
    from engine import runs
    from engine.parallel import SingleProcess
    from engine.setup import TrainSetup, on_device, starting_model
    from objectives.answers import Objective
    from train import train

    compute = hardware.set_up_compute(config)
    start = runs.starting_point(problem.name, config, args.resume)
    if start.checkpoint:
        learned = problem_of(start.checkpoint, args, start.name, problem.tokenizer())
        if learned != problem:
            raise UserError(
                f"{start.name} has learned {learned.description}: give these options, name another run after "
                "--resume, or leave --resume out"
            )
    model, tokenizer = starting_model(start, config, shape, compute, problem.tokenizer)
    questions = problems.TrainingQuestions(problem, tokenizer, config.batch_size, args.seed)
    test = problems.HeldOutQuestions(problem, tokenizer, config.batch_size, args.seed, N_TEST)
    stage, parallel = Stage(problem.name, "a toy problem", "answers", "questions"), SingleProcess()
    setup = TrainSetup(
        stage, config, compute, start, model, tokenizer, Objective(), questions, [test], problem.sizes
    )
    began = time.perf_counter()
    trained = train(on_device(setup, parallel), parallel)
    if trained is None:  # stopped before its end
        return
    log, path = trained
    assert path, "the last step saves a checkpoint"
    # For a resumed run, the time of the earlier sessions is unknown.
    seconds = None if start.resumes else round(time.perf_counter() - began, 1)
    details = {"steps": config.max_steps, "seconds": seconds, "seed": args.seed,
               "device": compute.name, "checkpoint": path.name}  # fmt: skip
    report(problem, model.eval(), tokenizer, test.questions, details)
    draw_chart(log, path.with_suffix(".png"))
    if args.play:
        play(problem, model, tokenizer)


def retest(args: argparse.Namespace) -> None:
    """Test a checkpoint again."""
    from common import hardware
    from engine import checkpoint

    path = resolve_path(args.model)
    state = checkpoint.load(path)
    model, tokenizer = checkpoint.build(state, display_path(path))
    problem = problem_of(state, args, display_path(path), tokenizer)
    compute = hardware.resolve_compute(hardware.detect_machine(args.device), args.device, dtype="float32")
    model = model.to(compute.device)
    test = problems.HeldOutQuestions(problem, tokenizer, 1, args.seed, N_TEST)
    report(problem, model, tokenizer, test.questions, {"steps": state.step, "seed": args.seed})
    if args.play:
        play(problem, model, tokenizer)


def problem_of(
    state: Checkpoint, args: argparse.Namespace, name: str, tokenizer: Tokenizer
) -> problems.Problem:
    """The problem that a checkpoint has learned, with its sizes. name: the checkpoint's, for errors.

    Raises UserError if it is not the problem of the command line.
    """
    if state.stage != args.problem:
        raise UserError(f"{name} has learned {state.stage}, not {args.problem}")
    if not state.problem:
        raise UserError(f"{name} does not say which size of {args.problem} it has learned")
    problem = problems.make(args.problem, state.problem)
    for size, value in problem.sizes.items():
        if vars(args)[size] not in (None, value):
            raise UserError(f"{name} has learned --{size} {value}, not {vars(args)[size]}")
    if tokenizer.to_dict() != problem.tokenizer().to_dict():
        raise UserError(f"{name} was trained on other characters than those of {args.problem}")
    return problem


# ---- showing -------------------------------------------------------------------------------------------


def report(
    problem: problems.Problem,
    model: GPT,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    details: dict[str, Any],
) -> None:
    """Test the model and print examples and results. A new run's results also go to the table of all runs."""
    from rich.console import Console
    from rich.table import Table

    given: list[str] = []
    for first in range(0, len(questions), 500):
        given += answers(model, problem, tokenizer, questions[first : first + 500])
    right = [problem.check(question, answer) for question, answer in zip(questions, given, strict=True)]
    kinds = collections.Counter(map(problem.kind, questions))
    right_of_kind = collections.Counter(problem.kind(q) for q, ok in zip(questions, right, strict=True) if ok)
    ((_, most_frequent),) = collections.Counter(map(problem.answer, questions)).most_common(1)

    # Some wrong answers, if there are any, then the first questions: they are in random order.
    wrong = [i for i, ok in enumerate(right) if not ok][: N_EXAMPLES // 2]
    chosen = list(dict.fromkeys([*wrong, *range(len(questions))]))[:N_EXAMPLES]
    examples = Table(title="examples")
    for name in ("question", "the model's answer", "", "right answer"):
        examples.add_column(name, overflow="fold")
    for i in chosen:
        verdict = "[green]✓" if right[i] else "[red]✗"
        examples.add_row(questions[i], given[i], verdict, "" if right[i] else problem.answer(questions[i]))

    result = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "problem": problem.name,
        "sizes": problem.sizes,
        "parameters": model.n_params,
        "accuracy": sum(right) / len(right),
        "base rate": most_frequent / len(right),
        "questions": len(right),
        **details,
    }
    sizes = ", ".join(f"{name} {value}" for name, value in problem.sizes.items())
    table = Table(title=f"{problem.name}, {sizes}", show_header=False)
    for name, value in result.items():
        if name not in ("time", "problem", "sizes"):
            table.add_row(name, format_value(name, value))
    if len(kinds) > 1:
        for kind, count in sorted(kinds.items()):
            table.add_row(f"accuracy, {kind}", f"{right_of_kind[kind] / count:.2%} of {count:,}")
    try:
        if "seconds" in details:
            append_line(RESULTS, json.dumps(result, ensure_ascii=False) + "\n")
    finally:  # print them even if the disk is full
        Console(highlight=False).print(examples, table)


def format_value(name: str, value: Any) -> str:
    """The text for a value in the column of this name."""
    if value is None:
        return "resumed"
    if name in ("accuracy", "base rate"):
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int | float) and name != "seed" else str(value)


def draw_chart(log_path: Path, path: Path) -> None:
    import plot_loss
    from common.log_reader import Log

    plot_loss.prepare_matplotlib()
    log = Log(log_path)
    log.read()
    plot_loss.save([log], path)
    print(f"chart: {display_path(path)}")


def play(problem: problems.Problem, model: GPT, tokenizer: Tokenizer) -> None:
    """Answer questions from standard input until it ends."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print(f"Type a question such as {problem.draw(random.Random())}; Ctrl-D leaves.")
    while True:
        try:
            if text := input(prompt).strip():
                question = problem.read(text)
                (answer,) = answers(model, problem, tokenizer, [question])
                right = problem.check(question, answer)
                print(answer, "✓" if right else f"✗ right answer: {problem.answer(question)}", flush=True)
        except UserError as error:
            print(error, file=sys.stderr)
        except EOFError:
            return


def read_results() -> list[dict[str, Any]]:
    """The table of all runs, oldest first. Damaged lines are skipped, with a notice on standard error."""
    from pydantic import ValidationError

    from config.schema import ProblemResult

    results, damaged = [], []
    try:
        with open(RESULTS, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        results.append(ProblemResult.model_validate_json(line).model_dump(by_alias=True))
                except ValidationError:
                    damaged.append(str(number))
    except FileNotFoundError:
        pass
    if damaged:
        lines = f"{', '.join(damaged[:9])}{', ...' * (len(damaged) > 9)}"
        text = f"{display_path(RESULTS)}: cannot read line {lines}"
        if not results:
            raise UserError(f"{text}, nor any other; move the file away")
        print(f"{text}; the table leaves them out", file=sys.stderr)
    return results


def show_results(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not results:
        raise UserError("no problem was trained yet; try: python problem.py sort")
    table = Table(title="toy problems", box=None, padding=(0, 2, 0, 0), pad_edge=False)  # fits 80 columns
    for name in ("when", "problem", "params", "steps", "seconds", "accuracy", "base", "seed"):
        table.add_column(name, justify="left" if name in ("when", "problem") else "right", no_wrap=True)
    columns = ("parameters", "steps", "seconds", "accuracy", "base rate", "seed")
    for result in results:
        size = " ".join(map(str, result["sizes"].values()))
        table.add_row(
            result["time"][5:16],
            f"{result['problem']} {size}",
            *(format_value(n, result[n]) for n in columns),
        )
    Console().print(table)


if __name__ == "__main__":
    run(main)
