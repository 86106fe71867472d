"""Which documents are held out for validation.

This is decided before anything is cut into blocks, so no token of a validation document is ever trained on.
"""

from collections.abc import Iterable, Iterator

import numpy as np


def mix64(x: np.ndarray) -> np.ndarray:
    """A well-mixed number for each uint64 of an array (SplitMix64's finalizer; Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Split:
    """Holds out about `fraction` of `n_documents`, chosen by a hash of (seed, number of the document).

    Of two or more documents, at least one is held out, and not all of them are.
    """

    def __init__(self, n_documents: int, fraction: float, seed: int) -> None:
        self.fraction = fraction
        self.key = mix64(np.array([seed], np.uint64))
        # One document is always held out and one never is. Choosing them among the first 65,536 is enough:
        # with more documents, the hash alone holds out some and keeps some.
        first = self._uniform(0, min(n_documents, 1 << 16))
        self.always, self.never = int(first.argmin()), int(first.argmax())

    def _uniform(self, start: int, count: int) -> np.ndarray:
        """A pseudorandom number in [0, 1) for each document."""
        numbers = np.arange(start, start + count, dtype=np.uint64)
        return mix64(numbers * np.uint64(0x9E3779B97F4A7C15) ^ self.key) / 2.0**64

    def held_out(self, start: int, count: int) -> np.ndarray:
        """Of the `count` documents from number `start` on, which are for validation: bool [count]."""
        numbers = np.arange(start, start + count)
        chosen = (self._uniform(start, count) < self.fraction) | (numbers == self.always)
        return chosen & (numbers != self.never)


def cut_in_two(
    batches: Iterable[tuple[list[str], bool]], n_characters: int, fraction: float
) -> Iterator[tuple[list[str], bool]]:
    """Cut the only document in `batches` in two; the second part is about its last `fraction`.

    It is cut after a line end if one is near: the second part may become twice as long for that.
    """
    cut_at = min(max(1, round(n_characters * (1 - fraction))), n_characters - 1)
    earliest = max(1, 2 * cut_at - n_characters)
    n_seen = 0
    for texts, is_open in batches:
        for text in texts:
            if n_seen < cut_at <= n_seen + len(text):
                after_line = text.rfind("\n", max(0, earliest - n_seen), cut_at - n_seen) + 1
                cut = after_line or cut_at - n_seen
                yield [text[:cut]], False
                yield [text[cut:]], is_open
            else:
                yield [text], is_open
            n_seen += len(text)
