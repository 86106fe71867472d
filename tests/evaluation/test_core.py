"""evaluation/core.py on a made-up bundle, against plain loops with a pass over each whole text."""

import csv
import json
import math
import random
import re

import pytest
import torch
from made_models import checkpoint
from test_harness import TEXT, make

from common.errors import UserError
from decoding.sampling import generate
from evaluation import core

yaml = pytest.importorskip("yaml")

WORDS = sorted({word for word in TEXT.split() if word.isalpha()})


def item(kind, draw):
    def words(n):
        return " ".join(draw.choice(WORDS) for _ in range(n))

    if kind == "multiple_choice":
        choices = [words(draw.randint(1, 4)) for _ in range(3)]
        return {"query": words(5) + ":", "choices": choices, "gold": draw.randrange(3)}
    if kind == "schema":
        contexts = [words(3), words(5)]
        return {"context_options": contexts, "continuation": words(2), "gold": draw.randrange(2)}
    return {"context": words(4) + draw.choice(("", " ")), "continuation": words(1)[:2]}


TASKS = [  # label, kind, examples in the prompt, delimiter, baseline in per cent
    ("choices", "multiple_choice", 0, None, "33.3"),
    ("choices_3", "multiple_choice", 3, "\nAnswer: ", "25"),
    ("schema", "schema", 0, None, "50.0"),
    ("schema_2", "schema", 2, " ", "50.0"),
    ("words", "language_modeling", 0, None, "0.0"),
    ("words_1", "language_modeling", 1, "\n", "0"),
    ("greedy", "language_modeling", 0, "", "0"),
]


@pytest.fixture
def bundle(tmp_path):
    draw = random.Random(3)
    (tmp_path / "eval_data" / "part").mkdir(parents=True)
    tasks = []
    with open(tmp_path / "eval_meta_data.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Eval Task", "Task Category", "Random baseline"])
        for label, kind, n_examples, delimiter, baseline in TASKS:
            table.writerow([label, "made up", baseline])
            entry = {"label": label, "dataset_uri": f"part/{label}.jsonl", "num_fewshot": [n_examples],
                     "icl_task_type": kind}  # fmt: skip
            tasks.append(entry | ({} if delimiter is None else {"continuation_delimiter": delimiter}))
            lines = [json.dumps(item(kind, draw)) for _ in range(14)]
            (tmp_path / "eval_data" / "part" / f"{label}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}))
    return tmp_path


@torch.no_grad()
def by_hand(model, tokenizer, path, kind, n_examples, delimiter, limit=None):
    """Whether each item is answered right."""
    data = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(1337).shuffle(data)
    data = data[:limit]
    right = []
    for i, one in enumerate(data):
        rng = random.Random(1234 + i)
        before = [data[j] for j in rng.sample([j for j in range(len(data)) if j != i], n_examples)]
        prefix = ""
        for other in before:
            if kind == "multiple_choice":
                prefix += f"{other['query']}{delimiter}{other['choices'][other['gold']]}\n\n"
            elif kind == "schema":
                prefix += f"{other['context_options'][other['gold']]}{delimiter}{other['continuation']}\n\n"
            else:
                prefix += f"{other['context'].strip()}{delimiter}{other['continuation']}\n\n"
        if kind == "multiple_choice":
            texts = [f"{prefix}{one['query']}{delimiter}{choice}" for choice in one["choices"]]
        elif kind == "schema":
            texts = [f"{prefix}{c}{delimiter}{one['continuation']}" for c in one["context_options"]]
        else:
            whole = f"{prefix}{one['context'].strip()}{delimiter}"
            texts = [whole.strip(), whole + one["continuation"]]
        rows = [[tokenizer.bos_id, *tokenizer.encode(text).tolist()] for text in texts]
        shortest = min(map(len, rows))
        if kind == "language_modeling":
            assert rows[1][: len(rows[0])] == rows[0]
            logits = model(torch.tensor([rows[1]]))[0]
            best = logits.argmax(-1).tolist()
            right.append(best[len(rows[0]) - 1 : -1] == rows[1][len(rows[0]) :])
            continue
        losses = []
        for row in rows:
            if kind == "multiple_choice":
                start = next((k for k in range(shortest) if len({r[k] for r in rows}) > 1), shortest)
            else:
                same = next((k for k in range(shortest) if len({r[-1 - k] for r in rows}) > 1), shortest)
                start = len(row) - same
            logits = model(torch.tensor([row]))[0]
            nats = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="none")
            losses.append(nats[start - 1 :].mean().item())
        right.append(losses.index(min(losses)) == one["gold"])
    return right


