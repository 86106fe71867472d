"""The thread that computes for a server: requests go in from asyncio, tokens come out as they are drawn.

A `BatchedDecoder` belongs to one thread and is busy all the time; the event loop must never wait for it.
Between them are two one-way streets: orders go to the engine's thread through a queue, and what each step
has drawn comes back with `loop.call_soon_threadsafe`, all of it in one call.

    engine = Engine(model, n_slots=8, max_queue=64, seconds=120)
    engine.start()
    async for index, tokens, logprobs, finish_reason in engine.answer([request, ...], deadline):
        ...
    engine.stop()
"""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import prometheus_client as prometheus

from common.errors import UserError
from decoding.engine import BatchedDecoder, Request
from decoding.sampling import check_prompt
from decoding.text import StopStrings, TextStream, word_of
from server.openai_api import ApiError, name_of
from tokenizer import BLOCK, merge_turns

LONGEST_PIECE = 4 * BLOCK  # characters that are encoded at once


class Overloaded(Exception):
    """There are as many requests as are allowed to wait."""


class EngineFailed(Exception):
    """A step raised an exception: nobody whose request was under way gets the rest of it."""


class Ticket:
    """A request that somebody listens to: its place among theirs, and how much of it they have heard."""

    def __init__(self, index, request, events, deadline):
        self.index, self.request, self.events, self.deadline = index, request, events, deadline
        self.n_told = 0


class Engine(threading.Thread):
    """Owns the model. At most `n_slots` requests run and `max_queue` wait; each has `seconds` in all.

    attention: a context to compute in. error: what the last step died of, None if it succeeded.
    n_tokens, n_failures: since the start. n_open: requests that run or wait. on_step: told how many seconds.
    """

    def __init__(self, model, n_slots, max_queue, seconds, attention=None):
        super().__init__(name="engine", daemon=True)
        self.model, self.n_slots, self.max_queue, self.seconds = model, n_slots, max_queue, seconds
        self.attention = attention or contextlib.nullcontext()
        self.decoder = BatchedDecoder(model, n_slots)
        # If it is half a second only: a seed means the same from the first request on.
        self.decoder.compile(wait=self.decoder.is_prepared)
        self.error, self.n_tokens, self.n_failures, self.n_open = None, 0, 0, 0
        self.is_stopped, self.on_step = False, lambda seconds: None
        self._loop, self._orders = None, queue.SimpleQueue()
        self._tickets, self._told = {}, []  # known to the thread only

    # ---- on the event loop

    @property
    def n_running(self):
        return min(self.n_open, self.n_slots)

    def has_room(self, n):
        """Whether n further requests may wait."""
        return self.n_open + n <= self.n_slots + self.max_queue

    async def answer(self, requests, deadline):
        """Yields (index of the request, its new ids, their logprobs, finish_reason or None) until all ended.

        finish_reason is the decoder's, or "timeout" after the deadline (of time.monotonic). To stop listening
        is to cancel: the slots are free with the next step. Raises Overloaded before anything is computed,
        and EngineFailed.
        """
        if self.is_stopped:
            raise EngineFailed(self.error or "it has been stopped")
        if not self.has_room(len(requests)):
            raise Overloaded
        self._loop, events = asyncio.get_running_loop(), asyncio.Queue()
        self.n_open += len(requests)
        running = set(requests)
        try:
            for index, request in enumerate(requests):
                self._orders.put(Ticket(index, request, events, deadline))
            while running:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                index, *_, finish_reason = event
                if finish_reason:
                    running.discard(requests[index])
                yield event
        finally:
            self.n_open -= len(requests)
            for request in running:
                self.cancel(request)

    def cancel(self, request):
        """Its slot is free with the next step; whoever listens hears "cancelled"."""
        self._orders.put(request)

    def stop(self):
        """Ends the thread; requests that are under way get no answer."""
        self._orders.put(None)
        self.join(timeout=10)

    # ---- on the engine's thread

    def run(self):
        try:
            with self.attention:
                while self._obey():
                    self._step()
                    self._send()
        finally:
            # Not only after `stop`: a graphics card that failed once may refuse everything from then on.
            self.is_stopped = True
            while not self._orders.empty():
                if isinstance(order := self._orders.get(), Ticket):
                    self._tickets[order.request] = order
            self._dismiss(self.error or "it has been stopped")
            self._send()

    def _step(self):
        try:
            start = time.perf_counter()
            for request in self.decoder.step():
                self._tell(self._tickets[request], request.finish_reason)
            self.on_step(time.perf_counter() - start)
            self.error = None
        except Exception as error:
            logging.getLogger("uvicorn.error").exception("the engine failed")
            self.error = f"{type(error).__name__}: {error}"
            self.n_failures += 1
            for request in self._dismiss(self.error):
                self.decoder.remove(request)  # its row may hold anything; the next request fills it anew
        now = time.monotonic()
        for ticket in [ticket for ticket in self._tickets.values() if ticket.deadline < now]:
            self._remove(ticket, "timeout")

    def _obey(self):
        """Carry out all orders; wait for one when there is nothing else to do. False: it was the last."""
        while True:
            try:
                order = self._orders.get(block=not self.decoder.is_busy)
            except queue.Empty:
                return True
            if order is None:
                return False
            if isinstance(order, Ticket):
                self._begin(order)
            elif order in self._tickets:
                self._remove(self._tickets[order], "cancelled")
            self._send()

    def _begin(self, ticket):
        request = ticket.request
        try:
            self.decoder.add(request)
        except Exception as error:
            self._told.append((ticket.events, EngineFailed(str(error))))
            return
        self._tickets[request] = ticket
        if request.finish_reason:  # no token was asked for
            self._tell(ticket, request.finish_reason)

    def _tell(self, ticket, finish_reason):
        request = ticket.request
        tokens, logprobs = request.tokens_from(ticket.n_told), request.logprobs[ticket.n_told :]
        ticket.n_told += len(tokens)
        self.n_tokens += len(tokens)
        self._told.append((ticket.events, (ticket.index, tokens, logprobs, finish_reason)))
        if finish_reason:
            del self._tickets[request]

    def _remove(self, ticket, finish_reason):
        self.decoder.remove(ticket.request)
        self._tell(ticket, finish_reason)

    def _dismiss(self, why):
        """All that run or wait are told that this was it; returns their requests."""
        requests = list(self._tickets)
        self._told += [(ticket.events, EngineFailed(why)) for ticket in self._tickets.values()]
        self._tickets.clear()
        return requests

    def _send(self):
        told, self._told = self._told, []
        if told:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(deliver, told)


