"""The engine's thread, without HTTP: tokens, limits, deadlines and failures."""

import asyncio
import contextlib
import time

import pytest
from handmade import break_down, handmade_service, request_of, slow_down

from decoding.sampling import generate
from server.scheduler import EngineFailed, Overloaded


@pytest.fixture
def service(tmp_path):
    with handmade_service(tmp_path) as service:
        yield service


def collect(engine, requests, seconds=20.0):
    """(the tokens of each request, its finish_reason)"""

    async def run():
        tokens, reasons = [[] for _ in requests], [None] * len(requests)
        async for index, new, _, finish_reason in engine.generate(requests, time.monotonic() + seconds):
            tokens[index] += new
            reasons[index] = finish_reason
        return tokens, reasons

    return asyncio.run(run())


def becomes_idle(engine):
    for _ in range(500):
        if not engine.n_open and not engine.decoder.is_busy:
            return True
        time.sleep(0.01)
    return False


def test_tokens_are_those_of_generate(service):
    requests = [request_of(service, "1", 5), request_of(service, "1+", 3), request_of(service, "1", 0)]
    texts = [
        list(generate(service.engine.model, one.context, one.max_tokens, temperature=0))
        for one in requests[:2]
    ]
    tokens, reasons = collect(service.engine, requests)
    assert tokens == [*texts, []] and reasons == ["length"] * 3
    assert service.engine.n_tokens == 8 and service.engine.n_open == 0


def test_a_full_queue(service):
    with pytest.raises(Overloaded):
        collect(service.engine, [request_of(service, "1", 1) for _ in range(5)])
    assert collect(service.engine, [request_of(service, "1", 1) for _ in range(4)])[1] == ["length"] * 4


def test_the_deadline(service):
    slow_down(service, 0.02)
    assert collect(service.engine, [request_of(service, "1", 90)], seconds=0.2)[1] == ["timeout"]
    assert becomes_idle(service.engine)


def test_a_generator_that_is_closed_frees_its_slot(service):
    slow_down(service, 0.01)

    async def run():
        outputs = service.engine.generate(
            [request_of(service, "1", 90), request_of(service, "1", 90)], time.monotonic() + 20
        )
        async with contextlib.aclosing(outputs):
            await anext(outputs)
            assert service.engine.n_running == 2

    asyncio.run(run())
    assert becomes_idle(service.engine)


def test_a_step_that_fails(service):
    step = service.engine.decoder.step
    break_down(service)
    with pytest.raises(EngineFailed, match="the card has left"):
        collect(service.engine, [request_of(service, "1", 3)])
    assert service.engine.n_failures == 1 and "the card has left" in service.engine.error
    service.engine.decoder.step = step
    assert collect(service.engine, [request_of(service, "1", 3)])[1] == ["length"]
    assert service.engine.error is None


def test_an_engine_that_has_stopped(service):
    service.engine.stop()
    with pytest.raises(EngineFailed, match="has been stopped"):
        collect(service.engine, [request_of(service, "1", 3)])
