"""The sample world: every fact stated often, no leaks, answers right, the same bytes everywhere."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from common.errors import UserError
from dataset.sample_world import ARBITRARY, LANGUAGES, build_world, write_world

SCRIPT = Path(__file__).resolve().parents[2] / "dataset" / "sample_world.py"
NAMES = ("pretrain.txt", "sft.jsonl", "eval.jsonl")


class Files:
    """The three files of one world, and its facts."""

    def __init__(self, folder, seed, size):
        self.counts = write_world(folder, seed, size)
        self.world = build_world(seed, size)
        self.pretrain = (folder / "pretrain.txt").read_text("utf-8")
        self.sft = [json.loads(line) for line in (folder / "sft.jsonl").read_text("utf-8").splitlines()]
        self.eval = [json.loads(line) for line in (folder / "eval.jsonl").read_text("utf-8").splitlines()]
        self.asking = defaultdict(set)  # every question of every phrasing and language -> the facts it means
        for fact in self.world.facts:
            for language in LANGUAGES:
                for question in fact.questions(language):
                    self.asking[question].add((fact, language))

    def understand(self, record):
        """[(fact, language)] that a conversation asks for; understands "And his job?" and the like."""
        meant = []
        for question, _ in turns(record):
            found = set(self.asking[question])
            if meant:
                before, language = meant[-1]
                for fact in self.world.facts:
                    if fact.topic == before.topic == "person":
                        same_subject = fact.slots["zh"]["s"] == before.slots["zh"]["s"]
                        asking = fact.next_subject(language) if fact.kind == before.kind else []
                        if same_subject:
                            asking = [fact.same_subject(language), *fact.questions(language, pronoun=True)]
                        if question in asking:
                            found.add((fact, language))
            assert len(found) == 1, (question, found)
            meant.append(found.pop())
        return meant


def turns(record):
    """[(question, answer), ...] of a line of sft.jsonl or eval.jsonl."""
    if "messages" not in record:
        return [(record["question"], record["answer"])]
    roles = [message["role"] for message in record["messages"]]
    assert len(roles) > 2 and roles == ["user", "assistant"] * (len(roles) // 2)
    texts = [message["content"] for message in record["messages"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.fixture(scope="module", params=[(1337, 1.0), (7, 0.6)], ids=["default", "small"])
def files(request, tmp_path_factory):
    return Files(tmp_path_factory.mktemp("world"), *request.param)


def test_every_held_out_fact_is_stated_in_at_least_three_phrasings_of_its_language(files):
    for record in files.eval:
        *_, (fact, _) = files.understand(record)
        stated = [sentence for sentence in fact.statements(record["language"]) if sentence in files.pretrain]
        assert len(set(stated)) >= 3, record
        assert all(fact.value(record["language"]) in sentence for sentence in stated), record
        assert turns(record)[-1][1] in stated


def test_every_fact_is_stated_in_at_least_five_phrasings_in_both_languages(files):
    for fact in files.world.facts:
        stated = {
            language: sum(sentence in files.pretrain for sentence in fact.statements(language))
            for language in LANGUAGES
        }
        assert sum(stated.values()) >= 5 and min(stated.values()) >= 2, fact


def test_no_held_out_fact_is_asked_for_in_fine_tuning(files):
    taught = {fact.key for record in files.sft for fact, _ in files.understand(record)}
    held_out = set()
    for record in files.eval:
        *_, (fact, language) = files.understand(record)
        assert fact.key == record["fact"] and fact.kind == record["kind"] and language in LANGUAGES
        held_out.add(fact.key)
    assert taught and held_out and not taught & held_out
    # Turns before the last of an evaluated conversation are facts that fine-tuning did teach.
    assert {fact.key for record in files.eval for fact, _ in files.understand(record)[:-1]} <= taught


def test_no_fine_tuning_line_pairs_a_person_with_a_held_out_value(files):
    """The same as above, found with plain text search, without the generator's phrases."""
    held_out = defaultdict(list)
    for fact in files.world.evaluated():
        for language in LANGUAGES:
            if fact.topic == "person":
                held_out[fact.slots[language]["s"]].append(fact.value(language))
    for record in files.sft:
        for question, answer in turns(record):
            for name in held_out:
                said = re.findall(r"\w+", answer.replace(name, "")) if name.isascii() else [answer]
                values = [value for value in held_out[name] if any(value in words for words in said)]
                assert name not in question or not values, record


