"""What a run is tested with while it trains: the keys eval_tasks and sample_prompts.

The scores are those of evaluate.py for a checkpoint of the same step, with `--limit` eval_tasks_examples. The
texts are those of `inference.py --prompt` (in a stage with a chat template, -i) with the run's random_seed,
cut after SAMPLE_TOKENS tokens. Neither changes the run: weights and random state stay as they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.log import notice
from evaluation.runner import TaskResult, eval_mode, evaluate_task, examples_of, prepare
from evaluation.selection import find_task

if TYPE_CHECKING:
    from common.metrics import Metric
    from engine.setup import TrainSetup

SAMPLE_TOKENS = 100
# As inference.py does by default.
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 5, "repetition_penalty": 1.2}

Event = tuple[str, "dict[str, Metric]"]  # ("task" or "sample", its metrics)


class TrainingTests:
    """The tests of a run. Raises UserError for a task that does not exist or does not suit the model."""

    def __init__(self, setup: TrainSetup) -> None:
        config, model = setup.config, setup.model
        self.tokenizer, self.seed = setup.tokenizer, config.random_seed
        self.chat = setup.stage.chat_template is not None
        wanted = config.eval_tasks or config.sample_prompts
        self.interval = config.eval_tasks_interval if wanted else math.inf
        self.prompts = list(dict.fromkeys(config.sample_prompts))
        self.tasks = {}
        for spec in dict.fromkeys(config.eval_tasks):
            task = find_task(spec)
            examples = examples_of(task, config.eval_tasks_examples)
            for sentence in prepare(task, examples, self.tokenizer, model.config, self.chat).notes:
                notice(sentence)
            self.tasks[spec] = task, examples, task.base_rate(examples)
        if self.prompts and not model.config.is_causal:
            raise UserError("sample_prompts need a model that writes: this one sees all tokens at once")
        if self.prompts and self.chat and not all(prompt.strip() for prompt in self.prompts):
            raise UserError("sample_prompts: an empty one is no question; remove it")

    def run(self, model: Any, parallel: Any, stops: Callable[[], bool]) -> Iterator[Event]:
        """Test the model; yields an event for each text and each task. All processes must call it.

        The processes that have the whole model share the examples; texts are written by the first of them.
        If a test fails, the user is told, and the others go on. stops: whether to end before the next task.
        """
        if not self.tasks and not self.prompts:
            return
        whole = parallel.whole_model(model)
        ranks = [rank for rank, has in enumerate(parallel.all_gather(whole is not None)) if has]
        if self.prompts and not parallel.rank:
            texts, fault = _attempt(lambda: self._write(whole))
            for prompt, text in zip(self.prompts, texts or (), strict=False):
                yield "sample", {"prompt": prompt, "text": text}
            if fault:
                notice(f"sample_prompts could not be continued ({fault}); training goes on")
        for spec, (task, examples, base_rate) in self.tasks.items():
            if any(parallel.all_reduce_sum(stops())):
                return
            start = time.perf_counter()
            own = examples[ranks.index(parallel.rank) :: len(ranks)] if parallel.rank in ranks else []

            def scores(task: Any = task, own: Any = own) -> list[Any]:
                if not own:
                    return []
                return evaluate_task(whole, self.tokenizer, task, own, chat=self.chat).scores

            parts, faults = zip(*parallel.all_gather(_attempt(scores)), strict=True)
            if fault := next(filter(None, faults), None):
                notice(f"{spec} could not be scored ({fault}); training goes on")
                continue
            all_scores = [score for part in parts for score in part]
            seconds = time.perf_counter() - start
            yield "task", metrics_of(TaskResult(spec, task.metric, base_rate, all_scores, seconds=seconds))

    def _write(self, model: Any) -> list[str]:
        """The texts after all prompts."""
        from decoding.engine import BatchedDecoder, Request
        from decoding.text_generator import TextGenerator, stop_tokens

        generator = TextGenerator(model, self.tokenizer)
        requests = []
        for prompt in self.prompts:
            messages = [{"role": "user", "content": prompt}]
            ids, _ = generator.chat_prompt(messages) if self.chat else generator.completion_prompt(prompt)
            n = min(SAMPLE_TOKENS, generator.max_length - len(ids))
            ends = stop_tokens(self.tokenizer)
            requests.append(Request(ids, n, stop_tokens=ends, seed=self.seed, **SAMPLING))
        with eval_mode(model):
            BatchedDecoder(model, n_slots=len(requests)).run(requests)
        size, unknown = self.tokenizer.vocab_size, self.tokenizer.unknown_id
        return [self.tokenizer.decode([i if i < size else unknown for i in r.tokens]) for r in requests]


def _attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """(the result, None), or (None, what went wrong)."""
    import torch

    # Training insists on deterministic operations (common/hardware.py); decoding may use the others, too.
    insists = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        return action(), None
    except Exception as error:  # whatever it is, the run is worth more
        return None, f"{type(error).__name__}: {error}"
    finally:
        torch.use_deterministic_algorithms(insists)


def metrics_of(result: TaskResult) -> dict[str, Metric]:
    """The metrics of an event "task"; see FIELDS of common/metrics.py."""
    known: dict[str, Any] = {"task": result.name}
    if result.metric == "perplexity":
        beside = result.beside()
        known |= {"perplexity": result.score, "bits_per_byte": beside and beside.score}
    else:
        known |= {"score": result.score, "standard_error": result.standard_error}
    known |= {"base_rate": result.base_rate, "metric": result.metric, "n": result.n}
    known |= {"seconds": result.seconds}
    return {name: value for name, value in known.items() if value is not None}
