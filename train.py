"""Train a model on one device: pretraining, then supervised fine-tuning (SFT).

    python train.py -t pretrain                         from config/config_pretrain.json
    python train.py -t sft                              from config/config_sft.json
    python train.py -t pretrain --resume                go on where the newest good checkpoint ends
    python train.py -t pretrain --plan                  no training: size, memory, speed, time to finish
    python train.py -t pretrain --plan --world 2 --link 1     the same for two machines, 1 Gbit/s between them
    python train.py -t pretrain --set batch_size=8 --set device=cpu

A step takes one global batch of batch_size x gradient_accumulation_steps sequences. Batch, dropout
and learning rate of step N follow from the configuration and N alone, so a run that was killed
continues, bit for bit, from any of its checkpoints. Pretraining and SFT differ in their data only:
SFT's loss mask is one on the words of the answers and zero elsewhere.
"""

import argparse
import contextlib
import functools
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

from config.schema import TrainConfig
from engine.config import find, load_run, parse_overrides, shown
from engine.errors import UserError, is_out_of_memory, run


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
                        help="override a key; repeatable")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the newest good checkpoint of this task")
    # fmt: on
    if extend:
        extend(parser)
    args = parser.parse_args()
    args.set = parse_overrides(args.set)
    args.config = find(args.config or f"config/config_{args.task}.json")
    args.model = find(args.model)
    args.since = None
    return args


@dataclass
class Job:
    """A model and what it learns from: `text_job` makes one of token files, problem.py of a toy problem.

    batches(step) -> x, y [global batch, T] and the loss mask, numpy arrays; validation(i) -> the same,
    a micro-batch. Both know how many `sequences_per_epoch` they have. With `exact`, a validation also
    tells in how many sequences all tokens of the mask are right.
    """

    task: str
    config: TrainConfig
    choice: Any
    start: Any
    model: Any
    tokenizer: Any
    batches: Any
    validation: Any
    exact: bool = False


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
    from engine import hardware, plan
    from engine.parallel import Alone

    choice, parallel = hardware.prepare(config), Alone()
    instead = functools.partial(plan.show, world=args.world, link=args.link) if args.plan else None
    train(text_job(args, config, model_config, choice, parallel), parallel, instead)


def enter_launch(example):
    """For a script that a launcher starts once for every device: only the first process is to talk.

    UserError if there is no launcher; `example` is a command with one.
    """
    if "RANK" not in os.environ:
        raise UserError(f"this needs a launcher, here for two processes: {example}")
    if os.environ["RANK"] != "0":
        from engine.log import mute

        mute()


def main_launched(args, strategy, loss_scaling=True):
    """The rest of such a script. strategy(config, choice): how the run is spread (engine/parallel.py)."""
    config, model_config = load_run(args)
    import psutil

    from engine import hardware

    if not args.resume and "TORCHELASTIC_RUN_ID" in os.environ:
        # When the launcher brings a run back (--max-restarts), it goes on from what this launch has saved.
        args.since = psutil.Process().parent().create_time()
    # PyTorch's launcher and DeepSpeed's have different names for it.
    local_world = os.environ.get("LOCAL_WORLD_SIZE") or os.environ["LOCAL_SIZE"]
    place = int(os.environ["LOCAL_RANK"]), int(local_world)
    choice = hardware.prepare(config, place, loss_scaling)
    with strategy(config, choice) as parallel:
        train(text_job(args, config, model_config, choice, parallel), parallel)


