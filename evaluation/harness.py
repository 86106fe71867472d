"""Public benchmarks, such as arc_easy, mmlu or gsm8k, through EleutherAI's lm-evaluation-harness.

The harness knows the tasks: their data, prompts, examples and metrics. `NanoLM` answers its requests with the
batched decoder. The numbers are those of its Hugging Face backend on the exported model, with two exceptions:
<|bos|> is not a part of a text whose perplexity is measured (there it is predicted from itself), and a
chat prompt does not begin with <|bos|>, as in training.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import importlib.util
import logging
import math
import random
import re
import socket
import sys
import time
import types
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from common.config import ROOT
from common.errors import UserError
from decoding.engine import BatchedDecoder, Request
from decoding.likelihood import log_likelihoods
from decoding.text_generator import stop_tokens
from evaluation.prompts import windows
from evaluation.runner import ExampleScore, TaskResult
from evaluation.sandbox import CodeEval
from model import GPT
from tokenizer import SPECIAL_TOKENS, Tokenizer

MARKS = {"system": "<|system_mark|>", "user": "<|instruct_mark|>", "assistant": "<|response_mark|>"}
SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

# ---- the model, as the harness sees it ---------------------------------------------------------------


class NanoLM(TemplateLM):
    """A model for lm-evaluation-harness.

    chat: prompts are in the chat template, whose marks are special tokens; others begin with <|bos|>.
    on_each is called as each request ends. n_shortened: of each task, how many requests did not fit in the
    context.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        chat: bool = False,
        on_each: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        self.model, self.nano_tokenizer, self.chat, self.on_each = model, tokenizer, chat, on_each
        self.capacity, self.n_shortened = model.config.block_size, collections.Counter[str]()

    @property
    def eot_token_id(self) -> int:
        return self.nano_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.nano_tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.nano_tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if not self.chat:
            ids = self.nano_tokenizer.encode(string).tolist()
            return ids if add_special_tokens is False else [self.prefix_token_id, *ids]
        marks = [SPECIAL_TOKENS.index(mark) for mark in SPECIAL.findall(string)]
        first, *others = (ids.tolist() for ids in self.nano_tokenizer.encode_batch(SPECIAL.split(string)))
        return [*first, *(i for mark, ids in zip(marks, others, strict=True) for i in (mark, *ids))]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = "".join(
            MARKS[turn["role"]] + turn["content"] + "<|eos|>" * (turn["role"] == "assistant")
            for turn in chat_history
        )
        return text + MARKS["assistant"] if add_generation_prompt else text.removesuffix("<|eos|>")

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.task_names = [request.task_name for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        for (_, text), _, ids in requests:
            if not 0 < len(ids) <= self.capacity:
                raise UserError(
                    f"{len(ids)} tokens cannot be scored in a context of {self.capacity}: {text!r}"
                )
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = log_likelihoods(self.model, pairs, lambda *_: self.on_each())
        self.n_shortened.update(
            name for name, one in zip(self.task_names, found, strict=True) if one.n_dropped
        )
        return [(one.logprob, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        texts = self.nano_tokenizer.encode_batch([request.args[0] for request in requests])
        parts = [windows(ids.tolist(), self.prefix_token_id, self.capacity) for ids in texts]
        found = iter(log_likelihoods(self.model, [part for own in parts for part in own]))
        sums = [math.fsum(next(found).logprob for _ in own) for own in parts]
        for _ in requests:
            self.on_each()
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        decoder = BatchedDecoder(self.model, n_slots=64)
        if decoder.is_prepared:
            decoder.compile(wait=True)
        stops: dict[Request, list[str]] = {}
        for number, instance in enumerate(requests):
            text, options = instance.args
            kwargs: Any = normalize_gen_kwargs(options, 256)
            max_tokens, until = kwargs.pop("max_gen_toks"), handle_stop_sequences(kwargs.pop("until"), None)
            options = {key: kwargs.pop(key) for key in SAMPLING if key in kwargs}
            if not kwargs.pop("do_sample"):
                options = {"temperature": 0}
            if kwargs:
                raise UserError(f"generation_kwargs holds what Nano does not know: {', '.join(kwargs)}")
            prompt, room = self.tok_encode(text), self.capacity - max_tokens
            room = room if room > 0 else max(1, self.capacity // 2)  # a long answer then drops what is old
            self.n_shortened[instance.task_name] += len(prompt) > room
            request = Request(
                prompt[-room:],
                max_tokens,
                seed=number,
                stop_tokens=stop_tokens(self.nano_tokenizer),
                **options,
            )
            stops[decoder.add(request)] = [stop for stop in until if stop]
        while decoder.is_busy:
            for request in decoder.step():
                longest = max((len(stop.encode()) for stop in stops[request]), default=0)
                end = self.text_of(
                    request.context[max(request.n_prompt, len(request.context) - longest - 1) :]
                )
                if any(stop in end for stop in stops[request]):
                    decoder.remove(request)
                if request.finish_reason:
                    self.on_each()
        return [postprocess_generated_text(self.text_of(one.tokens), stops[one], None) for one in stops]

    def text_of(self, ids: list[int]) -> str:
        """Without special tokens."""
        return self.nano_tokenizer.decode(
            [i for i in ids if i < self.nano_tokenizer.vocab_size], skip_special=True
        )


# ---- tasks -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def code_eval() -> Iterator[None]:
    """A context in which `import evaluate` means Hugging Face's package, not Nano's script of this name, and
    its code_eval is ours."""
    before = sys.modules.pop("evaluate", None)

    def load(name: str, *args: Any, **options: Any) -> Any:
        if name == "code_eval":
            return CodeEval()
        elsewhere = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
        spec = PathFinder.find_spec("evaluate", elsewhere)
        assert spec and spec.loader  # the harness needs it, too
        sys.modules["evaluate"] = library = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(library)
        return library.load(name, *args, **options)

    stand_in: Any = types.ModuleType("evaluate")
    stand_in.load = load
    sys.modules["evaluate"] = stand_in
    try:
        yield
    finally:
        del sys.modules["evaluate"]
        if before is not None:
            sys.modules["evaluate"] = before


def find(names: Sequence[str], include_path: Path | None = None) -> dict[str, tuple[Any, list[Any]]]:
    """{name: (its group or None, its tasks)}, with the data of the tasks.

    Raises UserError for names that the harness does not know, and for tasks whose data is not there.
    """
    import datasets
    import huggingface_hub
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if not is_online():  # otherwise every download would be tried for half a minute
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    manager, found = TaskManager(include_path=include_path, include_defaults=False), {}
    if any(name not in manager.task_index for name in names):
        manager = TaskManager(include_path=include_path)  # reads ten thousand files
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"there is no task {name}, neither in Nano nor in lm-evaluation-harness{hint}")
        try:
            loaded = manager.load([name])
        except Exception as error:  # of any kind: the harness runs code of the task, and downloads its data
            why = " ".join(str(error).split())[:300]
            raise UserError(
                f"{name} could not be loaded ({type(error).__name__}: {why}); lm-evaluation-harness "
                "downloads the data of a task from huggingface.co, unless that has been done before"
            ) from None
        found[name] = loaded["groups"].get(name), list(loaded["tasks"].values())
    return found


def is_online() -> bool:
    """Whether huggingface.co, or what HF_ENDPOINT names instead, can be reached."""
    from huggingface_hub import constants

    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies():
        return True  # the proxy knows
    try:
        port = address.port or {"http": 80}.get(address.scheme, 443)
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def run(
    model: GPT,
    tokenizer: Tokenizer,
    names: Sequence[str],
    *,
    chat: bool = False,
    limit: int | None = None,
    include_path: Path | None = None,
    run_generated_code: bool = False,
    on_each: Callable[[], object] = lambda: None,
) -> dict[str, list[TaskResult]]:
    """Run tasks of the harness on a model. For each name, returns a result for each metric of its tasks.

    limit: examples of each task, the first ones; of a group such as mmlu, of each task in it. include_path: a
    folder with task files of one's own. run_generated_code: allow tasks that run code that the model has
    written. on_each is called as each request ends. Raises UserError for what `find` refuses.
    """
    import lm_eval
    import lm_eval.api.task

    lm_eval.api.task.tqdm = lambda documents, **_: documents  # `on_each` shows the progress
    start = time.perf_counter()
    with code_eval():
        found = find(names, include_path)
        tasks = {task.task_name: task for _, own in found.values() for task in own}
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False) and not run_generated_code:
                raise UserError(
                    f"{name} runs code that the model has written: --run_generated_code allows it"
                )
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)  # this and the seeds below are the harness's own
        random.seed(0)
        np.random.seed(1234)
        lm = NanoLM(model, tokenizer, chat, on_each)
        scored: Any = lm_eval.evaluate(
            lm, {"tasks": tasks, "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=0,
            apply_chat_template=chat, fewshot_as_multiturn=chat, confirm_run_unsafe_code=True,
        )  # fmt: skip
    seconds, n_all = time.perf_counter() - start, sum(len(task.instances) for task in tasks.values())
    results: dict[str, list[TaskResult]] = {}
    for name, (group, own) in found.items():
        parts = (
            [(name, own)] if group and group.has_aggregation else [(task.task_name, [task]) for task in own]
        )
        results[name] = []
        for title, members in parts:
            of_part = results_of(title, group, members, scored, lm.n_shortened)
            share = sum(len(task.instances) for task in members) / n_all
            results[name] += (dataclasses.replace(result, seconds=seconds * share) for result in of_part)
    return results


def results_of(
    name: str, group: Any, tasks: list[Any], scored: dict[str, Any], n_shortened: dict[str, int]
) -> list[TaskResult]:
    """A TaskResult for each metric and filter of a task or group; the kinds are the tasks of a group."""
    from lm_eval.api import metrics

    of_group = {one.metric: one.weight_by_size for one in (group and group.aggregate_metric_list) or []}
    collected: dict[str, list[ExampleScore]] = {}
    base_rates: dict[str, list[float]] = {}
    notes = []
    if n_long := sum(n_shortened[task.task_name] for task in tasks):
        notes = [
            f"{n_long:,} prompts of {name} are too long for the context: their oldest tokens are left out"
        ]
    for task in tasks:
        samples, left_out = scored["samples"][task.task_name], set()
        n_filters = len({sample["filter"] for sample in samples})
        for sample in samples:
            n_choices = len(sample["arguments"]) if task.OUTPUT_TYPE == "multiple_choice" else 0
            for metric in sample["metrics"]:
                if of_group and metric not in of_group:
                    continue
                aggregate = task.aggregation().get(metric, metrics.mean)
                value, weight, title = sample[metric], 1.0, metric
                if aggregate is metrics.perplexity:
                    value, title = -value, "answer perplexity"
                elif aggregate in (metrics.weighted_perplexity, metrics.bits_per_byte):
                    value, weight = -value[0], value[1]
                    value = value / math.log(2) if aggregate is metrics.bits_per_byte else value
                elif aggregate is not metrics.mean:
                    left_out.add((metric, sample["filter"]))
                    continue
                if sample["filter"] != "none":
                    title += f", {sample['filter']}"
                share = 1.0 if of_group.get(metric, True) else n_filters / len(samples)
                scores = collected.setdefault(title, [])
                answer = sample["filtered_resps"][0]
                answer = answer[0] if isinstance(answer, list) else answer
                if n_choices:
                    logprobs = [logprob for logprob, _ in sample["filtered_resps"]]
                    answer = sample["arguments"][int(np.argmax(logprobs))][1].strip()
                    if metric.startswith("acc"):
                        base_rates.setdefault(title, []).append(1 / n_choices)
                scores.append(
                    ExampleScore(
                        len(scores),
                        task.task_name,
                        float(value) * share,
                        weight * share,
                        answer if isinstance(answer, str) else "",
                    )
                )
        for metric, kept in sorted(left_out):
            value = scored["results"][task.task_name][f"{metric},{kept}"]
            notes.append(f"{task.task_name}: {metric} is {value:.4f}; it is not a mean over examples")
    return [
        TaskResult(
            name, title, math.fsum(rates) / len(rates) if (rates := base_rates.get(title)) else None, scores,
            n_all=sum(len(task.eval_docs) for task in tasks), notes=notes,
        )
        for title, scores in collected.items()
    ]  # fmt: skip
