"""Why did the original Nano's calculator stop at 88 %? One change after another, on the same examples.

    python benchmark/calculator_plateau.py -o doc/calculator_plateau.png

The original draws 100 expressions per step, for 1,000 steps. Nodes above the depth of 4 are digits with
probability 0.2. Its loss is the mean over all 64 positions, including the random digits and the padding, and
its position embeddings are learned. Each row of the table changes one more thing. All variants are tested on
expressions drawn like the original's, which may repeat.

The dashed lines show the accuracy if everything below the first one, two or three levels of an expression is
guessed. The entropy at the end of the table is the lowest possible loss over all positions, because the
questions themselves are random.
"""

import argparse
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.errors import run  # noqa: E402
from config.schema import ModelConfig, TrainConfig  # noqa: E402
from config.validation import check  # noqa: E402
from tasks.calculator import Calculator  # noqa: E402

# name -> (loss over all positions, RoPE, Nano's expressions, loss on the value of every operation)
VARIANTS = {
    "as the original": (True, False, False, False),
    "loss over the answer only": (False, False, False, False),
    "and RoPE": (False, True, False, False),
    "and deep expressions more often": (False, True, True, False),
    "and every operation's value asked for": (False, True, True, True),
}
BATCH_SIZE, N_TEST, EVERY = 100, 2000, 50


@dataclass
class Original(Calculator):
    """The calculator, with the expressions of the original Nano."""

    def draw(self, random):
        return self.expression(random, 0)

    def expression(self, random, level):
        if level == self.depth or random.random() < 0.2:
            return random.choice("01")
        left, right = (self.expression(random, level + 1) for _ in range(2))
        return f"({random.choice('+*')}{left}{right})"


def entropy_per_position(depth=4, digit=0.2, positions=64):
    """The unpredictable part of the loss on the original's questions, in nats per position.

    A node above `depth` chooses between digit and operation, then one of two. The very first token is never
    predicted, so it does not count. The answer follows from the question.
    """
    which = -digit * math.log(digit) - (1 - digit) * math.log(1 - digit)
    nodes = [(2 * (1 - digit)) ** level for level in range(depth + 1)]
    nats = sum(nodes) * math.log(2) + sum(nodes[:-1]) * which - which - digit * math.log(2)
    return nats / positions


def right_if_guessed_below(question, levels):
    """Probability that the likelier value is right, if everything below `levels` levels is unknown."""
    characters = iter(question)

    def p_one(depth):
        """Probability that the next expression has the value 1."""
        if (token := next(characters)) in "01":
            return float(token)
        operator, left, right = next(characters), p_one(depth + 1), p_one(depth + 1)
        next(characters)  # the closing parenthesis
        if depth >= levels:
            return 0.5
        return left * right if operator == "*" else left + right - left * right

    p = p_one(0)
    return max(p, 1 - p)


def learn(name, steps, shape, rate, seed):
    """Train one variant. Returns [(step, share of right answers to the original's questions, loss)]."""
    import torch

    import objectives
    from engine.optimizer import learning_rate_at, make_optimizer
    from model import GPT
    from problem import answers
    from tasks import problems

    all_positions, rope, nano_expressions, supervised = VARIANTS[name]
    original = Original()
    problem = Calculator() if nano_expressions else original
    tokenizer = problem.tokenizer()
    shape = check(ModelConfig, {"block_size": 64, "use_rope": rope, **shape}, "model")
    config = TrainConfig(
        dataset_path=[("none", "none")], learning_rate=rate, min_lr=0.0, warmup_iters=steps // 10,
        max_steps=steps, beta2=0.99,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = GPT(shape.resolved(tokenizer.vocab_size))
    optimizer = make_optimizer(model, config)
    chance = random.Random(f"test/{seed}")
    questions = sorted((original.draw(chance) for _ in range(N_TEST)), key=len)  # less padding
    examples = problems.TrainingQuestions(problem, tokenizer, BATCH_SIZE, seed)
    objective = objectives.find("lm")
    if not nano_expressions:  # without leaving out those that are also in the test
        chance = random.Random(seed)
        examples.questions = lambda step: [original.draw(chance) for _ in range(BATCH_SIZE)]

    curve, losses = [], []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step - 1, config)
        arrays = problem.encode(tokenizer, examples.questions(step), supervised)
        batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
        divisor = objective.weight(batch)
        if all_positions:  # padding would be predicted perfectly, so it adds nothing to the sum
            batch["mask"] = (batch["y"] != tokenizer.padding_id).float()
            divisor = 64 * len(batch["x"])
        loss = objective.loss(model, batch)[0] / divisor
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % EVERY == 0 or step == steps:
            given = [a for i in range(0, N_TEST, 500)
                     for a in answers(model, problem, tokenizer, questions[i : i + 500])]  # fmt: skip
            right = sum(original.check(q, a) for q, a in zip(questions, given, strict=True))
            recent = sum(losses[-EVERY:]) / len(losses[-EVERY:])
            curve.append((step, right / N_TEST, recent))
            model.train()
            print(f"{name}: step {step}, loss {recent:.4f}, right {right / N_TEST:.1%}", flush=True)
    return curve


def draw(curves, ceilings, path):
    from matplotlib.figure import Figure

    from plot_loss import GREY, PALETTE

    figure = Figure(figsize=(8, 4.5), layout="tight")
    panel = figure.subplots()
    for colour, (name, curve) in zip(PALETTE, curves.items(), strict=False):
        steps, right, _ = zip(*curve, strict=True)
        panel.plot(steps, [100 * share for share in right], "-", color=colour, label=name)
    for levels, share in ceilings.items():
        panel.axhline(100 * share, color=GREY, linestyle="--", linewidth=0.8)
        panel.annotate(f"{levels} known", (steps[-1], 100 * share), fontsize=8, color=GREY,
                       ha="right", va="bottom")  # fmt: skip
    panel.set(xlabel="step", ylabel="% right", ylim=(45, 101))
    panel.legend(fontsize=8, loc="center right")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("-o", "--out", type=Path, default=Path("calculator_plateau.png"), metavar="FILE")
    args = parser.parse_args()

    problem = Calculator()
    shape, rate = problem.model(), problem.training()["learning_rate"]
    chance = random.Random(args.seed)
    questions = [Original().draw(chance) for _ in range(20_000)]
    ceilings = {
        f"{levels} level{'s' * (levels > 1)}":
            sum(right_if_guessed_below(question, levels) for question in questions) / len(questions)
        for levels in (1, 2, 3)
    }  # fmt: skip
    curves = {}
    for name in VARIANTS:
        curves[name] = learn(name, args.steps, shape, rate, args.seed)
        draw(curves, ceilings, args.out)

    from rich.console import Console
    from rich.table import Table

    table = Table("what", "% right", "loss", title=f"{args.steps:,} steps of {BATCH_SIZE} examples")
    for name, curve in curves.items():
        table.add_row(name, f"{100 * curve[-1][1]:.1f}", f"{curve[-1][2]:.4f}")
    table.add_section()
    for levels, share in ceilings.items():
        table.add_row(f"guessing all below {levels}", f"{100 * share:.1f}", "")
    table.add_row("entropy of the questions, per position", "", f"{entropy_per_position():.4f}")
    Console().print(table)
    print(f"chart: {args.out}")


if __name__ == "__main__":
    run(main)
