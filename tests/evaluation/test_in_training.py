"""eval_tasks and sample_prompts: what is logged, that it is right, and that training does not notice."""

import json
import re

import pytest

import evaluation.in_training
from common import trackers
from common.log_reader import Log
from decoding.text_generator import TextGenerator
from engine.checkpoint import build, load
from evaluation.in_training import SAMPLE_TOKENS, SAMPLING
from evaluation.runner import evaluate_task, examples_of
from tasks.questions import Questions

TESTS = dict(eval_tasks_interval=3, eval_tasks_examples=9, sample_prompts=["1 + 1", "7"])
FIELDS = ["event", "time", "epoch", "step"]


def questions(train, n=20):
    path = train.root / "questions.jsonl"
    lines = [json.dumps({"question": f"{i} + 1?", "answer": f"{i + 1}。"}) for i in range(n)]
    path.write_text("\n".join(lines), "utf-8")
    return path


def events(train, kind):
    path = max(train.root.glob("train_*.metrics.jsonl"))
    found = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text("utf-8").splitlines()]
    return [event for event in found if event["event"] == kind]


def checkpoint(train, step, stage="pretrain"):
    return load(max(train.root.glob(f"checkpoint/{stage}_*_step_{step}.pt")))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "model", ["nano", pytest.param("nanochat", marks=SLOW), pytest.param("deepseek_v3", marks=SLOW)]
)
def test_training_does_not_notice(train, model):
    keys = dict(max_steps=7, save_interval=5, dropout=0.1, architecture=model, block_size=96)
    if model != "nano":  # these have keys of their own
        shapes = {"nanochat": dict(n_kv_head=2), "deepseek_v3": dict(kv_lora_rank=8, n_layer=2)}
        (train.root / "config" / "model_config.json").write_text(
            json.dumps({"architecture": model, "block_size": 32, "n_head": 2, "n_embd": 32}
                       | {"n_layer": 1} | shapes[model])
        )  # fmt: skip
    assert train("pretrain", **keys).returncode == 0
    alone = {step: checkpoint(train, step) for step in (5, 7)}
    path = questions(train)
    tested = train("pretrain", **keys, eval_tasks=["choices", str(path)], **TESTS)
    assert tested.returncode == 0 and "could not" not in tested.stderr, tested.stderr
    for step, before in alone.items():
        after = checkpoint(train, step)
        after.train_config = before.train_config
        assert train.same(before, after)
    losses = train.logged("Train", "Loss")
    assert len(losses) == 14 and losses[:7] == losses[7:]
    assert [event["step"] for event in events(train, "task")] == [3, 3, 6, 6, 7, 7]


def test_scores_and_texts_are_those_of_the_checkpoint(train):
    path = questions(train)
    keys = dict(max_steps=60, save_interval=30, learning_rate=2e-2, eval_interval=1000, from_checkpoint="")
    tests = TESTS | dict(eval_tasks_interval=30, eval_tasks=[str(path)])
    done = train("sft", **keys, **tests)
    assert done.returncode == 0, done.stderr
    scored, samples = events(train, "task"), events(train, "sample")
    assert [event["step"] for event in scored] == [30, 60]
    assert [(event["step"], event["prompt"]) for event in samples] == [
        (step, prompt) for step in (30, 60) for prompt in TESTS["sample_prompts"]
    ]
    task = Questions(path)
    for event in scored:
        saved = checkpoint(train, event["step"], "sft")
        model, tokenizer = build(saved, "a test's")
        right = evaluate_task(model, tokenizer, task, examples_of(task, 9), chat=True)
        assert event["score"] == right.score and event["standard_error"] == right.standard_error
        assert event["base_rate"] == right.base_rate == 1 / 9 and event["n"] == 9
        assert event["task"] == str(path) and event["metric"] == "exact"
        generator = TextGenerator(model, tokenizer, seed=1337, **SAMPLING)
        for sample in samples:
            if sample["step"] == event["step"]:
                text = "".join(generator.chat([{"role": "user", "content": sample["prompt"]}]))
                assert sample["text"] == text[:SAMPLE_TOKENS]
    assert scored[-1]["score"] > 0
    assert list(scored[0]) == [
        *FIELDS,
        "task",
        "score",
        "standard_error",
        "base_rate",
        "metric",
        "n",
        "seconds",
    ]
    line = next(line for line in done.stdout.splitlines() if "| Task |" in line)
    assert f" | {path} | Score: " in line and " | Base: 11.11% | Metric: exact | Examples: 9 | " in line
    assert re.search(r'\| Sample \| Epoch-Step: \d+-30 \| "1 \+ 1" \| Text: ".*"\n', done.stdout)


