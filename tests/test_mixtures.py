"""Mixtures: every part has its share, at any time, and training on one resumes, is told and validated."""

import json
import math
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import largest_difference, launched, losses

import tasks
from common.log_reader import Log
from config.resolved import ResolvedTrainConfig
from data import Mixture, TokenBatches, TokenFile, whole_shares
from engine.checkpoint import load
from engine.parallel import SingleProcess
from tasks.parts import TaskPart
from tokenizer import load as load_tokenizer

weights_of_parts = st.lists(st.floats(1e-2, 1e3), min_size=1, max_size=9)


# ---- which sequence comes when ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(weights_of_parts)
def test_every_prefix_holds_each_part_in_its_share(weights):
    mixture, n = Mixture([math.inf] * len(weights), weights), np.arange(2000)
    counts = mixture.among_first(n)
    assert (counts.sum(0) == n).all() and (np.diff(counts) >= 0).all() and (np.diff(counts) <= 1).all()
    shares = np.array(weights) / sum(weights)
    assert np.abs(counts - np.outer(shares, n)).max() < 2.5
    far = 10**15 + n  # where a share that was rounded would be wrong by millions of sequences
    assert (np.diff(mixture.among_first(far)).sum(0) == 1).all()


def test_equal_parts_stay_within_one_sequence():
    for k in range(2, 30):
        counts = Mixture([math.inf] * k, [1] * k).among_first(np.arange(500))
        assert np.abs(counts - np.arange(500) / k).max() < 1


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([3, 1], [3, 1]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([2.5, 5.0], [1, 2]),
        ([8], [1]),
        ([1e-6, 1.0], [1, 10**6]),
    ],
)
def test_weights_are_whole_numbers(weights, shares):
    assert whole_shares(weights) == shares


@settings(deadline=None, max_examples=50)
@given(weights_of_parts)
def test_weights_that_are_not_keep_their_proportions(weights):
    shares, total = whole_shares(weights), sum(map(Fraction, weights))
    assert sum(shares) < 2**31
    for weight, share in zip(weights, shares, strict=True):
        assert abs(Fraction(share, sum(shares)) / (Fraction(weight) / total) - 1) < 1e-3


@pytest.mark.parametrize(
    ("counts", "weights"),
    [([100_000, 7_000], [3, 1]), ([50_000, math.inf, 20_000], [0.61, 0.25, 0.14]), ([90_001], [5]),
     ([20_000, 3_000], [99, 1]), ([8_000] * 4, [1, 2, 3, 4])],
)  # fmt: skip
def test_an_epoch_shows_all_of_every_part_in_its_share(counts, weights):
    mixture = Mixture(counts, weights)
    _, parts, _ = mixture.locate(0, mixture.n_sequences)
    seen = np.bincount(parts, minlength=len(counts))
    shares = np.array(weights) / sum(weights)
    np.testing.assert_allclose(seen / mixture.n_sequences, shares, rtol=1e-3)
    assert all(n >= count for n, count in zip(seen, counts, strict=True) if count < math.inf)
    before = np.bincount(parts[:-1], minlength=len(counts))  # one sequence less would not do
    assert any(n < count for n, count in zip(before, counts, strict=True))


def test_where_a_sequence_is_by_counting():
    counts, weights = [10, math.inf, 3], [0.5, 0.3, 0.2]
    mixture, seen = Mixture(counts, weights), [0, 0, 0]
    for number in range(500):
        [turn], [part], [within] = mixture.locate(number, 1)
        expected = divmod(seen[part], counts[part]) if counts[part] < math.inf else (0, seen[part])
        assert (turn, within) == expected
        seen[part] += 1
    together = mixture.locate(0, 500)
    for first in (0, 3, 17, 493):
        for one, all_of_them in zip(mixture.locate(first, 7), together, strict=True):
            np.testing.assert_array_equal(one, all_of_them[first : first + 7])
    assert mixture.position(mixture.n_sequences + 4) == (1, 0, 4)
    assert Mixture([math.inf], [1]).position(10**12) == (0, 0, 10**12)


# ---- batches ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tiny_data):
    """Text, chats and a task."""
    text, chats = (TokenFile(tiny_data / f"{name}_train.bin") for name in ("pretrain", "sft"))
    return [
        text,
        chats,
        TaskPart(tasks.parse("sort:digits=5"), load_tokenizer(tiny_data / "tokenizer.json"), 32),
    ]


