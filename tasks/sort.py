"""Sort the digits of a number: 114515 -> 111455."""

from tasks import DigitProblem


class Sort(DigitProblem):
    is_causal = False

    def answer(self, question):
        return "".join(sorted(question))
