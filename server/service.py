"""A served model: what it is, prompts for it from requests, and text from the tokens it generates.

`Service` turns a checked request into a `Prompt` (in another thread, because long texts take a while to
encode), hands it to the `InferenceEngine`, and yields a `Delta` for every new piece of text. It raises the
errors that a client is told (`ApiError`), but knows nothing of the JSON of a response: see responses.py.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from common.errors import UserError
from decoding.engine import Logprob, Request
from decoding.sampling import check_prompt
from decoding.text import StopStrings, TextStream, word_of
from decoding.text_generator import TextGenerator
from engine.checkpoint import Checkpoint
from server.metrics import ServerMetrics
from server.openai_api import (
    ApiError,
    ChatCompletionRequest,
    CompletionParams,
    CompletionRequest,
    RequestMessage,
    TokenizeRequest,
)
from server.scheduler import EngineFailed, InferenceEngine, Overloaded
from tokenizer import BLOCK, Message, Tokenizer, merge_turns

MAX_PIECE = 4 * BLOCK  # characters encoded at once

T = TypeVar("T")


@dataclasses.dataclass
class Prompt:
    """What the model reads for a request.

    ids: one list per prompt. texts: the prompts as text, for `echo`. dropped_messages: None if not a chat.
    """

    ids: list[list[int]]
    texts: list[str]
    stop: StopStrings
    warnings: list[str]
    dropped_messages: int | None = None


class Choice:
    """One of the answers to a request, as it grows. OpenAI's API calls it a choice."""

    def __init__(self, index: int, tokenizer: Tokenizer, stop: StopStrings) -> None:
        self.index, self.n_tokens = index, 0
        self.finish_reason: str | None = None
        self._stream = TextStream(tokenizer, stop)

    @property
    def has_stop_token(self) -> bool:
        """Whether the model ended the answer itself, rather than a stop string or a limit."""
        return self.finish_reason == "stop" and not self._stream.is_stopped

    def feed(self, tokens: list[int], finish_reason: str | None) -> str:
        """Add tokens, and return the text that is now certain. The answer ends at a stop string."""
        text = ""
        for token in tokens:
            text += self._stream.feed(token)
            self.n_tokens += 1
            if self._stream.is_stopped:
                break
        self.finish_reason = "stop" if self._stream.is_stopped else finish_reason
        return text + self._stream.end() if self.finish_reason else text


@dataclasses.dataclass
class Delta:
    """What is new in a choice. text may lag behind tokens: see `TextStream`. is_first: of this choice."""

    choice: Choice
    text: str
    tokens: list[int]
    logprobs: list[Logprob]
    is_first: bool


