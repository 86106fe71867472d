"""The JSON files and --set: valid values are taken literally, mistakes are reported by name."""

import json
import random
import re
import string
from types import SimpleNamespace

import pytest

import models
from common.config import ROOT, display_path, parse_overrides, read_json
from common.errors import UserError, printable
from config.schema import DeepSpeedConfig, ModelConfig, TrainConfig
from config.validation import ANY, load, unsupported
from engine import reference
from engine.run_config import load_run

PAIRS = [["a.bin", "b.bin"]]
RUN = {"dataset_path": PAIRS, "max_steps": 1000}


def refusal(schema, path, text, overrides=()):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as info:
        load(schema, path, parse_overrides(overrides))
    return str(info.value)


# ---- one sentence for each mistake -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"learning_rat": 1}, 'unknown key "learning_rat"; did you mean "learning_rate"?'),
        ({"zzz": 1}, 'unknown key "zzz"; known keys: backend, batch_size, beta1, '),
        ({"n_layer": 1}, 'unknown key "n_layer"'),
        ({"dataset_path": None}, 'key "dataset_path": found null; needs a list of [train, validation] pairs'),
        ({"dataset_path": [["a"]]}, 'key "dataset_path": found ["a"]; needs a list'),
        ({"dataset_path": [["a", 1]]}, 'key "dataset_path": found 1; needs a list'),
        ({"batch_size": "8"}, 'key "batch_size": found "8"; needs an integer >= 1 and <= 1048576'),
        ({"batch_size": "Auto"}, 'found "Auto"; needs an integer >= 1 and <= 1048576 or "auto"'),
        ({"batch_size": 0}, 'key "batch_size": found 0; needs an integer >= 1'),
        ({"batch_size": 8.0}, 'key "batch_size": found 8.0; needs an integer'),
        ({"batch_size": True}, 'key "batch_size": found true; needs an integer'),
        ({"batch_size": None}, 'key "batch_size": found null; needs an integer'),
        ({"batch_size": [[8] * 99]}, 'key "batch_size": found [[8, 8, '),
        ({"dropout": 1}, 'key "dropout": found 1; needs a number >= 0 and < 1'),
        ({"learning_rate": 0}, 'key "learning_rate": found 0; needs a number > 0 and <= 10'),
        ({"learning_rate": "1e-3"}, 'key "learning_rate": found "1e-3"; needs a number'),
        ({"decay_lr": 1}, 'key "decay_lr": found 1; needs true or false'),
        ({"device": "gpu"}, 'key "device": found "gpu"; needs "auto", "cpu", "mps", "cuda" or "cuda:N"'),
        ({"dtype": "fp16"}, 'found "fp16"; needs one of "auto", "float32", "bfloat16", "float16"'),
        ({"optimizer": "sgd"}, 'key "optimizer": found "sgd"; needs one of "adamw", "muon"'),
        ({"random_seed": 1 << 63}, "needs an integer >= 0 and < 9223372036854775808"),
        ({"max_steps": 0}, "decay_lr needs an end: set lr_decay_iters or max_steps, or set decay_lr to"),
        ({"max_steps": 300}, "warmup_iters=300 must be below the end of the decay, 300"),
        ({"min_lr": 0.1}, "min_lr=0.1 is above learning_rate=0.0006"),
        ({"matrix_lr": 0.02}, 'matrix_lr is for optimizer "muon", but optimizer is "adamw"'),
        ({"momentum": 0.9}, 'momentum is for optimizer "muon", but optimizer is "adamw"'),
        ({"warmup_ratio": 0.6, "warmdown_ratio": 0.5}, "begins before the warm-up of 600 steps ends; lower"),
        ({"warmdown_ratio": 0.8}, "warmdown_ratio=0.8 of 1000 steps begins before the warm-up of 300 steps"),
        ({"decay_lr": False, "warmdown_ratio": 0.5}, "warmdown_ratio need decay_lr, but decay_lr is false"),
    ],
)
def test_a_wrong_key_of_a_run(tmp_path, change, sentence):
    told = refusal(TrainConfig, tmp_path / "run.json", json.dumps({**RUN, **change}))
    assert told.startswith(f"{tmp_path}/run.json: ") and sentence in told and "\n" not in told


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n_heads": 4}, 'unknown key "n_heads"; did you mean "n_head"?'),
        ({"architecture": "gpt2"}, 'key "architecture": found "gpt2"; needs "nano"'),
        ({"n_embd": 130}, "n_embd=130 is not a multiple of n_head=4; change one of them or set head_dim"),
        ({"n_kv_head": 3}, "n_kv_head=3 does not divide n_head=4"),
        ({"n_embd": 4}, "rotary positions need an even head_dim, found 1"),
        ({"vocab_size": 1.5}, 'key "vocab_size": found 1.5; needs an integer >= 1 and <= 16777216 or null'),
        ({"block_size": -1}, 'key "block_size": found -1; needs an integer >= 1'),
    ],
)
def test_a_wrong_key_of_a_model(tmp_path, change, sentence):
    told = refusal(ModelConfig, tmp_path / "model.json", json.dumps(change))
    assert told.startswith(f"{tmp_path}/model.json: ") and sentence in told and "\n" not in told


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "broken JSON at line 1, column 1: expecting value"),
        ('{"a": 1,\n "b" 2}', "broken JSON at line 2, column 6: expecting ':' delimiter"),
        ('{"a": 1,\n\n}', "broken JSON at line 3, column 1: "),
        ('{"a": "x', "broken JSON at line 1, column 7: unterminated string"),
        ('{"a": 1} {}', "broken JSON at line 1, column 10: extra data"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8 text"),
        ("[1, 2]", "found [1, 2]; a JSON object {...} is needed"),
        ("null", "found null; a JSON object {...} is needed"),
        ('{"dropout": 0, "dropout": 0.1}', 'key "dropout" appears twice'),
        ('{"dropout": NaN}', "NaN is not a JSON number"),
        ('{"dropout": -Infinity}', "-Infinity is not a JSON number"),
        ('{"norm_eps": 1e999}', 'key "norm_eps": found Infinity; needs a number > 0'),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ('{"n_layer": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"\\ud800": 1}', r"contains a lone surrogate (like \ud800), which is not a character"),
        ('{"architecture": "\\ud800"}', "contains a lone surrogate"),
        ('{"n_layer": ' + "[" * 300 + "]" * 300 + "}", "recursion limit exceeded"),
    ],
)
def test_what_is_no_sound_json(tmp_path, text, sentence):
    told = refusal(ModelConfig, tmp_path / "model.json", text)
    assert told.startswith(f"{tmp_path}/model.json: ") and sentence in told and "\n" not in told