def test_it_does_not_count_as_training_time(train, monkeypatch):
    import time

    usual = evaluation.in_training.evaluate_task

    def slow(*args, **kwargs):
        time.sleep(0.5)
        return usual(*args, **kwargs)

    monkeypatch.setattr(evaluation.in_training, "evaluate_task", slow)
    keys = dict(max_steps=7, eval_tasks_interval=1, eval_tasks_examples=2, eval_tasks=[str(questions(train))])
    assert train("pretrain", **keys).returncode == 0
    assert all(event["step_seconds"] < 0.5 for event in events(train, "train")[1:])
    assert all(event["seconds"] >= 0.5 for event in events(train, "task"))


def test_a_checkpoint_is_saved_before_the_tests(train, monkeypatch):
    monkeypatch.setattr(evaluation.in_training, "evaluate_task", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(evaluation.in_training.TrainingTests, "_write", lambda *args: [][0])
    keys = dict(max_steps=6, save_interval=3, eval_tasks=[str(questions(train))], **TESTS)
    done = train("pretrain", **keys)
    assert done.returncode == 0 and [*train.checkpoints()] == [3, 6]
    assert (
        done.stderr.count("could not be scored (ZeroDivisionError: division by zero); training goes on") == 2
    )
    assert done.stderr.count("sample_prompts could not be continued (IndexError") == 2
    assert not events(train, "task") and len(events(train, "train")) == 6

    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(evaluation.in_training, "evaluate_task", killed)
    with pytest.raises(Killed):
        train("pretrain", **keys)
    assert len(list(train.root.glob("checkpoint/*_step_3.pt"))) == 2


def test_what_does_not_fit_is_named_before_training(train):
    long = train.root / "long.jsonl"
    long.write_text(json.dumps({"question": "1?", "answer": "1" * 40}) + "\n")
    for key, value, told in (
        ("eval_tasks", ["arithmetik"], "there is no task arithmetik; did you mean arithmetic"),
        ("eval_tasks", ["arithmetic:digit=2"], "arithmetic has no option digit; its options are"),
        (
            "eval_tasks",
            ["copying:length=200"],
            "leaves no room for the question in the context of 32; lower length",
        ),
        ("eval_tasks", ["recall"], "do not fit in the context of 32 tokens"),
        ("eval_tasks", [str(long)], "an answer of 40 tokens, which leaves no room"),
        ("eval_tasks", ["nowhere.jsonl"], "nowhere.jsonl"),
        ("eval_tasks", "arithmetic", 'key "eval_tasks": found "arithmetic"; needs a list of strings'),
        ("eval_tasks_examples", 0, "needs an integer >= 1"),
        ("tracker", "wandbb", 'key "tracker": found "wandbb"; needs one of "tensorboard", "wandb"'),
    ):
        done = train("pretrain", **{key: value})
        assert done.returncode == 2 and told in done.stderr, (key, value, done.stderr)
    assert not list(train.root.glob("train_*"))
    done = train("pretrain", is_causal=False, sample_prompts=["1"])
    assert done.returncode == 2 and "sample_prompts need a model that writes" in done.stderr
    # Without them, such a model trains as before.
    assert train("pretrain", is_causal=False).returncode == 0


def test_long_prompts_and_empty_ones(train):
    done = train("pretrain", max_steps=6, sample_prompts=["1" * 500, ""], eval_tasks_interval=6)
    assert done.returncode == 0 and "could not" not in done.stderr
    assert [event["prompt"] for event in events(train, "sample")] == ["1" * 500, ""]
    done = train("sft", max_steps=6, from_checkpoint="", sample_prompts=[" "])
    assert done.returncode == 2 and "sample_prompts: an empty one is no question" in done.stderr


def test_a_tracker_that_fails_does_not_end_the_run(train, monkeypatch):
    class Failing(trackers.TensorBoard):
        def log(self, step, values):
            if step == 3:
                raise OSError(28, "No space left on device")
            super().log(step, values)

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Failing)
    done = train("pretrain", tracker="tensorboard")
    assert done.returncode == 0 and len(events(train, "train")) == 6
    told = "the tracker tensorboard failed (OSError: [Errno 28] No space left on device): the run goes on"
    assert done.stderr.count(told) == 1