def test_the_evaluation_asks_in_words_that_the_running_text_does_not_use(files):
    """pretrain.txt also asks for held-out facts, so that they can be retrieved, but in other phrasings."""
    for record in files.eval:
        *_, (question, _) = turns(record)
        if files.asking[question]:  # not "And her job?", which only its conversation makes a question
            assert not re.search(r"(?<!\d)" + re.escape(question), files.pretrain), record


def test_questions_in_the_running_text_are_answered_right(files):
    asked = Counter()
    sentences = re.findall(r"[^。？.?\n<>|]+[。？.?]", files.pretrain)
    for question, answer in zip(sentences, sentences[1:], strict=False):
        if meant := files.asking[question.strip()]:
            assert answer.strip() in {fact.answer(language) for fact, language in meant}, question
            asked.update(fact.key in files.world.held_out for fact, _ in meant)
    assert min(asked.values()) > 100


def test_a_taught_question_has_one_answer_and_it_is_the_fact(files):
    answers = defaultdict(set)
    for record in files.sft + files.eval:
        conversation = turns(record)
        for (_, answer), (fact, language) in zip(conversation, files.understand(record), strict=True):
            assert answer == fact.answer(language)
        if len(conversation) == 1:
            answers[conversation[0][0]].add(conversation[0][1])
    assert all(len(found) == 1 for found in answers.values())


def test_numbers_and_letters_are_right(files):
    records = [turn for record in files.sft + files.eval for turn in turns(record)]
    checked = Counter()
    for question, answer in records:
        kind, expected = recompute(question)
        checked[kind] += 1
        assert expected is None or re.findall(r"\d+", answer)[-1] == str(expected), question
        assert expected is not None or not re.search(r"\d|letter|几个|几？", question), question
    assert all(checked[kind] >= 20 for kind in ("sum", "difference", "bigger", "count", "length")), checked
    stated = re.findall(r"(\d+)([+-])(\d+)=(\d+)", files.pretrain)
    assert len(stated) > 200
    assert all(int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) for a, sign, b, c in stated)


def recompute(question):
    """("sum", 7) for "What is 3 plus 4?", computed from the words alone; (None, None) for other questions."""
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    if len(numbers) == 2:
        if re.search("bigger|大", question):
            return "bigger", max(numbers)
        if re.search(r"plus|加|\+|How much is \d+ and", question):
            return "sum", sum(numbers)
        if re.search("minus|减|-|less", question):
            return "difference", numbers[0] - numbers[1]
    latin = re.findall(r"[a-z]+", question)
    if match := re.search(r"How many ([a-z]) are|does ([a-z]) appear|times is ([a-z]) in", question):
        return "count", latin[-1].count(next(filter(None, match.groups())))
    if re.search("letters are in|length of|个字母|长度", question):
        return "length", len(latin[-1])
    if re.search("几个[a-z]|字母[a-z]", question):
        return "count", latin[0].count(latin[1])
    return None, None


def test_the_score_means_knowledge(files):
    """Most held-out questions are about arbitrary facts, and guessing the most frequent value fails."""
    held_out = {
        (fact.key, language): fact.value(language)
        for fact in files.world.evaluated()
        for language in LANGUAGES
    }
    arbitrary = [record for record in files.eval if record["kind"].split(".")[0] in ARBITRARY]
    assert len(arbitrary) >= 0.75 * len(files.eval)
    guesses = 0
    for kind in {record["kind"] for record in files.eval}:
        for language in LANGUAGES:
            values = Counter(fact.value(language) for fact in files.world.facts if fact.kind == kind)
            guess = values.most_common(1)[0][0]
            guesses += sum(
                held_out[record["fact"], language] == guess
                for record in files.eval
                if record["kind"] == kind and record["language"] == language
            )
    assert guesses < 0.25 * len(files.eval)


