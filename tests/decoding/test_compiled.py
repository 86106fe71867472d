"""The compiled backend, and packed weights: the same numbers as PyTorch's."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from test_model import differ, random_tokens
from torch import nn

from common.config import ROOT
from config.schema import ModelConfig
from decoding import compile_cache
from decoding.backend import supports
from decoding.compile_cache import CACHE
from decoding.engine import BatchedDecoder
from decoding.packed import GROUP, ROWS, Int8Linear, quantize
from model import GPT, MLP

compiled = pytest.importorskip("decoding.compiled_backend", reason="Numba is not installed")
multiply = pytest.importorskip("decoding.compiled").multiply
LLAMA3 = dict(rope_type="llama3", factor=4.0, original_max_position_embeddings=16)
SHAPES = {
    "plain": dict(),
    "groups": dict(n_kv_head=2, head_dim=6),
    "one key for all heads, longer context": dict(n_kv_head=1, rope_scaling=LLAMA3, tie_embeddings=False),
    "learned positions, biases": dict(use_rope=False, bias=True, qk_norm=False),
    "odd sizes": dict(n_embd=77, n_head=3, head_dim=10, n_hidden=131, use_rope=False),
}


def network(**fields):
    torch.manual_seed(0)
    config = ModelConfig.model_validate(dict(block_size=24, n_layer=3, n_head=4, n_embd=72) | fields)
    model = GPT(config.resolved(29)).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, float("norm" in name), 0.3)
    return model.requires_grad_(False)


@pytest.mark.parametrize("n_threads", [1, 3, 6])
@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_model(shape, int8, n_threads):
    """However heads and features are divided among the threads; some may have none."""
    model, tokens = network(**SHAPES[shape]), random_tokens(9, 24, vocab_size=29)
    if int8:
        quantize(model)
    expected = model(tokens)
    assert expected.std() > 0.5
    backend = compiled.CompiledBackend(model, 10, n_threads)
    assert torch.equal(model(tokens), expected)  # the weights were moved and are the same
    for batch in (1, 2, 9):
        rows = torch.arange(batch)
        for row in rows.tolist():  # rows of different lengths
            backend.refill(row, tokens[row, : 3 - row % 3].tolist())
        for _ in range(21):
            places = torch.from_numpy(backend.lengths[:batch].copy())
            found, likeliest = backend.step(tokens[rows, places].tolist())
            # Beside int8 weights, activations have 16 bits; with bfloat16's 8, it would be 0.2.
            assert differ(found[:batch], expected[rows, places]) < (1e-2 * expected.std() if int8 else 1e-4)
            assert likeliest == found[:batch].argmax(-1).tolist()
            assert (backend.lengths[:batch] == (places + 1).numpy()).all()
    assert backend.lengths[9] == 0 and not backend.buffers.cache[:, 9].any()


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_does_not_depend_on_the_others(shape, int8):
    """To the last bit: one at a time or many, in any row, read as a prompt or step by step."""
    sizes = dict(n_embd=256, n_hidden=512, block_size=48) if shape == "plain" else dict(block_size=48)
    model, tokens = network(**(sizes | SHAPES[shape])), random_tokens(40, 48, vocab_size=29)
    backend = compiled.CompiledBackend(quantize(model) if int8 else model, 41, 2)
    expected = torch.stack([backend.step(column)[0].clone() for column in tokens.T.tolist()])
    for batch in (1, 2, 5, 16, 24):
        backend.lengths[:] = 0
        for t in range(4):
            assert torch.equal(backend.step(tokens[:batch, t].tolist())[0][:batch], expected[t, :batch])
        for length in (1, 2, 7, 33, 40):
            backend.refill(batch - 1, tokens[batch - 1, :length].tolist())
            backend.copy_row(batch - 1, batch)
            last = tokens[: batch + 1, 4].tolist()
            last[batch - 1 :] = [tokens[batch - 1, length].item()] * 2
            found = backend.step(last)[0]
            for row in (batch - 1, batch):
                assert torch.equal(found[row], expected[length, batch - 1])
                assert backend.lengths[row] == length + 1


@pytest.mark.parametrize("columns", [(0, 200), (128, 192), (70, 200), (64, 64)])
@pytest.mark.parametrize("n", [1, 3, 4, 9])
def test_int8_products_are_exact_but_for_the_16_bits_of_activations(n, columns):
    torch.manual_seed(n)
    small = Int8Linear(nn.Linear(200, 37).requires_grad_(False))
    x, out = torch.zeros(16, 256), torch.full((16, 192), torch.nan)
    x[:n, slice(*columns)] = (torch.randn(n, 200) * 10 ** torch.linspace(-3, 3, 200))[:, slice(*columns)]
    groups = x.unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    rounded = (groups * (32767 / largest.clamp(min=1e-30))).round() * (largest / 32767)
    expected = rounded.flatten(1)[:n, :200].double() @ small.weight.T.double() + small.bias
    scratch = compiled.make_scratch(ModelConfig(n_embd=256).resolved(2), 16)
    matrix = small.w.numpy(), small.scales.numpy(), small.bias.numpy()
    multiply(out.numpy(), matrix, x.numpy(), n, (0, 16), columns, False, scratch)
    assert differ(out[:n, :16] + small.bias[:16], expected[:, :16]) < 1e-6 * expected.abs().max()
    assert out[:, 16:].isnan().all() and out[n:].isnan().all()
    multiply(out.numpy(), matrix, x.numpy(), n, (17, 37), columns, True, scratch)
    assert differ(out[:n, 16:37], expected[:, 16:]) < 1e-6 * expected.abs().max()


@pytest.mark.slow
def test_int8_in_the_order_for_arm(tmp_path):
    """The order of the weights and the sums, without Arm's instructions."""
    code = (
        "import platform; platform.machine = lambda: 'aarch64'\n"
        "from test_compiled import *\n"
        "from decoding.packed import PAIRS_ARE_NEIGHBOURS\n"
        "assert not PAIRS_ARE_NEIGHBOURS\n"
        "test_rounding_is_less_than_half_a_step(130)\n"
        "test_logits_are_those_of_the_model('groups', True, 2)\n"
    )
    places = f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{ROOT / 'tests' / 'decoding'}"
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": places}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_in_memory_once(tied):
    def n_bytes():
        tensors = [*model.parameters(), *model.buffers()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    model = network(tie_embeddings=tied)
    before, weights = n_bytes(), compiled.CompiledBackend(model, 1).buffers.weights
    assert before <= n_bytes() < before + 50_000  # rows are filled up to blocks
    model.blocks[1].attn.qkv.w.fill_(5.0)
    assert (weights.qkv[0][1] == 5).all() and not (weights.qkv[0][0] == 5).any()
    assert model.lm_head.w.data_ptr() == weights.head[0].ctypes.data
    assert tied == (weights.wte.ctypes.data == weights.head[0].ctypes.data)
    model.lm_head.w.fill_(7.0)
    assert tied == bool((model.wte(torch.tensor([3])) == 7).all())


def test_unsupported_models_are_recognised():
    assert supports(network())
    assert not supports(network().bfloat16())
    assert not supports(type("Other", (GPT,), {})(network().config))
    assert not supports(network(is_causal=False))
    changed = network()
    changed.blocks[1].mlp = type("Other", (MLP,), {})(changed.config)
    assert not supports(changed)


def test_threads_end_with_the_model():
    before = threading.active_count()
    backend = compiled.CompiledBackend(network(), 1, 3)
    backend.step([1])
    assert threading.active_count() == before + 2
    del backend
    gc.collect()
    assert threading.active_count() == before


def test_ctrl_c_may_come_at_any_time():
    """The other threads never wait for one that was interrupted; the next step is correct."""
    model, n_interrupted = network(), 0
    expected = model(torch.tensor([[1, 2]]))[0]
    backend = compiled.CompiledBackend(model, 1, 3)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + i % 30))
                while True:
                    backend.lengths[0] = 0
                    backend.step([1])
            except KeyboardInterrupt:
                n_interrupted += 1
            if i % 50 == 0:
                time.sleep(0.01)  # the other threads have fallen asleep
            backend.lengths[0] = 0
            assert differ(backend.step([1])[0][0], expected[0]) < 1e-4
            assert differ(backend.step([2])[0][0], expected[1]) < 1e-4
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert n_interrupted == 300


