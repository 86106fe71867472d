"""Score models on tasks, and compare them.

    python evaluate.py                                        # the newest model on all of Nano's own tasks
    python evaluate.py --tasks world,arithmetic:digits=3      # tasks by name, with options
    python evaluate.py --tasks my.jsonl --metric contains     # a file of questions with answers
    python evaluate.py --tasks world --compare a.pt b.pt      # which of them is better, and is that chance?
    python evaluate.py --tasks world,arc_easy,gsm8k           # public benchmarks, too
    python evaluate.py --report                               # a page about the newest model and its training

A task is a file in tasks/, which says how its answers are scored. How models are asked, and what a metric
means exactly: evaluation/runner.py. All answers are kept in checkpoint/evaluation/ (evaluation/results.py),
so an evaluation that was stopped goes on with --resume. Other names are those of public benchmarks
(evaluation/public.py).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from common.errors import UserError, run, write_utf8  # first, because it explains imports that fail

# isort: split
from common.config import display_path, resolve_path
from decoding.text_generator import check_device, check_model_file, describe_model, load_model, print_notice
from evaluation import public
from evaluation.selection import find_task, is_own, own_tasks, split_specs
from tasks import Metric, Task, problems
from tasks.problems import Problem

if TYPE_CHECKING:
    from decoding.text_generator import LoadedModel
    from evaluation.results import Evaluation
    from evaluation.runner import Prepared, TaskResult


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Score models on tasks. Answers and scores are kept in checkpoint/evaluation/.",
        epilog="examples:\n"
        "  python evaluate.py                                     the newest model on all of Nano's tasks\n"
        "  python evaluate.py --tasks world,arithmetic:digits=3   tasks by name, with options\n"
        "  python evaluate.py --tasks my.jsonl --metric contains  questions with answers in a file\n"
        "  python evaluate.py --tasks world --compare a.pt b.pt   is the difference real?\n"
        "  python evaluate.py --tasks arc_easy,hellaswag,gsm8k    tasks of lm-evaluation-harness\n"
        "  python evaluate.py --tasks core --core_data DIR        the 22 tasks of CORE\n"
        "  python evaluate.py --report                            a page about the newest model\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", default=[], metavar="TASK",
        help="names of tasks, with options after a colon, or .jsonl files, separated by commas or spaces; "
        "also core and the tasks of lm-evaluation-harness, if lm_eval is installed "
        "(Nano's own tasks; for a model of a toy problem, that problem)")  # fmt: skip
    add("--metric", choices=get_args(Metric), help="how answers are scored (what the task says)")
    add("--limit", type=int, metavar="N",
        help="at most N examples of each task (1,000 of a task that draws them, else all)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="which examples are drawn (0)")
    add("--resume", action="store_true",
        help="go on with what was stopped; take what is finished from checkpoint/evaluation/")  # fmt: skip
    one = parser.add_mutually_exclusive_group()
    one.add_argument("-m", "--model", metavar="FILE", default="newest",
                     help="a checkpoint file; newest (of SFT, if there is one); or best: the checkpoint of "
                     "the newest run with the lowest validation loss (newest)")  # fmt: skip
    one.add_argument("--compare", nargs="+", metavar="FILE",
                     help="two models or more side by side; finished results are used again")  # fmt: skip
    add("--report", action="store_true",
        help="write a page, report.html and report.md: how the model was trained, and the scores of all "
        "stages side by side; finished results are used again")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="where --report writes (checkpoint/report/<checkpoint>/)")
    add("-q", "--quantize", choices=("int8",), help="weights in 8 bits")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N (auto)")
    add("--no_chat_template", action="store_true", help="ask chat models as if they only continued texts")
    of_public = parser.add_argument_group("public benchmarks")
    add = of_public.add_argument
    add("--include_path", type=resolve_path, metavar="DIR",
        help="a folder with task files of your own, in the format of lm-evaluation-harness")  # fmt: skip
    add("--core_data", type=resolve_path, default="eval_bundle", metavar="DIR",
        help="the data of core: the folder eval_bundle that nanochat downloads (eval_bundle)")  # fmt: skip
    add("--run_generated_code", action="store_true",
        help="let benchmarks such as humaneval run programs that the model has written, in a process that "
        "writes to a temporary folder only, opens no connections and starts no other processes")  # fmt: skip
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be 1 or more, not {args.limit}")
    if not 0 <= args.seed < 1 << 63:
        raise UserError(f"--seed must be 0 or more and fit in 63 bits, not {args.seed}")
    if args.compare and len(args.compare) < 2:
        raise UserError("--compare needs two models or more")
    if args.compare and args.report:
        raise UserError("--report is about one model and how it was trained: name it with -m, not --compare")
    if args.out and not args.report:
        raise UserError("--out is the folder for --report")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a folder")
    if args.metric and not args.tasks:
        raise UserError("--metric needs --tasks: each of Nano's own tasks has a metric that suits it")
    check_device(args.device)
    for model in args.compare or [args.model]:
        check_model_file(model)
    args.resume = args.resume or bool(args.compare) or args.report
    args.tasks = split_specs(args.tasks)
    args.public = [spec for spec in args.tasks if not is_own(spec)]
    args.options = public.Options(args.limit, args.include_path, args.core_data, args.run_generated_code)
    public.check(args.public, args.options)
    if args.metric and args.public:
        raise UserError(f"--metric is for tasks of Nano: {args.public[0]} has its own metrics")
    return args


def main() -> None:
    args = parse_arguments()
    tasks = [find_task(spec, args.metric) for spec in args.tasks if is_own(spec)]
    write_utf8()
    from rich.console import Console

    from common.hardware import attention_context
    from engine.checkpoint import FOLDER
    from evaluation import report, tables
    from evaluation.results import Evaluation

    def load(path: str) -> LoadedModel:
        return load_model(path, True, args.device, args.quantize, must_write=False)

    asked = args.compare or [args.model]
    if args.report:
        stages, notes = report.lineage(args.model, load)
        models = [stage.loaded for stage in stages if stage.loaded]
        asked = [*(loaded.name for loaded in models[:-1]), args.model]
        folder = args.out or FOLDER / "report" / models[-1].path.stem
        folder.mkdir(parents=True, exist_ok=True)  # first, because there may be no permission
    else:
        models = [load(path) for path in asked]
    prepared = prepare_all(models, tasks, args) if tasks or not args.public else [[] for _ in models]
    console = Console(highlight=False)
    evaluations = []
    benchmarks: list[list[TaskResult]] = [[] for _ in models]
    told: set[str] = set()
    for path, loaded, own in zip(asked, models, prepared, strict=True):
        console.print(describe_model(loaded, path), markup=False)
        print_notes(own, told)
        evaluations.append([Evaluation(loaded, one, args.seed, args.quantize) for one in own])
    try:
        for loaded, of_model in zip(models, evaluations, strict=True):
            with attention_context(loaded.compute):
                for evaluation in of_model:
                    total = len(evaluation.prepared.examples)
                    with tables.progress(evaluation.prepared.task.spec, total) as advance:
                        evaluation.run(args.resume, advance)
        for number, loaded in enumerate(models if args.public else []):
            with attention_context(loaded.compute), tables.progress(", ".join(args.public)) as advance:
                benchmarks[number] = public.run(
                    loaded, args.public, args.options, chat=is_asked_as_chat(loaded, args),
                    quantize=args.quantize, resume=args.resume, on_each=advance,
                )  # fmt: skip
            for note in itertools.chain.from_iterable(result.notes for result in benchmarks[number]):
                print_note(note, told)
    except BaseException as error:  # whatever stops it, what was scored is shown
        show(evaluations, benchmarks)
        if isinstance(error, KeyboardInterrupt):
            print_notice("stopped; the same command with --resume goes on")
        raise
    if args.report:
        for file in report.write(folder, stages, evaluations, benchmarks, notes):
            console.print(f"report: {display_path(file)}", markup=False)
    elif args.compare:
        names = [loaded.name for loaded in models]
        results = [
            # The exponential of a mean has no bootstrap here; bits per byte says the same.
            [
                *(one.result for one in own),
                *(one for one in of_model if "perplexity" not in one.metric),
            ]
            for own, of_model in zip(evaluations, benchmarks, strict=True)
        ]
        tables.print_comparison(console, names, results, args.seed)
    else:
        show(evaluations, benchmarks)
        console.print(f"all answers: {display_path(FOLDER / 'evaluation')}", markup=False)


# ---- which tasks --------------------------------------------------------------------------------------


def prepare_all(
    models: Sequence[LoadedModel], tasks: Sequence[Task], args: argparse.Namespace
) -> list[list[Prepared]]:
    """The tasks made ready for each model. Of Nano's own tasks, if none was asked for, those that fit all."""
    from evaluation.runner import examples_of, prepare

    chosen = choose_tasks(models, tasks, args.metric) or own_tasks()
    ready = []
    for task in chosen:
        try:
            examples = examples_of(task, args.limit, args.seed)
            ready.append([
                prepare(task, examples, loaded.tokenizer, loaded.model.config,
                        chat=is_asked_as_chat(loaded, args))
                for loaded in models
            ])  # fmt: skip
        except UserError as error:
            if tasks:
                raise
            print_notice(f"left out: {error}")
    if not ready and not args.report:
        raise UserError("none of Nano's own tasks fits; name others with --tasks")
    return [[of_task[number] for of_task in ready] for number in range(len(models))]


