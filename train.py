"""Train a model on one device: pretraining, mid-training if wanted, then supervised fine-tuning (SFT).

    python train.py -t pretrain                         from config/config_pretrain.json
    python train.py -t sft                              from config/config_sft.json, and so on
    python train.py -t pretrain --resume                continue the newest run
    python train.py -t pretrain --resume 20260102_030405     ... or a certain run: its name, or a checkpoint
    python train.py -t pretrain --plan                  no training: size, memory, speed, time to finish
    python train.py -t pretrain --plan --world 2 --link 1    the same for two machines linked at 1 Gbit/s
    python train.py -t pretrain --set batch_size=8 --set device=cpu

A step takes one global batch of batch_size x gradient_accumulation_steps sequences. What it computes follows
from the configuration, the number of the step and how many sequences the run has consumed. So a run that was
killed continues, bit for bit, from any of its checkpoints.

The file reads from top to bottom: what changes in training (TrainState), one step, a validation, a
checkpoint, then the loop. A step gets its batch from data.py and its loss from objectives/, and
engine/parallel.py distributes it over processes.
"""

import argparse
import contextlib
import functools
import math
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from common.config import display_path, parse_overrides, resolve_path
from common.errors import UserError, run
from config.stages import STAGES

if TYPE_CHECKING:  # torch takes seconds to import: functions do it, after the arguments were checked
    from pathlib import Path

    from torch import Tensor

    from engine.setup import TrainSetup


@dataclass
class TrainState:
    """Everything that changes during training.

    model        the network; `module` computes its loss, wrapped for the devices of the run
    optimizer    steps once per global batch; `scaler` scales the loss so that float16 does not underflow
    step         optimizer steps done
    consumed     {"sequences": of the current data, "tokens": that counted in the loss, None if unknown}
    best         the lowest validation loss, {"loss", "step"}
    validation   the last one, likewise
    """

    model: Any
    module: Any
    optimizer: Any
    scaler: Any
    step: int
    consumed: dict[str, Any]
    best: dict[str, Any]
    validation: dict[str, Any]


class StepResult(NamedTuple):
    """What a step computes in this process: tensors that the device may still be working on."""

    loss: "Tensor"
    grad_norm: "Tensor"
    metrics: dict[str, "Tensor"]


class DeviceBatch(NamedTuple):
    """This process's rows of a global batch, on the device, and shape, weight and counts of all of it."""

    tensors: dict[str, "Tensor"]
    shape: tuple[int, ...]
    weight: float
    counts: dict[str, int]


def forward_backward(
    state: TrainState, setup: "TrainSetup", parallel: Any, batch: dict[str, "Tensor"], weight: float,
    is_last: bool,
) -> tuple["Tensor", dict[str, "Tensor"]]:  # fmt: skip
    """Add the gradient of a micro-batch. Returns its part of the loss, and the metrics.

    The loss is summed over the micro-batch and divided by the weight of the global batch. So the parts add
    up to the mean over all tokens that count, however they are distributed: never a mean of means.
    """
    from common import hardware

    with parallel.micro_batch(is_last):
        with hardware.forward_context(setup.compute):
            loss, metrics = state.module(batch)
        parallel.backward(state.scaler.scale(loss / weight))
    return loss.detach() / weight, metrics


def initial_state(setup: "TrainSetup", parallel: Any) -> TrainState:
    """The state before the first step, or that of the checkpoint to resume from."""
    import torch

    from common.log import notice
    from engine import checkpoint, runs
    from engine.optimizer import make_optimizer, state_shapes
    from engine.setup import compiling, reset_counts, to_device
    from objectives import LossModule

    config, compute, start, model = setup.config, setup.compute, setup.start, setup.model
    optimizer = make_optimizer(model, config, compute.dtype, parallel.muon)
    shapes = [state_shapes(group, p.shape) for group in optimizer.param_groups for p in group["params"]]
    module, optimizer = parallel.wrap(LossModule(model, setup.objective), optimizer, config, compute)
    scaler = torch.amp.GradScaler(compute.device_type, enabled=compute.grad_scaling)
    progress, notices = runs.initial_progress(start, config, setup.data, setup.train.position)
    if start.resumes:
        checkpoint.restore(start, shapes, functools.partial(parallel.load_optimizer, optimizer), scaler)
        notices += runs.learning_rate_jump(start, config)
    for line in notices:
        notice(line)
    start.checkpoint = None  # frees its copy of the weights
    model.train()
    state = TrainState(model, module, optimizer, scaler, **vars(progress))
    if config.compile:  # compile now, before speed is measured
        with compiling(True):
            batch = to_device(setup.train(state.consumed["sequences"]), parallel.rows(config), compute.device)
            micro_batch = {key: tensor[: parallel.rows(config).step] for key, tensor in batch.items()}
            forward_backward(state, setup, parallel, micro_batch, 1.0, is_last=True)
        optimizer.zero_grad(set_to_none=True)
        reset_counts(model)
    return state


