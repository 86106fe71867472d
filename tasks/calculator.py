"""Evaluate a prefix Boolean expression: (+ (* 0 1) (* 1 1)) = 1, where + is or, and * is and.

A token is a character, and spaces are left out: (+(*01)(*11))=1. Nested d deep, an expression has up to
2^d values and 2^d - 1 operations of three tokens: 61 in all for a depth of 4.
"""

import itertools
import re
from dataclasses import dataclass

from engine.errors import UserError
from tasks import Problem, option

OPERATION = re.compile(r"\(([+*])([01])([01])\)")


@dataclass
class Calculator(Problem):
    depth: int = option(4, "how deep expressions are nested, at most", highest=8)

    characters = "()+*01"

    def draw(self, random):
        # The deeper, the more there is to learn and the more expressions there are.
        depths = range(1, self.depth + 1)
        return self.tree(random, random.choices(depths, [2**depth for depth in depths])[0])

    def tree(self, random, depth):
        """An expression nested exactly so deep."""
        if not depth:
            return random.choice("01")
        parts = [self.tree(random, depth - 1), self.tree(random, random.randrange(depth))]
        random.shuffle(parts)
        return f"({random.choice('+*')}{parts[0]}{parts[1]})"

    def answer(self, question):
        while len(question) > 1:
            question, count = OPERATION.subn(value, question)
            if not count:
                raise UserError(f"{question} is no operation")
        return question

    def read(self, text):
        question = text.replace(" ", "").removesuffix("=")
        try:
            if not re.fullmatch("[01]", self.answer(question)) or self.nesting(question) > self.depth:
                raise UserError
        except UserError:
            raise UserError(
                f"{text} is not an expression such as (+ (* 0 1) 1), nested at most {self.depth} deep"
            ) from None
        return question

    def kind(self, question):
        return f"depth {self.nesting(question)}"

    def nesting(self, question):
        return max(itertools.accumulate((c == "(") - (c == ")") for c in question))

    @property
    def longest(self):
        return 4 * 2**self.depth - 3, 1

    def model(self):
        return dict(n_layer=6, n_head=4, n_embd=64)

    def training(self):
        return dict(max_steps=2600, batch_size=128, learning_rate=4e-3)


def value(operation):
    operator, left, right = operation.groups()
    return str(int(left) | int(right) if operator == "+" else int(left) & int(right))