def test_missing_keys_and_files(tmp_path):
    told = refusal(TrainConfig, tmp_path / "run.json", "{}")
    assert 'key "dataset_path" is missing: [[train, validation], ...] pairs of token files; several' in told
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        load(ModelConfig, tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="is a folder; a JSON file is needed"):
        load(ModelConfig, tmp_path)


# ---- --set -------------------------------------------------------------------------------------------------


def test_overrides(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("\ufeff" + json.dumps({"$schema": "x", **RUN, "batch_size": 1}), "utf-8")
    overrides = parse_overrides(
        ["batch_size=8", "device=cpu", 'dtype="float32"', "decay_lr=false", "n_layer=2", "from_checkpoint=",
         "tokenizer_path=a=b c.json", 'dataset_path=[["x", "y"], ["z", "w"]]', "batch_size=9"]
    )  # fmt: skip
    run = load(TrainConfig, path, overrides)
    assert (run.batch_size, run.device, run.dtype, run.decay_lr) == (9, "cpu", "float32", False)
    assert run.tokenizer_path == "a=b c.json" and run.dataset_path == [("x", "y"), ("z", "w")]
    path.write_text("{}")
    assert load(ModelConfig, path, overrides).n_layer == 2


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("batch_size", '--set batch_size: write it as key=value, such as "--set batch_size=8"'),
        ("=8", "--set =8: write it as key=value"),
        ("batch_size=x", '--set: key "batch_size": found "x"; needs an integer >= 1'),
        ("batch_size=", '--set: key "batch_size": found ""; needs an integer'),
        ("batch_size=NaN", '--set: key "batch_size": found "NaN"; needs an integer'),
        ("decay_lr=True", '--set: key "decay_lr": found "True"; needs true or false'),
        ("dropout=-0.1", '--set: key "dropout": found -0.1; needs a number >= 0 and < 1'),
        ("grad_clip=1e999", '--set: key "grad_clip": found Infinity; needs a number'),
    ],
)
def test_wrong_overrides(tmp_path, assignment, sentence):
    told = refusal(TrainConfig, tmp_path / "run.json", json.dumps(RUN), [assignment])
    assert told.startswith(sentence)


