"""How large can toy problems get? Accuracy over size, always with the training steps of the default size.

    python benchmark/toy_limits.py -o doc/toy_limits.png            # all four: an hour or two
    python benchmark/toy_limits.py sort --sizes 20 40 --steps 1500 -o sort.png

Every run also becomes a line in the table of `python problem.py --results`. A run that is already in the
table, with the same seed and number of steps, is not repeated.
"""

import argparse
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.config import display_path  # noqa: E402
from common.errors import UserError, run  # noqa: E402
from problem import RESULTS, read_results, show_results  # noqa: E402
from tasks import problems  # noqa: E402

SIZES = {
    "q": (6, 12, 24, 48),
    "sort": (6, 12, 20, 32),
    "palindrome": (6, 12, 24, 48, 96),
    "calculator": (3, 4, 6),
}


def result_of(problem, seed, steps):
    """The newest result of such a run in the table of all runs, or None."""
    wanted = {"problem": problem.name, "sizes": problem.sizes, "seed": seed, "steps": steps}
    found = [result for result in read_results() if wanted.items() <= result.items()]
    return found[-1] if found else None


def train(name, size, seed, steps):
    """Run problem.py. Returns its line in the table of all runs."""
    option = fields(problems.find(name))[0].name
    problem = problems.make(name, {option: size})
    steps = steps or problems.make(name, {}).training()["max_steps"]
    if result := result_of(problem, seed, steps):
        print(f"{name} {size}: already in {display_path(RESULTS)}")
        return result
    values = {option: size, "seed": seed, "steps": steps}
    arguments = [str(part) for key, value in values.items() for part in (f"--{key}", value)]
    done = subprocess.run([sys.executable, ROOT / "problem.py", name, *arguments], cwd=ROOT)
    if done.returncode or not (result := result_of(problem, seed, steps)):
        raise UserError(f"problem.py {name} {' '.join(arguments)} ended with code {done.returncode}")
    return result


def draw(results, path):
    """Plot accuracy over size, and the base rate for comparison, with one panel per problem."""
    from matplotlib.figure import Figure

    from plot_loss import BLUE, GREY

    names = list(dict.fromkeys(result["problem"] for result in results))
    figure = Figure(figsize=(3.2 * len(names), 3), layout="tight")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        of_name = [result for result in results if result["problem"] == name]
        ((option, _),) = of_name[0]["sizes"].items()
        sizes = [result["sizes"][option] for result in of_name]
        for what, colour in (("accuracy", BLUE), ("base rate", GREY)):
            panel.plot(sizes, [100 * result[what] for result in of_name], "o-", color=colour, label=what)
        panel.set(title=name, xlabel=option, xticks=sizes, ylim=(-3, 103))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("% exact on unseen questions")
    panels[0][0].legend(loc="center")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help=f"{', '.join(SIZES)} (all)")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="numbers of digits, or depths")
    parser.add_argument("--seed", type=int, default=1337, metavar="N")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of each run")
    parser.add_argument("-o", "--out", type=Path, default=Path("toy_limits.png"), metavar="FILE")
    args = parser.parse_args()
    for name in args.problems:
        if name not in problems.names():
            parser.error(f"there is no problem {name}; choose from {', '.join(problems.names())}")

    results = []
    for name in args.problems or SIZES:
        for size in args.sizes or SIZES.get(name, ()):
            results.append(train(name, size, args.seed, args.steps))
            draw(results, args.out)

    show_results(results)
    print(f"chart: {args.out}")


if __name__ == "__main__":
    run(main)
