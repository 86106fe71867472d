"""The thread that computes for a server: requests go in from asyncio, tokens come out as they are drawn.

A `Decoder` belongs to one thread and is busy all the time; the event loop must never wait for it. Between
them are two one-way streets: orders go to the engine's thread through a queue, and what each step has drawn
comes back with `loop.call_soon_threadsafe`, all of it in one call.

    engine = Engine(model, n_slots=8, max_queue=64, seconds=120)
    engine.start()
    async for index, tokens, logprobs, finish_reason in engine.answer([request, ...]):
        ...
    engine.stop()
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time

from engine.decoding import Decoder, Request, TextStream
from engine.errors import UserError
from engine.wire import ApiError
from tokenizer import check_messages, render_chat


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
    n_tokens, n_failures: since the start. n_open: requests that run or wait.
    """

    def __init__(self, model, n_slots, max_queue, seconds, attention=None):
        super().__init__(name="engine", daemon=True)
        self.model, self.n_slots, self.max_queue, self.seconds = model, n_slots, max_queue, seconds
        self.attention = attention or contextlib.nullcontext()
        self.decoder = Decoder(model, n_slots)
        # If it is half a second only: a seed means the same from the first request on.
        self.decoder.compile(wait=self.decoder.is_prepared)
        self.error, self.n_tokens, self.n_failures, self.n_open = None, 0, 0, 0
        self.is_stopped = False
        self._loop, self._orders = None, queue.SimpleQueue()
        self._tickets, self._told = {}, []  # known to the thread only

    # ---- on the event loop

    async def answer(self, requests):
        """Yields (index of the request, its new ids, their logprobs, finish_reason or None) until all ended.

        finish_reason is the Decoder's, or "timeout". To stop listening is to cancel: the slots are free with
        the next step. Raises Overloaded before anything is computed, and EngineFailed.
        """
        if self.is_stopped:
            raise EngineFailed(self.error or "it has been stopped")
        if self.n_open + len(requests) > self.n_slots + self.max_queue:
            raise Overloaded
        self._loop, events = asyncio.get_running_loop(), asyncio.Queue()
        deadline = time.monotonic() + self.seconds
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
            for request in self.decoder.step():
                self._tell(self._tickets[request], request.finish_reason)
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
        tokens, logprobs = request.tokens[ticket.n_told :], request.logprobs[ticket.n_told :]
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


class Service:
    """A model that is served: what it is, prompts for it, and answers of it."""

    def __init__(self, checkpoint, path, speaker, engine, device):
        self.speaker, self.engine, self.name = speaker, engine, path.stem
        self.tokenizer, self.context = speaker.tokenizer, speaker.context
        self.can_chat, loss = checkpoint.task == "sft", checkpoint.validation["loss"]
        self.facts = {
            "id": self.name,
            "object": "model",
            "created": int(path.stat().st_mtime),
            "owned_by": "nano",
            "task": checkpoint.task,
            "step": checkpoint.step,
            "validation_loss": loss if checkpoint.validation["step"] == checkpoint.step else None,
            "architecture": speaker.model.config.architecture,
            "parameters": speaker.model.n_params,
            "context": self.context,
            "vocabulary": self.tokenizer.vocab_size,
            "device": device,
            "slots": engine.n_slots,
        }

    def check_count(self, n):
        """Before anything is computed for the request."""
        if n > self.engine.n_slots:
            raise ApiError(400, f"at most {self.engine.n_slots} answers at a time", "too_many_answers", "n")

    def check_model(self, name):
        if name not in (None, "nano", self.name):
            message = f"there is no model {name!r} here, only {self.name!r}"
            raise ApiError(404, message, "model_not_found", "model")

    def chat_prompt(self, asked):
        """(ids, how many of the oldest messages were dropped)"""
        if not self.can_chat:
            # The template's marks mean nothing to it, so what it would answer is noise: better none.
            raise ApiError(
                400, f"{self.name} was only pretrained: it continues texts (/v1/completions) and has never "
                "learned to answer; `python train.py -t sft` teaches that", "model_cannot_chat", "model",
            )  # fmt: skip
        messages = [message.plain() for message in asked.messages]
        try:
            check_messages(messages)
            if messages[-1]["role"] != "user":
                raise UserError("the last message must be the user's")
        except UserError as error:
            raise ApiError(400, str(error), "invalid_messages", "messages") from None
        if asked.truncation == "auto":
            n_messages = len(messages)
            ids, n_lost = self.speaker.chat_prompt(messages)  # drops turns until there is room for an answer
            return self.checked(ids, "messages", n_lost), n_messages - len(messages)
        ids, _ = render_chat(self.tokenizer, messages, add_generation_prompt=True)
        return self.checked(ids.tolist(), "messages"), 0

    def completion_prompt(self, prompt):
        """The ids of a text, or ids as they are."""
        if isinstance(prompt, str):
            prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt).tolist()]
        return self.checked(prompt, "prompt")

    def checked(self, ids, param, n_lost=0):
        """The ids, if they are of this model and leave room for a token to follow."""
        if n_lost or len(ids) >= self.context:
            raise ApiError(
                400, f"this model's context has {self.context:,} tokens; {len(ids) + n_lost:,} of the prompt "
                "leave no room for an answer", "context_length_exceeded", param,
            )  # fmt: skip
        try:
            return self.speaker.model.prompt(ids)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_prompt", param) from None

    def requests(self, prompts, asked, max_tokens, n_logprobs):
        """A Request for each of n answers to each of the prompts, in this order."""
        return [
            Request(
                ids,
                min(max_tokens or self.context, self.context - len(ids)),
                stop_tokens=self.speaker.stop_tokens,
                seed=None if asked.seed is None else asked.seed + i,
                n_logprobs=n_logprobs,
                **asked.sampling,
            )
            for ids in prompts
            for i in range(asked.n or 1)
        ]

    async def follow(self, requests, stops):
        """Yields (choice, its new text, its new tokens, their logprobs), as soon as there are any."""
        choices = [Choice(index, self.tokenizer, stops) for index in range(len(requests))]
        try:
            async with contextlib.aclosing(self.engine.answer(requests)) as news:
                async for index, tokens, logprobs, finish_reason in news:
                    choice = choices[index]
                    if choice.finish_reason:
                        continue
                    if finish_reason == "timeout":
                        raise ApiError(504, f"no end after {self.engine.seconds} s", "timeout")
                    n_before = choice.n_tokens
                    text = choice.feed(tokens, finish_reason)
                    if choice.finish_reason and not finish_reason:
                        self.engine.cancel(requests[index])
                    n_new = choice.n_tokens - n_before
                    yield choice, text, tokens[:n_new], logprobs[:n_new]
        except Overloaded:
            raise ApiError(429, "too many requests wait already; try again soon", "overloaded") from None
        except EngineFailed as error:
            raise ApiError(500, f"the model failed: {error}", "engine_failed") from None


class Choice:
    """One of the answers to a request, as it grows."""

    def __init__(self, index, tokenizer, stops):
        self.index, self.stream = index, TextStream(tokenizer, stops)
        self.n_tokens, self.finish_reason = 0, None
        self.has_begun, self.n_characters = False, 0  # the forms below keep these

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
