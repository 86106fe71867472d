"""Questions about the sample world, in Chinese and English: what dataset/sample_world.py writes.

To train on are the conversations of sft.jsonl, to test with the questions of eval.jsonl. They ask about other
facts, which only the world's pretrain.txt states.
"""

import functools
from dataclasses import dataclass

from dataset.sample_world import Turns, write_texts
from tasks import Example, ListedTask, option
from tokenizer import Message


@dataclass
class World(ListedTask):
    """See the top of this file."""

    seed: int = option(1337, "which world", lowest=0, highest=10**9)
    size: float = option(1.0, "how many people live in it; 1.0 is 24", lowest=0.1, highest=20)

    def listed(self, split: str) -> list[Example]:
        return examples_of(self.seed, self.size)[split]


@functools.lru_cache(4)
def examples_of(seed: int, size: float) -> dict[str, list[Example]]:
    """All examples of a world, for "train" and for "test"."""
    texts = write_texts(seed, size)
    return {
        "train": [example_of(turns) for _, turns in texts.taught],
        "test": [example_of(turns, fact.kind) for fact, _, turns in texts.questions],
    }


def example_of(turns: Turns, kind: str = "") -> Example:
    """A conversation, of which the last answer is asked for."""
    *before, (question, answer) = turns
    if not before:
        return Example(question, answer, kind)
    messages: list[Message] = []
    for asked, answered in before:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return Example([*messages, {"role": "user", "content": question}], answer, kind)
