"""Train a model on one device: pretraining, then supervised fine-tuning (SFT).

    python train.py -t pretrain                         from config/config_pretrain.json
    python train.py -t sft                              from config/config_sft.json
    python train.py -t pretrain --resume                go on where the newest run ended
    python train.py -t pretrain --resume 20260102_030405      ... or a certain one, by its name or checkpoint
    python train.py -t pretrain --plan                  no training: size, memory, speed, time to finish
    python train.py -t pretrain --plan --world 2 --link 1     the same for two machines, 1 Gbit/s between them
    python train.py -t pretrain --set batch_size=8 --set device=cpu

A step takes one global batch of batch_size x gradient_accumulation_steps sequences. What it computes
follows from the configuration, its number and how many sequences the run has consumed, so a run that was
killed continues, bit for bit, from any of its checkpoints. Pretraining and SFT differ in their data only:
SFT's loss mask is one on the words of the answers and zero elsewhere.
"""

import argparse
import contextlib
import functools
import math
import os
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from typing import Any

from common.config import display_path, parse_overrides, resolve_path
from common.errors import UserError, is_out_of_memory, run
from config.schema import TrainConfig
from engine.run_config import load_run
from engine.stop import Launcher, StopRequest


def parse_arguments(doc, extend=None):
    """doc: the script's, its first line and then its examples. extend(parser) may add arguments."""
    description, _, examples = doc.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=examples.rpartition("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # fmt: off
    parser.add_argument("-t", "--task", choices=("pretrain", "sft"), required=True, help="what to train")
    parser.add_argument("-c", "--config", help="the run (default: config/config_<task>.json)")
    parser.add_argument("-m", "--model", default="config/model_config.json",
                        help="the model (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override a key of a configuration; may be repeated")
    parser.add_argument("--resume", nargs="?", const=True, metavar="RUN",
                        help="go on with the newest run of this task, or with this one (its name, or a file)")
    # fmt: on
    if extend:
        extend(parser)
    args = parser.parse_args()
    args.set = parse_overrides(args.set)
    args.config = resolve_path(args.config or f"config/config_{args.task}.json")
    args.model = resolve_path(args.model)
    return args


@dataclass
class Job:
    """A model and what it learns from: `text_job` makes one of token files, problem.py of a toy problem.

    batches(first) -> x, y [global batch, T] and the loss mask, numpy arrays, of the sequences from this
    number on. validation: a list of such, one for each file, whose batches are micro-batches. All know how
    many `sequences_per_epoch` they have, and what `data` they read. With `exact`, a validation also tells in
    how many sequences all tokens of the mask are right.
    """

    task: str
    config: TrainConfig
    compute: Any
    start: Any
    model: Any
    tokenizer: Any
    batches: Any
    validation: list
    exact: bool = False

    @property
    def data(self):
        """As a checkpoint has it."""
        return {"train": self.batches.data, "validation": [one for v in self.validation for one in v.data]}


def plan_arguments(parser):
    # fmt: off
    parser.add_argument("--plan", action="store_true", help="train nothing; say what training would take")
    parser.add_argument("--world", type=int, default=1, metavar="N", help="plan for N such machines")
    parser.add_argument("--link", type=float, default=1.0, metavar="GBIT",
                        help="... joined by a link of so many Gbit/s (default: %(default)s)")
    # fmt: on


def main():
    args = parse_arguments(__doc__, plan_arguments)
    if args.world < 1 or not 0 < args.link < math.inf:
        raise UserError("--world is a number of machines, 1 or more, and --link a speed in Gbit/s, above 0")
    if args.world > 1 and not args.plan:
        raise UserError("--world is for --plan; train_ddp.py trains on several devices")
    config, model_config = load_run(args)
    # Only now, when the arguments are known to be good, is it worth to wait for torch.
    from common import hardware
    from engine import plan
    from engine.parallel import SingleProcess

    compute, parallel = hardware.set_up_compute(config), SingleProcess()
    instead = functools.partial(plan.show, world=args.world, link=args.link) if args.plan else None
    train(text_job(args, config, model_config, compute, parallel), parallel, instead)


def enter_launch(example):
    """For a script that a launcher starts once for every device: only the first process is to talk.

    Returns (its number, number of processes) on this machine. UserError if there is no launcher, or the
    environment is not one's; `example` is a command with one.
    """
    if "RANK" not in os.environ:
        raise UserError(f"this needs a launcher, here for two processes: {example}")

    def told(name, lowest=None, highest=None):
        text = os.environ.get(name, "")
        number = int(text) if re.fullmatch("[0-9]{1,5}", text) else -1
        if not text or lowest is not None and not lowest <= number <= highest:
            raise UserError(f"the environment has {name}={text[:20]!r}, which comes from no launcher; "
                            f"here is one for two processes: {example}")  # fmt: skip
        return number

    world = told("WORLD_SIZE", 1, 99_999)
    rank = told("RANK", 0, world - 1)
    # PyTorch's launcher and DeepSpeed's have different names for it.
    local_world = told("LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE", 1, world)
    place = told("LOCAL_RANK", 0, local_world - 1), local_world
    told("MASTER_ADDR")
    told("MASTER_PORT", 0, 65535)
    if rank:
        from common.log import mute

        mute()
    return place


def main_launched(args, strategy, place, loss_scaling=True):
    """The rest of such a script. strategy(config, compute): how the run is spread (engine/parallel.py)."""
    launcher = Launcher()
    config, model_config = load_run(args)
    from common import hardware

    compute = hardware.set_up_compute(config, place, loss_scaling)
    with strategy(config, compute) as parallel:
        train(text_job(args, config, model_config, compute, parallel), parallel, launcher=launcher)


def text_job(args, config, model_config, compute, parallel):
    """What -t, --resume and the two configurations ask for."""
    from data import Batches, TokenFile
    from engine import runs, scaling_laws
    from formats import load_tokenizer

    start = parallel.first(
        lambda: runs.starting_point(args.task, config, args.resume, parallel.run_of_this_launch())
    )
    model, tokenizer = initial_model(
        start, config, model_config, compute, lambda: load_tokenizer(resolve_path(config.tokenizer_path))
    )
    written = config.model_dump(mode="json")
    config = parallel.first(lambda: scaling_laws.resolved(config, model, compute, args.task, start))
    files = [
        [TokenFile(resolve_path(path), tokenizer.fingerprint) for path in pair]
        for pair in config.dataset_path
    ]
    for file in (file for pair in files for file in pair):
        if file.meta["kind"] != args.task:
            raise UserError(
                f"{display_path(file.path)} was prepared for {file.meta['kind']}, not for {args.task}"
            )
    parallel.agree(
        {**written, **model.config.model_dump()}
        | {display_path(file.path): file.meta for pair in files for file in pair}
    )
    block_size, batch_size = model.config.block_size, config.batch_size
    global_batch = batch_size * config.gradient_accumulation_steps
    batches = Batches([pair[0] for pair in files], block_size, global_batch, config.random_seed)
    validation = [Batches([pair[1]], block_size, batch_size, config.random_seed) for pair in files]
    return Job(args.task, config, compute, start, model, tokenizer, batches, validation)


def initial_model(start, config, model_config, compute, make_tokenizer):
    """(model, tokenizer): those of the checkpoint to start from, or new ones."""
    import torch

    import models
    from common.log import notice
    from engine import checkpoint, plan, runs

    for line in start.notices:
        notice(line)
    if start.checkpoint:
        for line in runs.extend_context(start, model_config):
            notice(line)
        model, tokenizer = checkpoint.build(start.checkpoint, start.name, dropout=config.dropout)
        for line in runs.differences(model.config, model_config.resolved(tokenizer.vocab_size)):
            notice(line)
        return model, tokenizer
    tokenizer = make_tokenizer()
    shape = model_config.resolved(tokenizer.vocab_size).model_copy(update={"dropout": config.dropout})
    if shape.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size={shape.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} tokens; "
            "set it to null"
        )
    plan.refuse_too_large(shape, compute, config.optimizer)
    torch.manual_seed(config.random_seed)
    return models.build(shape), tokenizer


