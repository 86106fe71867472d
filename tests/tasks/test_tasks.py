"""The project's own tasks: answers computed in other ways, what is for testing only, and their options."""

import collections
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tasks
from common.errors import UserError
from dataset import sample_world
from tasks import Example, Task, key_of
from tasks.questions import Questions
from tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parents[2]
SPECS = (
    "arithmetic", "arithmetic:digits=4,steps=true", "spelling", "copying", "recall", "recall:length=400",
    "world", "choices", "choices:letters=false,seed=7,size=0.5",
)  # fmt: skip
KINDS = {
    "arithmetic": {f"{n} {sign}" for n in ("1 digit", "2 digits") for sign in "+-x"},
    "spelling": {"spell", "count", "reverse"},
    "copying": {f"{quarter} of 32" for quarter in ("0-25 %", "25-50 %", "50-75 %", "75-100 %")},
    "recall": {f"{quarter} back" for quarter in ("0-25 %", "25-50 %", "50-75 %", "75-100 %")},
}


def taught(task, seed, count):
    return [task.train_example(seed, number) for number in range(int(min(count, task.n_train)))]


def held_out(task, seed, count):
    return list(itertools.islice(task.examples("test", seed), count))


def some(spec, count=1500):
    """Examples of both splits."""
    task = tasks.parse(spec)
    return taught(task, 3, count) + held_out(task, 3, 100)


# ---- right answers -----------------------------------------------------------------------------------

SIGNS = {
    "+": int.__add__, "plus": int.__add__, "-": int.__sub__, "minus": int.__sub__, "x": int.__mul__,
    "times": int.__mul__,
}  # fmt: skip


def asked(question):
    """(a, sign, b) of a question of `arithmetic`."""
    [(a, sign, b)] = re.findall(r"(\d+) ?([-+x]|plus|minus|times) ?(\d+)", question)
    return int(a), sign, int(b)


@pytest.mark.parametrize("digits", [1, 2, 5])
def test_arithmetic(digits):
    for example in some(f"arithmetic:digits={digits}"):
        a, sign, b = asked(example.question)
        assert int(example.answer) == SIGNS[sign](a, b), example
        length = max(len(str(a)), len(str(b)))
        assert length <= digits and example.kind.startswith(f"{length} digit")


@pytest.mark.parametrize("digits", [1, 2, 3, 7, 20])
def test_worked_steps_are_right_and_end_with_the_answer(digits):
    task = tasks.parse(f"arithmetic:digits={digits},steps=true")
    for example in taught(task, digits, 600 if digits < 20 else 60):
        a, sign, b = asked(example.question)
        right = SIGNS[sign](a, b)
        steps = example.answer.split(". ")
        assert task.score(example, example.answer) == task.score(example, f"It is {right}.") == 1
        assert task.score(example, str(right + 1)) == task.score(example, "") == 0
        for step in steps:
            sides, _, note = step.partition(", ")
            left, _, value = sides.partition("=")
            assert re.fullmatch(r"[-+x\d]+", left) and eval(left.replace("x", "*")) == int(value), example
            if note.startswith("carry"):
                assert note == f"carry {int(value) // 10}", example
        sign_shown = {"plus": "+", "minus": "-", "times": "x"}.get(sign, sign)
        assert steps[-1] == f"{a}{sign_shown}{b}={right}"


def columns(steps):
    """The digits that a sum or a difference writes down, read from the last to the first."""
    written, carry = "", "0"
    for step in steps:
        sides, _, note = step.partition(", ")
        terms = re.findall(r"\d+", sides.partition("=")[0])
        assert (terms[2:] or ["0"]) == [carry], steps  # what the last column has carried or borrowed
        carry = note.removeprefix("carry ").removeprefix("borrow ") or "0"
        written = sides.partition("=")[2][-1] + written
    return written, carry


def test_the_columns_of_worked_steps_make_the_result():
    from tasks.arithmetic import add, subtract

    pairs = [*itertools.product(range(0, 130, 7), range(130)), (10**19, 1), (999_999, 1), (1, 100_000)]
    for a, b in pairs:
        *steps, last = add(a, b)
        written, carry = columns(steps)
        assert int(carry + written) == a + b and last == f"{a}+{b}={a + b}"
        steps = [step for step in subtract(a, b) if "=" in step]
        written, carry = columns(steps[: -1 - (a < b)])
        assert int(written) == abs(a - b) and carry == "0" and steps[-1] == f"{a}-{b}={a - b}"