# ---- the reference -----------------------------------------------------------------------------------------


def test_the_reference_is_up_to_date():
    assert (ROOT / "doc" / "configuration.md").read_text("utf-8") == reference.reference_page()
    for name, schema in reference.editor_schemas().items():
        text = (ROOT / "config" / f"{name}.schema.json").read_text("utf-8")
        assert json.loads(text) == schema


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"zero_optimization": {}, "optimizer": {}, "bf16": {}}', "only there; remove bf16, optimizer"),
        ('{"zero_optimisation": {}}', 'unknown key "zero_optimisation"; did you mean "zero_optimization"?'),
        ('{"train_batch_size": "many", "zero_optimization": {}}', 'needs an integer >= 1 or "auto"'),
        ('{"zero_optimization": 3}', "found 3; needs a JSON object"),
    ],
)
def test_a_wrong_file_for_deepspeed(tmp_path, text, sentence):
    assert sentence in refusal(DeepSpeedConfig, tmp_path / "deepspeed.json", text)


def test_every_configuration_that_comes_with_nano_is_sound():
    paths = [path for path in sorted((ROOT / "config").rglob("*.json")) if ".schema" not in path.name]
    assert len(paths) >= 3
    for path in paths:
        kind = path.name.partition("_")[0]
        if kind == "model":
            models.check_config(read_json(path), display_path(path))
        else:
            load({"config": TrainConfig, "deepspeed": DeepSpeedConfig}[kind], path)


# ---- damage ------------------------------------------------------------------------------------------------


VALUES = (
    "null true false 0 1 -1 2 3 4 7 8 0.5 1.0 1e-3 -0.0 1e999 1e-999 NaN 9223372036854775808 "
    '"" "auto" "cpu" "cuda" "cuda:9" "float16" "bfloat16" "math" "flash" "8" "nano" "adamw" "~nobody/x.json" '
    '"\\ud800" "a\\u0000b" "../x" [] [[]] [1] {} {"a":1} [["a"]] [["a","b"]] [["a","b","c"]] "\\u4e2d"'
).split() + ["9" * 400, "9" * 5000, json.dumps("x" * 300), "[" * 3000]


def damage(text, dice):
    """Damage the text of a JSON object as a person or a disk might."""
    entries = [[json.dumps(key), json.dumps(value)] for key, value in json.loads(text).items()]
    for _ in range(dice.choice((1, 1, 1, 2))):
        entry = dice.choice(entries)
        at, letter = dice.randrange(1, len(entry[0])), dice.choice(string.ascii_lowercase + "_ ")
        match dice.randrange(12):
            case 0:
                entry[0] = entry[0][:at] + letter + entry[0][at:]
            case 1:
                entry[0] = f'"{entry[0][1:at]}{entry[0][at + 1 : -1]}"'
            case 2:
                entries = [other for other in entries if other is not entry] or entries
            case 3:
                entries.append([entry[0], dice.choice(VALUES)])
            case 4 | 5 | 6 | 7 | 8:
                entry[1] = dice.choice(VALUES)
            case 9:
                entry[1] = dice.choice(entries)[1]
    text = "{" + ",\n".join(": ".join(entry) for entry in entries) + "}"
    data = bytearray(text.encode())
    at, length = dice.randrange(len(data)), dice.choice((1, 1, 2, 20))
    match dice.randrange(10):
        case 0:
            del data[at:]
        case 1:
            del data[at : at + length]
        case 2:
            data[at:at] = dice.randbytes(length)
        case 3:
            data[at:at] = dice.choice(b'0123456789,:.-"{}[]').to_bytes()
        case 4:
            data[at] ^= 1 << dice.randrange(8)
    return bytes(data)