def settled(job, rows, parallel):
    """The job's ComputeConfig with a dtype that is the same in all processes.

    Where only measuring can tell, a run that goes on keeps the dtype it had; for a new one, the first process
    measures its first micro-batch. Its model is on the device, with weights in float32.
    """
    import torch

    from common import hardware

    config, compute, model = job.config, job.compute, job.model
    before = job.start.checkpoint.train_config.get("dtype") if job.start.resumes else None

    def measured():
        batch = [torch.from_numpy(array[rows.start : rows.start + rows.step]) for array in job.batches(0)]
        batch = [tensor.to(compute.device) for tensor in batch]
        forward = torch.compile(model) if config.compile else model
        model.train()

        def one_pass(compute):
            model.use_custom_kernels(compute.custom_kernels)
            with hardware.forward_context(compute):
                forward(*batch, loss_divisor=1)[1].backward()
            model.zero_grad(set_to_none=True)
            hardware.synchronize(compute.device)

        trials = [hardware.with_dtype(compute, config, dtype, "") for dtype in ("float32", "bfloat16")]
        with compiling(config.compile):
            found = hardware.measure_dtype({c.dtype: functools.partial(one_pass, c) for c in trials})
        model.zero_grad(set_to_none=True)  # of a pass for which memory did not suffice
        model.after_step(lambda *numbers: [0.0] * len(numbers))  # what it has counted does not count
        return found

    found = parallel.gather((compute.dtype, compute.undecided))
    if any(other != found[0] for other in found):
        dtype, why = "float32", "the machines of this run would choose differently, and all of them have it"
    elif not compute.undecided:
        return compute
    elif before in ("float32", "bfloat16"):
        dtype, why = before, "as this run has had it so far"
    else:
        dtype, why = parallel.first(measured)
    compute = hardware.with_dtype(compute, config, dtype, why)
    print(compute.reasons[1])
    return compute