def text_job(args, config, model_config, choice, parallel):
    """What -t, --resume and the two configurations ask for."""
    import tokenizer as tokenizers
    from data import Batches, TokenFile
    from engine import checkpoint, dial

    start = parallel.first(lambda: checkpoint.starting_point(args.task, config, args.resume, args.since))
    model, tokenizer = initial_model(
        start, config, model_config, choice, lambda: tokenizers.load(find(config.tokenizer_path))
    )
    written = config.model_dump(mode="json")
    config = parallel.first(lambda: dial.resolved(config, model, choice, args.task, start))
    files = [[TokenFile(find(path), tokenizer.fingerprint) for path in pair] for pair in config.dataset_path]
    for file in (file for pair in files for file in pair):
        if file.meta["kind"] != args.task:
            raise UserError(f"{shown(file.path)} was prepared for {file.meta['kind']}, not for {args.task}")
    parallel.agree(
        {**written, **model.config.model_dump()}
        | {shown(file.path): file.meta for pair in files for file in pair}
    )
    block_size, batch_size = model.config.block_size, config.batch_size
    global_batch = batch_size * config.gradient_accumulation_steps
    batches = Batches([pair[0] for pair in files], block_size, global_batch, config.random_seed)
    validation = Batches([pair[1] for pair in files], block_size, batch_size, config.random_seed)
    return Job(args.task, config, choice, start, model, tokenizer, batches, validation)


def initial_model(start, config, model_config, choice, make_tokenizer):
    """(model, tokenizer): those of the checkpoint to start from, or new ones."""
    import torch

    import models
    from engine import checkpoint, plan
    from engine.log import notice

    for line in start.notices:
        notice(line)
    if start.checkpoint:
        for line in checkpoint.extend_context(start, model_config):
            notice(line)
        model, tokenizer = checkpoint.build(start.checkpoint, start.name, dropout=config.dropout)
        for line in checkpoint.differences(model.config, model_config.resolved(tokenizer.vocab_size)):
            notice(line)
        return model, tokenizer
    tokenizer = make_tokenizer()
    shape = model_config.resolved(tokenizer.vocab_size).model_copy(update={"dropout": config.dropout})
    if shape.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size={shape.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} tokens; "
            "set it to null"
        )
    plan.refuse_too_large(shape, choice, config.optimizer)
    torch.manual_seed(config.random_seed)
    return models.build(shape), tokenizer


def settled(job, rows, step, parallel):
    """The job's Choice with a dtype that is the same in all processes.

    Where only measuring can tell, a run that goes on keeps the dtype it had; for a new one, the first process
    measures its first micro-batch of this step. Its model is on the device, with weights in float32.
    """
    import torch

    from engine import hardware

    config, choice, model = job.config, job.choice, job.model
    before = job.start.checkpoint.train_config.get("dtype") if job.start.run else None

    def measured():
        batch = [torch.from_numpy(array[rows.start : rows.start + rows.step]) for array in job.batches(step)]
        batch = [tensor.to(choice.device) for tensor in batch]
        forward = torch.compile(model) if config.compile else model
        model.train()

        def one_pass(choice):
            model.use_cpu_kernels(choice.cpu_kernels)
            with hardware.forward_context(choice):
                forward(*batch, loss_divisor=1)[1].backward()
            model.zero_grad(set_to_none=True)
            hardware.synchronize(choice.device)

        trials = [hardware.with_dtype(choice, config, dtype, "") for dtype in ("float32", "bfloat16")]
        with compiling(config.compile):
            found = hardware.measured_dtype({c.dtype: functools.partial(one_pass, c) for c in trials})
        model.zero_grad(set_to_none=True)  # of a pass for which memory did not suffice
        model.after_step(lambda *numbers: [0.0] * len(numbers))  # what it has counted does not count
        return found

    found = parallel.gather((choice.dtype, choice.undecided))
    if any(other != found[0] for other in found):
        dtype, why = "float32", "the machines of this run would choose differently, and all of them have it"
    elif not choice.undecided:
        return choice
    elif before in ("float32", "bfloat16"):
        dtype, why = before, "as this run has had it so far"
    else:
        dtype, why = parallel.first(measured)
    choice = hardware.with_dtype(choice, config, dtype, why)
    print(choice.reasons[1])
    return choice


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