def train_step(state: TrainState, setup: "TrainSetup", parallel: Any, batch: "DeviceBatch") -> StepResult:
    """One optimizer step on one global batch, of which `batch` holds this process's rows."""
    import torch

    from engine.optimizer import rate_multiplier

    config, rows = setup.config, parallel.rows(setup.config)
    parallel.begin_step(state.step + 1)
    seed = config.random_seed * 1_000_003 + state.step + (parallel.rank << 40)
    torch.manual_seed(seed % (1 << 63))  # dropout
    loss: Any = 0.0
    metrics: dict[str, Any] = {}
    for first in range(0, len(rows) * rows.step, rows.step):
        micro_batch = {key: tensor[first : first + rows.step] for key, tensor in batch.tensors.items()}
        is_last = first + rows.step == len(rows) * rows.step
        part, values = forward_backward(state, setup, parallel, micro_batch, batch.weight, is_last)
        loss = loss + part
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0.0) + value.detach() / (len(rows) * parallel.world_size)
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate_multiplier(state.step, config)
    state.scaler.unscale_(state.optimizer)
    grad_norm = parallel.clip_grad_norm_(state.model.parameters(), config.grad_clip)
    state.scaler.step(state.optimizer)  # skips the step if float16 gradients have overflowed
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.model.after_step(parallel.all_reduce)
    state.step += 1
    for key, count in batch.counts.items():
        if state.consumed[key] is not None:
            state.consumed[key] += count
    return StepResult(loss, grad_norm, metrics)


def device_batches(setup: "TrainSetup", parallel: Any, first: int, count: float) -> Generator[DeviceBatch]:
    """`count` global batches from sequence `first` on, each prepared during the step before it."""
    from concurrent.futures import ThreadPoolExecutor

    from engine.setup import to_device

    rows = parallel.rows(setup.config)
    with ThreadPoolExecutor(1) as background:
        pending = background.submit(setup.train, first)
        while count > 0:
            batch, count = pending.result(), count - 1
            if count > 0:
                pending = background.submit(setup.train, first := first + setup.train.batch_size)
            shape, weight = batch["x"].shape, setup.objective.weight(batch)
            counts = {"sequences": shape[0], "tokens": int(weight)}
            yield DeviceBatch(to_device(batch, rows, setup.compute.device), shape, weight, counts)


def check_finite(when: str, numbers: dict[str, float], step: int, setup: "TrainSetup", run_name: str) -> None:
    """Raises UserError if one of the numbers, computed with the weights of this step, is NaN or infinite.

    Nothing is saved before this check, so the weights of every earlier checkpoint gave finite losses.
    """
    from engine import runs

    if not all(map(math.isfinite, numbers.values())):
        what = ", ".join(f"{name} {number}" for name, number in numbers.items())
        good = [f.path for f in runs.list_checkpoints(setup.stage.name, run_name) if f.step < step]
        last = (
            f"The last good checkpoint is {display_path(good[-1])}: use --resume" if good else "Start again"
        )
        raise UserError(
            f"{when}: {what}; training stopped and nothing was overwritten. {last} with a lower "
            "learning_rate, or look for unusual texts in the data."
        )