# ---- keys of earlier versions ----------------------------------------------------------------------------


def test_the_key_tensorboard_of_earlier_versions(train):
    path = train.root / "config" / "config_pretrain.json"
    keys = json.loads(path.read_text())
    for value, has_files in ((False, False), (True, True)):
        path.write_text(json.dumps(keys | {"tensorboard": value}))
        assert train("pretrain").returncode == 0
        assert (train.root / "runs").exists() is has_files
    assert checkpoint(train, 6).train_config["tracker"] == "tensorboard"
    path.write_text(json.dumps(keys | {"tensorboard": True}))
    done = train("pretrain", tracker="swanlabb")  # --set goes over the file
    assert done.returncode == 2 and '--set: key "tracker"' in done.stderr
    for wrong, told in (
        ({"tensorboard": "yes"}, "found 'yes'; it is \"tracker\" now"),
        ({"tensorboard": True, "tracker": "wandb"}, 'an older name of "tracker": "tensorboard"; remove it'),
    ):
        path.write_text(json.dumps(keys | wrong))
        done = train("pretrain")
        assert done.returncode == 2 and "error: config/config_pretrain.json: " in done.stderr
        assert told in done.stderr


def test_a_checkpoint_of_an_earlier_version_resumes_without_false_alarms(train):
    assert train("pretrain", tracker="tensorboard").returncode == 0
    saved = checkpoint(train, 6)
    new = ("eval_tasks", "eval_tasks_interval", "eval_tasks_examples", "sample_prompts", "tracker")
    saved.train_config = {k: v for k, v in saved.train_config.items() if k not in new} | {"tensorboard": True}
    saved.save()
    done = train("pretrain", "--resume", tracker="tensorboard", max_steps=8, lr_decay_iters=6)
    assert done.returncode == 0, done.stderr
    assert "changed since then: max_steps: 6 -> 8, lr_decay_iters: 0 -> 6\n" in done.stderr
    assert "the learning rate jumps" not in done.stderr


# ---- the chart ---------------------------------------------------------------------------------------------


def test_scores_are_read_from_both_logs(train):
    path = questions(train)
    keys = dict(save_interval=3, eval_tasks=[str(path)], **TESTS)
    assert train("pretrain", max_steps=6, **keys).returncode == 0
    train.checkpoints()[6].unlink()
    assert train("pretrain", "--resume", max_steps=9, lr_decay_iters=6, **keys).returncode == 0
    [log] = train.root.glob("train_*.log")
    (both := Log(log)).read()
    [(name, points)] = both.run.scores().items()
    assert name == str(path) and [step for step, _ in points] == [3, 6, 9]
    assert both.run.base_rates == {name: 1 / 9}
    log.with_name(log.name.replace(".log", ".metrics.jsonl")).unlink()
    (readable := Log(log)).read()
    [(name, rounded)] = readable.run.scores().items()
    assert rounded == [(step, pytest.approx(score, abs=5e-5)) for step, score in points]
    assert readable.run.base_rates == {name: pytest.approx(1 / 9, abs=5e-5)}
