"""On a CUDA GPU: every dtype and attention kernel that "auto" may choose there, and all that trains or talks.

`python benchmark/gpu.py` runs these and measures; `python -m pytest -m gpu` runs them alone. They are skipped
where there is no GPU, but GPU_TESTS_ON=cpu has the CPU stand in, for a rehearsal without one: what only a GPU
has is skipped then. Those that take long are marked slow, too.
"""

import contextlib
import copy
import math
import os
import shutil
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Workplace
from launching import TORCHRUN, largest_difference, launched, losses
from lm_pass import lm_pass

import models
from common import hardware, kernels
from common.errors import UserError
from decoding.engine import BatchedDecoder, Request
from decoding.sampling import generate
from engine.checkpoint import load
from inference import TextGenerator

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
IS_GPU = DEVICE != "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_GPU and not torch.cuda.is_available(), reason="torch finds no CUDA GPU here"),
]
only_a_gpu = pytest.mark.skipif(not IS_GPU, reason="the CPU does not do this")
slow = pytest.mark.slow

ARCHITECTURES = {
    "nano": {"n_kv_head": 2},
    "learned positions, biases": {"use_rope": False, "bias": True},
    "nanochat": {"architecture": "nanochat"},
    "deepseek_v3": {"architecture": "deepseek_v3"},
}
# How far off a norm may be, as a share of it: rounding, of three layers there and back.
CLOSE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
DTYPES = pytest.mark.parametrize("dtype", CLOSE)
KERNELS = pytest.mark.parametrize("kernel", hardware.KERNELS)
LONG = dict(block_size=256, n_embd=64, eval_interval=3)  # attention is cut into blocks of rows


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Training sets up its process; the next test begins with another one."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # it is read once, by the first product
    yield
    torch.use_deterministic_algorithms(False)


def choice_of(**settings):
    """What `auto` chooses here, but for these settings. What this device cannot do is skipped."""
    try:
        return hardware.resolve_compute(hardware.detect_machine(DEVICE), DEVICE, **settings)
    except UserError as why:
        pytest.skip(str(why))