def rows_of(batches, first, n):
    """[(ids that count or are read, mask)] of n sequences: what is left without the padding."""
    rows = []
    for start in range(first, first + n, batches.batch_size):
        batch = batches(start)
        for x, y, mask in zip(batch["x"], batch["y"], batch["mask"], strict=True):
            end = max(np.flatnonzero(y != 0), default=-1) + 1
            rows.append((x[:1].tolist() + y[:end].tolist(), mask[:end].tolist()))
    return rows[:n]


def test_a_mixture_holds_what_its_parts_hold_alone(parts):
    text, chats, task = parts
    mixture = TokenBatches(parts, 32, 5, 3, [2, 1, 0.5])
    n = 600
    rows, (_, which, _) = rows_of(mixture, 0, n), mixture.order.locate(0, n)
    assert mixture.sequences_per_epoch < n  # the first part is seen more than once
    alone = TokenBatches([text], 32, 1, 3)
    of_text = [row for row, part in zip(rows, which, strict=True) if part == 0]
    assert of_text == rows_of(alone, 0, len(of_text)) and len(of_text) > alone.sequences_per_epoch
    documents = [chats.tokens[a:b].tolist() for a, b in zip(chats.starts, chats.starts[1:], strict=False)]
    of_chats = [ids for (ids, _), part in zip(rows, which, strict=True) if part == 1]
    n_chats = len(documents)
    assert sorted(of_chats[:n_chats]) == sorted(documents) == sorted(of_chats[n_chats : 2 * n_chats])
    assert of_chats[:n_chats] != of_chats[n_chats : 2 * n_chats]
    of_task = [row for row, part in zip(rows, which, strict=True) if part == 2]
    assert len({str(ids) for ids, _ in of_task}) > len(of_task) // 2
    for ids, mask in of_task:
        question, answer = ids[1:6], ids[7:-1]
        assert sorted(question) == answer and mask == [0] * 6 + [1] * 6


def test_a_batch_is_a_pure_function_of_its_first_number(parts):
    make = lambda size, seed=3: TokenBatches(parts, 32, size, seed, [2, 1, 1])  # noqa: E731
    whole = rows_of(make(6), 0, 900)
    batches = make(7)
    for first in (893, 0, 512, 77, 10**12, 3):
        rows = rows_of(batches, first, 7)
        if first < 900:
            assert rows == whole[first : first + 7]
        assert rows == rows_of(make(7), first, 7) != rows_of(make(7, seed=4), first, 7)
    # Several processes take rows of the same global batch, in the same order.
    config = ResolvedTrainConfig(
        dataset_path=[], batch_size=6, max_steps=9, warmup_iters=1, learning_rate=1e-3, min_lr=0.0
    )
    batch = make(6)(42)
    for world_size in (1, 2, 3):
        strategies = [SingleProcess() for _ in range(world_size)]
        for rank, strategy in enumerate(strategies):
            strategy.rank, strategy.world_size = rank, world_size
        rows = [strategy.rows(config) for strategy in strategies]
        shared = np.concatenate([batch["x"][row.start : row.stop] for row in rows])
        np.testing.assert_array_equal(shared, batch["x"])


def test_weights_in_the_same_proportion_are_the_same_mixture(parts):
    one, same, other = (
        TokenBatches(parts, 32, 8, 3, weights) for weights in ([3, 1, 2], [1.5, 0.5, 1], [3, 1, 1])
    )
    assert one.fingerprints == same.fingerprints != other.fingerprints
    np.testing.assert_array_equal(one(99)["x"], same(99)["x"])
    assert len(one.fingerprints) == 1 and "50.00% of " in one.fingerprints[0]["size"]


# ---- training --------------------------------------------------------------------------------------------

PAIRS = {
    name: [f"dataset/prepared/{name}_{split}.bin" for split in ("train", "val")]
    for name in ("pretrain", "sft")
}
MIXTURE = [
    {"path": PAIRS["pretrain"], "weight": 2}, {"path": PAIRS["sft"], "weight": 1},
    {"task": "sort:digits=5", "weight": 0.5},
]  # fmt: skip
SETTINGS = dict(dataset_path=MIXTURE, from_checkpoint="", log_interval=1)