def deliver(told):
    for events, event in told:
        events.put_nowait(event)


class Metrics:
    """What Prometheus hears of: https://prometheus.io/docs/practices/naming/"""

    media_type = prometheus.CONTENT_TYPE_LATEST

    def __init__(self, engine):
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)

        def counter(name, text, labels=()):
            return prometheus.Counter(f"nano_{name}", text, labels, registry=registry)

        def histogram(name, text, first):
            bounds = [first * 2**i for i in range(16)]
            return prometheus.Histogram(f"nano_{name}_seconds", text, buckets=bounds, registry=registry)

        def gauge(name, text, function):
            prometheus.Gauge(f"nano_requests_{name}", text, registry=registry).set_function(function)

        self.requests = counter("requests", "HTTP requests (499: the client had left)", ("route", "status"))
        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts")
        self.tokens = counter("completion_tokens", "tokens of answers")
        self.first_token = histogram("time_to_first_token", "since the request, for each answer", 0.002)
        self.step = histogram("step", "of the model: a token for each answer", 0.0005)
        gauge("running", "answers that are being written", lambda: engine.n_running)
        gauge("waiting", "answers that wait for a slot", lambda: engine.n_open - engine.n_running)
        engine.on_step = self.step.observe

    def count(self, route, status):
        self.requests.labels(route or "none", status).inc()

    @property
    def text(self):
        return prometheus.generate_latest(self.registry)


@dataclasses.dataclass
class Prompt:
    """What a request has the model read. ids: one list for each text. texts: what `echo` repeats of them."""

    ids: list[list[int]]
    texts: list[str]
    stops: StopStrings
    warnings: list[str] = dataclasses.field(default_factory=list)
    extra: dict = dataclasses.field(default_factory=dict)  # of the reply


