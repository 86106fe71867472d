"""engine/archive.py and its users: no file may cost more than its size justifies, and none is trusted."""

import copy
import io
import json
import operator
import pickle
import pickletools
import random
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, leaves

import models
from config.schema import ModelConfig
from engine import archive
from engine.checkpoint import VERSION, Checkpoint, load
from tokenizer import CharTokenizer

TOKENIZER = CharTokenizer.train(["abc"])
MIXTURE = dict(
    architecture="deepseek_v3", block_size=8, n_layer=1, n_head=2, n_embd=8, n_hidden=8, kv_lora_rank=4,
    qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=4, n_group=2, topk_group=1,
    num_experts_per_tok=1, moe_intermediate_size=4, first_k_dense_replace=0,
)  # fmt: skip
# Loads each file in a separate process with limited memory and time, and prints the outcome.
JUDGE = """
import json, resource, signal, sys, time
sys.path.insert(0, sys.argv[1])
from engine.checkpoint import build, load
from common.errors import UserError

def pages():
    return int(open("/proc/self/statm").read().split()[0])

def too_long(*_):
    raise TimeoutError

signal.signal(signal.SIGALRM, too_long)
limit = pages() * resource.getpagesize() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[3:]:
    signal.alarm(20)
    began = time.process_time()
    try:
        model, tokenizer = build(load(path), "it")
        told = "built"
    except UserError as error:
        told = f"refused: {error}"
    except BaseException as error:
        told = f"{type(error).__name__}: {error}"
    signal.alarm(0)
    print(json.dumps([told, time.process_time() - began]))
"""


def state(shape=None, **changes):
    """The content of a checkpoint."""
    torch.manual_seed(0)
    config = ModelConfig(block_size=8, n_layer=2, n_head=2, n_embd=8)
    config = (models.check_config(shape, "the test") if shape else config).resolved(TOKENIZER.vocab_size)
    model = models.build(config)
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]}
    made = Checkpoint(
        "sft", "20260102_030405", 7, config.model_dump(), {"dataset_path": [["a", "b"]]}, TOKENIZER.to_dict(),
        dict(model.state_dict()), optimizer,
    )  # fmt: skip
    fields = {**vars(made), "tokenizer": json.dumps(made.tokenizer)}
    return {"format": "nano-checkpoint", "version": VERSION, **fields, **changes}


def save(value, path):
    torch.save(value, path)


def save_pickle(data, path, records=()):
    """Write a container as PyTorch does, with these bytes as its pickle."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", data, len(data))
    for name, content in records:
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()


def judged(paths, folder, memory=300 << 20):
    """Load the files in a separate process. Returns [(outcome, CPU seconds)]."""
    script = folder / "judge.py"
    script.write_text(JUDGE)
    done = warm.run([script, ROOT, memory, *paths], {"OMP_NUM_THREADS": "1"}, cwd=folder, timeout=300)
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(verdicts) == len(paths), done.stderr
    return verdicts


# ---- what is made to cost much -----------------------------------------------------------------------


def laughs(kind, levels=40):
    """Billion laughs: each level contains the previous one ten times."""
    value = kind(["ha"] * 10)
    for _ in range(levels):
        value = kind([value] * 10)
    return value


def cycle(kind=list):
    value = []
    value.append(value)
    return value


def nested(depth=100_000):
    """As a pickle, because to build such lists in Python would overflow the stack."""
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def by_key(key):
    """The pickle of a dictionary with one key. key: the pickle operations that make it."""
    return b"\x80\x02}" + key + b"Ns."


def doubled(times=40):
    """A tuple that contains the previous one twice, and so on."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(times))


def calling(function, *operations):
    return b"\x80\x02c" + function.encode() + b"\n" + b"".join(operations) + b"R."