@contextlib.contextmanager
def compiling(on):
    """For first passes of what went through torch.compile, if it is `on`: that takes time, and may fail."""
    if on:
        print("Compiling the training step: about a minute, this once.", flush=True)
    try:
        yield
    except RuntimeError as error:
        if not on or is_out_of_memory(error):
            raise
        why = str(error).strip().partition("\n")[0]
        raise UserError(f"torch.compile failed: {why}; set compile to false") from None


@dataclass
class Trained:
    """What a run has left: the paths of its log and of its last checkpoint."""

    log: Any
    checkpoint: Any


def train(job, parallel, instead=None, launcher=None):
    """The training loop. Returns what it has `Trained`; None if it was stopped, or had nothing to do.

    parallel: how the run is spread over processes (engine/parallel.py). instead: what to call, instead of
    training, with the run's RunEstimate, its Speedometer and a function that does one step. launcher: of a
    launched run (engine/stop.py).
    """
    import torch

    from common import hardware
    from common.log import RunLog, duration, notice
    from engine import checkpoint as checkpoints
    from engine import plan, runs
    from engine.optimizer import learning_rate_at, rate_multiplier

    config, compute, start = job.config, job.compute, job.start
    batches, validation = job.batches, job.validation
    rows = parallel.rows(config)

    # -- model and optimizer ----------------------------------------------------------------------

    model = job.model.to(compute.device, torch.float32 if compute.autocast else getattr(torch, compute.dtype))
    compute = settled(job, rows, parallel)
    model.use_custom_kernels(compute.custom_kernels)
    parallel.prepare(model, config, compute)
    if start.resumes:
        parallel.restore(start)
    state, notices = runs.progress(start, config, job.data, batches.position)
    if start.resumes and (jump := runs.jump_of_the_rate(start, config)):
        notices.append(jump)
    for line in notices:
        notice(line)
    start.checkpoint = None  # frees its copy of the weights

    # -- data -------------------------------------------------------------------------------------

    def tensors(arrays):
        return [torch.from_numpy(array).to(compute.device, non_blocking=True) for array in arrays]

    # Of every file the same sequences each time, of a longer one more of them.
    n_sequences = [v.sequences_per_epoch for v in validation]
    shares = [config.eval_iters * n / sum(n_sequences) for n in n_sequences]
    places = [
        (number, i * config.batch_size)
        for number, (n, share) in enumerate(zip(n_sequences, shares, strict=True))
        for i in range(min(max(1, round(share)), -(-n // config.batch_size)))
    ]

    @torch.no_grad()
    def evaluate():
        """(loss in nats per token of all validation files, of each, share of exact answers)."""
        model.eval()
        totals, weights, n_exact, n_asked = [0.0] * len(validation), [0.0] * len(validation), 0, 0
        for first in range(0, len(places), parallel.world):
            at = first + parallel.rank
            number, place = places[min(at, len(places) - 1)]
            x, y, mask = tensors(validation[number](place))
            with hardware.forward_context(compute):
                logits, loss, _ = model(x, y, mask, loss_divisor=1)
            if at >= len(places):  # a surplus process only keeps the others company
                continue
            totals[number] += loss.item()
            weights[number] += mask.sum().item()
            if job.exact:
                n_exact += int(((logits.argmax(-1) == y) | (mask == 0)).all(-1).sum())
                n_asked += len(x)
        model.train()
        *sums, n_exact, n_asked = parallel.sum(*totals, *weights, n_exact, n_asked)
        losses = [sums[i] / sums[i + len(validation)] for i in range(len(validation))]
        parts = [v.n_counting for v in validation]
        whole = sum(loss * (part / sum(parts)) for loss, part in zip(losses, parts, strict=True))
        return whole, losses, n_exact / n_asked if job.exact else None

    def forward(batch, first):
        """Of the micro-batch that begins with this row: the sum of its tokens' losses, and what to watch."""
        x, y, mask = tensors(array[first : first + rows.step] for array in batch)
        with hardware.forward_context(compute):
            return parallel.forward(x, y, mask, loss_divisor=1)[1:]

    def compile_step():
        """Has torch.compile do now, before the clock starts, what it puts off until the first pass."""
        with compiling(True):
            forward(batches(state.consumed["sequences"]), rows.start)[0].backward()
        parallel.clear()
        model.after_step(lambda *numbers: [0.0] * len(numbers))  # what it has counted does not count

    def one_step():
        """Train on the next batch -> (its loss, the norm of its gradient, {name: what is watched}, how many
        sequences and tokens it has consumed)."""
        parallel.reached(state.step + 1)
        seed = config.random_seed * 1_000_003 + state.step + (parallel.rank << 40)
        torch.manual_seed(seed % (1 << 63))  # dropout
        batch = batches(state.consumed["sequences"])
        speed.add(batch[0].shape)
        divisor = float(batch[2].sum())
        step_loss, watched = 0.0, {}
        for first in rows:
            with parallel.micro_batch(last=first == rows[-1]):
                loss, other_vars = forward(batch, first)
                parallel.backward(loss / divisor)
            step_loss += loss.detach() / divisor
            for name, value in other_vars.items():
                watched[name] = watched.get(name, 0.0) + value.detach() / (len(rows) * parallel.world)
        step_loss, *means = parallel.sum(step_loss, *watched.values())
        norm = parallel.step(rate_multiplier(state.step, config), math.isfinite(step_loss))
        model.after_step(parallel.sum)
        consumed = {"sequences": len(batch[2]), "tokens": int(divisor)}
        return step_loss, norm, dict(zip(watched, means, strict=True)), consumed

    # -- the loop ---------------------------------------------------------------------------------

    if config.max_steps and state.step >= config.max_steps and not instead:
        print(f"Nothing to do: {start.name} has all of its {config.max_steps} steps.")
        return None
    facts = plan.RunEstimate(job.task, model, compute, batches, validation, config)
    if config.compile:
        with facts.advice_when_out_of_memory():
            compile_step()
    speed = Speedometer(model)
    if instead:
        instead(facts, speed, one_step)
        return None
    print(facts.summary())
    if facts.too_large:
        notice(facts.too_large)

    run, stop, stopping = contextlib.nullcontext(), StopRequest(launcher), False
    if not parallel.rank:
        run = start.run or runs.Run()
        runs.sweep(run)
        parallel.hand_on(run.name)
        free = shutil.disk_usage(checkpoints.FOLDER).free
        if free < facts.checkpoint_bytes:
            size = plan.gib(facts.checkpoint_bytes)
            notice(f"a checkpoint takes about {size}, and {plan.gib(free)} are free in checkpoint/")
    run_name = parallel.first(lambda: run.name)

    def save():
        states = parallel.states()
        if parallel.rank:
            return None
        # The dtype is that of `settled`, so that the run keeps it.
        saved = checkpoints.Checkpoint(
            job.task, run_name, model_config=model.config.model_dump(),
            train_config=config.model_dump(mode="json") | {"dtype": compute.dtype},
            tokenizer=job.tokenizer.to_dict(), data=job.data, **vars(state), **states,
        )  # fmt: skip
        path = saved.save()
        log.event("Save", (epoch, state.step), {"": display_path(path)})
        runs.prune(saved, config.keep_checkpoints)
        return path

    def diverged(what):
        # The weights of all checkpoints before this step have given finite losses.
        good = [entry.path for entry in runs.saved(job.task, run_name) if entry.step < state.step]
        last = (
            f" The last good checkpoint is {display_path(good[-1])}: --resume it," if good else " Begin again"
        )
        return UserError(
            f"{what}; training stopped and nothing was saved over.{last} with a lower learning_rate, "
            "or look for odd texts in the data."
        )

    header = {**facts.header(), "run": run_name, "resumed_from_step": state.step}
    if start.branched_from:
        header["branched_from"] = start.branched_from
    advice = facts.advice_when_out_of_memory()
    with run, RunLog(run_name, header, config.max_steps, state.step) as log, advice:
        model.train()
        last_saved = first_step = state.step
        while state.step < config.max_steps or not config.max_steps:
            if stopping := any(parallel.sum(stop.requested)):
                break
            epoch, stage, sequence = batches.position(state.consumed["sequences"])
            loss, norm, watched, consumed = one_step()
            if not math.isfinite(loss) or not (compute.grad_scaling or math.isfinite(norm)):
                raise diverged(f"step {state.step + 1}: loss {loss}, gradient norm {norm}")
            state.step += 1
            for what, count in consumed.items():
                if state.consumed[what] is not None:  # a run of an earlier version has not counted tokens
                    state.consumed[what] += count
            step, last = state.step, state.step == config.max_steps

            if step % config.log_interval == 0 or last:
                fields = {
                    "Curriculum": f"{stage}-{sequence}",
                    "Loss": f"{loss:.6f}",
                    "LR": f"{learning_rate_at(step - 1, config):.2e}",
                    "Grad-Norm": f"{norm:.3f}",
                    **{name: f"{value:.4g}" for name, value in watched.items()},
                    **speed.read(),
                }
                if config.max_steps:
                    fields["Remaining"] = duration(speed.seconds_per_step * (config.max_steps - step))
                log.event("Train", (epoch, step), fields)

            improved = False
            if step % config.eval_interval == 0 or last:
                value, values, exact = evaluate()
                if not math.isfinite(value):
                    raise diverged(f"after step {step}: validation loss {value}")
                state.validation = {"loss": value, "step": step}
                improved = state.best["loss"] is None or value < state.best["loss"]
                if improved:
                    state.best = state.validation
                fields = {"Loss": f"{value:.6f}", "Best": f"{state.best['loss']:.6f}"}
                if len(values) > 1:
                    fields |= {f"Loss/{i}": f"{value:.6f}" for i, value in enumerate(values)}
                if job.exact:
                    fields["Accuracy"] = f"{exact:.2%}"
                if job.task == "pretrain":
                    fields["BPB"] = f"{facts.bits_per_byte(value):.4f}"
                log.event("Val", (epoch, step), fields)
            if step % config.save_interval == 0 or improved or last:
                path = save()
                last_saved = step
            if last_saved == step or step % config.eval_interval == 0:
                speed.restart()

        stop.loop_ended()
        if stopping and last_saved < state.step:
            save()
        if stopping:
            command = resume_command(run_name, launcher)
            log.say(f"Stopped after step {state.step}. Go on with: {command}")
        else:
            log.say(f"Done: step {state.step}, {state.step - first_step} of them now.")
            log.say(f"Loss chart: python plot_loss.py -n {display_path(log.path)}")
    return None if stopping else Trained(log.path, path)


class Speedometer:
    """Counts tokens and their FLOPs between two readings; `restart` leaves out what was not training."""

    def __init__(self, model):
        self.model, self.seconds_per_step = model, 0.0
        self.restart()

    def restart(self):
        self.since, self.steps, self.tokens, self.flops = time.perf_counter(), 0, 0, 0.0

    def add(self, shape):
        """A batch of this shape [B, T] is about to be trained on."""
        rows, length = shape
        self.steps, self.tokens = self.steps + 1, self.tokens + rows * length
        self.flops += rows * length * self.model.flops_per_token(length)

    def read(self):
        """Since the last reading: {"Time": per step, "Speed": ..., "Tokens/s": ...}, as text."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        now = seconds / max(self.steps, 1)
        # The time that remains should not jump with every single step.
        self.seconds_per_step = 0.9 * self.seconds_per_step + 0.1 * now if self.seconds_per_step else now
        fields = {
            "Time": f"{1000 * now:.0f} ms",
            "Speed": f"{self.flops / seconds / 1e9:.2f} GFLOP/s",
            "Tokens/s": f"{self.tokens / seconds:.0f}",
        }
        self.restart()
        return fields


def resume_command(run_name, launched):
    """What was typed, with --resume and the run's name, for a shell; a launcher does not tell what it was."""
    if launched:
        return f"the same command and --resume {run_name}"
    typed = sys.argv[:]
    if "--resume" in typed:
        at = typed.index("--resume")
        has_value = at + 1 < len(typed) and not typed[at + 1].startswith("-")
        del typed[at : at + 1 + has_value]
    typed = [word for word in typed if not word.startswith("--resume=")]
    return shlex.join(["python", *typed, "--resume", run_name])


if __name__ == "__main__":
    run(main)
