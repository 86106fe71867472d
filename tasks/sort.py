"""Sort the digits of a number: 114515 -> 111455."""

from tasks.problems import DigitProblem


class Sort(DigitProblem):
    """See the top of this file."""

    is_causal = False

    def answer(self, question: str) -> str:
        return "".join(sorted(question))
