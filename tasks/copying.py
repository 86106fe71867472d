"""Repeat a text of random letters: "Repeat: qkzzv" -> qkzzv. The table shows up to which length it works."""

import random
import string
from dataclasses import dataclass

from tasks import DrawnTask, Example, option

QUARTERS = ("0-25 %", "25-50 %", "50-75 %", "75-100 %")


@dataclass
class Copying(DrawnTask):
    """See the top of this file."""

    length: int = option(32, "how many characters a text has at most", lowest=4, highest=100_000)

    def draw_example(self, random: random.Random) -> Example:
        # With few different letters ("abbab"), the next one depends on more than the one before it.
        letters = random.sample(string.ascii_lowercase, random.randint(2, 26))
        length = random.randint(1, self.length)
        text = "".join(random.choices(letters, k=length))
        kind = f"{QUARTERS[4 * (length - 1) // self.length]} of {self.length:,}"
        return Example(f"Repeat: {text}", text, kind, key=text)
