"""Sums, differences and products: "Calculate 17+25." -> 42.

With steps=true, the answer is worked out as on paper, from the last digit to the first:

    17+25   7+5=12, carry 1. 1+2+1=4. 17+25=42
    42-17   12-7=5, borrow 1. 4-1-1=2. 42-17=25
    17x25   7x5=35, carry 3. 1x5+3=8. 17x5=85. (... 17x20=340, and their sum.) 17x25=425
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tasks import DrawnTask, Example, option

WORDINGS = ("Calculate {a}{sign}{b}.", "Work out {a} {word} {b}.", "{a}{sign}{b}=", "{a} {word} {b} =")
WORDS = {"+": "plus", "-": "minus", "x": "times"}


@dataclass
class Arithmetic(DrawnTask):
    """See the top of this file."""

    digits: int = option(2, "how many digits the numbers have at most", highest=20)
    steps: bool = option(False, "work the answer out, digit by digit")

    metric = "numeric"

    def draw_example(self, random: random.Random) -> Example:
        # Draw lengths first: of the numbers below 1000, nine in ten have three digits.
        longer = random.randint(1, self.digits)
        numbers = [draw_number(random, longer), draw_number(random, random.randint(1, longer))]
        random.shuffle(numbers)
        a, b = numbers
        sign, wording = random.choice("+-x"), random.choice(WORDINGS)
        answer = str({"+": a + b, "-": a - b, "x": a * b}[sign])
        if self.steps:
            answer = ". ".join({"+": add, "-": subtract, "x": multiply}[sign](a, b))
        return Example(
            wording.format(a=a, b=b, sign=sign, word=WORDS[sign]),
            answer,
            kind=f"{longer} digit{'s' * (longer > 1)} {sign}",
            key=f"{min(numbers)}{sign}{max(numbers)}",  # who knows 17+25 knows 25+17
        )


def draw_number(random: random.Random, length: int) -> int:
    """A number with so many digits."""
    return random.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)


# ---- the worked steps, of which the last one is the answer ------------------------------------------


def digits_of(number: int) -> list[int]:
    """From the last to the first."""
    return [int(digit) for digit in reversed(str(number))]


def add(a: int, b: int) -> Iterator[str]:
    """Column by column, carrying what exceeds 9."""
    carry = 0
    for x, y in itertools.zip_longest(digits_of(a), digits_of(b), fillvalue=0):
        value = x + y + carry
        yield f"{x}+{y}{f'+{carry}' * (carry > 0)}={value}{', carry 1' * (value > 9)}"
        carry = value // 10
    yield f"{a}+{b}={a + b}"


def subtract(a: int, b: int) -> Iterator[str]:
    """Column by column, borrowing from the next one; the smaller number from the larger."""
    larger, smaller, borrowed = max(a, b), min(a, b), 0
    for x, y in itertools.zip_longest(digits_of(larger), digits_of(smaller), fillvalue=0):
        borrows = x < y + borrowed
        x += 10 * borrows
        yield f"{x}-{y}{'-1' * borrowed}={x - y - borrowed}{', borrow 1' * borrows}"
        borrowed = int(borrows)
    yield f"{larger}-{smaller}={larger - smaller}"
    if a < b:
        yield f"{a}-{b}={a - b}"


def multiply(a: int, b: int) -> Iterator[str]:
    """a times each digit of b, column by column, and the sum of these."""
    total = 0
    for place, digit in enumerate(digits_of(b)):
        if b and not digit:
            continue
        carry = 0
        for x in digits_of(a):
            value = x * digit + carry
            carry_in, carry = carry, value // 10
            yield f"{x}x{digit}{f'+{carry_in}' * (carry_in > 0)}={value}{f', carry {carry}' * (carry > 0)}"
        factor = digit * 10**place
        yield f"{a}x{factor}={a * factor}"
        if total:
            yield from add(total, a * factor)
        total += a * factor
    if factor != b:
        yield f"{a}x{b}={total}"