class Service:
    """A model that is served: what it is, prompts for it, and answers of it."""

    def __init__(self, checkpoint, path, text_generator, engine, device):
        self.text_generator, self.engine, self.name = text_generator, engine, path.stem
        self.metrics, self.n_reading, self.readers = Metrics(engine), 0, ThreadPoolExecutor(2, "reader")
        self.tokenizer, self.context = text_generator.tokenizer, text_generator.context
        self.can_chat, loss = checkpoint.task == "sft", checkpoint.validation["loss"]
        self.facts = {
            "id": self.name,
            "object": "model",
            "created": int(path.stat().st_mtime),
            "owned_by": "nano",
            "task": checkpoint.task,
            "step": checkpoint.step,
            "validation_loss": loss if checkpoint.validation["step"] == checkpoint.step else None,
            "architecture": text_generator.model.config.architecture,
            "parameters": text_generator.model.n_params,
            "context": self.context,
            "vocabulary": self.tokenizer.vocab_size,
            "device": device,
            "slots": engine.n_slots,
        }

    async def read(self, deadline, function, *args):
        """function(*args) in another thread: to count the tokens of a long text takes a while.

        It is not begun if the client has left by then. Raises the ApiError that it raises, one of status 429
        if there are too many requests already, and of 504 after the deadline (of time.monotonic).
        """
        if not self.engine.has_room(self.n_reading + 1):
            raise overloaded()
        self.n_reading += 1
        work = asyncio.get_running_loop().run_in_executor(self.readers, attempt, function, *args)
        try:
            await asyncio.wait({work}, timeout=max(0, deadline - time.monotonic()))
            if not work.done():
                raise self.too_late()
            result, refusal = work.result()
        finally:
            self.n_reading -= 1
            work.cancel()
        if refusal:
            raise ApiError(*refusal)
        return result

    def check_model(self, name):
        if name not in (None, "nano", self.name):
            message = f"there is no model {name!r} here, only {self.name!r}"
            raise ApiError(404, message, "model_not_found", "model")

    async def tokens_of(self, asked, deadline):
        """What /tokenize tells. A long text is encoded piece by piece: others have their turn in between."""
        self.check_model(asked.model)
        if asked.messages is not None:
            ids = (await self.read(deadline, self.chat_ids, asked.messages))[0]
        elif asked.prompt is not None:
            ids = [self.tokenizer.bos_id] * asked.add_special_tokens
            for piece in self.tokenizer.pieces(asked.prompt):
                ids += await self.read(deadline, self.to_tokens, piece)
        else:
            raise ApiError(400, "there is neither a prompt nor messages", "invalid_value", "prompt")
        names = [name_of(self.tokenizer, token) for token in ids] if asked.return_token_strs else None
        return {"count": len(ids), "max_model_len": self.context, "tokens": ids, "token_strs": names}

    # ---- in another thread: what is to be read

    def check(self, asked, n_prompts):
        """Whether it can be served at all."""
        self.check_model(asked.model)
        if (asked.n or 1) * n_prompts > self.engine.n_slots:
            raise ApiError(400, f"at most {self.engine.n_slots} answers at a time", "too_many_answers", "n")
        last = self.text_generator.model.config.vocab_size - 1
        if asked.logit_bias and max(asked.logit_bias) > last:
            raise ApiError(400, f"logit_bias: the ids are 0 to {last}", "invalid_value", "logit_bias")

    def conversation(self, asked):
        """The Prompt of a chat."""
        self.check(asked, 1)
        ids, warnings, n_dropped = self.chat_ids(asked.messages, asked.truncation == "auto")
        return Prompt([ids], [], StopStrings(asked.stops), warnings, {"dropped_messages": n_dropped})

    def chat_ids(self, messages, may_drop=False):
        """(ids, warnings, how many of the oldest messages were dropped)"""
        if not self.can_chat:
            # The template's marks mean nothing to it, so what it would answer is noise: better none.
            raise ApiError(
                400, f"{self.name} was only pretrained: it continues texts (/v1/completions) and has never "
                "learned to answer; `python train.py -t sft` teaches that", "model_cannot_chat", "model",
            )  # fmt: skip
        try:
            messages, n_merged = merge_turns(messages)
            if messages[-1]["role"] == "system":
                raise UserError("after what the system says, somebody else must speak")
        except UserError as error:
            raise ApiError(400, str(error), "invalid_messages", "messages") from None
        n_messages, n_lost, stay = len(messages), 0, messages
        if may_drop:
            first = int(messages[0]["role"] == "system")
            last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=first)
            stay = messages[:first] + messages[last:]
        self.check_least(sum(1 + self.tokenizer.fewest(message["content"]) for message in stay), "messages")
        if may_drop:
            ids, n_lost = self.text_generator.chat_prompt(
                messages
            )  # drops turns until there is room for an answer
        else:
            ids = self.text_generator.encode_chat(messages)
        self.check_length(len(ids) + n_lost, 1, "messages")
        warnings = []
        if n_merged:
            were = "message was" if n_merged == 1 else "messages were"
            warnings.append(f"{n_merged:,} {were} joined to the one before, of the same role")
        warnings += filter(None, [self.text_generator.unknown_characters(ids)])
        return ids, warnings, n_messages - len(messages)

    def continuation(self, asked):
        """The Prompt of texts that are to be continued, or of lists of ids."""
        self.check(asked, len(asked.prompts))
        room = 0 if asked.max_tokens == 0 else 1
        ids = [self.text_ids(prompt, room) for prompt in asked.prompts]
        is_text = isinstance(asked.prompts[0], str)
        warnings = filter(
            None,
            [is_text and self.text_generator.unknown_characters([token for one in ids for token in one])],
        )
        bos = self.tokenizer.bos_id  # is no part of the text
        texts = [self.to_text(one[one[0] == bos :]) for one in ids] if asked.echo else []
        return Prompt(ids, texts, StopStrings(asked.stops), list(warnings))

    def text_ids(self, prompt, room):
        """The ids of a text, or ids as they are, if the model has them and so many more fit."""
        if isinstance(prompt, str):
            self.check_least(self.tokenizer.fewest(prompt), "prompt")
            prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt).tolist()]
        self.check_length(len(prompt), room, "prompt")
        try:
            return check_prompt(self.text_generator.model, prompt)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_prompt", "prompt") from None

    def check_least(self, n, param):
        """Whether a prompt of n tokens or more is worth the work of encoding it."""
        if n > 2 * self.context:
            raise self.too_long(f"at least {n:,}", param)

    def check_length(self, n, room, param):
        """Whether a prompt of n tokens fits in the context, and so many more."""
        if n + room > self.context:
            raise self.too_long(f"{n:,}", param)

    def too_long(self, n, param):
        message = f"this model's context has {self.context:,} tokens"
        message += f"; {n} of the prompt leave no room for an answer"
        return ApiError(400, message, "context_length_exceeded", param)

    def to_tokens(self, piece):
        """The ids of a piece of a text."""
        if len(piece) > LONGEST_PIECE:
            message = f"there must be a line break every {LONGEST_PIECE:,} characters"
            raise ApiError(400, message, "invalid_value", "prompt")
        return self.tokenizer.encode(piece).tolist()

    def to_text(self, ids):
        """The text of ids, whatever they are."""
        try:
            ids = check_prompt(self.text_generator.model, ids) if ids else ids
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value", "tokens") from None
        return b"".join(word_of(self.tokenizer, token) for token in ids).decode("utf-8", "replace")

    # ---- on the event loop: answers

    def requests(self, prompt, asked):
        """A Request for each of n answers to each of the prompts, in this order."""
        return [
            Request(
                ids,
                min(self.context if asked.limit is None else asked.limit, self.context - len(ids)),
                stop_tokens=self.text_generator.stop_tokens,
                seed=None if asked.seed is None else asked.seed + i,
                n_logprobs=asked.n_logprobs,
                scores_prompt=asked.echo,
                **asked.sampling,
            )
            for ids in prompt.ids
            for i in range(asked.n or 1)
        ]

    async def follow(self, requests, stops, deadline):
        """Yields (choice, its new text, its new tokens, their logprobs), as soon as there are any."""
        choices = [Choice(index, self.tokenizer, stops) for index in range(len(requests))]
        try:
            async with contextlib.aclosing(self.engine.answer(requests, deadline)) as news:
                async for index, tokens, logprobs, finish_reason in news:
                    choice = choices[index]
                    if choice.finish_reason:
                        continue
                    if finish_reason == "timeout":
                        raise self.too_late()
                    if not choice.has_begun:
                        self.metrics.prompt_tokens.inc(requests[index].n_prompt)
                    n_before = choice.n_tokens
                    text = choice.feed(tokens, finish_reason)
                    if choice.finish_reason and not finish_reason:
                        self.engine.cancel(requests[index])
                    n_new = choice.n_tokens - n_before
                    if n_new and not n_before:
                        self.metrics.first_token.observe(time.monotonic() - deadline + self.engine.seconds)
                    self.metrics.tokens.inc(n_new)
                    yield choice, text, tokens[:n_new], logprobs[:n_new]
        except Overloaded:
            raise overloaded() from None
        except EngineFailed as error:
            raise ApiError(500, f"the model failed: {error}", "engine_failed") from None

    def too_late(self):
        return ApiError(504, f"no end after {self.engine.seconds} s", "timeout")


