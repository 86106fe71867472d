"""How well a training step uses the CPU: Nano, nanoGPT and Transformers' Llama compared.

    git clone https://github.com/karpathy/nanoGPT
    python benchmark/train_speed.py --nanogpt nanoGPT                    # about six minutes
    python benchmark/train_speed.py --nanogpt nanoGPT --compile          # with torch.compile; takes longer
    python benchmark/train_speed.py --nanogpt nanoGPT --batch_size 16

Each implementation trains two models in float32 on the CPU as its own trainer would: forward, backward,
gradient clipping, AdamW. They take turns for several rounds, each time in a new process, because the speed of
a machine drifts. For the same reason, every process also times products of two large matrices between its
steps. "share" is the FLOP/s of the median step divided by that of the median product, and "of fastest"
divides by the fastest product instead. The table has the median over all rounds, with minimum and maximum.
"level" means that Nano was faster in some rounds and slower in others.

FLOPs are counted from the shapes with the same formula for all, 6 N + 12 L T C per token: N weights of linear
layers (with the output head, without the embedding), L layers, T tokens, width C. This counts the full square
of attention, as PaLM and nanoGPT do, although a causal kernel may skip half of it.
"""

import argparse
import contextlib
import functools
import importlib.util
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark import figures  # noqa: E402
from common.errors import UserError, run  # noqa: E402
from config.resolved import ResolvedTrainConfig  # noqa: E402
from config.schema import ModelConfig, TrainConfig  # noqa: E402

MODELS = {
    "speed table": ModelConfig(block_size=512, vocab_size=2114, n_layer=2, n_head=4, n_embd=512),
    "nanoGPT's CPU recipe": ModelConfig(block_size=64, vocab_size=2113, n_layer=4, n_head=4, n_embd=128),
}
# The defaults of a training run.
TRAINING = ResolvedTrainConfig(**TrainConfig(dataset_path=[("none", "none")], max_steps=1000).model_dump())
WARM_UP = 3  # steps
MATRIX_SIZES = (1024, 2048, 4096)  # the size with the most FLOP/s is the reference for the steps


def check_nanogpt(folder):
    """Raises UserError unless `folder` is a clone of nanoGPT."""
    for name in ("model.py", "train.py"):
        if not (Path(folder) / name).is_file():
            raise UserError(
                f"{folder} holds no {name}; --nanogpt needs the folder of a clone of "
                "https://github.com/karpathy/nanoGPT"
            )


def load_nanogpt(folder):
    """nanoGPT's model.py as a module."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the implementations: each returns (model, step), where step(x, y) trains on tokens [B, T] ---------


def nano(shape, _, without=()):
    """As train.py on a CPU with everything "auto", in float32. without: see ablation.py."""
    import torch

    import objectives
    from common.hardware import keep_freed_memory
    from engine.optimizer import learning_rate_at, make_optimizer
    from model import GPT
    from objectives import LossModule

    if "kept memory" not in without:
        keep_freed_memory()
    model = GPT(shape)
    model.use_custom_kernels(True)
    for module in model.modules():
        if type(module).__name__ in without:
            module.custom_kernels = False
    module, optimizer = LossModule(model, objectives.find("lm")), make_optimizer(model, TRAINING)
    mask = None

    def step(x, y):
        nonlocal mask
        mask = torch.ones(x.shape) if mask is None else mask
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(0, TRAINING)
        loss = module({"x": x, "y": y, "mask": mask})[0] / float(mask.sum())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.grad_clip)
        if math.isfinite(float(loss.detach())) and math.isfinite(float(norm)):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return module, step


def nanogpt(shape, folder):
    """As nanoGPT's train.py with --device=cpu."""
    import torch

    module = load_nanogpt(folder)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    model = module.GPT(module.GPTConfig(**{name: getattr(shape, name) for name in names}))
    config = TRAINING
    betas = (config.beta1, config.beta2)
    optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, "cpu")

    def step(x, y):
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def transformers(shape, _):
    """LlamaForCausalLM of the same shape, with the default optimizer of Transformers' Trainer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape.resolved(shape.vocab_size)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.n_embd,
        intermediate_size=shape.n_hidden,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        max_position_embeddings=shape.block_size,
        tie_word_embeddings=shape.tie_embeddings,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING.learning_rate, fused=True)

    def step(x, _):
        model(input_ids=x, labels=x).loss.backward()  # the model shifts the labels
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


IMPLEMENTATIONS = {"Nano": nano, "nanoGPT": nanogpt, "Llama": transformers}


# ---- measuring -----------------------------------------------------------------------------------------


def flops_per_token(model, shape):
    """The formula at the top of this file, for any implementation's model."""
    from torch.nn import Linear

    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    return 6 * weights + 12 * shape.n_layer * shape.block_size * shape.n_embd


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def random_batches(shape, batch_size):
    """Eight batches of (x, y): [8, 2, B, T]."""
    import torch

    return torch.randint(shape.vocab_size, (8, 2, batch_size, shape.block_size))