def test_a_killed_run_on_a_mixture_resumes_bit_for_bit(train, tmp_path):
    assert train("mid", **SETTINGS, dropout=0.1, save_interval=3).returncode == 0
    whole = train.checkpoints("mid")
    later = [
        path.unlink() for step, path in whole.items() if step == 6 and shutil.copy(path, tmp_path / "6.pt")
    ]
    assert later and train("mid", "--resume", **SETTINGS, dropout=0.1, save_interval=3).returncode == 0
    assert train.same(load(tmp_path / "6.pt"), load(train.checkpoints("mid")[6]))
    steps = train.logged("Train", "Curriculum", "Loss")
    assert steps[3:6] == steps[6:9] and [position for _, position, _ in steps[:3]] == ["0-0", "0-4", "0-8"]


def test_the_parts_are_told(train, parts):
    done = train("mid", **SETTINGS, max_steps=70, lr_decay_iters=70)
    assert done.returncode == 0
    lines = [line for line in done.stdout.splitlines() if line.startswith("data ")]
    n_text, n_chats = (
        TokenBatches([TokenFile(train.root / path[0])], 32, 1).sequences_per_epoch for path in PAIRS.values()
    )
    epoch = max(math.ceil(n_text * 3.5 / 2), math.ceil(n_chats * 3.5 / 1))
    [told] = re.findall("data a mixture, ([0-9,]+) sequences an epoch; 70 steps = ", lines[0])
    assert abs((found := int(told.replace(",", ""))) - epoch) <= 3
    epoch = found
    text, chats, task = lines[1:]
    assert text.startswith(f"data 57.14% {PAIRS['pretrain'][0]}: ") and text.endswith(
        f"of the tokens that count; seen {epoch * 2 / 3.5 / n_text:.2f} times in an epoch, "
        f"{280 * 2 / 3.5 / n_text:.2f} times in the run"
    )
    assert chats.startswith("data 28.57% ") and f"{280 / 3.5 / n_chats:.2f} times in the run" in chats
    assert task.startswith("data 14.29% sort:digits=5: ") and task.endswith("; drawn anew every time")
    tokens = [float(line.split(": ")[1].split("%")[0]) for line in (text, chats, task)]
    assert sum(tokens) == pytest.approx(100, abs=0.02)
    counted = [[], [], []]
    batches = TokenBatches(
        [*(TokenFile(train.root / path[0]) for path in PAIRS.values()), parts[2]], 32, 1, 1337, [2, 1, 0.5]
    )
    for first, part in enumerate(batches.order.locate(0, epoch)[1]):
        counted[part].append(batches(first)["mask"].sum())
    total = sum(map(sum, counted))
    assert tokens == pytest.approx([100 * sum(each) / total for each in counted], abs=0.5)


def test_every_part_has_its_own_validation_loss(train, capsys):
    assert train("mid", **SETTINGS, eval_interval=6, eval_iters=14).returncode == 0
    [(step, whole, text, chats, task)] = train.logged("Val", "Loss", "Loss/0", "Loss/1", "Loss/2")
    files = [TokenFile(train.root / path[1]) for path in PAIRS.values()]
    counted = [file.meta["n_loss_tokens"] / TokenBatches([file], 32, 1).sequences_per_epoch for file in files]
    weights = np.array([2, 1, 0.5]) * [*counted, 6]
    assert step == 6 and float(whole) == pytest.approx(
        np.average([float(text), float(chats), float(task)], weights=weights), abs=2e-5
    )
    (log := Log(next(train.root.glob("train_*.log")))).read()
    assert log.run.part_names == {0: "pretrain_val", 1: "sft_val", 2: "sort:digits=5"}


def test_a_mixture_that_changes_is_begun_anew(train):
    settings = {**SETTINGS, "eval_interval": 3}
    assert train("mid", **settings).returncode == 0
    done = train("mid", "--resume", **settings, max_steps=7)
    assert done.returncode == 0 and "the data have changed" not in done.stderr
    assert load(train.checkpoints("mid")[7]).consumed["sequences"] == 28
    heavier = [*MIXTURE[:2], {**MIXTURE[2], "weight": 3.5}]
    done = train("mid", "--resume", **{**settings, "dataset_path": heavier}, max_steps=8)
    assert done.returncode == 0
    assert (
        "the data have changed: the mixture: 57.14% of " in done.stderr and " then, 30.77% of " in done.stderr
    )
    assert "training restarts at the first sequence of the data: their content has changed\n" in done.stderr
    assert load(train.checkpoints("mid")[8]).consumed["sequences"] == 4
    longer = [*heavier[:2], {"task": "sort:digits=6", "weight": 3.5}]
    done = train("mid", "--resume", **{**settings, "dataset_path": longer}, max_steps=9)
    assert "of sort:digits=5 then, " in done.stderr and "of sort:digits=6 now" in done.stderr
    assert "the data have changed: sort:digits=6: " in done.stderr  # those that are validated with
    assert load(train.checkpoints("mid")[9]).consumed["sequences"] == 4