@pytest.mark.slow
def test_a_program_may_end_at_any_time():
    """While Numba loads or threads wait: no crash, and the program's own exit code."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from config.schema import ModelConfig\n"
        "from decoding.engine import BatchedDecoder, Request\n"
        "from model import GPT\n"
        "def main():\n"  # so that only the thread refers to the model at the end
        "    decoder = BatchedDecoder(GPT(ModelConfig(n_embd=64).resolved(30)).eval())\n"
        "    decoder.compile(); time.sleep(float(sys.argv[2])); decoder.run([Request([1], 5)])\n"
        "main(); sys.exit(7)"
    )
    for seconds in ("0", "0.3"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(ROOT), seconds], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (7, ""), seconds


@pytest.mark.parametrize("trouble", ["damaged", "nowhere"])
def test_without_its_cache_pytorch_runs_the_model(tmp_path, trouble):
    """A damaged cache is deleted, so that the next start compiles again."""
    folder = tmp_path / CACHE.name
    if trouble == "damaged":
        BatchedDecoder(network()).compile(wait=True)
        shutil.copytree(CACHE, folder)
        for index in folder.rglob("*.nbi"):
            os.truncate(index, index.stat().st_size // 2)
    else:
        tmp_path.joinpath("file").touch()
        folder = tmp_path / "file" / CACHE.name
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from config.schema import ModelConfig\n"
        "from decoding.engine import BatchedDecoder, Request\n"
        "from model import GPT\n"
        "decoder = BatchedDecoder(GPT(ModelConfig(n_embd=64).resolved(30)).eval())\n"
        "decoder.compile(wait=True); decoder.run([request := Request([1], 5)]); print(len(request.tokens))"
    )
    env = os.environ | {"NUMBA_CACHE_DIR": str(folder.parent)}
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")
    assert not folder.exists()


# ---- 8 bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 63, GROUP, 130])
def test_rounding_is_less_than_half_a_step(width):
    linear = nn.Linear(width, 17).requires_grad_(False)
    linear.weight[3] = 0.0
    linear.weight[4] *= 1e-30
    small = Int8Linear(linear)
    n_groups = -(-width // GROUP)
    assert small.w.dtype == torch.int8 and small.w.numel() == 2 * ROWS * n_groups * GROUP
    assert small.scales.shape == (2, n_groups, ROWS)
    largest = torch.stack([part.abs().amax(1) for part in linear.weight.split(GROUP, dim=1)], dim=1)
    allowed = (largest / 127 / 2 * 1.001).repeat_interleave(GROUP, dim=1)[:, :width]
    assert ((small.weight - linear.weight).abs() <= allowed).all()
    x = torch.randn(2, 5, width)
    assert differ(small(x), x @ small.weight.T + linear.bias) < 1e-5


def test_a_quantized_model_is_smaller_and_nearly_the_same():
    model, tokens = network(n_embd=256, tie_embeddings=False), random_tokens(2, 24, vocab_size=29)
    for parameter in model.blocks.parameters():
        parameter.mul_(0.2)
    expected, n_bytes = model(tokens), sum(t.nbytes for t in model.state_dict().values())
    assert quantize(model) is model
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert sum(t.nbytes for t in model.state_dict().values()) < 0.3 * n_bytes
    assert differ(model(tokens), expected) < 0.05 * expected.std()


def test_code_compiled_from_other_source_is_not_used(tmp_path, monkeypatch):
    """Numba only looks at decoding/compiled.py, but the constants of decoding/packed.py matter, too."""
    shutil.copytree(ROOT / "decoding", tmp_path / "decoding", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compile_cache, "ROOT", tmp_path)
    names = [compile_cache.cache_folder().name]
    for file in ("packed", "compiled"):
        path = tmp_path / "decoding" / f"{file}.py"
        times = path.stat()
        path.write_bytes(path.read_bytes() + b"# another one\n")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        names.append(compile_cache.cache_folder().name)
    assert len({*names}) == 3 and len({name.rpartition("_")[0] for name in names}) == 1 and all(names)
