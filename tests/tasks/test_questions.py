"""A user's own questions: the formats of the file, the metric that follows, and mistakes."""

import json

import pytest

from common.errors import UserError
from tasks import Example
from tasks.questions import Questions

CHOICES = {"question": "Who?", "choices": ["Anna", "Bob", "Kim"]}


@pytest.fixture
def questions(tmp_path):
    """questions(record, ..., metric=None): the task of a file with these lines."""

    def read(*records, metric=None):
        path = tmp_path / "my questions.jsonl"
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(line + "\n" for line in lines), "utf-8")
        return Questions(path, metric)

    return read


def test_conversations_are_answered_exactly(questions):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    task = questions(
        {"question": "2+2?", "answer": "4", "kind": "sum", "id": 7},
        {"messages": chat},
        {"instruction": "Say", "input": "x", "output": "X"},
        {"question": "Who?", "answer": "Bob", "text": "not read"},
    )
    assert task.metric == "exact" and task.n_train == 0 and task.name == "questions"
    assert (
        task.listed("test")
        == list(task.examples("test", 0))
        == [
            Example("2+2?", "4", "sum"),
            Example(chat[:3], "d", "question"),
            Example("Say\nx", "X", "question"),
            Example("Who?", "Bob", "question"),
        ]
    )
    [note] = task.notes
    assert "not read: id (1), text (1)" in note and "kind" not in note
    assert list(task.examples("train", 0)) == []
    with pytest.raises(UserError, match="no examples to train on"):
        task.train_example(0, 0)


@pytest.mark.parametrize(
    "answer",
    [{"answer": 1}, {"label": 1}, {"index": 1}, {"gold": 1}, {"answer": "B"}, {"answer": "Bob"},
     {"answer": 1, "label": None}],
)  # fmt: skip
def test_multiple_choice(questions, answer):
    task = questions({**CHOICES, **answer})
    assert task.metric == "choice" and task.base_rate(task.list) == pytest.approx(1 / 3)
    assert task.list == [Example("Who?", "Bob", "question", ("Anna", "Bob", "Kim"))]
    assert questions({**CHOICES, **answer}, metric="exact").metric == "exact"


def test_texts_are_read_for_their_perplexity(questions):
    task = questions({"text": "Once upon a time.", "kind": "tale", "source": "web"}, {"text": "\n The end. "})
    assert task.metric == "perplexity" and task.base_rate(task.list) is None
    assert task.list == [Example("", "Once upon a time.", "tale"), Example("", "\n The end. ", "question")]
    assert "not read: source (1)" in task.notes[0]
    assert questions({"question": "a", "answer": "b"}, metric="perplexity").metric == "perplexity"


@pytest.mark.parametrize(
    ("metric", "answer", "right", "wrong"),
    [
        ("exact", "Bob", " Bob\n", "bob"),
        ("contains", "Bob  Lee", "It was bob lee.", "Bob"),
        ("numeric", "about 1,000.50 euros", "10 or rather 1000.5", "1000"),
        ("numeric", "-3", "so it is −3", "3"),
    ],
)
def test_metrics(questions, metric, answer, right, wrong):
    task = questions({"question": "a", "answer": answer}, metric=metric)
    [example] = task.list
    assert (task.score(example, right), task.score(example, wrong)) == (1, 0)


@pytest.mark.parametrize(
    ("records", "metric", "sentence"),
    [
        ([], None, "there is no text in it"),
        ([CHOICES | {"answer": 0}, "{"], None, "line 2: not JSON"),
        ([{"question": "a"}], None, "line 1: has question, but no answer"),
        ([CHOICES], None, "line 1: does not say which choice is right; that goes into answer"),
        ([CHOICES | {"answer": 3}], None, "its answer 3 is none of the choices: they are numbered from 0"),
        ([CHOICES | {"answer": -1}], None, "its answer -1 is none of the choices"),
        ([CHOICES | {"answer": True}], None, "its answer True is none of the choices"),
        ([CHOICES | {"answer": 1.0}], None, "its answer 1.0 is none of the choices"),
        ([CHOICES | {"answer": "1"}], None, "its answer '1' is none of the choices"),
        ([CHOICES | {"answer": "D"}], None, "or A to C"),
        ([CHOICES | {"answer": [1]}], None, "its answer [1] is none of the choices"),
        ([CHOICES | {"answer": 1, "label": 1}], None, "has answer and label; keep the one"),
        ([CHOICES | {"answer": 1, "context": "x"}], None, "its context cannot be used"),
        ([CHOICES | {"choices": ["A"], "answer": 0}], None, "needs two choices or more, but has 1"),
        ([CHOICES | {"choices": [], "answer": 0}], None, "needs two choices or more, but has 0"),
        ([CHOICES | {"choices": ["x", "y", "x"], "answer": 0}], None, "has the choice 'x' twice"),
        ([CHOICES | {"choices": ["x", 2], "answer": 0}], None, "its choices are not a list of texts"),
        ([CHOICES | {"choices": ["x", " "], "answer": 0}], None, "its choices are not a list of texts"),
        ([CHOICES | {"choices": ["B", "A"], "answer": "A"}], None, "one choice as a letter, and another"),
        ([{"choices": ["x", "y"], "answer": 0}], None, "has choices, but no question"),
        ([{"text": " "}], None, "its text is empty"),
        (["3"], None, "needs a JSON object"),
        ([CHOICES | {"answer": 0}, {"question": "a", "answer": "b"}], None, "line 2: has an answer"),
        ([{"question": "a", "answer": "b"}], "choice", "the metric can be exact, contains"),
        ([{"text": "a"}], "exact", "line 1: has a text: the metric can be perplexity, not exact"),
        ([{"question": "a", "answer": "3"}, {"question": "a", "answer": "two"}], "numeric", "line 2"),
    ],
)  # fmt: skip
def test_what_is_not_a_question(questions, records, metric, sentence):
    with pytest.raises(UserError) as error:
        questions(*records, metric=metric)
    assert sentence in str(error.value) and "my questions.jsonl" in str(error.value)
