"""`TextGenerator`: a prompt or a conversation in, text out; and loading the model for it.

Nothing here imports torch before a model is loaded, so that a script can check its arguments first.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import UserError
from config.stages import STAGES, Stage

if TYPE_CHECKING:
    from pathlib import Path

    from common.hardware import ComputeConfig
    from engine.checkpoint import Checkpoint
    from model import GPT
    from tokenizer import Tokenizer

LOAD_SECONDS, COMPILE_SECONDS = 0.5, 12.0  # to load the compiled backend, and to compile it the first time


class TextGenerator:
    """A model with its tokenizer and sampling options.

    `options`: those of `sampling.generate`. `max_length`: tokens of prompt and answer together; the model's
    context if None. After an answer, n_prompt and n_tokens are the tokens of its prompt and of itself,
    first_seconds and seconds the time to its first and to its last token.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, max_length: int | None = None, **options: Any
    ) -> None:
        from decoding.engine import BatchedDecoder

        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.decoder = BatchedDecoder(model)
        self.seconds_decoding = 0.0  # since the start; decides when the compiled backend is worth it
        self.context: int = model.config.block_size
        self.max_length = max_length or self.context
        self.stop_tokens = stop_tokens(tokenizer)
        self.n_prompt, self.n_tokens = 0, 0
        self.first_seconds, self.seconds = 0.0, 0.0

    @classmethod
    def load(
        cls,
        path: str = "newest",
        max_length: int | None = None,
        device: str = "auto",
        quantize: str | None = None,
        **options: Any,
    ) -> TextGenerator:
        """The model of a checkpoint file, or of the "newest" or "best" checkpoint. quantize: "int8" or None.

        options: `seed` and those of `sampling.logits_to_probs`; greedy by default. Raises UserError if there
        is no such model.
        """
        loaded = load_model(path, True, device, quantize)
        return cls(loaded.model, loaded.tokenizer, max_length, **{"temperature": 0, **options})

    # ---- text out ----------------------------------------------------------------------------------

    def chat(self, messages: Iterable[dict[str, str]]) -> Iterator[str]:
        """Yield the answer to a conversation in pieces: [{"role": "user", "content": str}, ...]."""
        yield from self.stream(self.chat_prompt(list(messages))[0])

    def complete(self, text: str) -> Iterator[str]:
        """Yield the continuation of a text in pieces."""
        yield from self.stream(self.completion_prompt(text)[0])

    def stream(self, ids: list[int]) -> Iterator[str]:
        """Yield the continuation of `ids` as text, a piece per token; "" while a character is incomplete."""
        from decoding.text import TextStream

        text = TextStream(self.tokenizer)
        self.n_prompt, self.n_tokens, self.first_seconds = len(ids), 0, 0.0
        start = time.perf_counter()
        for token in self.stream_tokens(ids, self.max_length - len(ids)):
            self.n_tokens += 1
            self.seconds = time.perf_counter() - start
            self.first_seconds = self.first_seconds or self.seconds
            yield text.feed(token)
        yield text.end()

    def stream_tokens(self, ids: list[int], max_tokens: int) -> Iterator[int]:
        """Yield the ids of the continuation of `ids`, at most `max_tokens` of them."""
        from decoding.engine import Request
        from decoding.sampling import generate

        options = self.options | {"stop_tokens": self.stop_tokens}
        if options.get("temperature") == 0 and self.model.drafter():
            yield from generate(self.model, ids, max_tokens, **options)
            return
        request = self.decoder.add(Request(ids, max_tokens, **options))
        try:
            while request.finish_reason is None:
                n_before, start = len(request.context), time.perf_counter()
                self.decoder.step()
                self.seconds_decoding += time.perf_counter() - start
                self._compile_if_worthwhile()
                yield from request.context[n_before:]
        finally:
            self.decoder.remove(request)  # the caller may have stopped listening, for instance with Ctrl-C

    def _compile_if_worthwhile(self) -> None:
        """Switch to the compiled backend once decoding has taken as long as the switch would.

        So it never costs more than twice the time of doing without, and short answers do not wait for it.
        """
        seconds = LOAD_SECONDS if self.decoder.is_prepared else COMPILE_SECONDS
        if self.seconds_decoding > seconds:
            self.decoder.compile()
            self.seconds_decoding = -math.inf

    def profile(self) -> str:
        """Tokens and speed of the last answer, in words."""
        if not self.n_tokens:
            return f"prompt {self.n_prompt} tokens, no answer"
        rest = self.seconds - self.first_seconds
        speed = f", {(self.n_tokens - 1) / rest:,.0f} tokens/s" if self.n_tokens > 1 else ""
        return (
            f"prompt {self.n_prompt} tokens, answer {self.n_tokens}; "
            f"first token after {1000 * self.first_seconds:.1f} ms{speed}"
        )

    # ---- prompts -----------------------------------------------------------------------------------

    @property
    def max_prompt(self) -> int:
        """The longest prompt, in tokens: one token of max_length is left for the answer."""
        return min(self.max_length - 1, self.context)

    def completion_prompt(self, text: str) -> tuple[list[int], int]:
        """Returns (ids, how many tokens had to be left out)."""
        return self.truncate_prompt([self.tokenizer.bos_id, *self.tokenizer.encode(text).tolist()])

    def chat_prompt(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """The prompt for a conversation. Returns (ids, how many tokens had to be left out).

        Turns that do not fit are removed from `messages`, oldest first. If the last message is the
        assistant's, the model continues it.
        """
        # A quarter is left for the answer. Once turns must go, make the conversation much shorter than
        # necessary, so that the next turns fit without dropping again.
        limit, shorter = self.max_prompt - self.max_prompt // 4, self.max_prompt // 2
        # Drop what cannot fit before encoding it: a message has at least its mark and `min_tokens`.
        sizes = [1 + self.tokenizer.min_tokens(message["content"]) for message in messages]
        if sum(sizes) > limit:
            limit = shorter
            drop_oldest_turns(messages, sizes, limit)
        ids = self.encode_chat(messages)
        if len(ids) > limit:
            tokenizer, first = self.tokenizer, int(messages[0]["role"] == "system")
            marks = {
                tokenizer.system_id,
                tokenizer.instruct_id,
                tokenizer.response_id,
            }  # not in texts
            starts = [i for i, token in enumerate(ids) if token in marks][: len(messages)]
            sizes = [end - start for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
            n = drop_oldest_turns(messages, sizes, shorter)
            del ids[sum(sizes[:first]) : sum(sizes[: first + n])]
        return self.truncate_prompt(ids)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation in the chat template, up to where the model continues."""
        from tokenizer import render_chat

        has_begun = messages[-1]["role"] == "assistant"
        ids, _ = render_chat(self.tokenizer, messages, add_generation_prompt=not has_begun)
        return ids[: len(ids) - has_begun].tolist()  # an answer to be continued has no <|eos|> yet

    def truncate_prompt(self, ids: list[int]) -> tuple[list[int], int]:
        """Cut the oldest tokens off a prompt that is too long, leaving a quarter of the room for the answer.

        Returns (ids, how many were cut off).
        """
        if len(ids) <= self.max_prompt:
            return ids, 0
        keep = self.max_prompt - self.max_prompt // 4
        # The first token stays: it is the mark that says what kind of text this is.
        return [ids[0], *ids[len(ids) - keep + 1 :]], len(ids) - keep

    def unknown_characters(self, ids: list[int]) -> str | None:
        """A sentence that says how many characters are not in the vocabulary, or None."""
        count = ids.count(self.tokenizer.unknown_id)
        are = "character is" if count == 1 else "characters are"
        return f"{count:,} {are} unknown to this model" if count else None


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: all special ones except <|unknown|>, which is part of the text."""
    return (
        tokenizer.eos_id, tokenizer.bos_id, tokenizer.padding_id,
        tokenizer.instruct_id, tokenizer.response_id, tokenizer.system_id,
    )  # fmt: skip


def drop_oldest_turns(messages: list[dict[str, str]], sizes: list[int], limit: int) -> int:
    """Remove the oldest turns until the messages have at most `limit` tokens; `sizes` are those of each.

    A system message stays, and so does the last turn. Returns how many messages were removed.
    """
    first = int(messages[0]["role"] == "system")
    total, end = sum(sizes), first
    for i in range(first + 1, len(messages)):
        if messages[i]["role"] == "user" and total > limit:
            total -= sum(sizes[end:i])
            end = i
    del messages[first:end]
    return end - first


def answer_greedily(
    model: GPT,
    prompts: Iterable[list[int]],
    max_tokens: Iterable[int],
    stop_tokens: Collection[int],
    on_answer: Callable[[], object] = lambda: None,
) -> list[tuple[list[int], bool]]:
    """Continue all prompts greedily. Returns [(ids, whether it ended with a stop token)].

    `max_tokens[i]` limits the i-th answer, including its stop token; so does the context. on_answer is called
    after each.
    """
    from decoding.engine import BatchedDecoder, Request

    requests = [
        Request(
            prompt, min(n, model.config.block_size - len(prompt) + 1), stop_tokens=stop_tokens, temperature=0
        )
        for prompt, n in zip(prompts, max_tokens, strict=True)
    ]
    decoder = BatchedDecoder(model, n_slots=64)
    decoder.run(requests, on_end=lambda request: on_answer())
    return [(request.tokens, request.finish_reason == "stop") for request in requests]


# ---- the model -------------------------------------------------------------------------------------

NAMED_MODELS = ("newest", "best")  # what -m may be instead of a file


class LoadedModel(NamedTuple):
    """A model ready to write text. name: of its checkpoint's file `path`, for messages."""

    checkpoint: Checkpoint
    path: Path
    name: str
    model: GPT
    tokenizer: Tokenizer
    compute: ComputeConfig


def check_model_file(path: str) -> None:
    """Raise UserError unless `path` is a file or one of NAMED_MODELS. Does not import torch."""
    from common.config import display_path, resolve_path

    if path not in NAMED_MODELS and not resolve_path(path).is_file():
        raise UserError(
            f"there is no file {display_path(resolve_path(path))}; without -m the newest model is taken"
        )


def check_device(device: str) -> None:
    """Raise UserError unless this is a value of --device. Does not import torch."""
    if not re.fullmatch("auto|cpu|mps|cuda(:[0-9]{1,3})?", device):
        raise UserError(f"--device must be auto, cpu, mps, cuda or cuda:N, not {device!r}")


def load_checkpoint(path: str, instruct: bool) -> tuple[Checkpoint, Path]:
    """Load a file, or the newest or best checkpoint. Returns (checkpoint, its file).

    instruct: prefer a model that can chat, and among these one of a last stage, even if it is older.
    """
    from common.config import resolve_path
    from engine import checkpoint as checkpoints
    from engine import runs

    if path not in NAMED_MODELS:
        file = resolve_path(path)
        return checkpoints.load(file), file
    choose = {"newest": runs.newest, "best": runs.best}[path]

    def rank(stage: Stage) -> tuple[bool, bool, list[str]]:
        newest_run = [file.run for file in runs.list_checkpoints(stage.name)[-1:]]
        is_last = not any(stage.name in other.follows for other in STAGES.values())
        return instruct and stage.chat_template is not None, instruct and is_last, newest_run

    for stage in sorted(STAGES.values(), key=rank, reverse=True):
        if found := choose(stage.name):
            checkpoint, file, notices = found
            for text in notices:
                print_notice(text)
            return checkpoint, file
    raise UserError("there is no model in checkpoint/ yet; `python train.py -t pretrain` makes one")


def load_model(
    path: str, instruct: bool, device: str = "auto", quantize: str | None = None, must_write: bool = True
) -> LoadedModel:
    """Load a model, on the device it is to run on. For path and instruct see `load_checkpoint`.

    Raises UserError if it cannot write text, unless it need not (must_write).
    """
    from common import hardware
    from common.config import display_path
    from decoding.packed import quantize as to_int8
    from engine.checkpoint import build

    checkpoint, file = load_checkpoint(path, instruct)
    name = display_path(file)
    # Half precision does not make a small model faster when it writes one token at a time.
    compute = hardware.resolve_compute(hardware.detect_machine(device), device, dtype="float32")
    model, tokenizer = build(checkpoint, name)
    if must_write and not model.config.is_causal:
        raise UserError(f"{name} sees all tokens at once (is_causal is false): it cannot continue a text")
    if not all(weights.isfinite().all() for weights in model.parameters()):
        raise UserError(f"{name} holds weights that are not finite numbers: its training had diverged")
    model = to_int8(model) if quantize == "int8" else model
    return LoadedModel(checkpoint, file, name, model.to(compute.device), tokenizer, compute)


def describe_model(loaded: LoadedModel, asked: str) -> str:
    """The model in two lines. asked: what -m was."""
    checkpoint, model = loaded.checkpoint, loaded.model
    parts = [
        f"{model.n_params / 1e6:.2f} M parameters",
        f"context {model.config.block_size:,}",
        f"{checkpoint.stage} step {checkpoint.step:,}",
        describe_validation(checkpoint),
        loaded.compute.device,
    ]
    best, which = checkpoint.best, ""
    if asked in NAMED_MODELS:
        which = f" ({asked})"
    if asked == "newest" and best["step"] not in (None, checkpoint.step):
        which = f" (newest; -m best is step {best['step']:,}, with validation loss {best['loss']:.3f})"
    return f"{loaded.name}{which}\n{' · '.join(parts)}"


def describe_validation(checkpoint: Checkpoint) -> str:
    """The validation loss of these weights or, if they have none, of the last ones before them that do."""
    loss, step = checkpoint.validation["loss"], checkpoint.validation["step"]
    if loss is None:
        return "not validated"
    return f"validation loss {loss:.3f}" + f" at step {step:,}" * (step != checkpoint.step)


def print_notice(text: str) -> None:
    """Tell the user something on stderr: stdout is for answers only."""
    from rich.console import Console

    Console(stderr=True).print(f"({text})", style="dim", markup=False, highlight=False, soft_wrap=True)