@pytest.mark.slow
def test_two_processes_train_on_the_same_mixture(train, tiny_project):
    settings = dict(from_checkpoint="", max_steps=30, learning_rate=1e-2)
    assert train("mid", dataset_path=MIXTURE, **settings).returncode == 0
    mixture = json.dumps(MIXTURE, separators=(",", ":"))
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"), "train_ddp.py"
    launched(tiny_project, *launcher, "-t", "mid", "--set", f"dataset_path={mixture}", **settings)
    assert largest_difference(losses(train), losses(tiny_project)) <= 1e-5


def test_one_file_may_be_a_mixture_of_pretraining_text(train):
    parts = [{"path": PAIRS["pretrain"], "weight": 3}, {"path": PAIRS["pretrain"][::-1], "weight": 1}]
    assert train("pretrain", dataset_path=parts, eval_interval=6).returncode == 0
    [(_, loss, bits)] = train.logged("Val", "Loss", "BPB")
    metas = [TokenFile(train.root / path).meta for path in PAIRS["pretrain"][::-1]]
    assert min(meta["n_bytes"] for meta in metas) > 0 and 0 < float(bits) < float(loss) / math.log(2)


# ---- the stage between pretraining and fine-tuning -------------------------------------------------------


def test_fine_tuning_starts_from_the_newest_of_both(train):
    assert train("sft").returncode == 2
    assert train("pretrain", max_steps=3).returncode == 0
    assert train("mid", max_steps=3).returncode == 0
    done = train("sft", max_steps=3)
    assert done.returncode == 0 and "starting from the weights of checkpoint/mid_" in done.stderr
    assert load(train.checkpoints("mid")[3]).chat_template == "nano"
    assert train("pretrain", max_steps=4).returncode == 0
    assert "starting from the weights of checkpoint/pretrain_" in train("sft", max_steps=4).stderr


def test_without_a_model_the_first_stage_is_named(train):
    for stage, names in (("mid", "pretrain"), ("sft", "pretrain or mid")):
        done = train(stage)
        assert done.returncode == 2 and f"checkpoint/ holds no model of {names}; run" in done.stderr
        assert "`python train.py -t pretrain` first" in done.stderr


# ---- what cannot be mixed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset_path", "stage", "sentence"),
    [
        ([{"task": "sort", "weight": 0}], "mid", 'its key "weight": input should be greater than 0, found 0'),
        ([{"task": "sort", "weight": -1}], "mid", 'key "weight": input should be greater than 0, found -1'),
        ([{"task": "sort", "wieght": 1}], "mid", 'its key "wieght": extra inputs are not permitted'),
        ([{"weight": 1}], "mid", 'found {"weight": 1}; a part of a mixture has either a path or a task'),
        ([{"task": "sort", "path": ["a", "b"]}], "mid", "a part of a mixture has either a path or a task"),
        ([{"path": ["a"]}], "mid", 'its key "path": needs two file names, [train, validation], found ["a"]'),
        ([["a", "b"], {"task": "sort"}], "mid", 'as {"path": [train, validation], "weight": 1}'),
        ([{"task": "sort", "weight": 1e-7}, {"task": "sort"}], "mid", "give it 2e-06 or more"),
        ([{"task": "srot"}], "mid", "there is no task srot; did you mean sort?"),
        ([{"task": "sort:digist=3"}], "mid", "sort has no option digist; its options are digits"),
        ([{"task": "sort"}], "pretrain", "but pretrain learns from text; use one of mid, sft"),
        ([{"path": PAIRS["sft"]}], "pretrain", "sft_train.bin was prepared for sft, not for pretrain"),
        ([{"path": PAIRS["pretrain"]}], "sft", "pretrain_train.bin was prepared for pretrain, not for sft"),
        ([{"path": ["no.bin", "no.bin"]}], "mid", "does not exist; run `python data.py` first"),
        ([{"task": "sort:digits=40"}], "sft", "than block_size, which is 32; with 82, all would fit"),
        ([{"task": "calculator"}], "sft", "has characters that the tokenizer does not know: ( ) *;"),
        ([], "mid", "dataset_path is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on(train, dataset_path, stage, sentence):
    done = train(stage, dataset_path=dataset_path, from_checkpoint="")
    assert (
        done.returncode == 2 and sentence in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    )