def number(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def hexed(times=36):
    """Bytes in hexadecimal digits, which are in hexadecimal digits again, and so on."""
    call = b"c_codecs\nencode\n"
    text = b"X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R"
    return b"\x80\x02" + call * (times + 1) + text + b"X\x03\x00\x00\x00hex\x86R" * times + b"."


def tensor_of(count, shape, stored=4, strides=None, offset=0, kind="FloatStorage"):
    """A pickle that declares a storage of `count` numbers, and a tensor that uses it."""

    def tuple_of(numbers):
        return b"(" + b"".join(map(number, numbers)) + b"t"

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu") + number(count)
    size = tuple_of(shape) + tuple_of(strides or [1] * len(shape))
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + number(offset) + size
    pickled = b"\x80\x02}" + text("a") + made + b"\x89ccollections\nOrderedDict\n)RtRs."
    return pickled, [("data/0", bytes(stored * 4))]


PICKLES = {
    "nested lists": (nested(), ()),
    "a key that takes years": (by_key(doubled()), ()),
    "a dictionary of pairs that take years": (
        calling("collections\nOrderedDict", b"](", doubled(), b"N\x86e\x85"), ()),
    "bytearray": (calling("builtins\nbytearray", number(10**12), b"\x85"), ()),
    "digits of digits": (hexed(), ()),
    "a set": (b"\x80\x02\x8f.", ()),
    "a counter": (calling("collections\nCounter", b")"), ()),
    "more numbers than there are": tensor_of(10**9, [10**9]),
    "a tensor beyond its storage": tensor_of(4, [10**9]),
    "a tensor far behind": tensor_of(4, [1], offset=2**40),
    "a negative size": tensor_of(4, [-1]),
    "a negative stride": tensor_of(4, [4], strides=[-1]),
    "one number seen as many": tensor_of(4, [1 << 40], strides=[0]),
    "a storage of no kind": tensor_of(4, [4], kind="UntypedStorage"),
    "many operations": (b"\x80\x02" + b"N0" * (1 << 23) + b".", ()),
    "no end": (b"\x80\x02]", ()),
    "nothing": (b"", ()),
}  # fmt: skip


def test_pickles_that_would_cost_much(tmp_path):
    paths = [tmp_path / f"{number}.pt" for number in range(len(PICKLES))]
    for path, (data, records) in zip(paths, PICKLES.values(), strict=True):
        save_pickle(data, path, records)
    for name, (told, seconds) in zip(PICKLES, judged(paths, tmp_path), strict=True):
        assert told.startswith("refused: ") and seconds < 15, (name, told)


def test_the_ordinary_pickle_is_taken(tmp_path):
    for shape, strides, offset in (
        ([4], None, 0), ([2, 2], [2, 1], 0), ([2], [1], 2), ([0], None, 0), ([], None, 3)
    ):  # fmt: skip
        pickled, records = tensor_of(4, shape, strides=strides, offset=offset)
        save_pickle(pickled, tmp_path / "x.pt", records)
        assert archive.read(tmp_path / "x.pt")["a"].shape == torch.Size(shape)


def views(n_bytes, times):
    whole = torch.zeros(n_bytes // 4)
    return {f"view{i}": whole[: n_bytes // 4 - i] for i in range(times)}


def tokenizer_of(patterns=(), **changes):
    from tokenizer import BPETokenizer

    content = BPETokenizer([["a", "b"]], patterns=list(patterns)).to_dict()
    return json.dumps(content | changes)


def with_weights(change):
    made = state()
    change(made)
    return made


def shared_moment(made):
    made["optimizer"]["state"][0]["exp_avg"] = made["model"]["wte.weight"][0]


def shared_weight(made):
    made["model"]["blocks.0.mlp.down.weight"] = made["model"]["blocks.1.mlp.down.weight"]


def untied(made):
    made["model"]["lm_head.weight"] = made["model"]["lm_head.weight"] + 1


STATES = {
    "laughs in lists": lambda: state(train_config={"a": laughs(list)}),
    "laughs in tuples": lambda: state(best={"loss": laughs(tuple), "step": 1}),
    "laughs in dictionaries": lambda: state(scaler=laughs(lambda items: dict(enumerate(items)))),
    "laughs in the optimizer": lambda: state(optimizer={"state": laughs(list), "param_groups": []}),
    "a cycle": lambda: state(train_config={"a": cycle()}),
    "a long text, often": lambda: state(train_config={"a": ["x" * 10**6] * 1000}),
    "views of one tensor": lambda: state(model=views(1 << 20, 700)),
    "one tensor, often": lambda: state(scaler={"a": [torch.zeros(1 << 18)] * 1000}),
    "a number that is too large": lambda: state(train_config={"a": 1 << 70}),
    "a number as large as a byte allows": lambda: state(step=1 << 2000),
    "a set": lambda: state(scaler={"a": {1}}),
    "bytes": lambda: state(scaler={"a": b"1"}),
    "an old file whose configuration is a tensor": lambda: state(
        version=2, task="sort", train_config=torch.zeros(3)
    ),
    "a parameter": lambda: state(scaler={"a": torch.nn.Parameter(torch.zeros(2))}),
    "a moment that is a weight": lambda: with_weights(shared_moment),
    "a weight that is another one": lambda: with_weights(shared_weight),
    "an embedding that is no head": lambda: with_weights(untied),
    "a tokenizer of brackets": lambda: state(tokenizer="[" * 10**6),
    "a tokenizer of lists": lambda: state(tokenizer="[" + "[]," * (1 << 20) + "[]]"),
    "a tokenizer that is too large": lambda: state(tokenizer=" " * (1 << 25) + "{}"),
    "a pattern that takes years": lambda: state(tokenizer=tokenizer_of(["(a+)+$"])),
    "a pattern that takes memory": lambda: state(tokenizer=tokenizer_of([r"\p{L}" * 10**5])),
    "a version that is a book": lambda: state(tokenizer=tokenizer_of(version="x" * 10**6)),
}
# A configuration whose shapes the weights do not have.
for shape, key, value in (
    (None, "n_embd", 65536), (None, "n_layer", 1024), (None, "n_head", 1024), (None, "head_dim", 4096),
    (None, "vocab_size", 1 << 24), (None, "n_hidden", 1 << 18), (None, "rope_theta", 1e308),
    (MIXTURE, "n_layer", 1024), (MIXTURE, "n_routed_experts", 65536),
    (MIXTURE, "moe_intermediate_size", 65536),
):  # fmt: skip

    def reshaped(shape=shape, key=key, value=value):
        made = state(shape)
        made["model_config"][key] = value
        return made

    STATES[f"{key} {value}" + " of a mixture" * bool(shape)] = reshaped


def test_states_that_would_cost_much(tmp_path):
    paths = [tmp_path / f"{number}.pt" for number in range(len(STATES))]
    for path, make in zip(paths, STATES.values(), strict=True):
        save(make(), path)
    for name, (told, seconds) in zip(STATES, judged(paths, tmp_path), strict=True):
        assert told.startswith("refused: ") and seconds < 8, (name, told)
        assert len(told) < 500 and "\n" not in told, (name, told)


def test_tables_that_follow_from_a_few_weights(tmp_path):
    """The rotary tables of a million positions take 17 GB for a head of width 4096, which is refused. For an
    ordinary head they are allowed."""
    wide = dict(n_layer=1, n_head=1, n_embd=2, n_hidden=2, head_dim=4096)
    for shape, verdict in (
        (wide | dict(block_size=1 << 20), "refused: "),
        (wide | dict(block_size=1 << 13), "built"),
        (dict(n_layer=1, n_head=1, n_embd=8, block_size=1 << 20), "built"),
    ):
        made = state(shape | dict(block_size=8))
        made["model_config"]["block_size"] = shape["block_size"]
        save(made, tmp_path / "x.pt")
        [(told, _)] = judged([tmp_path / "x.pt"], tmp_path, memory=1 << 30)
        assert told.startswith(verdict), told


# ---- the container -----------------------------------------------------------------------------------


@pytest.fixture
def sound(tmp_path):
    save(state(), tmp_path / "x.pt")
    return tmp_path / "x.pt"


def entries(content):
    with zipfile.ZipFile(io.BytesIO(content)) as container:
        return {entry.filename: container.read(entry) for entry in container.infolist()}


def rewritten(content, twice=(), **options):
    """Written by Python's library, which allows duplicate names and compression."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as container:
        for name, data in [*entries(content).items(), *twice]:
            container.writestr(name, data)
    return file.getvalue()


def listed(content, change):
    """Apply change(entry) to each entry of the central directory: a header of 46 bytes, then the name."""
    start = struct.unpack("<L", content[-6:-2])[0]
    directory, rest, at = b"", content[start:], 0
    while rest[at : at + 4] == b"PK\1\2":
        name, extra, comment = struct.unpack("<3H", rest[at + 28 : at + 34])
        length = 46 + name + extra + comment
        directory += bytes(change(bytearray(rest[at : at + length])))
        at += length
    assert len(directory) == at
    return content[:start] + directory + rest[at:]


def at_the_first(entry, first=[]):  # noqa: B006 (the first call's place is what counts)
    first.append(entry[42:46])
    entry[42:46] = first[0]
    return entry


def of_size(entry):
    entry[20:28] = struct.pack("<2L", 1 << 30, 1 << 30)
    return entry


def with_two_lists(content):
    """Python's library reads the directory right before the locator, PyTorch's the one it points to."""
    assert content[-42:-38] == b"PK\6\7"
    end64, locator, end = content[-98:-42], bytearray(content[-42:-22]), content[-22:]
    locator[8:16] = struct.pack("<Q", len(content) - 98 - 56)
    return content[:-98] + end64 + end64 + bytes(locator) + end


CONTAINERS = {
    "compressed": lambda content: rewritten(content, compression=zipfile.ZIP_DEFLATED),
    "a name twice": lambda content: rewritten(content, [("x/data.pkl", b"\x80\x02N.")]),
    "a name in capitals, too": lambda content: rewritten(content, [("x/DATA.PKL", b"\x80\x02N.")]),
    "a way out": lambda content: rewritten(content, [("../x", b"1")]),
    "a name that ends early": lambda content: content.replace(b"data/10", b"data/1\0"),
    "all at one place": lambda content: listed(content, at_the_first),
    "larger than the file": lambda content: listed(content, of_size),
    "something before it": lambda content: b"#!/bin/sh\n" + content,
    "something behind it": lambda content: content + b"x",
    "a comment": lambda content: content[:-2] + b"\4\0more",
    "two lists": with_two_lists,
    "a second list": lambda content: content + rewritten(content),
    "an empty one": lambda content: rewritten(content)[:0] + b"PK\5\6" + bytes(18),
    "half of it": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
    "a wrong checksum": lambda content: content.replace(b"nano-checkpoint", b"nano-checkpoinT"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_that_are_not_as_pytorch_writes_them(name, sound):
    content = sound.read_bytes()
    changed = CONTAINERS[name](content)
    assert changed != content
    sound.write_bytes(changed)
    with pytest.raises(archive.Damaged, match="x.pt is damaged"):
        archive.read(sound)


def test_a_container_of_countless_records(tmp_path):
    """The directory alone would take ten times as much memory as the file has bytes."""
    directory = b"PK\1\2" + bytes(42)
    count = 1 << 18
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(directory) * count, 0, 0)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory) * count, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(directory) * count, 1)
    (tmp_path / "x.pt").write_bytes(directory * count + end64 + locator + tail)
    [(told, seconds)] = judged([tmp_path / "x.pt"], tmp_path, memory=100 << 20)
    assert "x.pt is damaged" in told and seconds < 1, told


# ---- chance --------------------------------------------------------------------------------------------


VALUES = [
    None, True, False, 0, 1, -1, 3, 1.5, float("nan"), float("inf"), 1e308,
    1 << 31, 1 << 63, 1 << 64, -(1 << 80), 10**400, "", "x", "nano", "a" * 10_000, "\ud800", "\0",
    (), [], {}, (1,), [1], {"a": 1}, [[]], OrderedDict(a=1),
]  # fmt: skip
SMALL_TENSORS = [
    torch.zeros(0), torch.zeros(()), torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2).T,
    torch.zeros(1).expand(1000), torch.zeros(4)[1:3], torch.zeros(2, dtype=torch.bfloat16),
    torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.bool), torch.full((2,), float("nan")),
]  # fmt: skip


def containers(value):
    """[(dictionary or list, key)] of everything in `value`."""
    found, waiting, seen = [], [value], set()
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            found += [(one, key) for key in (one if isinstance(one, dict) else range(len(one)))]
            values = one.values() if isinstance(one, dict) else one
            waiting += [each for each in values if isinstance(each, dict | list)]
    return found


def mutated(made, dice):
    """Replace one to three values by others, from a list or from elsewhere in the state, or delete them."""
    made = copy.deepcopy(made)
    made["tokenizer"] = json.loads(made["tokenizer"])
    for _ in range(dice.randint(1, 3)):
        places = containers(made)
        holder, key = dice.choice(places)
        other, its_key = dice.choice(places)
        match dice.randrange(8):
            case 0 | 1 | 2:
                holder[key] = dice.choice(VALUES)
            case 3:
                holder[key] = dice.choice(SMALL_TENSORS)
            case 4:
                holder[key] = other[its_key]
            case 5:
                holder[key] = other
            case 6 if isinstance(holder, dict):
                holder[dice.choice([1, "", "more", key, (1, 2), 1.5, None])] = other[its_key]
            case _:
                del holder[key]
    if dice.random() < 0.7 and "tokenizer" in made:
        try:
            made["tokenizer"] = json.dumps(made["tokenizer"])
        except (TypeError, ValueError, RecursionError):
            pass
    return made


OPERATIONS = [bytes([code]) for code in range(256)] + [
    b"q\x00", b"h\x00", b"h\x01", b"K\x07", b"J\xff\xff\xff\x7f", b"X\x01\x00\x00\x00a", b"(t", b")R",
    b"cbuiltins\nbytearray\n", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"c_codecs\nencode\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nLongStorage\n",
    b"ctorch\ndevice\n", b"ctorch.serialization\n_get_layout\n",
]  # fmt: skip


def mutated_pickle(data, dice):
    """Copy, swap, delete, insert, replace or damage one to four operations."""
    places = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    parts = [data[start:end] for start, end in zip(places, places[1:], strict=False)]
    for _ in range(dice.randint(1, 4)):
        at, other = dice.randrange(len(parts)), dice.randrange(len(parts))
        match dice.randrange(6):
            case 0:
                del parts[at]
            case 1:
                parts[at:at] = parts[other : other + dice.randint(1, 9)]
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts[at:at] = [dice.choice(OPERATIONS)]
            case 4:
                parts[at] = dice.choice(OPERATIONS)
            case 5:
                part = bytearray(parts[at])
                part[dice.randrange(len(part))] ^= 1 << dice.randrange(8)
                parts[at] = bytes(part)
    return b"".join(parts)


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["values", "operations"])
def test_what_chance_makes_of_a_checkpoint(kind, seed, tmp_path):
    dice, paths, outcomes = random.Random(seed), [], Counter()
    yarn = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=8)
    made = [state(), state(MIXTURE), state(dict(n_layer=1, n_embd=8, n_head=1, rope_scaling=yarn))]
    save(made[0], tmp_path / "sound.pt")
    records = entries((tmp_path / "sound.pt").read_bytes())
    records = {name.partition("/")[2]: data for name, data in records.items()}
    pickled = records.pop("data.pkl")
    for number in range(250):
        path = tmp_path / f"{number}.pt"
        if kind == "values":
            try:
                save(mutated(dice.choice(made), dice), path)
            except (RecursionError, ValueError, UnicodeEncodeError):
                continue
        else:
            kept = [name for name in records if name.startswith("data/") or name == "byteorder"]
            save_pickle(mutated_pickle(pickled, dice), path, [(name, records[name]) for name in kept])
        paths.append(path)
    for path, (told, seconds) in zip(paths, judged(paths, tmp_path), strict=True):
        kind_of_end = told.partition(":")[0]
        assert kind_of_end in ("built", "refused"), (path, told)
        assert seconds < 10 and len(told) < 2000 and "\n" not in told, (path, told)
        outcomes[kind_of_end] += 1
    assert outcomes["refused"] > 50 and len(paths) > 150, outcomes


def test_a_checkpoint_is_what_was_saved(tmp_path, monkeypatch):
    """Including strings and numbers of all sizes, and dtypes that training does not use."""
    monkeypatch.setattr("engine.checkpoint.FOLDER", tmp_path)
    numbers = [0, -1, 255, 65536, 1 << 40, -(1 << 40), 0.1]
    made = state(train_config={"texts": ["狐", "\n" * 300, ""], "numbers": numbers})
    kinds = torch.float64, torch.float16, torch.int64, torch.bool
    made["optimizer"]["more"] = [torch.zeros(3, dtype=kind) for kind in kinds]
    made["tokenizer"] = json.loads(made["tokenizer"])
    save(made, tmp_path / "x.pt")
    found = vars(load(tmp_path / "x.pt"))
    for one, two in zip(leaves(found), leaves({key: made[key] for key in found}), strict=True):
        equal = torch.equal if isinstance(one, torch.Tensor) else operator.eq
        assert type(one) is type(two) and equal(one, two)


def test_permission_is_asked_of_the_system(sound, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "no")

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(PermissionError):
        archive.read(Path(sound))
