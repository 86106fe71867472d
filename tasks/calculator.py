"""Evaluate a Boolean expression in prefix notation: (+ (* 0 1) (* 1 1)) = 1, where + is or, and * is and.

Each character is a token, and there are no spaces: (+(*01)(*11))=1. An expression of depth d has up to 2^d
values and 2^d - 1 operations of three tokens: up to 61 tokens for a depth of 4.
"""

import itertools
import random
import re
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from tasks.problems import Problem, option

OPERATION = re.compile(r"\([+*][01][01]\)")


@dataclass
class Calculator(Problem):
    """See the top of this file."""

    depth: int = option(4, "maximum depth of nesting", highest=8)

    characters = "()+*01"

    def draw(self, random: random.Random) -> str:
        # Deep expressions more often: there are more of them, and more to learn from them.
        depths = range(1, self.depth + 1)
        return self.tree(random, random.choices(depths, [3**depth for depth in depths])[0])

    def tree(self, random: random.Random, depth: int) -> str:
        """An expression of exactly this depth."""
        if not depth:
            return random.choice("01")
        parts = [self.tree(random, depth - 1), self.tree(random, random.randrange(depth))]
        random.shuffle(parts)
        return f"({random.choice('+*')}{parts[0]}{parts[1]})"

    def answer(self, question: str) -> str:
        return question if len(question) == 1 else self.subproblems(question)[-1][2]

    def subproblems(self, question: str) -> list[tuple[int, int, str]]:
        """Every operation with its value, innermost first."""
        starts: list[int] = []
        values: list[str] = []
        found = []
        for i, character in enumerate(question):
            if character == "(":
                starts.append(i)
            elif character != ")":
                values.append(character)
            else:
                operator, left, right = values[-3:]
                values[-3:] = [max(left, right) if operator == "+" else min(left, right)]
                found.append((starts.pop(), i + 1, values[-1]))
        return found

    def read(self, text: str) -> str:
        question = rest = text.replace(" ", "").removesuffix("=")
        while (shorter := OPERATION.sub("0", rest)) != rest:
            rest = shorter
        if rest not in ("0", "1") or self.nesting(question) > self.depth:
            raise UserError(
                f"{text} is not an expression such as (+ (* 0 1) 1), nested at most {self.depth} deep"
            )
        return question

    def kind(self, question: str) -> str:
        return f"depth {self.nesting(question)}"

    def nesting(self, question: str) -> int:
        """How deep the parentheses are nested."""
        return max(itertools.accumulate((c == "(") - (c == ")") for c in question))

    @property
    def longest(self) -> tuple[int, int]:
        return 4 * 2**self.depth - 3, 1

    def model(self) -> dict[str, Any]:
        # One layer for each level of nesting, and two to match the parentheses.
        return dict(n_layer=self.depth + 2, n_head=8, n_embd=64)

    def training(self) -> dict[str, Any]:
        return dict(max_steps=1300 + 350 * max(0, self.depth - 4), batch_size=128, learning_rate=4e-3)
