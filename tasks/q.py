"""Count the closed loops in the digits of a number: 0, 6 and 9 have one, 8 has two. 8096 -> 5."""

from tasks.problems import DigitProblem

LOOPS = {"0": 1, "6": 1, "8": 2, "9": 1}


class Q(DigitProblem):
    """See the top of this file."""

    def answer(self, question: str) -> str:
        return str(sum(LOOPS.get(digit, 0) for digit in question))

    @property
    def longest(self) -> tuple[int, int]:
        return self.digits, len(str(2 * self.digits))
