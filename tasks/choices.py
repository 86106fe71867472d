"""Multiple choice about the sample world: one true answer and three that are true of others.

    Where does Anna live?
    A. Rome
    B. Paris
    C. Delhi
    D. Cairo                                      -> B

With letters=false, the question stands alone, and the likeliest of the whole answers counts ("Anna lives in
Rome.", "Anna lives in Paris.", ...): a model that only continues texts can be asked what it knows, too.

To test with are the facts that the world holds out, of all relations with at least four different values.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dataset.sample_world import LANGUAGES, Fact, World, build_world
from tasks import DrawnTask, Example, option

LETTERS = "ABCD"


@dataclass
class Choices(DrawnTask):
    """See the top of this file."""

    letters: bool = option(True, "list the answers, and ask for a letter")
    seed: int = option(1337, "which world", lowest=0, highest=10**9)
    size: float = option(1.0, "how many people live in it; 1.0 is 24", lowest=0.1, highest=20)

    metric = "choice"

    @property
    def facts(self) -> Facts:
        return facts_of(self.seed, self.size)

    def draw_example(self, random: random.Random) -> Example:
        return self.ask(random, random.choice(self.facts.all), random.choice(LANGUAGES))

    def is_test(self, example: Example) -> bool:
        return example.key in self.facts.world.held_out

    def examples(self, split: str, seed: int) -> Iterator[Example]:
        """An endless stream for "train"; for "test", every held-out fact in both languages, shuffled."""
        if split == "train":
            return super().examples(split, seed)
        chance = random.Random(f"{self.name}/test/{seed}")
        held_out = [fact for fact in self.facts.all if fact.key in self.facts.world.held_out]
        asked = [(fact, language) for fact in held_out for language in LANGUAGES]
        chance.shuffle(asked)
        return (self.ask(chance, fact, language) for fact, language in asked)

    def ask(self, random: random.Random, fact: Fact, language: str) -> Example:
        """Ask for a fact; the other choices are values of the same relation."""
        if fact.key in self.facts.world.held_out:
            question = self.facts.world.evaluation_question(fact, language)
        else:
            question = random.choice(fact.questions(language))
        right = fact.value(language)
        values = [value for value in self.facts.values[fact.kind, language] if value != right]
        values = [right, *random.sample(values, len(LETTERS) - 1)]
        random.shuffle(values)
        if self.letters:
            question += "".join(f"\n{letter}. {value}" for letter, value in zip(LETTERS, values, strict=True))
            choices = list(LETTERS)
        else:
            choices = [with_value(fact, language, value) for value in values]
        return Example(question, choices[values.index(right)], fact.kind, tuple(choices), fact.key)


@functools.lru_cache(100_000)
def with_value(fact: Fact, language: str, value: str) -> str:
    """The answer that states this value, such as "Anna lives in Rome."."""
    slots = {language: {**fact.slots[language], "v": value}}
    return dataclasses.replace(fact, slots=slots).answer(language)


class Facts(NamedTuple):
    """A world, its facts of relations with enough values, and {(relation, language): its values}."""

    world: World
    all: list[Fact]
    values: dict[tuple[str, str], list[str]]


@functools.lru_cache(4)
def facts_of(seed: int, size: float) -> Facts:
    """What can be asked about a world."""
    world = build_world(seed, size)
    values: dict[tuple[str, str], dict[str, None]] = {}
    for fact in world.facts:
        for language in LANGUAGES:
            values.setdefault((fact.kind, language), {})[fact.value(language)] = None
    enough = {key: list(found) for key, found in values.items() if len(found) >= len(LETTERS)}
    facts = [fact for fact in world.facts if all((fact.kind, language) in enough for language in LANGUAGES)]
    return Facts(world, facts, enough)