def is_small(model, run):
    """Whether a training step is fast enough for a test."""
    run = run.model_copy(update=dict.fromkeys(run.automatic, 1))  # these follow from the model
    return (
        model.n_layer * model.n_embd * model.implied()["head_dim"] * model.n_head <= 1 << 18
        and (model.n_hidden or 0) <= 1024
        and (model.vocab_size or 0) <= 1024
        and run.batch_size * run.gradient_accumulation_steps * model.block_size <= 1 << 13
        and max(run.eval_iters, run.max_steps) < 1000
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_damaged_configurations_are_refused_or_mean_what_they_say(train, seed):
    dice, outcomes = random.Random(seed), {"refused": 0, "trained": 0, "too large for a test": 0}
    folder = train.root / "config"
    files = {"-m": folder / "model_config.json", "-c": folder / "config_pretrain.json"}
    more = {"-m": {"n_layer": 1, "n_kv_head": None, "rope_theta": 1e4},
            "-c": {"dropout": 0.1, "save_interval": 5, "sdp_kernel": "auto", "use_amp": True}}  # fmt: skip
    texts = {flag: json.dumps({**json.loads(path.read_text()), **more[flag]}) for flag, path in files.items()}
    for number in range(200):
        flag = dice.choice(list(files))
        damaged = damage(texts[flag], dice)
        for each, path in files.items():
            path.write_bytes(damaged if each == flag else texts[each].encode())
        try:
            args = SimpleNamespace(config=files["-c"], model=files["-m"], set={})
            run, model = load_run(args)
        except UserError as error:
            assert str(error).startswith(f"config/{files[flag].name}: ") and "\n" not in str(error)
            done = train("pretrain")
            assert (done.returncode, done.stderr, done.stdout) == (2, f"error: {printable(str(error))}\n", "")
            outcomes["refused"] += 1
            continue
        written = json.loads(damaged.decode("utf-8-sig"))
        taken = (model if flag == "-m" else run).model_dump(mode="json")
        for key, value in written.items():
            is_number = type(taken[key]) is float and type(value) is int
            assert taken[key] == value and (is_number or type(taken[key]) is type(value)), key
        if is_small(model, run):
            done = train("pretrain", max_steps=2, decay_lr=False)
            assert done.returncode in (0, 2), number
            if done.returncode == 2:
                assert re.search(r"(^|\n)error: .+\n$", done.stderr) and not list(train.root.glob("train_*"))
            outcomes["trained" if done.returncode == 0 else "refused"] += 1
        else:
            outcomes["too large for a test"] += 1
        for path in [*train.root.glob("train_*"), *train.checkpoints().values()]:
            path.unlink()
    assert outcomes["refused"] > 80 and outcomes["trained"] > 15, outcomes


def test_what_is_not_implemented_is_named():
    """Also for keys of a nested object, if the whitelist has entries for them."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    plain, stretched = (models.check_config({"rope_scaling": scaling}, "x") for scaling in (None, yarn))
    all_keys = dict.fromkeys(type(plain).model_fields, ANY)
    inner = {f"rope_scaling.{key}": ANY for key in stretched.rope_scaling.model_dump()}
    for shape, implemented, reason in (
        (plain, all_keys, None),
        (stretched, all_keys, None),
        (stretched, all_keys | {"rope_scaling": (None,)},
         'rope_scaling is "yarn" in this model, but X supports only null: train with --set rope_scaling=null'
        ),
        (plain, all_keys | {"rope_scaling": (None,)} | inner, None),
        (stretched, all_keys | {"rope_scaling": (None,)} | inner, None),
        (stretched, all_keys | inner | {"rope_scaling.rope_type": ("llama3", "linear")},
         'rope_scaling.rope_type is "yarn" in this model, but X supports only "llama3" or "linear"'),
        (plain, all_keys | {"n_layer": (3,)},
         "n_layer is 4 in this model, but X supports only 3: train with --set n_layer=3"),
    ):  # fmt: skip
        assert unsupported(shape, implemented, "X") == reason
    for key in all_keys:
        reason = unsupported(plain, {k: v for k, v in all_keys.items() if k != key}, "X")
        assert re.fullmatch(f"{key} is .* in this model, but X does not know this key: .*", reason)
    for key in inner:
        reason = unsupported(stretched, all_keys | {k: v for k, v in inner.items() if k != key}, "X")
        assert re.fullmatch(f"{re.escape(key)} is .* in this model, but X does not know this key: .*", reason)