def network(name="nano", block_size=24):
    """A small one, in eval(), with weights so large that no two tokens are equally likely."""
    torch.manual_seed(0)
    shape = dict(block_size=block_size, vocab_size=29, n_layer=3, n_head=4, n_embd=128)
    model = models.build(models.check_config(shape | ARCHITECTURES[name], "the test").resolved(29)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def tokens_and_targets(length):
    tokens = torch.randint(29, (3, length + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def trained(train, task="pretrain", *args, **settings):
    """The checkpoint that train.py leaves, on the GPU."""
    choice_of(**{key: settings[key] for key in ("dtype", "sdp_kernel") if key in settings})
    done = train(task, *args, **{"device": DEVICE, "dtype": "auto", "max_steps": 6, **settings})
    assert done.returncode == 0, done.stderr
    return load([*train.checkpoints(task).values()][-1])


def curve(train, task="pretrain", **settings):
    """The losses that a new run logs, those of validation last."""
    kinds = ("Train", "Val")
    before = [len(losses(train, kind)) for kind in kinds]
    trained(train, task, **settings)
    return [loss for kind, n in zip(kinds, before, strict=True) for loss in losses(train, kind)[n:]]


def distance(found, exact):
    """The norm of the difference as a share of the norm, of all of these tensors together."""
    pairs = [[t.detach().cpu().double() for t in pair] for pair in zip(found, exact, strict=True)]
    return math.sqrt(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


def logits_and_gradients(model, x, y, compute=None):
    context = hardware.forward_context(compute) if compute else torch.enable_grad()
    with context:
        logits, loss, _ = lm_pass(model, x, y)
        loss.backward()
    return [logits], [p.grad for p in model.parameters()]


# ---- the same numbers --------------------------------------------------------------------------------------


@KERNELS
@DTYPES
def test_logits_and_gradients_are_those_of_float64_on_the_cpu(dtype, kernel):
    compute, exact = choice_of(dtype=dtype, sdp_kernel=kernel), network(block_size=300).train()
    model = copy.deepcopy(exact).to(compute.device)
    x, y = tokens_and_targets(300)
    wanted = logits_and_gradients(exact.double(), x, y)
    found = logits_and_gradients(model, x.to(compute.device), y.to(compute.device), compute)
    assert [distance(*both) for both in zip(found, wanted, strict=True)] == pytest.approx(
        [0, 0], abs=CLOSE[dtype]
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_computes_the_same(name):
    compute, exact = choice_of(dtype="float32"), network(name).train()
    model = copy.deepcopy(exact).to(compute.device)
    x, y = tokens_and_targets(24)
    wanted = logits_and_gradients(exact.double(), x, y)
    found = logits_and_gradients(model, x.to(compute.device), y.to(compute.device), compute)
    assert max(distance(*both) for both in zip(found, wanted, strict=True)) < CLOSE["float32"]


@DTYPES
def test_grouped_products(dtype):
    """Of experts of which one has no token."""
    choice_of(dtype=dtype)
    torch.manual_seed(0)
    x, weight, sizes = torch.randn(33, 32), torch.randn(4, 32, 48), torch.tensor([7, 0, 20, 6])
    results = []
    for device, kind in (("cpu", torch.float64), (DEVICE, getattr(torch, dtype))):
        a, b = (t.to(device, kind).detach().requires_grad_() for t in (x, weight))
        y = kernels.grouped_matmul(a, b, sizes.to(device))
        F.silu(y).sum().backward()
        results.append([y, a.grad, b.grad])
    assert distance(*reversed(results)) < CLOSE[dtype]


def test_the_loss_curve_is_that_of_the_cpu(train):
    settings = dict(**LONG, dtype="float32", log_interval=1, max_steps=12)
    for task in ("pretrain", "sft"):
        found = curve(train, task, **settings)
        exact = curve(train, task, **settings, device="cpu", sdp_kernel="math")
        assert len(found) == 12 + 4 and largest_difference(found, exact) < 1e-3


# ---- training ----------------------------------------------------------------------------------------------

WAYS = {
    **{kernel: {"sdp_kernel": kernel} for kernel in hardware.KERNELS},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
    "weights in bfloat16": {"dtype": "bfloat16", "use_amp": False},
    "muon": {"optimizer": "muon"},
    "muon, float16": {"optimizer": "muon", "dtype": "float16"},
    "nanochat": {"architecture": "nanochat"},
    "deepseek_v3, muon": {"architecture": "deepseek_v3", "optimizer": "muon"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_goes_on_bit_for_bit(train, way):
    dropout = 0.1 if IS_GPU or way != "flash" else 0.0
    settings = {**LONG, "dropout": dropout, "gradient_accumulation_steps": 2, **WAYS[way]}
    whole = trained(train, **settings)
    for path in train.checkpoints().values():
        path.unlink()
    half = trained(train, **settings, max_steps=3, lr_decay_iters=6)
    again = trained(train, "pretrain", "--resume", **settings, lr_decay_iters=6)
    assert (half.step, again.step) == (3, 6)
    again.train_config["lr_decay_iters"] = whole.train_config["lr_decay_iters"]
    assert Workplace.same(again, whole)
    assert bool(whole.scaler) is (way.split()[-1] == "float16")


def test_a_run_moves_to_the_cpu_and_back(train):
    for step, device in ((2, DEVICE), (4, "cpu"), (6, DEVICE)):
        resume = ["--resume"] * (step > 2)
        found = trained(
            train, "pretrain", *resume, dtype="float32", device=device, max_steps=step, lr_decay_iters=6
        )
        assert found.step == step
    assert all(weights.isfinite().all() for weights in found.model.values())


def test_the_plan(train):
    choice_of()
    done = train("pretrain", "--plan", device=DEVICE, dtype="auto")
    assert done.returncode == 0 and "speed, measured" in done.stdout, done.stderr


@only_a_gpu
def test_out_of_memory_is_told(train):
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        done = train("pretrain", device=DEVICE, dtype="auto", batch_size=1 << 14, n_embd=512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert done.returncode == 2 and "Lower batch_size" in done.stderr


@slow
def test_a_compiled_step_computes_the_same(train):
    if not (IS_GPU or shutil.which("g++")):
        pytest.skip("needs a C++ compiler")
    settings = {**LONG, "dtype": "float32", "log_interval": 1}
    assert largest_difference(curve(train, compile=True, **settings), curve(train, **settings)) < 1e-3


@slow
@pytest.mark.parametrize("script", ["train_ddp.py", "train_deepspeed.py"])
def test_launched_it_draws_the_curve_of_one_process(tiny_project, train, monkeypatch, script):
    """With nccl, if it is a GPU."""
    if "deepspeed" in script:
        pytest.importorskip("deepspeed")
    settings = dict(dtype="float32", log_interval=1, max_steps=6, device=DEVICE)
    alone = curve(train, **settings)
    monkeypatch.setenv("DS_ACCELERATOR", DEVICE)
    launcher = (*TORCHRUN[:-1], "1")
    output = launched(tiny_project, launcher, script, "-t", "pretrain", **settings)
    assert "Done: step 6" in output
    assert largest_difference(losses(tiny_project) + losses(tiny_project, "Val"), alone) < 1e-4


# ---- talking -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_many_texts_at_once_are_those_of_one_at_a_time(name):
    compute = choice_of(dtype="float32")
    model = network(name).to(compute.device)
    texts = [list(range(1, 2 + 2 * i)) for i in range(12)]
    requests = [Request(text, 40 - len(text), temperature=0, n_logprobs=len(text) % 3) for text in texts]
    with hardware.attention_context(compute):
        BatchedDecoder(model, 5).run(requests)
        for text, request in zip(texts, requests, strict=True):
            assert request.tokens == list(generate(model, text, request.max_tokens, temperature=0))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_seed_means_the_same_as_on_the_cpu(train, quantize, monkeypatch):
    choice_of()
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # decoding/compiled.py rounds in its own way
    trained(train, dtype="float32", max_steps=60, device="cpu")
    trained(train, "sft", dtype="float32", max_steps=60, device="cpu")
    [*_, path] = train.checkpoints("sft").values()
    options = dict(max_length=24, temperature=0.8, top_k=9, top_p=0.95, repetition_penalty=1.1, seed=1)
    texts = []
    for device in (DEVICE, "cpu"):
        text_generator = TextGenerator.load(path, device=device, quantize=quantize, **options)
        assert text_generator.model.device.type == torch.device(device).type
        texts.append("".join(text_generator.chat([{"role": "user", "content": "3 + 1?"}])))
    assert texts[0] == texts[1] and texts[0]


def test_the_server_answers(train):
    requests = pytest.importorskip("requests")
    for name in ("fastapi", "uvicorn"):
        pytest.importorskip(name)
    import serve
    from server.app import make_app
    from server.connections import bind, make_server

    choice_of()
    shutil.copytree(Path(serve.__file__).parent / "web", train.root / "web")
    trained(train)
    [*_, path] = train.checkpoints().values()
    asked = Namespace(model=str(path), device=DEVICE, quantize=None, slots=2, max_queue=4, timeout=60)
    service, _ = serve.load_service(asked)
    assert service.text_generator.model.device.type == torch.device(DEVICE).type
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = make_server(make_app(service), listener, n_answers=6, timeout=5)
    with running(service.engine, server, listener):
        ask = {"prompt": "1 + 2", "max_tokens": 20, "temperature": 0.0}
        reply = requests.post(f"{url}/v1/completions", json=ask, timeout=60).json()
        health = requests.get(f"{url}/health", timeout=60).json()
    assert reply["usage"]["completion_tokens"] > 0 and reply["choices"][0]["text"]
    assert (health["status"], health["failures"]) == ("ok", 0)


@contextlib.contextmanager
def running(engine, server, listener):
    thread = threading.Thread(target=server.run, args=([listener],))
    engine.start()
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
        engine.stop()
