"""Write a number backwards: 123456 -> 654321."""

from tasks import DigitProblem


class Palindrome(DigitProblem):
    is_causal = False

    def answer(self, question):
        return question[::-1]