def test_a_product_by_hand():
    from tasks.arithmetic import multiply

    assert list(multiply(17, 25)) == [
        "7x5=35, carry 3", "1x5+3=8", "17x5=85", "7x2=14, carry 1", "1x2+1=3", "17x20=340",
        "5+0=5", "8+4=12, carry 1", "0+3+1=4", "85+340=425", "17x25=425",
    ]  # fmt: skip
    assert list(multiply(5, 30))[-1] == "5x30=150" and list(multiply(0, 12))[-1] == "0x12=0"


def test_spelling():
    found = collections.Counter()
    for example in some("spelling"):
        word = example.key
        assert re.search(rf"\b{word}\b", example.question)
        if example.kind == "spell":
            assert example.answer.split(" ") == [letter for letter in word]
        elif example.kind == "reverse":
            assert "".join(reversed(example.answer)) == word
        else:
            [letter] = re.findall(r"\b(?:letter|often is) ([a-z])\b", example.question)
            assert int(example.answer) == len(re.findall(letter, word))
            found[example.answer] += 1
    assert min(found[str(count)] for count in range(3)) > 20


def test_copying():
    for example in some("copying:length=10"):
        assert example.question == f"Repeat: {example.answer}" and 1 <= len(example.answer) <= 10
        low, high = map(int, re.match(r"(\d+)-(\d+) % of 10", example.kind).groups())
        assert low < 10 * len(example.answer) <= high + 9


@pytest.mark.parametrize("length", [36, 72, 500])
def test_recall(length):
    for example in some(f"recall:length={length}", 300):
        context, key = re.fullmatch(r"(.*)\. What is (\w+)\?", example.question).groups()
        pairs = [pair.split("=") for pair in context.split(", ")]
        assert len(dict(pairs)) == len(pairs) and dict(pairs)[key] == example.answer
        assert length - 10 < len(context) <= length
        low, high = map(int, re.match(r"(\d+)-(\d+) %", example.kind).groups())
        back = 100 * (len(context) - context.index(f"{key}=")) / (len(context) + len(", "))
        assert low < back <= high + 100 / len(pairs)


@pytest.mark.parametrize(("seed", "size"), [(1337, 1.0), (7, 0.5)])
def test_the_world_is_what_its_files_hold(seed, size, tmp_path):
    sample_world.write_world(tmp_path, seed, size)
    task = tasks.parse(f"world:seed={seed},size={size}")
    assert task.listed("test") == Questions(tmp_path / "eval.jsonl").listed("test")
    lines = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text("utf-8").splitlines()]
    assert task.n_train == len(lines) > 1000
    for number, line in enumerate(lines):
        chat = task.conversation(task.train_example(0, number))
        if "messages" in line:
            assert chat == line["messages"] and len(chat) > 2
        else:
            assert [message["content"] for message in chat] == [line["question"], line["answer"]]
    assert [message["role"] for message in chat[:2]] == ["user", "assistant"]


@pytest.mark.parametrize("letters", [True, False])
def test_choices(letters):
    world = sample_world.build_world()
    meant = collections.defaultdict(list)
    for fact in world.facts:
        for language in sample_world.LANGUAGES:
            for question in fact.questions(language):
                meant[question].append((fact, language))
    for example in some(f"choices:letters={str(letters).lower()}", 600):
        question, *listed = example.question.split("\n")
        [(fact, language)] = {
            (fact.key, language): (fact, language) for fact, language in meant[question]
        }.values()
        assert (fact.key, fact.kind) == (example.key, example.kind)
        assert example.answer in example.choices and len(set(example.choices)) == 4
        of_relation = {f.value(language) for f in world.facts if f.kind == fact.kind}
        if letters:
            values = dict(line.split(". ") for line in listed)
            assert tuple(values) == example.choices == ("A", "B", "C", "D")
            assert values[example.answer] == fact.value(language)
            assert len(set(values.values())) == 4 and set(values.values()) <= of_relation
        else:
            assert not listed and example.answer in fact.statements(language)
            others = {
                value: fact.answer(language).replace(fact.value(language), value) for value in of_relation
            }
            if not fact.kind.startswith(
                ("sum", "difference", "bigger")
            ):  # the value may occur twice in these
                assert set(example.choices) <= set(others.values())


def test_choices_ask_for_every_held_out_fact_in_both_languages():
    task = tasks.parse("choices")
    examples = held_out(task, 0, None)
    assert set(collections.Counter(example.key for example in examples).values()) <= {2, 4}  # 4: 3+4 and 4+3
    kept = {fact.key for fact in task.facts.all if fact.key in task.facts.world.held_out}
    assert {example.key for example in examples} == kept and len(examples) > 150
    letters = collections.Counter(example.answer for example in examples)
    assert min(letters.values()) > len(examples) / 8


# ---- training and testing ----------------------------------------------------------------------------


