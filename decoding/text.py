"""From tokens to text, one token at a time, up to a stop string."""

from __future__ import annotations

import codecs
import collections
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizer import Tokenizer


def word_of(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token. Rows of a model beyond its tokenizer's vocabulary are <|unknown|>."""
    return tokenizer.token_bytes[token if token < tokenizer.vocab_size else tokenizer.unknown_id]


class StopStrings:
    """Finds the first of several strings in a text that arrives in pieces, looking at each character once.

    An automaton (Aho & Corasick 1975, "Efficient String Matching"). Its state stands for the longest suffix
    of the text so far that is a prefix of one of the strings; state 0 is the empty one. For each state:

    next: {character: the state after it}, where that suffix grows
    back: the state of the next shorter suffix that is a prefix of one of the strings
    length: the number of characters of the suffix
    found: the length of the longest string that ends here, 0 if none does
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.back, self.length, self.found = [0], [0], [0]
        for string in strings:
            state = 0
            for character in string:
                state = self.next[state].setdefault(character, len(self.next))
                if state == len(self.next):
                    self.next.append({})
                    self.length.append(0)
                    self.found.append(0)
                    self.back.append(0)
            self.found[state] = len(string)
        states = collections.deque([0])
        while states:  # shorter suffixes before longer ones
            state = states.popleft()
            for character, longer in self.next[state].items():
                back = self.step(self.back[state], character) if state else 0
                self.back[longer], self.length[longer] = back, self.length[state] + 1
                self.found[longer] = self.found[longer] or self.found[back]
                states.append(longer)

    def step(self, state: int, character: str) -> int:
        """The state after another character."""
        while state and character not in self.next[state]:
            state = self.back[state]
        return self.next[state].get(character, 0)


class TextStream:
    """Takes tokens one by one and returns text as soon as it is final.

    A token may hold only a part of a character, and the end of the text may be the beginning of a stop
    string: both are held back. stop: the stop strings, a list or StopStrings. The text ends before a stop
    string, and `is_stopped` becomes true. Of several that overlap, the one that is complete first counts; of
    those that are complete at the same character, the longest.
    """

    def __init__(self, tokenizer: Tokenizer, stop: StopStrings | Iterable[str] = ()) -> None:
        self.tokenizer, self.is_stopped = tokenizer, False
        self.stop = stop if isinstance(stop, StopStrings) else StopStrings(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._state, self._held = 0, ""

    def feed(self, token: int) -> str:
        """Add a token; returns the text that is final now, "" if there is none."""
        return self._release(self._decoder.decode(word_of(self.tokenizer, token)))

    def end(self) -> str:
        """No more tokens: returns the text that was held back."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.is_stopped:
            return ""
        pending = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            self._state = self.stop.step(self._state, character)
            if n_found := self.stop.found[self._state]:
                self.is_stopped, self._held = True, ""
                return pending[: end - n_found]
        n_final = len(pending) - self.stop.length[self._state]
        self._held = pending[n_final:]
        return pending[:n_final]
