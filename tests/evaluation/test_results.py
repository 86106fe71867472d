"""Results on disk: an evaluation that was stopped goes on exactly, and never with what belongs to another."""

import json

import pytest
from made_models import TEXT, Listed, checkpoint, polite, small_model

import engine.checkpoint
from common.errors import UserError
from decoding.text_generator import load_model
from evaluation import runner
from evaluation.results import Evaluation
from tokenizer import CharTokenizer

ROWS = [
    ("你好"[i % 2] * (1 + i % 5) + "?", "好吗"[: 1 + i % 2], "odd" if i % 2 else "even") for i in range(40)
]


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """A model of random weights, in a folder of the test's own."""
    monkeypatch.setattr(engine.checkpoint, "FOLDER", tmp_path / "检查 point")
    monkeypatch.setattr(runner, "GROUP", 8)
    tokenizer = CharTokenizer.train([TEXT])
    model = small_model(tokenizer)
    return load_model(str(checkpoint(tokenizer, model.config, model).save()), True)


def evaluation(loaded, rows=ROWS, metric="exact", seed=0):
    task = Listed(rows, metric)
    prepared = runner.prepare(task, task.list, loaded.tokenizer, loaded.model.config, chat=True)
    return Evaluation(loaded, prepared, seed, None)


def stop_after(n):
    """A callback that is like Ctrl-C as example n ends."""
    calls = []

    def on_each():
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt

    return on_each


def lines(path):
    """What is in a file, but for times."""
    first, *others, last = map(json.loads, path.read_text("utf-8").splitlines())
    del first["about"]["time"], last["seconds"]
    return list(map(json.dumps, [first, *others, last]))


def test_a_file_says_all(loaded):
    done = evaluation(loaded)
    done.run(resume=False)
    header, *scores, footer = map(json.loads, lines(done.file.path))
    assert header["identity"] == done.file.identity and header["about"]["run"] == "20260102_030405"
    assert header["about"]["checkpoint"].endswith("sft_20260102_030405_step_7.pt")
    assert [score["question"] for score in scores] == [row[0] for row in ROWS]
    assert [score["right"] for score in scores] == [row[1] for row in ROWS]
    assert footer["score"] == done.result.score and footer["n"] == 40
    assert [path.name for path in done.file.path.parent.iterdir()] == [
        done.file.path.name
    ]  # no .part, no .lock


@pytest.mark.parametrize("metric", ["exact", "perplexity"])
@pytest.mark.parametrize("n", [3, 8, 20, 39])
def test_stopped_and_resumed_is_as_in_one_go(loaded, metric, n):
    whole = evaluation(loaded, metric=metric)
    whole.run(resume=False)
    expected = lines(whole.file.path)
    whole.file.path.unlink()
    part = evaluation(loaded, metric=metric)
    with pytest.raises(KeyboardInterrupt):
        part.run(False, stop_after(n))
    assert len(part.scores) == n // 8 * 8 - 8 * (n % 8 == 0) and not part.file.path.exists()
    again, calls = evaluation(loaded, metric=metric), []
    again.run(True, lambda: calls.append(1))
    assert lines(again.file.path) == expected and len(calls) == 40
    assert again.result.scores == whole.result.scores
    assert (again.seconds is None) == (n > 8)


def test_a_finished_result_is_taken_only_when_asked_for(loaded, monkeypatch):
    first = evaluation(loaded)
    first.run(resume=False)
    monkeypatch.setattr(runner, "score", lambda *_: pytest.fail("scored again"))
    again = evaluation(loaded)
    again.run(resume=True)
    assert again.scores == first.scores and again.seconds == first.seconds
    with pytest.raises(pytest.fail.Exception):
        evaluation(loaded).run(resume=False)


def half_done(loaded):
    """The path of the file of an evaluation that was stopped after 16 examples, and its content."""
    part = evaluation(loaded)
    with pytest.raises(KeyboardInterrupt):
        part.run(False, stop_after(20))
    return part.file.part, part.file.part.read_bytes()


@pytest.mark.parametrize("cut", [1, 30, 300])
def test_a_truncated_file_loses_what_is_truncated(loaded, cut):
    path, content = half_done(loaded)
    path.write_bytes(content[:-cut])
    again = evaluation(loaded)
    again.take_up()
    assert len(again.scores) == 8
    again.run(resume=True)
    assert len(lines(again.file.path)) == 42


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"value": ', '"value": "x', 1),
        lambda text: text.replace('"number": 3', '"number": 4', 1),
        lambda text: text.replace('{"number": 3', '["number": 3', 1),
        lambda text: text.replace('"weight": 1.0', '"weight": null', 4),
        lambda text: text.replace('"version": 1', '"version": 2', 1),
        lambda text: "\n" + text,
        lambda text: "",
        lambda text: "[" * 100_000 + "\n" + text,
        lambda text: "\0" * 100,
    ],
)
def test_what_is_damaged_is_scored_anew(loaded, damage):
    path, content = half_done(loaded)
    path.write_text(damage(content.decode()), "utf-8")
    again = evaluation(loaded)
    again.run(resume=True)
    assert [json.loads(line)["number"] for line in again.file.path.read_text("utf-8").splitlines()[1:-1]] == [
        *range(40)
    ]
    fresh = evaluation(loaded)
    fresh.run(resume=False)
    assert fresh.scores == again.scores


def test_another_model_task_or_seed_is_never_mixed_in(loaded, monkeypatch):
    path, content = half_done(loaded)
    others = [
        evaluation(loaded, seed=1),
        evaluation(loaded, metric="contains"),
        evaluation(loaded, rows=[*ROWS[:-1], ("你", "好")]),
        evaluation(loaded, rows=[*ROWS[:-1], (*ROWS[-1][:2], "another kind")]),
    ]
    state = polite(CharTokenizer.train([TEXT]), run="20260102_030406")
    others.append(evaluation(load_model(str(state.save()), True)))
    for other in others:
        assert other.file.part != path
        other.file.part.write_bytes(content)  # even under the very name
        other.take_up()
        assert other.scores == []


def test_two_processes_do_not_write_one_file(loaded):
    with pytest.raises(UserError, match="another process is writing"):
        evaluation(loaded).run(False, lambda: evaluation(loaded).run(False))
    evaluation(loaded).run(False)  # the lock is gone


def test_a_full_disk_loses_nothing(loaded, monkeypatch):
    done = evaluation(loaded)
    done.run(resume=False)
    kept = done.file.path.read_bytes()

    def fails(self, line, sync=False):
        raise OSError(28, "No space left on device", str(done.file.part))

    monkeypatch.setattr("common.files.LineFile.write", fails)
    with pytest.raises(OSError):
        evaluation(loaded).run(resume=False)
    assert done.file.path.read_bytes() == kept