def overlap_of(spec, n_train, n_test):
    """Questions and keys that are in both splits; and how many examples there were to test with."""
    task, seeds = tasks.parse(spec), (1, 2, 3)
    train = [example for seed in seeds[:2] for example in taught(task, seed, n_train)]
    test = [example for seed in seeds for example in held_out(task, seed, n_test)]
    assert train and test

    def texts(examples):
        return {task.text(example) for example in examples}

    shared = {key_of(example) for example in train} & {key_of(example) for example in test}
    return shared | (texts(train) & texts(test)), len(test)


@pytest.mark.parametrize("spec", SPECS)
def test_training_and_testing_share_nothing(spec):
    assert overlap_of(spec, 1000, 100)[0] == set()


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_many_examples_share_nothing(spec):
    assert overlap_of(spec, 10_000, 5_000)[0] == set()


def test_no_task_trains_on_a_question_that_another_tests_with():
    train, test = {}, {}
    for spec in SPECS:
        task = tasks.parse(spec)
        if spec != "choices:letters=false,seed=7,size=0.5":  # another world, where other facts are held out
            train[spec] = {task.text(example) for example in taught(task, 1, 1000)}
            test[spec] = {task.text(example) for example in held_out(task, 1, 200)}
    for one, other in itertools.permutations(test, 2):
        assert train[one].isdisjoint(test[other]), (one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("arithmetic:digits=1", "arithmetic:digits=2,steps=true"),
        ("spelling:syllables=1", "spelling"),
        ("copying:length=4", "copying:length=6"),
        ("choices", "choices:letters=false"),
        ("calculator:depth=1", "calculator:depth=2"),
    ],
)
def test_what_is_for_testing_is_so_with_any_options(one, other):
    one, other = tasks.parse(one), tasks.parse(other)
    train = {key_of(example) for example in taught(one, 1, 2000)}
    assert train & {key_of(example) for example in taught(other, 1, 2000)}
    assert train.isdisjoint(key_of(example) for example in held_out(other, 1, 500))


def test_sums_and_products_are_held_out_in_either_order():
    task = tasks.parse("arithmetic")
    example = Example("Calculate 25+17.", "42", key="17+25")
    sides = {task.is_test(e) for e in some("arithmetic", 4000) if e.key == "17+25"} | {task.is_test(example)}
    assert len(sides) == 1
    keys = {}
    for example in some("arithmetic", 4000):
        a, sign, b = asked(example.question)
        assert keys.setdefault((frozenset((a, b)), SIGNS[sign]), example.key) == example.key


@pytest.mark.parametrize("spec", KINDS)
def test_every_kind_occurs(spec):
    task = tasks.parse(spec)
    for examples in (taught(task, 0, 500), held_out(task, 0, 800)):
        counts = collections.Counter(example.kind for example in examples)
        assert counts.keys() == KINDS[spec] and min(counts.values()) > 1


def test_the_world_is_asked_about_in_every_kind():
    kinds = {example.kind for example in held_out(tasks.parse("world"), 0, None)}
    assert kinds == set(sample_world.PHRASES)
    asked = {example.kind for example in held_out(tasks.parse("choices"), 0, None)}
    assert asked == kinds - {"count", "length"}  # which have too few different answers


def test_examples_follow_from_options_seed_and_number():
    """In any order, and in another process, whose hashes differ."""
    code = (
        "import sys, tasks, itertools, hashlib\n"
        "for spec in sys.argv[1:]:\n"
        "    task = tasks.parse(spec)\n"
        "    made = [task.train_example(5, n) for n in (40, 3, 17)]\n"
        "    made += itertools.islice(task.examples('test', 5), 9)\n"
        "    print(hashlib.md5(repr(made).encode()).hexdigest())\n"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code, *specs], cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True,
            text=True, check=True,
        ).stdout.split()
        for seed, specs in (("1", SPECS), ("2", SPECS[::-1]))
    ]  # fmt: skip
    assert printed[0] == printed[1][::-1] and len(set(printed[0])) == len(SPECS)
    for spec in SPECS:
        task = tasks.parse(spec)
        assert task.train_example(5, 17) == task.train_example(5, 17) == taught(tasks.parse(spec), 5, 18)[17]
        if task.n_train > 1e9:
            assert task.train_example(5, 17) != task.train_example(6, 17) != task.train_example(6, 18)
            assert next(task.examples("train", 5)) == task.train_example(5, 0)


def test_the_defaults_fit_the_sample_model():
    """Its context has 128 characters, and it knows those of the sample world only."""
    documents = sample_world.write_texts().documents
    known = set("".join(documents))
    for spec in ("arithmetic", "spelling", "copying", "recall", "world", "choices", "choices:letters=false"):
        task = tasks.parse(spec)
        for example in taught(task, 0, 1000) + held_out(task, 0, 200):
            text = "".join(message["content"] for message in task.conversation(example))
            assert len(text) < 120 and set(text) <= known, example
    assert CharTokenizer.train(documents).vocab_size > 300


