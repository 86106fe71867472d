"""Write a number backwards: 123456 -> 654321."""

from typing import Any

from tasks.problems import DigitProblem


class Palindrome(DigitProblem):
    """See the top of this file."""

    is_causal = False

    def answer(self, question: str) -> str:
        return question[::-1]

    def model(self) -> dict[str, Any]:
        # The target position depends on the absolute position, and RoPE encodes only distances.
        return {**super().model(), "use_rope": False}
