"""How architectures are found and used: the guide's examples in every script."""

import json
import re
from pathlib import Path

import pytest
import torch
from lm_pass import lm_pass
from torch.utils._python_dispatch import TorchDispatchMode

import models
from engine.checkpoint import load

ROOT = Path(__file__).resolve().parents[2]


def test_every_file_is_an_architecture():
    files = {path.stem for path in (ROOT / "models").glob("*.py")} - {"__init__"}
    assert {*models.names()} == {"nano", *files}
    for name in models.names():
        assert models.config_class(name)(architecture=name).architecture == name


def test_the_guides_example_is_an_architecture(tiny_project):
    guide = (ROOT / "doc" / "extending.md").read_text("utf-8")
    [code] = re.findall(r"`models/parallel.py`:\n\n```python\n(.*?)```", guide, re.DOTALL)
    (tiny_project.root / "models" / "parallel.py").write_text(code, "utf-8")

    def succeed(*args):
        done = tiny_project.run(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    chosen = ("-t", "pretrain", "--set", "architecture=parallel")
    assert "parallel: 1 layers" in succeed("train.py", *chosen, "--plan")
    succeed("train.py", *chosen, "--set", "max_steps=3", "--set", "lr_decay_iters=6")
    succeed("train.py", *chosen, "--resume")
    checkpoint = load(tiny_project.checkpoints()[6])
    assert checkpoint.model_config["architecture"] == "parallel"
    assert "blocks.0.attn_norm.weight" in checkpoint.model
    assert "blocks.0.mlp_norm.weight" not in checkpoint.model
    watched = tiny_project.logged("Train", "vector_size")
    assert [step for step, _ in watched] == [1, 2, 3, 4, 5, 6] and all(float(size) > 0 for _, size in watched)
    succeed("train.py", "-t", "sft")
    succeed("inference.py", "-i", "--prompt", "1 + 1?", "-l", 12)
    done = tiny_project.run("train.py", *chosen, "--set", "n_heads=3")
    assert done.returncode == 2 and 'unknown key "n_heads"; did you mean "n_head"?' in done.stderr


HYBRID = """
import torch
import models
from decoding.engine import BatchedDecoder, Request
from decoding.likelihood import log_likelihoods
from decoding.sampling import generate

torch.manual_seed(0)
shape = {"architecture": "hybrid", "block_size": 24, "n_layer": 3, "n_head": 2, "n_embd": 32}
model = models.build(models.check_config(shape, "the test").resolved(50)).eval()
tokens = torch.randint(50, (3, 12))
with torch.inference_mode():
    expected, cache = model(tokens), model.new_cache(3)
    parts = [model(part, cache) for part in tokens.split((5, 1, 4, 1, 1), dim=1)]
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-5
    lengths, cache = torch.tensor([2, 7, 4]), model.new_cache(3)  # rows of different lengths, padded
    model(tokens[:, :7], cache, lengths)
    following = model(tokens[:, :1], cache)
    for row, n in enumerate(lengths.tolist()):
        alone = model(torch.cat((tokens[row, :n], tokens[row, :1]))[None])
        assert (following[row] - alone[0, -1]).abs().max() < 1e-5
# Several texts at once, which start and end at different times and outgrow the context.
requests = [Request([2, 9 + i], 10 + 8 * i, temperature=0) for i in range(5)]
BatchedDecoder(model, 2).run(requests)
for request in requests:
    assert request.tokens == list(generate(model, request.context[:2], request.max_tokens, temperature=0))
# Likelihoods, where texts begin alike.
few, many = [[3] * 10, [3] * 10 + [4] * 8], [[1], [2, 2], [7, 8, 9, 4]]
pairs = [(context, continuation) for context in few for continuation in many]
for (context, continuation), found in zip(pairs, log_likelihoods(model, pairs)):
    logprobs = model(torch.tensor([context + continuation]))[0].log_softmax(-1)
    expected = sum(logprobs[len(context) - 1 + i, token] for i, token in enumerate(continuation))
    assert abs(found.logprob - expected) < 1e-4
attention, recurrence = model.blocks[1].costs(24), model.blocks[0].costs(24)
assert recurrence.attention_flops == 0 < attention.attention_flops
linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
weights = sum(m.in_features * m.out_features for m in linear)
assert model.flops_per_token(24, training=False) == 2 * weights + 4 * 32 * 24
"""


def test_the_guides_layers_may_differ(tiny_project):
    """Cache and costs are right, and it trains, resumes exactly, and generates."""
    guide = (ROOT / "doc" / "extending.md").read_text("utf-8")
    [code] = re.findall(r"`models/hybrid.py`:\n\n```python\n(.*?)```", guide, re.DOTALL)
    (tiny_project.root / "models" / "hybrid.py").write_text(code, "utf-8")
    (tiny_project.root / "test_hybrid.py").write_text(HYBRID, "utf-8")
    chosen = ("-t", "pretrain", "--set", "architecture=hybrid", "--set", "n_layer=2")
    chosen += ("--set", "lr_decay_iters=4", "--set", "save_interval=2")
    for command in (
        ("test_hybrid.py",),
        ("train.py", *chosen, "--set", "max_steps=4"),
        ("train.py", *chosen, "--set", "max_steps=2"),
        ("train.py", *chosen, "--set", "max_steps=4", "--resume"),
        ("train.py", "-t", "sft"),
        ("inference.py", "-i", "--prompt", "1 + 1?", "-l", 12),
    ):
        done = tiny_project.run(*command)
        assert done.returncode == 0, done.stderr
    one, two = sorted((tiny_project.root / "checkpoint").glob("pretrain_*_step_4.pt"))
    assert tiny_project.same(load(one), load(two))


@pytest.mark.parametrize("name", models.names())
def test_each_trains_with_muon_and_goes_on_exactly(train, name):
    settings = dict(architecture=name, optimizer="muon", lr_decay_iters=6, save_interval=3)
    assert train("pretrain", **settings, max_steps=6).returncode == 0
    whole = load(train.checkpoints()[6])
    for path in train.checkpoints().values():
        path.unlink()
    assert train("pretrain", **settings, max_steps=3).returncode == 0
    assert train("pretrain", "--resume", **settings, max_steps=6).returncode == 0
    assert train.same(load(train.checkpoints()[6]), whole)


@pytest.mark.parametrize("name", models.names())
def test_gradients_of_each_are_the_same_each_time_with_several_threads(name):
    n_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        torch.manual_seed(0)
        shape = {"architecture": name, "block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 64}
        model = models.build(models.check_config(shape, "the test").resolved(99)).train()
        model.use_custom_kernels(True)
        x, y = torch.randint(99, (2, 8, 256))
        gradients = []
        for _ in range(5):
            lm_pass(model, x, y)[1].backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
            model.zero_grad(set_to_none=True)
        for others in gradients[1:]:
            assert all(map(torch.equal, others, gradients[0]))
    finally:
        torch.set_num_threads(n_threads)


# torch.use_deterministic_algorithms refuses these on CUDA, three more for some arguments, and others that are
# for images and audio.
UNREPEATABLE = {"put", "put_", "histc", "median", "nll_loss2d_forward"}


class Operations(TorchDispatchMode):
    """Collects the names of operations that are not deterministic on CUDA."""

    def __init__(self):
        super().__init__()
        self.seen, self.unrepeatable = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.removeprefix("aten::"), kwargs or {}
        depends = {
            "cumsum": lambda: args[0].is_floating_point(),
            "bincount": lambda: kwargs.get("weights", (*args, None)[1]) is not None,
            "scatter_reduce": lambda: args[4] == "prod",
        }
        self.seen.add(name)
        if name in UNREPEATABLE or depends.get(name, bool)():
            self.unrepeatable.add(name)
        return function(*args, **kwargs)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", models.names())
def test_each_trains_without_operations_that_cuda_cannot_repeat(train, name, optimizer):
    settings = dict(architecture=name, optimizer=optimizer, dropout=0.1, max_steps=3)
    with Operations() as operations:
        for task in ("pretrain", "sft"):
            done = train(task, **settings)
            assert done.returncode == 0, done.stderr
    assert {"embedding", "embedding_dense_backward"} <= operations.seen  # forward and backward
    assert not operations.unrepeatable


def test_editors_know_all_of_them():
    schema = json.loads((ROOT / "config" / "model_config.schema.json").read_text("utf-8"))
    kinds = [schema["$defs"][kind["$ref"].rpartition("/")[2]] for kind in schema["anyOf"]]
    assert {kind["properties"]["architecture"]["const"] for kind in kinds} == {*models.names()}


# The guide's change to the transformer, for each file: (old text, new text) ...
SQUARED = {
    "config/schema.py": [
        ('    bias: bool = Field(False, description="linear layers have a bias")\n',
         '    bias: bool = Field(False, description="linear layers have a bias")\n'
         '    activation: Literal["swiglu", "relu2"] = Field("swiglu", description="inside the MLP")\n'),
    ],
    "model.py": [
        ("self.down = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)\n",
         "self.down = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)\n"
         "        self.is_squared = config.activation == 'relu2'\n"),
        ("self.down(F.silu(gate) * up)",
         "self.down((gate.relu().square() if self.is_squared else F.silu(gate)) * up)"),
    ],
}  # fmt: skip
# ... and the changes that declare support for it.
TABLE = ['"architecture": ("nano",),', '"architecture": ("nano",), "activation": ("swiglu",),']
TOLD = {
    **dict.fromkeys(("decoding/backend.py", "formats/gguf.py", "formats/llama2c.py"), [TABLE]),
    "formats/families.py": [
        ('nano_fixed={"qk_norm": True,', 'nano_fixed={"activation": "swiglu", "qk_norm": True,'),
        ('nano_fixed={"qk_norm": False,', 'nano_fixed={"activation": "swiglu", "qk_norm": False,'),
    ],
}  # fmt: skip
DECODED = """
import sys
import engine.checkpoint
from decoding.backend import supports
from decoding.engine import BatchedDecoder, Request
from decoding.sampling import generate
model, _ = engine.checkpoint.build(engine.checkpoint.load(sys.argv[1]), "it")
print(supports(model))
decoder = BatchedDecoder(model, 2)
if "compile" in sys.argv:
    decoder.compile(wait=True)
requests = [Request([2, 9 + i], 40, temperature=0) for i in range(3)]
decoder.run(requests)
print([request.tokens for request in requests])
print([list(generate(model, request.context[:2], 40, temperature=0)) for request in requests])
"""
# The same change without a key, as a subclass.
OWN_CLASS = {
    "model.py": [
        (
            "class Block(",
            """class SquaredMLP(MLP):
    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(gate.relu().square() * up)


class Block(""",
        ),
        (" MLP(config)", " SquaredMLP(config)"),
    ],
}
# The answer of inference.py when the compiled backend, if it accepts the model, is ready for the first token;
# and the answer of `generate`.
CHATTED = """
import sys
import inference
from decoding.backend import TorchBackend
from decoding.engine import BatchedDecoder
from decoding.sampling import generate
from decoding.text_generator import TextGenerator
def compile_and_step(decoder, step=BatchedDecoder.step):
    decoder.compile(wait=True)
    advanced = step(decoder)
    assert type(decoder.backend) is TorchBackend
    return advanced
BatchedDecoder.step = compile_and_step
question, path = "7 + 1?", sys.argv[1]
sys.argv[1:] = ["-i", "-m", path, "--prompt", question, "-t", "0", "-r", "1"]
inference.main()
writer = TextGenerator.load(path)
ids, _ = writer.chat_prompt([{"role": "user", "content": question}])
n, stops = writer.max_length - len(ids), writer.stop_tokens
answer = generate(writer.model, ids, n, temperature=0, stop_tokens=stops)
print(writer.tokenizer.decode(list(answer)))
"""


def rewrite(project, changes):
    for file, pairs in changes.items():
        source = (project.root / file).read_text("utf-8")
        for known, new in pairs:
            assert source.count(known) == 1, (file, known)
            source = source.replace(known, new)
        (project.root / file).write_text(source, "utf-8")


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_a_key_of_ones_own_is_never_passed_over(tiny_project, activation):
    """Code that does not know the key uses PyTorch, or refuses the model, whatever the value is."""
    rewrite(tiny_project, SQUARED)
    (tiny_project.root / "decoded.py").write_text(DECODED, "utf-8")
    settings = (f"activation={activation}", "learning_rate=0.1", "qk_norm=false", "max_steps=3")
    sets = [part for setting in settings for part in ("--set", setting)]
    done = tiny_project.run("train.py", "-t", "pretrain", *sets)
    assert done.returncode == 0, done.stderr
    [path] = tiny_project.checkpoints().values()

    def decoded(*args):
        done = tiny_project.run("decoded.py", path, *args, NUMBA_DISABLE_JIT="0")
        is_supported, ours, its_own = done.stdout.splitlines()
        assert ours == its_own and done.returncode == 0, done.stderr
        return is_supported == "True"

    def refused(name):
        done = tiny_project.run("export.py", "--format", name)
        found = re.fullmatch(f'error: activation is "{activation}" in this model, but (.*)\n', done.stderr)
        assert done.returncode == 2 and done.stdout == "" and found, done.stderr
        return found[1]

    names = "huggingface", "gguf", "llama2c"
    assert not decoded("compile")
    assert all(" does not know this key: see doc/extending.md" in refused(name) for name in names)
    assert [*(tiny_project.root / "checkpoint").iterdir()] == [path]

    rewrite(tiny_project, TOLD)
    if activation == "relu2":
        assert not decoded("compile")
        assert all(
            'supports only "swiglu": train with --set activation="swiglu"' in refused(n) for n in names
        )
    else:
        assert decoded()
        for name in names:
            done = tiny_project.run("export.py", "--format", name)
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", ["key", "class"])
def test_a_changed_network_is_the_one_that_chats(tiny_project, change):
    """The compiled backend must not run the unchanged network instead."""
    pytest.importorskip("numba")
    rewrite(tiny_project, SQUARED if change == "key" else OWN_CLASS)
    (tiny_project.root / "chatted.py").write_text(CHATTED, "utf-8")
    sets = ["from_checkpoint=", "learning_rate=0.1", "max_steps=8", "decay_lr=false"]
    sets += ["activation=relu2"] * (change == "key")
    done = tiny_project.run("train.py", "-t", "sft", *(part for pair in sets for part in ("--set", pair)))
    assert done.returncode == 0, done.stderr
    *_, path = tiny_project.checkpoints("sft").values()
    done = tiny_project.run("chatted.py", path, NUMBA_DISABLE_JIT="0")
    assert done.returncode == 0, done.stderr
    answer, expected = done.stdout.splitlines()
    assert answer == expected and len(answer) > 3
