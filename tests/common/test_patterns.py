"""common/patterns.py: the patterns of released models are accepted, and none that may take years."""

# ruff: noqa: E501 (patterns are as long as they are)

import random
import time

import pytest
from tokenizers import Regex, pre_tokenizers

from common.patterns import MAX_STEPS, cost_of, why_unsafe

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TIKTOKEN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+END"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*END"
    r"|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SIGNS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def made(pattern, number, end=""):
    return [pattern.replace("NUMBER", number).replace("END", end)]


# As in the tokenizer.json of these models or their families, and in tiktoken.
RELEASED = {
    "GPT-2, OLMo, MPT": [GPT2],
    "SmolLM, StarCoder, Command R": [r"\p{N}", GPT2],
    "Falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "GPT-4 in tiktoken": [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s"
    ],
    "Llama 3, DBRX, GLM-4": made(WORDS, r"\p{N}{1,3}"),
    "Qwen 2 and 3, StableLM 2, Grok 2": made(WORDS, r"\p{N}"),
    "Qwen 3.5": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "MiniCPM 5": [r"\p{N}{1,3}", *made(WORDS, r"\p{N}+")],
    "Seed-Coder": [
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+"
        "|\\s+(?!\\S)|\\s+"
    ],
    "nanochat": made(TIKTOKEN, r"\p{N}{1,2}"),
    "Ling": made(TIKTOKEN, r"\p{N}"),
    "GPT-4o, gpt-oss, MiniMax M2": made(CASES, r"\p{N}{1,3}", ENDS),
    "Tekken: Mistral Nemo": made(CASES, r"\p{N}"),
    "Kimi K2": [
        r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "DeepSeek LLM": [
        "[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿ]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+", r"\p{N}+",
    ],
    "DeepSeek Coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    "DeepSeek V3 and R1, Hunyuan": [r"\p{N}{1,3}", r"[一-龥\u3040-ゟ゠-ヿ]+", SIGNS],
    "Youtu": ["[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+", *made(CASES, r"\p{N}", ENDS)],
    "BLOOM, Poro, Viking": [r" ?[^(\s|[.,!?…。，、।۔،])]+", r"\p{N}"],
    "Jais 2": [
        *made(WORDS.removesuffix(r"|\s+(?!\S)|\s+"), r"\p{N}{1,3}"),
        "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}",
    ],
    "EXAONE": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
    ],
    "Tiny Aya": [r"\d{1,3}(?=(?:\d{3})*\b)", *made(CASES, r"\p{N}{1,3}", ENDS)],
    "SuperBPE": [r"\p{N}+", r"(?=(\d{3})+(?!\d))"],
    "Chameleon": [
        "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\\t\\n]|    |  )", r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
    ],
    "Laguna, Gemma 4": [r"[^\n]+|[\n]+"],
    "no cut at all": [r"[\s\S]+"],
}  # fmt: skip


@pytest.mark.parametrize("model", RELEASED)
def test_patterns_of_released_models_are_accepted(model):
    assert why_unsafe(RELEASED[model]) is None
    assert all(cost_of(pattern)[0].fail < MAX_STEPS / 3 for pattern in RELEASED[model])


YEARS = [
    r"(a+)+$", r"(a|a)*$", r"(?:a|b|ab)*c", r"(\w+\s?)+!", r"(?:\w\s)*!", r"a?" * 30 + "a" * 30, r"(a*)*b",
    r"((a{1,9}){1,9}){1,9}b", r"(.*)x", r"[\s\S]*\x00|[\s\S]", r"\w*\w*!", r"(?=[\s\S]*x)[\s\S]", r"x([\s\S]*9)?",
    r"(?!\w*\w*\d)a", r"(?:a+){2,}b", r"\p{L}+\p{L}+\p{L}+!", r"[^x]*x", r"(?<=a+b*c*)d|(\s*\S*)*!",
    r"(?:[a-z]|[a-y])+9",
]  # fmt: skip
UNKNOWN = [
    r"(?<name>a)\k<name>", r"(a)\1", r"(?<n>a\g<n>?b)", r"(?i)a", r"(?x) a # b", r"a(?#comment)", r"\Ga", r"a\Kb",
    r"\X+", r"(?~ab)", r"[]a+]", r"[^]a+]", r"[\c]a+]", r"(?(1)a|b)", r"\R", r"[[[a]]]", r"a\Qb\E",
]  # fmt: skip
NONE = ["(", ")", "a)", "(a", "[a", "*a", "a{2", "{2}", "(?", "|*", r"\p{Nothing}", "a" * 10_001, "\\"]


@pytest.mark.parametrize("pattern", [*YEARS, *UNKNOWN, *NONE])
def test_slow_or_unknown_patterns_are_refused(pattern):
    why = why_unsafe([pattern])
    assert why and (pattern not in YEARS or why.startswith("would take years on some texts: "))


def test_lists_of_patterns_are_bounded():
    assert why_unsafe([3]) == "is not text"
    assert why_unsafe(["a" * 100] * 100) is None
    assert "too long" in why_unsafe(["a" * 100] * 101)
    assert "nested too deeply" in why_unsafe(["(" * 40 + "a" + ")" * 40])


TEXTS = ["a" * 3000, " " * 3000, "aB" * 1500, "1" * 3000, "\n" * 3000, " \n" * 1500, "中" * 3000, "a 1\n" * 750,
         "".join(random.Random(0).choices("aB1 \n中.,'é", k=3000))]  # fmt: skip


@pytest.mark.parametrize("n_invented", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_accepted_patterns_are_fast(n_invented):
    """All of those above, and random combinations of pieces."""
    dice, taken, refused = random.Random(0), 0, 0
    pieces = [
        "a",
        r"\w",
        r"\s",
        r"\p{L}",
        r"[^a]",
        "(a|b)",
        r"(?:\w\s)",
        "(?=a)",
        r"(?!\s)",
        "1",
        r"[\s\S]",
        "|",
    ]
    signs = ["", "", "*", "+", "?", "{1,3}", "{2,}", "*?", "++"]

    def invented(depth=0):
        parts = []
        for _ in range(dice.randint(1, 4)):
            part = f"({invented(depth + 1)})" if depth < 3 and dice.random() < 0.3 else dice.choice(pieces)
            parts.append(part if part == "|" else part + dice.choice(signs))
        return "".join(parts)

    patterns = [pattern for some in RELEASED.values() for pattern in some]
    patterns += [invented() for _ in range(n_invented)]
    for pattern in patterns:
        if why_unsafe([pattern]):
            refused += 1
            continue
        taken += 1
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        for text in TEXTS:
            began = time.process_time()
            found = "".join(piece for piece, _ in split.pre_tokenize_str(text))
            assert "".join(found.split()) == "".join(text.split())
            assert time.process_time() - began < 2, pattern
    assert min(taken, refused) > n_invented / 5, (taken, refused)
