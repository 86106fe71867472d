"""Decide whether the regular expressions of a tokenizer from elsewhere are safe to run on any text.

Such a tokenizer brings patterns that cut text into words. They are applied by Oniguruma, a regex engine
inside the `tokenizers` library, which works by backtracking: where a part of a pattern can match in several
ways, it tries one, and if the rest of the pattern then fails, it goes back and tries the next. A pattern may
have exponentially many ways. `(a+)+$` can divide the letters of "aaaa...b" between its two + in two ways at
every letter, and the engine tries all of them before it gives up ("catastrophic backtracking"). The library
has no time limit.

So a pattern is analysed before it is used: it is parsed, and for each of its parts the parser computes upper
bounds on the steps that a match takes at one position of the worst text. If a failing match may take too
many, or the pattern has syntax that the parser does not know, the pattern is refused. Those of released
models pass: they run through letters or blanks once, and at most go back through them once. Atomic groups
`(?>...)` and possessive quantifiers `a++` have only one way to match, as backtracking never enters them.
"""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers

MAX_LENGTH = 10_000  # characters of all patterns of a tokenizer; the library makes 20 KB of every \p{L}
MAX_DEPTH = 30  # of nested groups
MAX_STEPS = 100_000  # of a failing match at one position
# The worst text: the length of a run of one kind of characters (letters or blanks), and of both kinds mixed.
LONGEST_RUN, LONGEST_TEXT = 1_000, 1_000_000

# The syntax that is known. A token is the start of a group, the end of an alternative, an anchor (it consumes
# nothing), or an atom, which matches exactly one character.
ESCAPE = r"\\(?:[pPdDsSwWhHnrtfvxu]|\W)"
CLASS = rf"\[(?:\^(?!\])|(?!\^))(?:[^\[\]\\]|{ESCAPE}|%s)+\]"
TOKEN = re.compile(
    rf"""(?P<open>\((?:\?(?:[i-]*:|>|<?[=!]))?)
    |(?P<end>\||\)|\Z)
    |(?P<anchor>[\^$]|\\[bBAzZ])
    |(?P<atom>{CLASS % (CLASS % "(?!)")}|\\[pP]\{{\^?\w+\}}|\\x[0-9a-fA-F]{{2}}|\\u[0-9a-fA-F]{{4}}
        |\\[dDsSwWhHnrtfv]|\\\W|[^\\\[\](){{}}*+?|^$])""",
    re.VERBOSE | re.DOTALL,
)
QUANTIFIER = re.compile(r"([*+?])|\{(\d*)(,?)(\d*)\}")
LETTERS, BLANKS = "aA0é中", " \n"


class Cost(NamedTuple):
    """Upper bounds on what a part of a pattern does at one position of the worst text."""

    ways: float = 1  # how many ways it has to match
    fail: float = 1  # steps until it is clear that it does not match
    exhaust: float = 1  # steps to try all its ways, because what follows never matches
    may_fail: bool = True
    kinds: frozenset[str] = frozenset()  # the kinds of characters that its atoms match: "letters", "blanks"


def why_unsafe(patterns: list[str]) -> str | None:
    """Why these patterns are refused, to be said after "one of its patterns "; None if they are safe."""
    if not all(isinstance(pattern, str) for pattern in patterns):
        return "is not text"
    if sum(map(len, patterns)) > MAX_LENGTH:
        return f"is too long: all of them together may have {MAX_LENGTH:,} characters"
    for pattern in patterns:
        try:
            _splitter(pattern)
            cost, end = cost_of(pattern)
        except ValueError as error:
            return f"is {error}: {pattern[:200]}"
        if end < len(pattern):
            return f"is not a regular expression: {pattern[:200]}"
        if not cost.fail <= MAX_STEPS:
            return f"would take years on some texts: {pattern[:200]}"
    return None


def _splitter(pattern: str) -> pre_tokenizers.Split:
    """The library's own use of a pattern: it cuts a text at the matches and drops these.

    ValueError if the library cannot compile the pattern.
    """
    from tokenizers import Regex, pre_tokenizers

    try:
        return pre_tokenizers.Split(Regex(pattern), "removed")
    except Exception:  # the library raises nothing more specific
        raise ValueError("not a regular expression") from None