def measure(implementation, shape, batch_size, seconds, folder=None, compiled=False):
    """Train for about `seconds`, at least three steps. Returns {"ms/step": ..., "share": ..., ...}."""
    import torch

    torch.manual_seed(0)
    with contextlib.redirect_stdout(None):  # nanoGPT prints while building
        model, step = IMPLEMENTATIONS[implementation](shape, folder)
    model.train()
    if compiled:
        model.compile()
    batches = random_batches(shape, batch_size)
    for i in range(WARM_UP):
        step(*batches[i])
    products = {}
    for size in MATRIX_SIZES:
        square = torch.randn(size, size)
        products[size] = functools.partial(torch.mm, square, square, out=torch.empty_like(square))
    size = max(products, key=lambda size: size**3 / min(timed(products[size]) for _ in range(3)))
    steps, matmuls = [], []
    while len(steps) < 3 or sum(steps) < seconds:
        if sum(steps) >= 2 * sum(matmuls):
            matmuls.append(timed(products[size]))
        steps.append(timed(step, *batches[len(steps) % len(batches)]))
    peak = 2 * size**3 / statistics.median(matmuls)
    step_seconds, tokens = statistics.median(steps), batch_size * shape.block_size
    flops = tokens * flops_per_token(model, shape) / step_seconds
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "ms/step": 1e3 * step_seconds,
        "tokens/s": tokens / step_seconds,
        "GFLOP/s": flops / 1e9,
        "matmul": peak / 1e9,
        "share": flops / peak,
        "of fastest": flops / (2 * size**3 / min(matmuls)),
    }


def in_fresh_process(function, *arguments):
    """Call `function` in a new Python process that has not imported anything yet."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise UserError("a measurement was killed, most likely because memory ran out") from None


def comparison(title, results):
    """A table of {implementation: [result of `measure` for each round]}, of which Nano is the first."""
    from rich.table import Table

    table = Table("", title=title)
    for name in results:
        table.add_column(name, overflow="fold")
    specs = {"params": ",.0f", "ms/step": ",.1f", "tokens/s": ",.0f", "GFLOP/s": ".0f", "matmul": ".0f"}
    specs |= {"share": ".0%", "of fastest": ".0%"}
    columns = {name: {key: [r[key] for r in rounds] for key in specs} for name, rounds in results.items()}
    for key, spec in specs.items():
        table.add_row(key, *(figures.spread(values[key], spec) for values in columns.values()))
    ours, *others = (values["share"] for values in columns.values())
    table.add_row("share, Nano / this", "", *(figures.ahead(ours, theirs) for theirs in others))
    return table


# ---- the command line ----------------------------------------------------------------------------------


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--nanogpt", type=Path, metavar="DIR", help="a clone of nanoGPT (without it: left out)")
    add("--compile", action="store_true", help="use torch.compile, which needs a C++ compiler")
    add("--rounds", type=int, default=5, help="rounds of measurements (5)")
    add("--seconds", type=float, default=5, help="time to measure in each process (5)")
    add("--batch_size", type=int, default=4, help="of the speed table's model (4); the recipe's is 12")
    args = parser.parse_args()
    if args.nanogpt:
        check_nanogpt(args.nanogpt)
    for name in ("rounds", "seconds", "batch_size"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} must be above 0, not {getattr(args, name)}")
    return args


def main():
    args = parse_arguments()

    from rich.console import Console

    console = Console(highlight=False)
    chosen = dict.fromkeys(IMPLEMENTATIONS)
    if not args.nanogpt:
        del chosen["nanoGPT"]
        console.print("nanoGPT is left out: --nanogpt DIR names a clone of it")
    if not importlib.util.find_spec("transformers"):
        del chosen["Llama"]
        console.print("Llama is left out: pip install transformers brings it")
    batch_sizes = dict(zip(MODELS, (args.batch_size, 12), strict=True))
    results = {model: {implementation: [] for implementation in chosen} for model in MODELS}
    with console.status("measuring ...") as status:
        for number in range(args.rounds):
            for model, shape in MODELS.items():
                for implementation in chosen:
                    status.update(f"round {number + 1} of {args.rounds}: {model}, {implementation}")
                    measured = in_fresh_process(
                        measure, implementation, shape, batch_sizes[model], args.seconds, args.nanogpt,
                        args.compile,
                    )  # fmt: skip
                    results[model][implementation].append(measured)
    for model, c in MODELS.items():
        shape = f"{c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, vocabulary {c.vocab_size}"
        title = f"{model}: {shape}, batch {batch_sizes[model]} x {c.block_size}"
        title += ", torch.compile" if args.compile else ""
        console.print(comparison(title, results[model]))
    console.print(
        f"commit {figures.commit()}; medians of {args.rounds} rounds (min–max). matmul: GFLOP/s of the "
        "fastest size of a float32 matrix product; shares are of its median or fastest measurement."
    )


if __name__ == "__main__":
    run(main)