def is_asked_as_chat(loaded: LoadedModel, args: argparse.Namespace) -> bool:
    return loaded.checkpoint.chat_template is not None and not args.no_chat_template


def choose_tasks(
    models: Sequence[LoadedModel], tasks: Sequence[Task], metric: Metric | None
) -> Sequence[Task]:
    """The tasks that were asked for or, for models of a toy problem, that problem. May be empty."""
    learned = [learned_problem(loaded) for loaded in models]
    if not any(learned):
        return tasks
    for loaded, problem in zip(models, learned, strict=True):
        if problem is None or problem != learned[0]:
            raise UserError(f"{models[0].name} and {loaded.name} have no task in common")
        if others := [task.spec for task in tasks if task != problem]:
            raise UserError(f"{loaded.name} has learned {problem.spec} and cannot be asked for {others[0]}")
        if loaded.tokenizer.to_dict() != problem.tokenizer().to_dict():
            raise UserError(f"{loaded.name} was trained on other characters than those of {problem.name}")
    return [find_task(problem.spec, metric) for problem in learned[:1] if problem]


def learned_problem(loaded: LoadedModel) -> Problem | None:
    """The toy problem that a model has learned, or None."""
    state = loaded.checkpoint
    return problems.make(state.stage, state.problem) if state.problem else None