def read_results(results: list[StepResult], state: TrainState, setup: "TrainSetup", parallel: Any,
                 run_name: str) -> list[dict[str, Any]]:  # fmt: skip
    """Wait for the last steps, reduce their numbers over all processes, and check them."""
    import torch

    if not results:
        return []
    names = ["loss", *results[0].metrics]
    local = torch.stack([torch.stack([r.loss, *r.metrics.values()]).double() for r in results])
    reduced = iter(parallel.all_reduce_sum(*local.flatten().tolist()))
    numbers = []
    for step, result in enumerate(results, state.step - len(results) + 1):
        values = {name: next(reduced) for name in names}
        norm = float(result.grad_norm)
        # With loss scaling, an infinite gradient only means that the step was skipped.
        checked = {"loss": values["loss"], "gradient norm": 0.0 if setup.compute.grad_scaling else norm}
        check_finite(f"step {step}", checked, step - 1, setup, run_name)
        numbers.append({"loss": values.pop("loss"), "grad_norm": norm, "metrics": values})
    return numbers


def evaluate(
    state: TrainState, setup: "TrainSetup", parallel: Any
) -> tuple[float, list[float], dict[str, float]]:
    """Validate. Returns (loss over all parts, loss of each part, metrics); losses are in nats per token.

    A part is a file, or a task of a mixture. Every validation takes the same sequences, more of them from
    longer files, or from parts with larger weights.
    """
    import torch

    from common import hardware
    from engine.setup import to_device

    config, sources = setup.config, setup.val
    whole_size = sum(source.size for source in sources)
    shares = [config.eval_iters * source.size / whole_size for source in sources]
    batches = [
        (number, i * config.batch_size)
        for number, (source, share) in enumerate(zip(sources, shares, strict=True))
        for i in range(min(max(1, round(share)), -int(-source.sequences_per_epoch // config.batch_size)))
    ]
    totals, weights, metrics = [0.0] * len(sources), [0.0] * len(sources), {"rows": 0.0}
    state.model.eval()
    for index in range(parallel.rank, parallel.rank + len(batches), parallel.world_size):
        # A rank without a batch of its own repeats the last one, so that all ranks make the same calls.
        number, first = batches[min(index, len(batches) - 1)]
        arrays = sources[number](first)
        batch = to_device(arrays, range(len(arrays["x"])), setup.compute.device)
        with torch.no_grad(), hardware.forward_context(setup.compute):
            loss, values = setup.objective.loss(state.model, batch)
        counts = index < len(batches)
        totals[number] += loss.item() * counts
        weights[number] += setup.objective.weight(batch) * counts
        metrics["rows"] += len(batch["x"]) * counts
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0.0) + value.item() * len(batch["x"]) * counts
    state.model.train()
    sums = parallel.all_reduce_sum(*totals, *weights, *metrics.values())
    losses = [sums[i] / sums[i + len(sources)] for i in range(len(sources))]
    parts = [source.loss_weight for source in sources]
    whole = sum(loss * (part / sum(parts)) for loss, part in zip(losses, parts, strict=True))
    n_rows, *values = sums[2 * len(sources) :]
    return whole, losses, dict(zip([*metrics][1:], (value / n_rows for value in values), strict=True))


def save_checkpoint(
    state: TrainState, setup: "TrainSetup", parallel: Any, run_name: str, log: Any, epoch: int
) -> "Path | None":
    """Save a checkpoint of this step and delete old ones. Returns its path on rank 0, else None."""
    from engine import runs
    from engine.checkpoint import Checkpoint

    model, optimizer = parallel.state_dicts(state.model, state.optimizer)
    if parallel.rank:
        return None
    saved = Checkpoint(
        setup.stage.name, run_name, model_config=setup.model.config.model_dump(),
        train_config=setup.config.model_dump(mode="json"), tokenizer=setup.tokenizer.to_dict(),
        data=setup.data, chat_template=setup.stage.chat_template, problem=setup.problem, model=model,
        optimizer=optimizer, scaler=state.scaler.state_dict(), step=state.step, consumed=state.consumed,
        best=state.best, validation=state.validation,
    )  # fmt: skip
    path = saved.save()
    log.write("save", epoch, state.step, {"path": display_path(path)})
    runs.prune(saved, setup.config.keep_checkpoints)
    return path


def train(setup: "TrainSetup", parallel: Any, launcher: Any = None) -> "tuple[Path, Path | None] | None":
    """The training loop. Returns the paths of the log and of the last checkpoint; None if it was stopped.

    parallel: how the run is distributed over processes (engine/parallel.py). launcher: see engine/stop.py.
    """
    from common.energy import EnergyMeter
    from common.log import RunLog, notice
    from engine import checkpoint, plan, runs
    from engine.optimizer import learning_rate_at
    from engine.speed import Speedometer
    from engine.stop import StopRequest
    from evaluation.in_training import TrainingTests

    config, start = setup.config, setup.start
    if start.resumes and start.checkpoint and 0 < config.max_steps <= start.checkpoint.step:
        print(f"Nothing to do: {start.name} has all of its {config.max_steps} steps.")
        return None
    tests, estimate = TrainingTests(setup), plan.RunEstimate.of(setup)
    with estimate.advice_when_out_of_memory():
        state = initial_state(setup, parallel)
    print(estimate.summary())
    if estimate.too_large:
        notice(estimate.too_large)
    stop = StopRequest(launcher)
    run: Any = contextlib.nullcontext() if parallel.rank else start.run or runs.Run()
    if not parallel.rank:
        runs.remove_partial_files(run)
        parallel.tell_launcher(run.name)
        if (free := shutil.disk_usage(checkpoint.FOLDER).free) < estimate.checkpoint_bytes:
            needed, left = plan.format_gib(estimate.checkpoint_bytes), plan.format_gib(free)
            notice(f"a checkpoint takes about {needed}, and {left} are free in checkpoint/")
    run_name = parallel.broadcast_from_rank0(lambda: run.name)
    header = {**estimate.header(), "run": run_name, "resumed_from_step": state.step}
    header |= {"branched_from": start.branched_from} if start.branched_from else {}
    meter = EnergyMeter.of(setup.compute.device)
    header |= {"energy_of": meter.sources} if meter.sources else {}
    n_steps = (config.max_steps or math.inf) - state.step
    batches = device_batches(setup, parallel, state.consumed["sequences"], n_steps)
    results, on_cpu = [], setup.compute.device_type == "cpu"
    first_step = last_saved = state.step
    stopping, path = False, None
    log, speed = RunLog(run_name, header, config.max_steps, state.step), Speedometer(setup.model)

    with run, log, contextlib.closing(batches), estimate.advice_when_out_of_memory():
        while state.step < config.max_steps or not config.max_steps:
            if stopping := any(parallel.all_reduce_sum(stop.requested)):
                break
            epoch, file, sequence = setup.train.position(state.consumed["sequences"])
            batch = next(batches)
            speed.add(batch.shape)
            results.append(train_step(state, setup, parallel, batch))

            step, is_last = state.step, state.step == config.max_steps
            logs, evaluates, saves, is_tested = (
                step % interval == 0 or is_last
                for interval in (
                    config.log_interval, config.eval_interval, config.save_interval, tests.interval
                )
            )  # fmt: skip
            if logs or evaluates or saves or on_cpu:  # reading the numbers would make a GPU wait
                numbers, results = read_results(results, state, setup, parallel, run_name), []
            if logs:
                rates = speed.read()
                remaining = {"remaining_seconds": speed.seconds_per_step * (config.max_steps - step)}
                own = {
                    "curriculum": (file, sequence), "loss": numbers[-1]["loss"],
                    "lr": learning_rate_at(step - 1, config), "grad_norm": numbers[-1]["grad_norm"],
                }  # fmt: skip
                rates |= remaining if config.max_steps else {}
                joules = meter.joules()
                energy, n_unknown = parallel.all_reduce_sum(joules or 0.0, joules is None)
                rates |= {} if n_unknown else {"energy_joules": energy}
                log.write("train", epoch, step, {**own, **numbers[-1]["metrics"], **own, **rates})
            if evaluates:
                loss, losses, metrics = evaluate(state, setup, parallel)
                check_finite(f"after step {step}", {"validation loss": loss}, step, setup, run_name)
                state.validation = {"loss": loss, "step": step}
                if state.best["loss"] is None or loss < state.best["loss"]:
                    state.best, saves = state.validation, True
                each = {f"loss/{i}": value for i, value in enumerate(losses)} if len(losses) > 1 else {}
                bpb = {"bpb": estimate.bits_per_byte(loss)} if setup.stage.documents == "text" else {}
                log.write(
                    "val", epoch, step, {"loss": loss, "best": state.best["loss"], **each, **metrics, **bpb}
                )
            if saves:
                path, last_saved = save_checkpoint(state, setup, parallel, run_name, log, epoch), step
            if is_tested:  # after a checkpoint that is due, as this may take long
                for event, result in tests.run(state.model, parallel, lambda: stop.requested):
                    log.write(event, epoch, step, result)
            if saves or evaluates or is_tested:
                speed.restart()  # what is not training does not count as training time

        stop.loop_ended()
        if stopping and last_saved < state.step:
            read_results(results, state, setup, parallel, run_name)
            save_checkpoint(state, setup, parallel, run_name, log, epoch)
        if stopping:
            command = runs.resume_command(run_name, bool(launcher))
            log.say(f"Stopped after step {state.step}. Resume with: {command}")
            return None
        log.say(f"Done: step {state.step}, {state.step - first_step} steps in this session.")
        log.say(f"Loss chart: python plot_loss.py -n {display_path(log.path)}")
        return log.path, path


# ---- the command line ------------------------------------------------------------------------------


def parse_arguments(
    doc: str, extend: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """doc: the script's docstring, a summary line and then examples. extend: adds arguments to the parser."""
    description, _, examples = doc.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=examples.partition("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # fmt: off
    parser.add_argument("-t", "--task", choices=[*STAGES], required=True, help="the stage to train")
    parser.add_argument("-c", "--config", help="the run (default: config/config_<task>.json)")
    parser.add_argument("-m", "--model", default="config/model_config.json",
                        help="the model (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override a key of a configuration; may be repeated")
    parser.add_argument("--resume", nargs="?", const=True, metavar="RUN",
                        help="continue the newest run of this task, or this one (its name, or a checkpoint)")
    # fmt: on
    if extend:
        extend(parser)
    args = parser.parse_args()
    args.set, args.stage = parse_overrides(args.set), STAGES[args.task]
    args.config = resolve_path(args.config or f"config/config_{args.task}.json")
    args.model = resolve_path(args.model)
    return args


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.add_argument("--plan", action="store_true", help="do not train; show what training would need")
    parser.add_argument("--world", type=int, default=1, metavar="N", help="plan for N machines like this one")
    parser.add_argument("--link", type=float, default=1.0, metavar="GBIT",
                        help="speed of the link between them (default: %(default)s)")
    # fmt: on


def train_launched(args: argparse.Namespace, strategy: Callable[..., Any], local: tuple[int, int],
                   loss_scaling: bool = True) -> None:  # fmt: skip
    """Train in one of several processes. strategy(config, compute) makes an engine/parallel.py strategy;
    local: (local rank, local world size)."""
    from engine.run_config import load_run
    from engine.stop import Launcher

    launcher = Launcher()
    config, shape = load_run(args)
    from common import hardware
    from engine.setup import stage_setup
    from formats import load_tokenizer

    compute = hardware.set_up_compute(config, local, loss_scaling)
    with strategy(config, compute) as parallel:
        setup = stage_setup(args.stage, config, shape, compute, parallel, load_tokenizer, args.resume)
        train(setup, parallel, launcher)


def main() -> None:
    args = parse_arguments(__doc__, add_plan_arguments)
    if args.world < 1 or not 0 < args.link < math.inf:
        raise UserError("--world is a number of machines, 1 or more, and --link a speed in Gbit/s, above 0")
    if args.world > 1 and not args.plan:
        raise UserError("--world is only for --plan; to train on several devices, use train_ddp.py")
    from engine.run_config import load_run

    config, shape = load_run(args)
    # torch is imported only now: errors in the arguments come without a wait.
    from common import hardware
    from engine import plan
    from engine.parallel import SingleProcess
    from engine.setup import stage_setup
    from formats import load_tokenizer

    compute, parallel = hardware.set_up_compute(config), SingleProcess()
    setup = stage_setup(args.stage, config, shape, compute, parallel, load_tokenizer, args.resume)
    if not args.plan:
        train(setup, parallel)
        return
    estimate = plan.RunEstimate.of(setup)
    with estimate.advice_when_out_of_memory():
        state = initial_state(setup, parallel)
        batches = device_batches(setup, parallel, state.consumed["sequences"], math.inf)

        def one_step() -> tuple[int, ...]:
            batch = next(batches)
            float(train_step(state, setup, parallel, batch).loss)  # waits for the device
            return batch.shape

        plan.print_plan(estimate, one_step, args.world, args.link)


if __name__ == "__main__":
    run(main)