def test_subjects_differ_in_their_first_letter(files):
    subjects = {
        (fact.topic if fact.kind != "count" else "length", language, fact.slots[language]["s"])
        for fact in files.world.facts
        for language in LANGUAGES
        if fact.topic in (*ARBITRARY, "length", "count")
    }
    initials = Counter((topic, language, name.removeprefix("the ")[0]) for topic, language, name in subjects)
    assert len(initials) > 100 and set(initials.values()) == {1}


def test_the_files_are_well_formed(files):
    documents = re.findall(r"<\|bos\|>(.+?)<\|eos\|>\n", files.pretrain, re.DOTALL)
    assert "".join(f"<|bos|>{document}<|eos|>\n" for document in documents) == files.pretrain
    assert len(documents) == files.counts["documents"]
    assert "{" not in files.pretrain and "\r" not in files.pretrain and "\t" not in files.pretrain
    evaluated, tuned = (
        "".join(text for record in records for turn in turns(record) for text in turn)
        for records in (files.eval, files.sft)
    )
    assert set(evaluated) <= set(files.pretrain + tuned)
    assert "{" not in evaluated + tuned and "<|" not in evaluated + tuned
    assert all(4 <= len(turn[1]) <= 60 for record in files.sft + files.eval for turn in turns(record))
    for records in (files.sft, files.eval):
        assert 0.05 < sum("messages" in record for record in records) / len(records) < 0.5


def test_the_default_world_fits_the_demo(tmp_path):
    counts = write_world(tmp_path)
    assert 250_000 < counts["characters of running text"] < 600_000
    assert 1_000 < counts["question-answer conversations"] < 3_000
    assert 100 < counts["held-out questions"] < 300
    assert counts["distinct characters"] < 600


def test_a_seed_and_a_size_are_the_same_bytes_everywhere(tmp_path):
    write_world(tmp_path, seed=1, size=0.1)
    digest = hashlib.sha256(b"".join((tmp_path / name).read_bytes() for name in NAMES)).hexdigest()
    assert digest == "fb35f75321770813acf6f073a29ccea5106635986ff19f9453f173d957184d64"


def test_another_seed_is_another_world_and_size_is_people():
    def people(**kw):
        return {(fact.key, fact.answer("en")) for fact in build_world(**kw).facts if fact.topic == "person"}

    assert people(seed=1) != people(seed=2)
    assert len(people(size=1)) == 6 * 24 and len(people(size=3.5)) == 6 * 84
    large = build_world(size=20)
    for language in LANGUAGES:
        assert len({fact.slots[language]["s"] for fact in large.facts if fact.topic == "person"}) == 480


@pytest.mark.parametrize("wrong", [{"size": 0}, {"size": 21}, {"size": float("nan")}, {"seed": -1}])
def test_out_of_range_is_refused(wrong, tmp_path):
    with pytest.raises(UserError, match="must"):
        write_world(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def script(*arguments, **kw):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", **kw)


def test_the_script_writes_into_a_folder_with_spaces_and_chinese_from_anywhere(tmp_path):
    out = tmp_path / "my 世界"
    done = script("--seed", 1, "--size", 0.1, "--out", out, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "held-out questions" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == sorted(NAMES)
    write_world(tmp_path / "again", seed=1, size=0.1)
    assert all((out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in NAMES)


def test_the_script_tells_mistakes_in_a_sentence(tmp_path):
    for arguments in (("--size", 99), ("--seed", -3), ("--size", "big"), ("--out", SCRIPT / "x")):
        done = script(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "error" in done.stderr
    assert "examples:" in script("--help").stdout