def train(job, parallel, instead=None):
    """The training loop. Returns the path of its log; None if it was stopped, or had nothing to do.

    parallel: how the run is spread over processes (engine/parallel.py). instead: what to call, instead of
    training, with the run's Facts, its Speedometer and a function that does one step.
    """
    import torch

    from engine import checkpoint as checkpoints
    from engine import hardware, plan
    from engine.log import RunLog, duration, notice
    from engine.optimizer import learning_rate_at, rate_multiplier

    config, choice, start = job.config, job.choice, job.start
    batches, validation = job.batches, job.validation
    rows = parallel.rows(config)
    step, best = 0, {"loss": None, "step": None}
    if start.run:
        step, best = start.checkpoint.step, dict(start.checkpoint.best)

    # -- model and optimizer ----------------------------------------------------------------------

    model = job.model.to(choice.device, torch.float32 if choice.autocast else getattr(torch, choice.dtype))
    choice = settled(job, rows, step, parallel)
    model.use_cpu_kernels(choice.cpu_kernels)
    parallel.prepare(model, config, choice)
    if start.run:
        parallel.restore(start)
    start.checkpoint = None  # frees its copy of the weights

    # -- data -------------------------------------------------------------------------------------

    n_validations = min(config.eval_iters, -(-validation.sequences_per_epoch // config.batch_size))
    if not any(validation(i)[2].any() for i in range(n_validations)):
        size = model.config.block_size
        raise UserError(f"block_size={size} cuts every conversation before its answer; raise it")

    def tensors(arrays):
        return [torch.from_numpy(array).to(choice.device, non_blocking=True) for array in arrays]

    @torch.no_grad()
    def evaluate():
        """(loss in nats per token, share of exact answers): always over the same eval_iters batches."""
        model.eval()
        total = weight = n_exact = n_sequences = 0
        for first in range(0, n_validations, parallel.world):
            i = first + parallel.rank
            x, y, mask = tensors(validation(min(i, n_validations - 1)))
            with hardware.forward_context(choice):
                logits, loss, _ = model(x, y, mask, loss_divisor=1)
            if i >= n_validations:  # a surplus process only keeps the others company
                continue
            total, weight = total + loss.item(), weight + mask.sum().item()
            if job.exact:
                n_exact += int(((logits.argmax(-1) == y) | (mask == 0)).all(-1).sum())
                n_sequences += len(x)
        model.train()
        total, weight, n_exact, n_sequences = parallel.sum(total, weight, n_exact, n_sequences)
        return total / weight, n_exact / max(1, n_sequences)

    def forward(batch, first):
        """Of the micro-batch that begins with this row: the sum of its tokens' losses, and what to watch."""
        x, y, mask = tensors(array[first : first + rows.step] for array in batch)
        with hardware.forward_context(choice):
            return parallel.forward(x, y, mask, loss_divisor=1)[1:]

    def compile_step():
        """Has torch.compile do now, before the clock starts, what it puts off until the first pass."""
        with compiling(True):
            forward(batches(step), rows.start)[0].backward()
        parallel.clear()
        model.after_step(lambda *numbers: [0.0] * len(numbers))  # what it has counted does not count

    def one_step(step):
        """Train on the batch of this step -> its loss, the norm of its gradient, {name: what is watched}."""
        seed = config.random_seed * 1_000_003 + step + (parallel.rank << 40)
        torch.manual_seed(seed % (1 << 63))  # dropout
        batch = batches(step)
        speed.add(batch[0].shape)
        divisor = max(1.0, float(batch[2].sum()))  # a batch of questions cut before their answers has none
        step_loss, watched = 0.0, {}
        for first in rows:
            with parallel.micro_batch(last=first == rows[-1]):
                loss, other_vars = forward(batch, first)
                parallel.backward(loss / divisor)
            step_loss += loss.detach() / divisor
            for name, value in other_vars.items():
                watched[name] = watched.get(name, 0.0) + value.detach() / (len(rows) * parallel.world)
        step_loss, *means = parallel.sum(step_loss, *watched.values())
        norm = parallel.step(rate_multiplier(step, config), math.isfinite(step_loss))
        model.after_step(parallel.sum)
        return step_loss, norm, dict(zip(watched, means, strict=True))

    # -- the loop ---------------------------------------------------------------------------------

    if config.max_steps and step >= config.max_steps and not instead:
        print(f"Nothing to do: {start.name} has all of its {config.max_steps} steps.")
        return None
    facts = plan.Facts(job.task, model, choice, batches, validation, config)
    if config.compile:
        with facts.advice_when_out_of_memory():
            compile_step()
    speed = Speedometer(model)
    if instead:
        instead(facts, speed, lambda: one_step(step))
        return None
    print(facts.summary())
    if facts.too_large:
        notice(facts.too_large)

    def save():
        states = parallel.states()
        if parallel.rank:
            return
        # The dtype is that of `settled`, so that the run keeps it.
        saved = checkpoints.Checkpoint(
            job.task, run_id, step, model.config.model_dump(),
            config.model_dump(mode="json") | {"dtype": choice.dtype},
            job.tokenizer.to_dict(), best=best, **states,
        )  # fmt: skip
        log.event("Save", (epoch, step), {"": shown(saved.save())})
        checkpoints.prune(saved, config.keep_checkpoints, began)

    def diverged(what):
        # The weights of all checkpoints before this step have given finite losses.
        good = [path for _, at, path in checkpoints.of_task(job.task, run_id) if at < step]
        return UserError(
            f"{what}; training stopped and nothing was saved over. "
            + (f"The last good checkpoint is {shown(good[-1])}. " if good else "")
            + "Lower learning_rate, or look for odd texts in the data."
        )

    began, stop, stopping = time.time(), StopRequest(parallel.world > 1), False
    header = {**facts.header(), "resumed_from_step": step}
    with RunLog(header, config.max_steps, step) as log, facts.advice_when_out_of_memory():
        run_id = start.run or log.started
        model.train()
        last_saved = first_step = step
        while step < config.max_steps or not config.max_steps:
            if stopping := any(parallel.sum(stop.asked)):
                break
            epoch, stage, sequence = batches.position(step)
            loss, norm, watched = one_step(step)
            if not math.isfinite(loss) or not (choice.grad_scaling or math.isfinite(norm)):
                raise diverged(f"step {step + 1}: loss {loss}, gradient norm {norm}")
            step += 1
            last = step == config.max_steps

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
                value, exact = evaluate()
                if not math.isfinite(value):
                    raise diverged(f"after step {step}: validation loss {value}")
                improved = best["loss"] is None or value < best["loss"]
                if improved:
                    best = {"loss": value, "step": step}
                fields = {"Loss": f"{value:.6f}", "Best": f"{best['loss']:.6f}"}
                if job.exact:
                    fields["Accuracy"] = f"{exact:.2%}"
                if job.task == "pretrain":
                    fields["BPB"] = f"{facts.bits_per_byte(value):.4f}"
                log.event("Val", (epoch, step), fields)
            if step % config.save_interval == 0 or improved or last:
                save()
                last_saved = step
            if last_saved == step or step % config.eval_interval == 0:
                speed.restart()

        if stopping and last_saved < step:
            save()
        if stopping:
            log.say(f"Stopped after step {step}. Go on with: {resume_command(parallel.world > 1)}")
        else:
            log.say(f"Done: step {step}, {step - first_step} of them now.")
            log.say(f"Loss chart: python plot_loss.py -n {shown(log.path)}")
    return None if stopping else log.path


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


def resume_command(launched):
    """What was typed, with --resume, for a shell. A launcher does not tell what was typed."""
    if launched:
        return "the same command and --resume"
    typed = [word for word in sys.argv if word != "--resume"]
    return shlex.join(["python", *typed, "--resume"])


class StopRequest:
    """Ctrl-C or SIGTERM: `asked` becomes true and the loop ends after its step; the second ends at once.

    launched: the launcher of several processes passes on what the terminal has sent already, and
    ends the processes itself if they take too long; so the second one is not another wish.
    """

    def __init__(self, launched=False):
        self.asked, self.launched = False, launched
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}

    def __call__(self, number, frame):
        self.asked = True
        for number, handler in self.before.items() if not self.launched else ():
            signal.signal(number, handler)


if __name__ == "__main__":
    run(main)