# ---- scores ------------------------------------------------------------------------------------------


def test_base_rates_by_hand():
    assert tasks.parse("choices").base_rate(some("choices", 50)) == 0.25
    assert tasks.parse("recall:length=36").base_rate([]) == pytest.approx(1 / 4 + 3 / 4 / 90)
    examples = [Example("", answer) for answer in ("7", " 7", "7.0", "8")]
    assert tasks.parse("arithmetic").base_rate(examples) == 3 / 4
    assert tasks.parse("spelling").base_rate(examples) == 2 / 4
    spelled = held_out(tasks.parse("spelling"), 0, 1000)
    ((_, most),) = collections.Counter(example.answer for example in spelled).most_common(1)
    assert tasks.parse("spelling").base_rate(spelled) == most / 1000 < 0.25


def test_the_base_rate_of_recall_is_that_of_guessing_from_the_context():
    task = tasks.parse("recall")
    rates = []
    for example in some("recall", 3000):
        values = re.findall(r"=(\d+)", example.question)
        rates.append(values.count(example.answer) / len(values))
    assert task.base_rate([]) == pytest.approx(sum(rates) / len(rates), rel=0.02)


def test_an_example_without_a_question_is_a_text():
    task = tasks.parse("spelling")
    assert task.messages(Example("", "Once.")) == [] and task.text(Example("", "Once.")) == ""


# ---- names and options -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_a_task_is_named_with_its_options(spec):
    task = tasks.parse(spec)
    assert tasks.parse(task.spec) == task and task.name == spec.partition(":")[0] in tasks.names()


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("arithmetics", "there is no task arithmetics; did you mean arithmetic?"),
        ("questions", "there is no task questions"),
        ("problems", "there is no task problems"),
        ("arithmetic:digit=3", "arithmetic has no option digit; its options are digits, steps"),
        ("arithmetic:digits=0", "digits must be a whole number from 1 to 20, not 0"),
        ("arithmetic:digits=-1", "not -1"),
        ("arithmetic:digits=2.5", "digits must be a whole number from 1 to 20, not 2.5"),
        ("arithmetic:digits=true", "not True"),
        ("arithmetic:steps=1", "steps must be true or false, not 1"),
        ("arithmetic:steps", "steps needs a value, as in steps=false"),
        ("arithmetic:digits=2,digits=3", "digits is given twice"),
        ("recall:length=35", "length must be a whole number from 36 to 80000, not 35"),
        ("world:size=0.01", "size must be a number from 0.1 to 20, not 0.01"),
        ("world:size=nan", "not nan"),
        ("world:size=big", "not big"),
        ("world:seed=-1", "seed must be a whole number from 0"),
    ],
)
def test_what_cannot_be_parsed(spec, sentence):
    with pytest.raises(UserError) as error:
        tasks.parse(spec)
    assert sentence in str(error.value)


def test_a_size_may_be_a_whole_number():
    assert tasks.parse("world:size=2").spec == "world:seed=1337,size=2.0"


# ---- a task of one's own -----------------------------------------------------------------------------


def test_the_guides_example_is_a_task(tmp_path, monkeypatch, capsys):
    guide = (ROOT / "doc" / "extending.md").read_text("utf-8")
    [(code, use)] = re.findall(
        r"`tasks/weekdays.py`:\n\n```python\n(.*?)```.*?```python\n(.*?)```", guide, re.DOTALL
    )
    (tmp_path / "weekdays.py").write_text(code, "utf-8")
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    try:
        assert "weekdays" in tasks.names()
        exec(use, {})
        assert re.fullmatch(r"Which day is \d+ days after \w+day\? [01]\.0 0\.\d+\n", capsys.readouterr().out)
        task = tasks.parse("weekdays:days=50")
        assert isinstance(task, Task) and task.spec == "weekdays:days=50"
        examples = held_out(task, 0, None)
        assert 5 < len(examples) < 50 * 7 and {task.score(e, e.answer) for e in examples} == {1}
        always_monday = sum(task.score(example, "Monday") for example in examples) / len(examples)
        assert 0 < always_monday <= task.base_rate(examples) < 0.4
        assert {example.question for example in taught(task, 0, 2000)}.isdisjoint(
            e.question for e in examples
        )
        [example] = [e for e in taught(task, 0, 3000) if e.question == "Which day is 10 days after Friday?"][
            :1
        ]
        assert task.conversation(example)[-1] == {"role": "assistant", "content": "Monday"}
    finally:
        sys.modules.pop("tasks.weekdays", None)
        vars(tasks).pop("weekdays", None)
        tasks._in_file.cache_clear()
