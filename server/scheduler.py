"""The thread that runs the model: requests come in from asyncio, tokens go back as they are sampled.

A `BatchedDecoder` belongs to one thread and is always busy, while the event loop must never wait for it. So
orders reach the engine's thread through a queue, and the tokens of each step go back in one
`loop.call_soon_threadsafe`.

    engine = InferenceEngine(model, n_slots=8, max_queue=64, timeout=120)
    engine.start()
    async for request_index, tokens, logprobs, finish_reason in engine.generate([request, ...], deadline):
        ...
    engine.stop()

This module knows nothing of HTTP: it depends on decoding/ only.
"""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from decoding.engine import BatchedDecoder, Logprob, Request
from model import GPT


class Overloaded(Exception):
    """The queue is full."""


class EngineFailed(Exception):
    """A step failed, or the engine has stopped: requests in progress get no further tokens."""


class RequestOutput(NamedTuple):
    """New tokens of one request.

    finish_reason: None while it runs, then the decoder's ("stop", "length", "cancelled"), or "timeout".
    """

    request_index: int
    tokens: list[int]
    logprobs: list[Logprob]
    finish_reason: str | None


OutputQueue = asyncio.Queue[RequestOutput | EngineFailed]


@dataclasses.dataclass
class ScheduledRequest:
    """A request in the engine, and where its tokens go. index: among the requests of the same caller."""

    index: int
    request: Request
    outputs: OutputQueue
    deadline: float  # of time.monotonic()
    n_sent: int = 0  # tokens


