"""Evaluate a prefix Boolean expression: (+ (* 0 1) (* 1 1)) = 1, where + is or, and * is and.

A token is a character, and spaces are left out: (+(*01)(*11))=1. Nested d deep, an expression has up to
2^d values and 2^d - 1 operations of three tokens: 61 in all for a depth of 4.
"""

import itertools
import re
from dataclasses import dataclass

from common.errors import UserError
from tasks import Problem, option

OPERATION = re.compile(r"\([+*][01][01]\)")


@dataclass
class Calculator(Problem):
    depth: int = option(4, "how deep expressions are nested, at most", highest=8)

    characters = "()+*01"

    def draw(self, random):
        # The deeper, the more there is to learn and the more expressions there are.
        depths = range(1, self.depth + 1)
        return self.tree(random, random.choices(depths, [3**depth for depth in depths])[0])

    def tree(self, random, depth):
        """An expression nested exactly so deep."""
        if not depth:
            return random.choice("01")
        parts = [self.tree(random, depth - 1), self.tree(random, random.randrange(depth))]
        random.shuffle(parts)
        return f"({random.choice('+*')}{parts[0]}{parts[1]})"

    def answer(self, question):
        return question if len(question) == 1 else self.subproblems(question)[-1][2]

    def subproblems(self, question):
        """Every operation, the innermost first."""
        starts, values, found = [], [], []
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

    def read(self, text):
        question = rest = text.replace(" ", "").removesuffix("=")
        while (shorter := OPERATION.sub("0", rest)) != rest:
            rest = shorter
        if rest not in ("0", "1") or self.nesting(question) > self.depth:
            raise UserError(
                f"{text} is not an expression such as (+ (* 0 1) 1), nested at most {self.depth} deep"
            )
        return question

    def kind(self, question):
        return f"depth {self.nesting(question)}"

    def nesting(self, question):
        return max(itertools.accumulate((c == "(") - (c == ")") for c in question))

    @property
    def longest(self):
        return 4 * 2**self.depth - 3, 1

    def model(self):
        # A layer for each level of nesting, and two to find out which parts belong together.
        return dict(n_layer=self.depth + 2, n_head=8, n_embd=64)

    def training(self):
        return dict(max_steps=1300 + 350 * max(0, self.depth - 4), batch_size=128, learning_rate=4e-3)
