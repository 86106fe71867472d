"""Which regular expressions of a tokenizer may be trusted with any text.

A tokenizer that others have made brings patterns that cut text into words. The library that applies them
(Oniguruma, within `tokenizers`) finds a match by trying: of `(a+)+$`, two ways at each letter of "aaaa...b".
There is no time limit that one could set. So patterns are read here, and one is taken only if it loses few
steps at any place of a text. Those of released models do: they go through a run of letters, or of blanks, and
at most step back through it.
"""

import functools
import math
import re
from typing import NamedTuple

LONGEST = 10_000  # characters of all patterns of a tokenizer: of each \p{L} the library makes 20 KB
DEEPEST = 30  # groups within each other
RUN, TEXT = 1_000, 1_000_000  # characters in a row of one kind, letters or blanks, and of both
MOST = 100_000  # steps lost at one place of such a text

ESCAPE = r"\\(?:[pPdDsSwWhHnrtfvxu]|\W)"
CLASS = rf"\[(?:\^(?!\])|(?!\^))(?:[^\[\]\\]|{ESCAPE}|%s)+\]"
TOKEN = re.compile(
    rf"""(?P<open>\((?:\?(?:[i-]*:|>|<?[=!]))?)
    |(?P<end>\||\)|\Z)
    |(?P<place>[\^$]|\\[bBAzZ])
    |(?P<atom>{CLASS % (CLASS % "(?!)")}|\\[pP]\{{\^?\w+\}}|\\x[0-9a-fA-F]{{2}}|\\u[0-9a-fA-F]{{4}}
        |\\[dDsSwWhHnrtfv]|\\\W|[^\\\[\](){{}}*+?|^$])""",
    re.VERBOSE | re.DOTALL,
)
REPEAT = re.compile(r"([*+?])|\{(\d*)(,?)(\d*)\}")
LETTERS, BLANKS = "aA0é中", " \n"


class Part(NamedTuple):
    """How a part of a pattern behaves at a place of a text."""

    ways: float = 1  # in which it can match
    lost: float = 1  # steps until it is clear that there is none
    tried: float = 1  # steps until all are tried, as what follows never matches
    may_fail: bool = True
    kinds: frozenset = frozenset()  # of characters that are matched in it


def trouble(patterns):
    """What is wrong with a list of patterns, to be said after "one of its patterns ", or None."""
    if not all(isinstance(pattern, str) for pattern in patterns):
        return "is no text"
    if sum(map(len, patterns)) > LONGEST:
        return f"is too long: they may have {LONGEST:,} characters in all"
    for pattern in patterns:
        try:
            _library(pattern)
            part, end = _alternatives(pattern, 0)
        except ValueError as error:
            return f"is {error}: {pattern[:200]}"
        if end < len(pattern):
            return f"is no regular expression: {pattern[:200]}"
        if not part.lost <= MOST:
            return f"would take years on some texts: {pattern[:200]}"
    return None


def _library(pattern):
    """What cuts a text at matches of the pattern, and leaves these out. ValueError if it is no pattern."""
    from tokenizers import Regex, pre_tokenizers

    try:
        return pre_tokenizers.Split(Regex(pattern), "removed")
    except Exception:  # the library knows no other kind
        raise ValueError("no regular expression") from None


def _alternatives(pattern, at, depth=0):
    """(Part, where it ends) of what begins at `at` and ends at a bracket that closes, or with the pattern."""
    if depth > DEEPEST:
        raise ValueError("nested too deeply")
    branches, branch = [], []
    while True:
        found = TOKEN.match(pattern, at)
        if not found:
            raise ValueError("of a kind that Nano does not know")
        at = found.end()
        match found.lastgroup:
            case "atom":
                part = Part(kinds=_kinds(found[0]))
            case "place":
                part = Part()
            case "open":
                part, at = _alternatives(pattern, at, depth + 1)
                if pattern[at : at + 1] != ")":
                    raise ValueError("no regular expression")
                at += 1
                if found[0][-1] in "=!":  # it looks ahead, or back, and stays where it is
                    part = Part(lost=part.lost + part.tried, tried=part.lost + part.tried)
                elif found[0][-1] == ">":
                    part = part._replace(ways=1)
            case "end":
                branches.append(_in_turn(branch))
                if found[0] != "|":
                    return _one_of(branches), at - len(found[0])
                branch = []
                continue
        while repeat := REPEAT.match(pattern, at):
            at = repeat.end()
            sign, least, comma, most = repeat.groups()
            if sign:
                least, most = (sign == "+"), (1 if sign == "?" else math.inf)
            elif not least and not most:
                raise ValueError("no regular expression")
            else:
                most = int(most) if most else math.inf if comma else int(least)
                least = int(least or 0)
            part = _repeated(part, least, most)
            follows = pattern[at : at + 1]
            if sign and follows in ("?", "+"):  # as few as possible; as many, for good
                at += 1
                part = part._replace(ways=1) if follows == "+" else part
        branch.append(part)


def _one_of(branches):
    ways, lost, tried, may_fail, kinds = zip(*branches, strict=True)
    return Part(sum(ways), sum(lost), sum(tried), all(may_fail), frozenset().union(*kinds))


def _in_turn(parts):
    """What stands behind the last part that may fail makes nobody step back."""
    last = max((i for i, part in enumerate(parts) if part.may_fail), default=-1)
    ways, lost, tried = 1, 0, 0
    for i, part in enumerate(parts):
        lost += ways * part.tried if i < last else ways * part.lost if i == last else part.lost
        ways, tried = ways * part.ways, tried + ways * part.tried
    return Part(ways, lost, tried, last >= 0, frozenset().union(*(part.kinds for part in parts)))


def _repeated(part, least, most):
    times = most if most < math.inf else TEXT if len(part.kinds) > 1 else RUN

    def starts(n):
        """How often a time is begun in all ways to match n times, or in none."""
        return n if part.ways == 1 else (_power(part.ways, n) - 1) / (part.ways - 1)

    return Part(
        ways=starts(times + 1) - starts(min(least, times)),
        lost=part.tried * starts(least) if least > 1 else part.lost,
        tried=part.tried * starts(times) + part.lost,
        may_fail=part.may_fail and least > 0,
        kinds=part.kinds,
    )


def _power(base, exponent):
    try:
        return float(base) ** exponent
    except OverflowError:
        return math.inf


@functools.cache
def _kinds(atom):
    """Which of letters and blanks one character of a pattern may be."""
    split = _library(atom)
    kinds = {"letters": LETTERS, "blanks": BLANKS}
    return frozenset(k for k, some in kinds.items() if any(not split.pre_tokenize_str(c) for c in some))