def overloaded():
    message = "too many requests wait already; try again soon"
    return ApiError(429, message, "overloaded", headers={"Retry-After": "1"})


def attempt(function, *args):
    """(what the function returns, None), or (None, what its ApiError says).

    An exception that was raised refers to all that the function had in hand, and a Future that passes it on
    refers to the exception: Python would keep both, and the body of the request, until it looks for cycles.
    """
    try:
        return function(*args), None
    except ApiError as error:
        return None, (error.status, error.message, error.code, error.param)


class Choice:
    """One of the answers to a request, as it grows."""

    def __init__(self, index, tokenizer, stops):
        self.index, self.stream = index, TextStream(tokenizer, stops)
        self.n_tokens, self.finish_reason = 0, None
        self.has_begun, self.n_characters = False, 0  # the forms below keep these

    @property
    def has_ended_itself(self):
        """Whether the model has written the mark of the end."""
        return self.finish_reason == "stop" and not self.stream.is_stopped

    def feed(self, tokens, finish_reason):
        """The text that is certain now. A stop string ends it, whatever the model has drawn since."""
        text = ""
        for token in tokens:
            text += self.stream.feed(token)
            self.n_tokens += 1
            if self.stream.is_stopped:
                break
        self.finish_reason = "stop" if self.stream.is_stopped else finish_reason
        return text + self.stream.end() if self.finish_reason else text