class Service:
    """One model, with its engine, its metrics and the threads that read requests."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        path: Path,
        text_generator: TextGenerator,
        engine: InferenceEngine,
        device: str,
    ) -> None:
        self.text_generator, self.engine, self.name = text_generator, engine, path.stem
        self.metrics = ServerMetrics(engine)
        self.readers, self.n_reading = ThreadPoolExecutor(2, "reader"), 0
        self.tokenizer: Tokenizer = text_generator.tokenizer
        self.context: int = text_generator.context
        self.can_chat, loss = checkpoint.chat_template is not None, checkpoint.validation["loss"]
        self.model_card = {
            "id": self.name,
            "object": "model",
            "created": int(path.stat().st_mtime),
            "owned_by": "nano",
            "task": checkpoint.stage,
            "step": checkpoint.step,
            "validation_loss": loss if checkpoint.validation["step"] == checkpoint.step else None,
            "architecture": text_generator.model.config.architecture,
            "parameters": text_generator.model.n_params,
            "context": self.context,
            "vocabulary": self.tokenizer.vocab_size,
            "device": device,
            "slots": engine.n_slots,
        }

    async def read(self, deadline: float, function: Callable[..., T], *args: object) -> T:
        """Run function(*args) in a reader thread, because parsing or encoding a long text takes a while.

        Not begun if the client has left by then. Raises the ApiError that the function raises, one with
        status 429 if too many requests are being read, and one with 504 after the deadline (of
        time.monotonic()).
        """
        if not self.engine.has_room(self.n_reading + 1):
            raise overloaded()
        self.n_reading += 1
        job = self.readers.submit(catch_api_error, function, *args)
        work = asyncio.wrap_future(job)
        try:
            await asyncio.wait({work}, timeout=max(0, deadline - time.monotonic()))
            if not work.done():
                raise self.timed_out()
            result, error = work.result()
        finally:
            self.n_reading -= 1
            job.cancel()  # at once; cancelling `work` alone would take another round of the event loop
            work.cancel()
        if error:
            raise ApiError(*error)
        return result  # type: ignore[return-value]  # None only beside an error

    def check_model(self, name: str | None) -> None:
        if name not in (None, "nano", self.name):
            message = f"there is no model {name!r} here, only {self.name!r}"
            raise ApiError(404, message, "model_not_found", "model")

    async def tokenize(self, params: TokenizeRequest, deadline: float) -> dict[str, Any]:
        """The response of /tokenize. A long text is encoded in pieces, so that others get their turn."""
        self.check_model(params.model)
        if params.messages is not None:
            ids = (await self.read(deadline, self.chat_ids, params.messages))[0]
        elif params.prompt is not None:
            ids = [self.tokenizer.bos_id] * params.add_special_tokens
            for piece in self.tokenizer.pieces(params.prompt):
                ids += await self.read(deadline, self.encode_piece, piece)
        else:
            raise ApiError(400, "there is neither a prompt nor messages", "invalid_value", "prompt")
        names = [token_name(self.tokenizer, token) for token in ids] if params.return_token_strs else None
        return {"count": len(ids), "max_model_len": self.context, "tokens": ids, "token_strs": names}

    # ---- in a reader thread: from a request to a prompt

    def check_limits(self, params: CompletionParams, n_prompts: int) -> None:
        """Raise ApiError if this model or server cannot serve the request at all."""
        self.check_model(params.model)
        if (params.n or 1) * n_prompts > self.engine.n_slots:
            raise ApiError(400, f"at most {self.engine.n_slots} answers at a time", "too_many_answers", "n")
        last = self.text_generator.model.config.vocab_size - 1
        if params.logit_bias and max(params.logit_bias) > last:
            raise ApiError(400, f"logit_bias: the ids are 0 to {last}", "invalid_value", "logit_bias")

    def chat_prompt(self, params: ChatCompletionRequest) -> Prompt:
        self.check_limits(params, 1)
        ids, warnings, n_dropped = self.chat_ids(params.messages, params.truncation == "auto")
        return Prompt([ids], [], StopStrings(params.stop_strings), warnings, n_dropped)

    def chat_ids(
        self, sent: list[RequestMessage], may_drop: bool = False
    ) -> tuple[list[int], list[str], int]:
        """Returns (ids, warnings, number of the oldest messages that were dropped)."""
        if not self.can_chat:
            # It has never seen the marks of the template, so its answer would be noise.
            raise ApiError(
                400, f"{self.name} was only pretrained: it continues texts (/v1/completions) and has never "
                "learned to answer; `python train.py -t sft` teaches that", "model_cannot_chat", "model",
            )  # fmt: skip
        try:
            # `flatten_message` has made strings of all contents.
            messages, n_merged = merge_turns(cast(list[Message], sent))
            if messages[-1]["role"] == "system":
                raise UserError("a message from another role must follow the system message")
        except UserError as error:
            raise ApiError(400, str(error), "invalid_messages", "messages") from None
        n_messages, n_cut, kept = len(messages), 0, messages
        if may_drop:
            first = int(messages[0]["role"] == "system")
            last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=first)
            kept = messages[:first] + messages[last:]
        self.check_at_least(
            sum(1 + self.tokenizer.min_tokens(message["content"]) for message in kept), "messages"
        )
        if may_drop:
            ids, n_cut = self.text_generator.chat_prompt(messages)  # removes turns from `messages`
        else:
            ids = self.text_generator.encode_chat(messages)
        self.check_length(len(ids) + n_cut, 1, "messages")
        warnings: list[str] = []
        if n_merged:
            subject = "message was" if n_merged == 1 else "messages were"
            warnings.append(f"{n_merged:,} {subject} joined to the one before, from the same role")
        warnings += filter(None, [self.text_generator.unknown_characters(ids)])
        return ids, warnings, n_messages - len(messages)

    def completion_prompt(self, params: CompletionRequest) -> Prompt:
        self.check_limits(params, len(params.prompts))
        room = 0 if params.max_tokens == 0 else 1
        ids = [self.prompt_ids(prompt, room) for prompt in params.prompts]
        warnings: list[str] = []
        if isinstance(params.prompts[0], str):
            all_ids = [token for row in ids for token in row]
            warnings += filter(None, [self.text_generator.unknown_characters(all_ids)])
        bos = self.tokenizer.bos_id  # not a part of the text
        texts = [self.decode(row[row[0] == bos :]) for row in ids] if params.echo else []
        return Prompt(ids, texts, StopStrings(params.stop_strings), warnings)

    def prompt_ids(self, prompt: str | list[int], room: int) -> list[int]:
        """The ids of a text, or ids as they are, if the model has them and `room` more tokens fit."""
        if isinstance(prompt, str):
            self.check_at_least(self.tokenizer.min_tokens(prompt), "prompt")
            prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt).tolist()]
        self.check_length(len(prompt), room, "prompt")
        try:
            return check_prompt(self.text_generator.model, prompt)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_prompt", "prompt") from None

    def check_at_least(self, n: int, param: str) -> None:
        """Raise ApiError if a prompt of n tokens or more is certainly too long, so it need not be encoded."""
        if n > 2 * self.context:
            raise self.too_long(f"at least {n:,}", param)

    def check_length(self, n: int, room: int, param: str) -> None:
        """Raise ApiError unless a prompt of n tokens and `room` more fit in the context."""
        if n + room > self.context:
            raise self.too_long(f"{n:,}", param)

    def too_long(self, n: str, param: str) -> ApiError:
        message = f"this model's context has {self.context:,} tokens"
        message += f"; {n} of the prompt leave no room for an answer"
        return ApiError(400, message, "context_length_exceeded", param)

    def encode_piece(self, piece: str) -> list[int]:
        if len(piece) > MAX_PIECE:
            message = f"there must be a line break every {MAX_PIECE:,} characters"
            raise ApiError(400, message, "invalid_value", "prompt")
        return self.tokenizer.encode(piece).tolist()

    def decode(self, ids: list[int]) -> str:
        """The text of any ids; U+FFFD replaces what is not UTF-8."""
        try:
            ids = check_prompt(self.text_generator.model, ids) if ids else ids
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value", "tokens") from None
        return b"".join(word_of(self.tokenizer, token) for token in ids).decode("utf-8", "replace")

    # ---- on the event loop: from a prompt to answers

    def make_requests(self, prompt: Prompt, params: CompletionParams) -> list[Request]:
        """The engine's requests: n for the first prompt, then n for the second, and so on."""
        limit = self.context if params.max_new_tokens is None else params.max_new_tokens
        return [
            Request(
                ids,
                min(limit, self.context - len(ids)),
                stop_tokens=self.text_generator.stop_tokens,
                seed=None if params.seed is None else params.seed + i,
                n_logprobs=params.n_logprobs,
                scores_prompt=bool(params.echo),
                **params.sampling_options,
            )
            for ids in prompt.ids
            for i in range(params.n or 1)
        ]

    async def generate(
        self, requests: list[Request], stop: StopStrings, deadline: float
    ) -> AsyncGenerator[Delta, None]:
        """Yield what is new in the answers to the requests, as soon as there is anything. Raises ApiError."""
        choices = [Choice(index, self.tokenizer, stop) for index in range(len(requests))]
        started: set[Choice] = set()
        try:
            async with contextlib.aclosing(self.engine.generate(requests, deadline)) as outputs:
                async for index, tokens, logprobs, finish_reason in outputs:
                    choice = choices[index]
                    if choice.finish_reason:  # by a stop string; the engine has yet to hear of it
                        continue
                    if finish_reason == "timeout":
                        raise self.timed_out()
                    is_first = choice not in started
                    if is_first:
                        started.add(choice)
                        self.metrics.prompt_tokens.inc(requests[index].n_prompt)
                    n_before = choice.n_tokens
                    text = choice.feed(tokens, finish_reason)
                    if choice.finish_reason and not finish_reason:
                        self.engine.cancel(requests[index])
                    n_new = choice.n_tokens - n_before
                    if n_new and not n_before:
                        self.metrics.first_token.observe(time.monotonic() - deadline + self.engine.timeout)
                    self.metrics.completion_tokens.inc(n_new)
                    yield Delta(choice, text, tokens[:n_new], logprobs[:n_new], is_first)
        except Overloaded:
            raise overloaded() from None
        except EngineFailed as error:
            raise ApiError(500, f"the model failed: {error}", "engine_failed") from None

    def timed_out(self) -> ApiError:
        return ApiError(504, f"not finished after {self.engine.timeout} s", "timeout")


def overloaded() -> ApiError:
    message = "too many requests are waiting; try again soon"
    return ApiError(429, message, "overloaded", headers={"Retry-After": "1"})


def catch_api_error(
    function: Callable[..., T], *args: object
) -> tuple[T | None, tuple[int, str, str | None, str | None] | None]:
    """Returns (the function's result, None), or (None, the arguments of the ApiError it raised).

    A raised exception refers to all that the function was working on, and a Future that passes it on refers
    to the exception: this cycle would keep the request's body until the garbage collector runs.
    """
    try:
        return function(*args), None
    except ApiError as error:
        return None, (error.status, error.message, error.code, error.param)


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text. One that is a part of a character is written as its bytes, such as "bytes:\\xe4"."""
    data = word_of(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
