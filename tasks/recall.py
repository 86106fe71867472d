"""Look up one of many pairs: "kalo=37, bemi=52, tusa=18. What is bemi?" -> 52.

How far does the context really carry? The kind of an example is how far back the pair lies, as a share of the
context: a model that sees less than it should knows the near pairs and not the far ones. (After associative
recall, Arora et al. 2023, "Zoology", and the "needle in a haystack", with nothing but needles.)
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tasks import DrawnTask, Example, option
from tasks.copying import QUARTERS

SYLLABLES = ["".join(pair) for pair in itertools.product("bcdfghjklmnpqrstvwxz", "aeiou")]
KEYS = ["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)]
VALUES = [str(number) for number in range(10, 100)]
PAIR = len("kalo=37, ")


@dataclass
class Recall(DrawnTask):
    """See the top of this file."""

    length: int = option(72, "how many characters of pairs there are", lowest=4 * PAIR, highest=80_000)

    @property
    def n_pairs(self) -> int:
        return self.length // PAIR

    def draw_example(self, random: random.Random) -> Example:
        keys, values = random.sample(KEYS, self.n_pairs), random.choices(VALUES, k=self.n_pairs)
        pairs = ", ".join(map("=".join, zip(keys, values, strict=True)))
        back = random.randrange(self.n_pairs)  # the pairs between this one and the question
        key, value = keys[-1 - back], values[-1 - back]
        return Example(f"{pairs}. What is {key}?", value, f"{QUARTERS[4 * back // self.n_pairs]} back")

    def base_rate(self, examples: Sequence[Example]) -> float:
        """The score of any value from the context: it is the right one, or else equals it by chance."""
        return 1 / self.n_pairs + (1 - 1 / self.n_pairs) / len(VALUES)
