"""What letters a word is made of: spell it, count a letter in it, write it backwards.

Tokens hide the letters of words from a model (nanochat's SpellingBee shows how to teach them). The words are
made up of syllables, so there is no list to download and no end to them.
"""

import itertools
import random
import string
from dataclasses import dataclass

from tasks import DrawnTask, Example, option

STARTS = ("", *"b br c ch d dr f fl g gr h j k l m n p pl qu r s sh sl st t th tr v w x y z".split())
VOWELS = "a e i o u ai ea oo".split()
ENDS = ("", "", "", *"l ll m n nd ng r rt s ss t tt".split())
SYLLABLES = ["".join(parts) for parts in itertools.product(STARTS, VOWELS, ENDS)]

WORDINGS = {
    "spell": ("Spell {word}.", "Which letters make up {word}?"),
    "count": ("Count the letter {letter} in {word}.", "How often is {letter} in {word}?"),
    "reverse": ("Write {word} backwards.", "Reverse {word}."),
}


@dataclass
class Spelling(DrawnTask):
    """See the top of this file."""

    syllables: int = option(3, "how many syllables a word has at most", highest=100)

    def draw_example(self, random: random.Random) -> Example:
        word = draw_word(random, self.syllables)
        kind = random.choice(list(WORDINGS))
        # One letter in four is drawn from the whole alphabet, and is often not in the word.
        letter = random.choice(word if random.random() < 0.75 else string.ascii_lowercase)
        answer = {"spell": " ".join(word), "count": str(word.count(letter)), "reverse": word[::-1]}[kind]
        question = random.choice(WORDINGS[kind]).format(word=word, letter=letter)
        return Example(question, answer, kind, key=word)


def draw_word(random: random.Random, syllables: int) -> str:
    """A word that can be pronounced, of at most so many syllables."""
    return "".join(random.choices(SYLLABLES, k=random.randint(1, syllables)))