@functools.cache
def _kinds(atom: str) -> frozenset[str]:
    """Which of letters and blanks an atom matches."""
    splitter = _splitter(atom)
    kinds = {"letters": LETTERS, "blanks": BLANKS}
    return frozenset(
        kind
        for kind, samples in kinds.items()
        if any(not splitter.pre_tokenize_str(character) for character in samples)
    )


def _power(base: float, exponent: float) -> float:
    try:
        return float(base) ** exponent
    except OverflowError:
        return math.inf


def _alternation(branches: list[Cost]) -> Cost:
    """a|b|c: all branches may have to be tried."""
    ways, fail, exhaust, may_fail, kinds = zip(*branches, strict=True)
    return Cost(sum(ways), sum(fail), sum(exhaust), all(may_fail), frozenset().union(*kinds))


def _sequence(parts: list[Cost]) -> Cost:
    """abc: each way of the parts before it is a new start for a part.

    Behind the last part that may fail, nothing causes backtracking any more: what is there always matches.
    """
    last = max((i for i, part in enumerate(parts) if part.may_fail), default=-1)
    ways: float = 1
    fail: float = 0
    exhaust: float = 0
    for i, part in enumerate(parts):
        fail += ways * part.exhaust if i < last else ways * part.fail if i == last else part.fail
        ways, exhaust = ways * part.ways, exhaust + ways * part.exhaust
    return Cost(ways, fail, exhaust, last >= 0, frozenset().union(*(part.kinds for part in parts)))


def _repetition(part: Cost, least: int, most: float) -> Cost:
    """a{least,most}, greedy or lazy, which makes no difference to the worst case."""
    times = most if most < math.inf else LONGEST_TEXT if len(part.kinds) > 1 else LONGEST_RUN

    def starts(n: float) -> float:
        """How many iterations are started over all ways to match n times in a row: 1 + ways + ways² + ..."""
        return n if part.ways == 1 else (_power(part.ways, n) - 1) / (part.ways - 1)

    return Cost(
        ways=starts(times + 1) - starts(min(least, times)),
        fail=part.exhaust * starts(least) if least > 1 else part.fail,
        exhaust=part.exhaust * starts(times) + part.fail,
        may_fail=part.may_fail and least > 0,
        kinds=part.kinds,
    )


def cost_of(pattern: str, at: int = 0, depth: int = 0) -> tuple[Cost, int]:
    """Parse alternatives from position `at` to the closing bracket of their group, or the end of the pattern.

    Returns (their cost, the position of that end). ValueError for unknown or wrong syntax.
    """
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    branches: list[Cost] = []
    branch: list[Cost] = []
    while True:
        token = TOKEN.match(pattern, at)
        if not token:
            raise ValueError("of a kind that Nano does not know")
        at = token.end()
        match token.lastgroup:
            case "atom":
                part = Cost(kinds=_kinds(token[0]))
            case "anchor":
                part = Cost()
            case "open":
                part, at = cost_of(pattern, at, depth + 1)
                if pattern[at : at + 1] != ")":
                    raise ValueError("not a regular expression")
                at += 1
                if token[0][-1] in "=!":  # lookahead or lookbehind: it consumes nothing
                    part = Cost(fail=part.fail + part.exhaust, exhaust=part.fail + part.exhaust)
                elif token[0][-1] == ">":  # atomic group
                    part = part._replace(ways=1)
            case _:
                branches.append(_sequence(branch))
                if token[0] != "|":
                    return _alternation(branches), at - len(token[0])
                branch = []
                continue
        while quantifier := QUANTIFIER.match(pattern, at):
            at = quantifier.end()
            sign, low, comma, high = quantifier.groups()
            if sign:
                least, most = int(sign == "+"), (1 if sign == "?" else math.inf)
            elif not low and not high:
                raise ValueError("not a regular expression")
            else:
                least, most = int(low or 0), int(high) if high else math.inf if comma else int(low)
            part = _repetition(part, least, most)
            suffix = pattern[at : at + 1]
            if sign and suffix in ("?", "+"):  # lazy or possessive
                at += 1
                part = part._replace(ways=1) if suffix == "+" else part
        branch.append(part)
