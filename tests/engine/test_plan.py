"""The numbers of --plan, and the advice when memory runs out."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from lm_pass import lm_pass

from common.errors import UserError
from common.hardware import Gpu, Machine, attention_context, resolve_compute
from config.schema import ModelConfig, TrainConfig
from config.stages import STAGES
from data import TokenBatches, TokenFile
from engine.plan import RunEstimate, check_model_fits
from model import GPT

GIB = 2**30
SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64).resolved(100)


def choice_of(memory=8 * GIB, **settings):
    return resolve_compute(Machine("a CPU", 4, memory, "2.7.0"), **settings)


def facts_of(compute, **settings):
    config = TrainConfig(dataset_path=[("a", "b")], decay_lr=False, **settings)
    batches = SimpleNamespace(sequences_per_epoch=100, batch_size=config.batch_size)
    return RunEstimate(STAGES["pretrain"], config, compute, GPT(SHAPE), batches)


# ---- the plan ----------------------------------------------------------------------------------------------


def test_the_plan(train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    before = sorted(train.root.rglob("*"))
    done = train("pretrain", "--plan", gradient_accumulation_steps=3, max_steps=1000)
    assert (done.returncode, done.stderr) == (0, "") and "\x1b" not in done.stdout
    assert sorted(train.root.rglob("*")) == before  # no log, no checkpoint

    rows = dict(re.findall(r"│ (\S.*?) +│ (\S.*?) +│", done.stdout))
    tokenizer_size = TokenFile(train.root / "dataset" / "prepared" / "pretrain_train.bin").meta["vocab_size"]
    model = GPT(ModelConfig(block_size=32, n_layer=1, n_head=2, n_embd=32).resolved(tokenizer_size))
    assert rows["model"] == (
        f"nano: 1 layers, width 32, 2 heads (2 key/value), context 32, vocabulary {tokenizer_size}"
    )
    assert rows["parameters"] == f"{model.n_params:,}"
    assert rows["FLOPs per token"] == f"{model.flops_per_token():,} (training)"
    files = [TokenFile(train.root / "dataset" / "prepared" / "pretrain_train.bin")]
    batches = TokenBatches(files, 32, 12)
    steps = batches.sequences_per_epoch / 12
    assert rows["data"] == f"{batches.tokens_per_epoch:,} tokens an epoch = {steps:.1f} steps"
    assert rows["chosen"] == "device cpu: set by hand" and rows["memory, estimated"].endswith(" GiB weights")
    measured = re.fullmatch(r"([\d,]+) ms a step, ([\d,]+) tokens/s", rows["speed, measured"])
    milliseconds, speed = (float(text.replace(",", "")) for text in measured.groups())
    assert speed == pytest.approx(12 * 32 / milliseconds * 1000, rel=0.2 + 0.5 / milliseconds)
    assert re.search(r" GFLOP/s = \d+% of a matrix product here \([\d,]+ GFLOP/s in float32\)", done.stdout)
    seconds = re.fullmatch(r"(?:(\d+) min )?(\d+) s", rows["time for 1000 steps"]).groups(default="0")
    assert 60 * int(seconds[0]) + int(seconds[1]) == pytest.approx(milliseconds, rel=0.1, abs=1)
    assert "time for an epoch" in rows


def test_the_plan_for_two_machines(train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    done = train("pretrain", "--plan", "--world", 2, "--link", 0.001)
    assert (done.returncode, done.stderr) == (0, "")
    n_params = int(re.search(r"parameters +│ ([\d,]+)", done.stdout)[1].replace(",", ""))
    row = re.search(r"2 of them, 0.001 Gbit/s │ \d+ ms of computing a step, (\d+) ms to", done.stdout)
    assert int(row[1]) == pytest.approx(4 * n_params * 8 / 1e6 * 1000, abs=1)  # every gradient once
    assert re.search(r"0\.\d\d to 0\.\d\d times as fast as one", done.stdout)  # slower than one
    for way in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"):
        assert f"GiB {way}" in done.stdout


@pytest.mark.parametrize("wrong", [("--world", 0), ("--link", 0), ("--link", "nan")])
def test_a_plan_for_nothing_is_refused(train, wrong):
    done = train("pretrain", "--plan", *wrong)
    assert done.returncode == 2 and "--world is a number of machines" in done.stderr
    done = train("pretrain", "--world", 2)
    assert done.returncode == 2 and "use train_ddp.py" in done.stderr


def test_what_several_machines_gain():
    facts = facts_of(choice_of(), batch_size=8)
    gradients = 4 * facts.model.n_params
    assert facts.exchange_seconds(2, 1.0) == pytest.approx(gradients * 8 / 1e9)
    assert facts.exchange_seconds(4, 1.0) == pytest.approx(1.5 * gradients * 8 / 1e9)
    assert facts.speed_up(4, 1e9, 1.0) == pytest.approx((4, 4), rel=1e-4)  # an infinitely fast link
    one = 2 * facts.exchange_seconds(2, 1.0)  # the exchange takes half as long as a step
    least, most = facts.speed_up(2, 1.0, one)
    assert least == pytest.approx(1.0) and most == pytest.approx(2 / (4 / 3))
    accumulating = facts_of(choice_of(), batch_size=8, gradient_accumulation_steps=8)
    assert (
        least < accumulating.speed_up(2, 1.0, one)[1] < most
    )  # less of the backward pass can overlap with it


def test_memory_that_zero_spreads():
    facts = facts_of(choice_of())
    psi, spread = facts.model.n_params, facts.memory_per_process(4)
    assert spread == {"DDP": 16 * psi, "ZeRO-1": 11 * psi, "ZeRO-2": 8 * psi, "ZeRO-3": 5 * psi}


def test_a_plan_is_there_for_a_finished_run_and_asks_for_the_same_data(train):
    train("pretrain", max_steps=2, decay_lr=False)
    logs = sorted(train.root.glob("train_*"))
    done = train("sft", "--plan")
    assert done.returncode == 0 and "plan: sft" in done.stdout and "starting from" in done.stderr
    done = train("pretrain", "--plan", "--resume", max_steps=2, decay_lr=False)
    assert done.returncode == 0 and "plan: pretrain" in done.stdout
    assert sorted(train.root.glob("train_*")) == logs
    done = train("sft", "--plan", dataset_path=[["nowhere.bin", "nowhere.bin"]])
    assert done.returncode == 2 and "nowhere.json does not exist; run `python data.py` first" in done.stderr


# ---- memory ------------------------------------------------------------------------------------------------


def test_memory_counts_weights_gradients_and_moments():
    facts = facts_of(choice_of(), batch_size=4)
    memory, n_bytes = facts.memory(), 4 * facts.model.n_params
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (n_bytes, n_bytes, 2 * n_bytes)
    assert facts.memory(8)["activations"] == 2 * memory["activations"]
    assert facts.memory(8)["weights"] == n_bytes
    with_muon = facts_of(choice_of(), batch_size=4, optimizer="muon")
    matrices = sum(p.numel() for p in with_muon.model.blocks.parameters() if p.dim() == 2)
    assert with_muon.memory()["optimizer"] == 2 * n_bytes - 4 * matrices


@pytest.mark.parametrize("kernel", ["math", "auto"])
def test_activations_are_near_what_autograd_keeps(kernel):
    facts = facts_of(choice_of(sdp_kernel=kernel), batch_size=8)
    context = attention_context(facts.compute)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.randint(100, (8, 64))
    own = {p.untyped_storage().data_ptr() for p in facts.model.parameters()}
    with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, loss, _ = lm_pass(facts.model.train(), tokens, tokens)
    measured = sum(size for pointer, size in kept.items() if pointer not in own)
    assert facts.memory()["activations"] == pytest.approx(measured, rel=0.25)
    assert math.isfinite(loss.item())


def test_the_largest_batch_fills_nine_tenths():
    facts = facts_of(choice_of(GIB))
    largest = facts.largest_batch()
    assert sum(facts.memory(largest).values()) <= 0.9 * GIB < sum(facts.memory(largest + 1).values())
    assert facts_of(choice_of(None)).largest_batch() is None
    assert facts_of(choice_of(1 << 10)).largest_batch() == 0


def test_a_run_that_seems_too_large_is_told_so():
    assert facts_of(choice_of(), batch_size=8).too_large is None
    assert facts_of(choice_of(None), batch_size=1 << 20).too_large is None
    told = facts_of(choice_of(), batch_size=1 << 20).too_large
    size, fits = re.fullmatch(
        r"by estimate this needs (\S+) GiB of memory, and there are 8\.00 GiB: batch_size (\d+) would fit",
        told,
    ).groups()
    assert float(size) > 8 and 100 < int(fits) < 1 << 20


def test_a_model_that_cannot_fit_is_refused_before_it_is_built():
    huge = ModelConfig(n_layer=64, n_embd=1 << 14, block_size=64).resolved(1 << 16)
    with pytest.raises(UserError, match=r"parameters needs \d+\.\d\d GiB .* are 8\.00 GiB; lower n_layer"):
        check_model_fits(huge, choice_of())
    check_model_fits(huge, choice_of(None))
    check_model_fits(SHAPE, choice_of())
    gpu = Gpu("A100", (8, 0), 8 * GIB)
    with pytest.raises(UserError, match="8.00 GiB"):
        check_model_fits(huge, resolve_compute(Machine("a CPU", 4, 999 * GIB, "2.7.0", gpus=(gpu,))))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.02 GB, max allowed: 18.13 GB)."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_becomes_advice(error):
    facts = facts_of(choice_of(), batch_size=1 << 20)
    advice = r"out of memory with batch_size 1048576 and block_size 64\. By estimate batch_size \d+ fits\. "
    with pytest.raises(UserError, match=advice + "Lower batch_size and raise gradient_accumulation_steps"):
        with facts.advice_when_out_of_memory():
            raise error
    with pytest.raises(RuntimeError, match="another"), facts.advice_when_out_of_memory():
        raise RuntimeError("another")
