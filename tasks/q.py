"""How many closed circles are in the digits of a number: 0, 6 and 9 have one, 8 has two. 8096 -> 5."""

from tasks import DigitProblem

CIRCLES = {"0": 1, "6": 1, "8": 2, "9": 1}


class Q(DigitProblem):
    def answer(self, question):
        return str(sum(CIRCLES.get(digit, 0) for digit in question))

    @property
    def longest(self):
        return self.digits, len(str(2 * self.digits))
