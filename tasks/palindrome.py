"""Write a number backwards: 123456 -> 654321."""

from tasks import DigitProblem


class Palindrome(DigitProblem):
    is_causal = False

    def answer(self, question):
        return question[::-1]

    def model(self):
        # Where a digit goes follows from its place alone, and rotary positions tell only distances.
        return {**super().model(), "use_rope": False}