class InferenceEngine(threading.Thread):
    """Owns the model. Up to `n_slots` requests run while `max_queue` wait.

    timeout: seconds for a request in all. attention: a context in which the model runs.
    error: the exception of the last step, None if it succeeded. n_tokens, n_failures: since the start.
    n_open: requests that run or wait. on_step: called with the seconds each step took.
    """

    def __init__(
        self,
        model: GPT,
        n_slots: int,
        max_queue: int,
        timeout: float,
        attention: AbstractContextManager[Any] | None = None,
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self.model, self.n_slots, self.max_queue, self.timeout = model, n_slots, max_queue, timeout
        self.attention = attention or contextlib.nullcontext()
        self.decoder = BatchedDecoder(model, n_slots)
        # Wait if it takes half a second only, so that a seed means the same from the first request on.
        self.decoder.compile(wait=self.decoder.is_prepared)
        self.error: str | None = None
        self.n_tokens = self.n_failures = self.n_open = 0
        self.is_stopped = False
        self.on_step: Callable[[float], object] = lambda seconds: None
        # Orders: a ScheduledRequest starts, a Request is cancelled, None ends the thread.
        self._orders: queue.SimpleQueue[ScheduledRequest | Request | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        # Used by the engine's thread only:
        self._scheduled: dict[Request, ScheduledRequest] = {}
        self._outbox: list[tuple[OutputQueue, RequestOutput | EngineFailed]] = []

    # ---- on the event loop

    @property
    def n_running(self) -> int:
        return min(self.n_open, self.n_slots)

    @property
    def n_waiting(self) -> int:
        return self.n_open - self.n_running

    def has_room(self, n: int) -> bool:
        """Whether n more requests may wait."""
        return self.n_open + n <= self.n_slots + self.max_queue

    async def generate(self, requests: list[Request], deadline: float) -> AsyncGenerator[RequestOutput, None]:
        """Yield tokens as they are sampled, until all requests have finished.

        A request still running at the deadline (of time.monotonic()) ends with the reason "timeout". Closing
        the generator cancels the rest: their slots are free from the next step on. Raises Overloaded before
        anything is computed, and EngineFailed.
        """
        if self.is_stopped:
            raise EngineFailed(self.error or "it has been stopped")
        if not self.has_room(len(requests)):
            raise Overloaded
        self._loop = asyncio.get_running_loop()
        outputs: OutputQueue = asyncio.Queue()
        self.n_open += len(requests)
        unfinished = set(requests)
        try:
            for index, request in enumerate(requests):
                self._orders.put(ScheduledRequest(index, request, outputs, deadline))
            while unfinished:
                output = await outputs.get()
                if isinstance(output, EngineFailed):
                    raise output
                if output.finish_reason:
                    unfinished.discard(requests[output.request_index])
                yield output
        finally:
            self.n_open -= len(requests)
            for request in unfinished:
                self.cancel(request)

    def cancel(self, request: Request) -> None:
        """Free its slot from the next step on. Its last output has the finish_reason "cancelled"."""
        self._orders.put(request)

    def stop(self) -> None:
        """End the thread. Requests in progress fail with EngineFailed."""
        self._orders.put(None)
        self.join(timeout=10)

    # ---- on the engine's thread

    def run(self) -> None:
        try:
            with self.attention:
                while self._process_orders():
                    self._step()
                    self._send()
        finally:
            # Not only after `stop`: a GPU that has failed may refuse all work from then on.
            self.is_stopped = True
            while not self._orders.empty():
                if isinstance(order := self._orders.get(), ScheduledRequest):
                    self._scheduled[order.request] = order
            self._fail_all(self.error or "it has been stopped")
            self._send()

    def _step(self) -> None:
        try:
            start = time.perf_counter()
            for request in self.decoder.step():
                self._output(self._scheduled[request], request.finish_reason)
            self.on_step(time.perf_counter() - start)
            self.error = None
        except Exception as error:
            logging.getLogger("uvicorn.error").exception("the engine failed")
            self.error = f"{type(error).__name__}: {error}"
            self.n_failures += 1
            for request in self._fail_all(self.error):
                self.decoder.remove(request)  # its row may hold anything; the next request overwrites it
        now = time.monotonic()
        for scheduled in [entry for entry in self._scheduled.values() if entry.deadline < now]:
            self._remove(scheduled, "timeout")

    def _process_orders(self) -> bool:
        """Carry out all orders, and wait for one while idle. Returns False when the thread is to end."""
        while True:
            try:
                order = self._orders.get(block=not self.decoder.is_busy)
            except queue.Empty:
                return True
            if order is None:
                return False
            if isinstance(order, ScheduledRequest):
                self._add(order)
            elif order in self._scheduled:
                self._remove(self._scheduled[order], "cancelled")
            self._send()

    def _add(self, scheduled: ScheduledRequest) -> None:
        request = scheduled.request
        try:
            self.decoder.add(request)
        except Exception as error:
            self._outbox.append((scheduled.outputs, EngineFailed(str(error))))
            return
        self._scheduled[request] = scheduled
        if request.finish_reason:  # max_tokens was 0
            self._output(scheduled, request.finish_reason)

    def _output(self, scheduled: ScheduledRequest, finish_reason: str | None) -> None:
        request, n_sent = scheduled.request, scheduled.n_sent
        tokens, logprobs = request.tokens_from(n_sent), request.logprobs[n_sent:]
        scheduled.n_sent += len(tokens)
        self.n_tokens += len(tokens)
        output = RequestOutput(scheduled.index, tokens, logprobs, finish_reason)
        self._outbox.append((scheduled.outputs, output))
        if finish_reason:
            del self._scheduled[request]

    def _remove(self, scheduled: ScheduledRequest, finish_reason: str) -> None:
        self.decoder.remove(scheduled.request)
        self._output(scheduled, finish_reason)

    def _fail_all(self, reason: str) -> list[Request]:
        """Fail all requests that run or wait, and return them."""
        requests = list(self._scheduled)
        self._outbox += [(scheduled.outputs, EngineFailed(reason)) for scheduled in self._scheduled.values()]
        self._scheduled.clear()
        return requests

    def _send(self) -> None:
        outbox, self._outbox = self._outbox, []
        if outbox and self._loop:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody is listening
                self._loop.call_soon_threadsafe(_deliver, outbox)


def _deliver(outbox: list[tuple[OutputQueue, RequestOutput | EngineFailed]]) -> None:
    for outputs, output in outbox:
        outputs.put_nowait(output)