# ---- showing -------------------------------------------------------------------------------------------


def print_notes(prepared: Sequence[Prepared], told: set[str]) -> None:
    """How the model is asked, and what a user must know about the tasks and was not told yet."""
    styles = {
        "chat": "asked in its chat template",
        "text": "it has no chat template: it reads each question as a text, and its answer goes on with that",
        "toy": "asked as in its training",
    }
    if prepared:
        print(f"({styles[prepared[0].style]})")
    for note in itertools.chain.from_iterable(one.notes for one in prepared):
        print_note(note, told)


def print_note(note: str, told: set[str]) -> None:
    """Print a note unless it was told before."""
    if note not in told:
        told.add(note)
        print_notice(note)


def show(evaluations: Sequence[Sequence[Evaluation]], benchmarks: Sequence[list[TaskResult]]) -> None:
    """Some answers, and the scores of each model, as far as there are any."""
    from rich.console import Console

    from evaluation import tables

    console = Console(highlight=False)
    for own, of_public in zip(evaluations, benchmarks, strict=False):
        scored = [evaluation for evaluation in own if evaluation.scores]
        for evaluation in scored:
            n_samples = max(2, 10 // len(scored))
            tables.print_samples(console, evaluation.prepared, evaluation.result, n_samples)
        if scored or of_public:
            tables.print_scores(console, [*(evaluation.result for evaluation in scored), *of_public])


if __name__ == "__main__":
    run(main)