@pytest.mark.parametrize("name", ["nano", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_accuracies_are_those_of_plain_loops(bundle, name, kind):
    model, tokenizer = make(name, kind, block_size=400)
    path = bundle / "eval_data" / "part" / "greedy.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[::2]:  # these are answered right
        ids = [tokenizer.bos_id, *tokenizer.encode(line["context"].strip()).tolist()]
        line["continuation"] = tokenizer.decode([*generate(model, ids, 1, temperature=0)])
    path.write_text("\n".join(map(json.dumps, lines)))
    done = []
    *results, whole = core.run(model.double(), tokenizer, bundle, on_each=lambda: done.append(1))
    assert len(done) == 7 * 14
    centred = []
    for result, (label, kind, n_examples, delimiter, baseline) in zip(results, TASKS, strict=True):
        path = bundle / "eval_data" / "part" / f"{label}.jsonl"
        delimiter = " " if delimiter is None else delimiter
        expected = by_hand(model, tokenizer, path, kind, n_examples, delimiter)
        assert any(expected) or kind == "language_modeling" and label != "greedy"
        assert [score.value for score in result.scores] == expected
        assert (result.name, result.metric, result.base_rate) == (
            f"core/{label}",
            "acc",
            float(baseline) / 100,
        )
        accuracy, chance = sum(expected) / len(expected), float(baseline) / 100
        centred.append((accuracy - chance) / (1 - chance))
        assert whole.by_kind()[label].score == pytest.approx(centred[-1])
    assert whole.score == pytest.approx(math.fsum(centred) / len(centred))


def test_a_limit_is_of_the_shuffled_examples(bundle):
    model, tokenizer = make("nano", "char", block_size=400)
    result = core.run(model, tokenizer, bundle, limit=5)[1]
    path = bundle / "eval_data" / "part" / "choices_3.jsonl"
    expected = by_hand(model, tokenizer, path, "multiple_choice", 3, "\nAnswer: ", limit=5)
    assert [score.value for score in result.scores] == expected


def test_long_texts_lose_their_beginning_and_that_is_told(bundle):
    model, tokenizer = make("nano", "char", block_size=60)
    notes = [note for result in core.run(model, tokenizer, bundle) for note in result.notes]
    assert any("choices_3: " in note and "longer than the context" in note for note in notes)
    model, tokenizer = make("nano", "char", block_size=8)
    with pytest.raises(UserError, match="too many for a context of 8"):
        core.run(model, tokenizer, bundle)


def test_damaged_bundles_are_named(bundle):
    model, tokenizer = make("nano", "char")

    def told(limit=None):
        with pytest.raises(UserError) as error:
            core.run(model, tokenizer, bundle, limit)
        return str(error.value)

    assert "choices_3: 3 examples are too few for 3" in told(limit=3)
    data = bundle / "eval_data" / "part" / "schema.jsonl"
    text = data.read_text()
    data.write_text(text.replace("continuation", "kontinuation", 1))
    assert "schema.jsonl, line 1: continuation is missing" in told()
    data.write_text("{\n" + text)
    assert "schema.jsonl, line 1, is not a JSON object" in told()
    data.unlink()
    assert "schema.jsonl is missing" in told()
    table = bundle / "eval_meta_data.csv"
    table.write_text(table.read_text().replace("words_1", "words_2"))
    assert "has no row for words_1" in told()
    (bundle / "core.yaml").write_text("- 1")
    assert "core.yaml is not the list" in told()
    (bundle / "core.yaml").unlink()
    assert "--core_data" in told()


def test_from_the_command_line(bundle, command, monkeypatch):
    import evaluate

    monkeypatch.setenv("COLUMNS", "120")
    model, tokenizer = make("nano", "char", block_size=400)
    path = checkpoint(tokenizer, model.config, model).save()
    done = command("--tasks", "core", "--core_data", bundle, "-m", path, "--limit", 5, main=evaluate.main)
    assert done.returncode == 0, done.stderr
    *results, whole = core.run(model, tokenizer, bundle, limit=5)
    assert re.search(rf"core +│ +centred acc +│ +{100 * whole.score:.1f} %", done.stdout)
    for result in results:
        assert re.search(rf"{result.name} +│ +acc +│ +{100 * result.score:.1f} %", done.stdout)
