"""A few dozen made-up examples of every kind of task, for lm-evaluation-harness."""

import random

from datasets import Dataset

COLOURS = ["red", "green", "blue", "yellow", "white", "black"]
ANIMALS = ["cat", "dog", "horse", "mouse", "owl", "whale"]
PLACES = ["the old house", "a garden", "the forest", "town"]


def splits(make, n):
    """{split: documents}, the same each time; the keyword arguments of the harness are not needed."""

    sizes = {"train": 6, "test": n}

    def documents(**_):
        draw = random.Random(make.__name__)
        return {split: Dataset.from_list([make(draw) for _ in range(size)]) for split, size in sizes.items()}

    return documents


def choice(draw):
    colours = draw.sample(COLOURS, 4)
    text = f"The {draw.choice(ANIMALS)} in {draw.choice(PLACES)} is"
    return {"question": text, "choices": [f"{one} and {draw.choice(ANIMALS)}-like" for one in colours],
            "gold": draw.randrange(4)}  # fmt: skip


def letter(draw):
    return {"question": f"{draw.choice(ANIMALS)} or {draw.choice(ANIMALS)}?", "gold": draw.randrange(4)}


def cloze(draw):
    words = draw.sample(ANIMALS, 3)
    return {"text": f"{words[0]}, {words[1]} and {words[2]}; {words[0]}, {words[1]} and", "word": words[2]}


def generation(draw):
    a, b = draw.randrange(20), draw.randrange(20)
    return {"question": f"{a} + {b}", "answer": f"{a + b}\n"}


def rolling(draw):
    words = (draw.choice(ANIMALS + COLOURS) for _ in range(draw.choice((3, 9, 40))))
    return {"text": " ".join(words) + "."}


def code(draw):
    name, n = draw.choice("fgh"), draw.randrange(9)
    return {"prompt": f"def {name}(x):\n", "test": f"assert {name}({n}) == {n + 1}\n"}


choices, letters, clozes = splits(choice, 16), splits(letter, 12), splits(cloze, 12)
generations, texts, programs = splits(generation, 10), splits(rolling, 8), splits(code, 6)


def build_programs(resps, docs):
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def pass_at_k(references, predictions, k):
    import evaluate

    return evaluate.load("code_eval").compute(references=references, predictions=predictions, k=k)[0]
