"""The JSON of whole responses and of streams; tests/test_serve.py reads it with OpenAI's client."""

import asyncio
import json
import time

import pytest
from handmade import break_down, handmade_service, slow_down

from server.openai_api import ApiError, ChatCompletionRequest, CompletionRequest
from server.responses import ChatFormat, CompletionFormat, ResponseBuilder, to_event

HI = [{"role": "user", "content": "Hello?"}]


@pytest.fixture
def service(tmp_path):
    with handmade_service(tmp_path) as service:
        yield service


def builder(service, **fields):
    if "messages" in fields:
        params = ChatCompletionRequest(temperature=0, **fields)
        response_format, prompt = ChatFormat(service.tokenizer), service.chat_prompt(params)
    else:
        params = CompletionRequest(temperature=0, **fields)
        response_format, prompt = CompletionFormat(service.tokenizer), service.completion_prompt(params)
    return ResponseBuilder(service, response_format, params, prompt, time.monotonic() + 20)


def full(service, **fields):
    async def run():
        return await builder(service, **fields).full()

    return asyncio.run(run())


def events(service, **fields):
    async def run():
        return [event async for event in await builder(service, **fields).events()]

    return asyncio.run(run())


def test_a_chat(service):
    response = full(service, messages=HI)
    assert response["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "你好吗"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert response["usage"] == {"prompt_tokens": 8, "completion_tokens": 3, "total_tokens": 11}
    assert response["object"] == "chat.completion" and response["id"].startswith("chatcmpl-")
    assert response["warnings"] == [] and response["dropped_messages"] == 0


def test_a_stream(service):
    *chunks, done = events(service, messages=HI, stream_options={"include_usage": True}, logprobs=True)
    assert done == "data: [DONE]\n\n"
    *chunks, usage = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    assert usage["usage"]["completion_tokens"] == 3 and usage["choices"] == []
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""}, {"content": "你"}, {"content": "好"}, {"content": "吗"}, {}
    ]  # fmt: skip
    assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["stop"]
    assert ["warnings" in chunk for chunk in chunks] == [True] + [False] * 4
    told = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in told] == ["你", "好", "吗"] and told[0]["bytes"] == list(
        "你".encode()
    )


def test_an_echo_begins_with_the_prompt(service):
    response = full(service, prompt=["1+", "1"], max_tokens=2, echo=True, logprobs=1)
    assert [choice["text"] for choice in response["choices"]] == ["1+1+", "1+1"]
    logprobs = response["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<|bos|>", *"1+1+"] and logprobs["text_offset"] == [0, 0, 1, 2, 3]
    assert logprobs["token_logprobs"][0] is None and all(
        value <= 0 for value in logprobs["token_logprobs"][1:]
    )


def test_an_error_before_the_first_event_is_raised(service):
    break_down(service)
    with pytest.raises(ApiError) as caught:
        events(service, prompt="1")
    assert (caught.value.status, caught.value.code) == (500, "engine_failed")


def test_an_error_after_it_is_an_event(service):
    async def run():
        stream = await builder(service, prompt="1", max_tokens=90).events()
        found = [await anext(stream)]
        break_down(service)
        return found + [event async for event in stream]

    slow_down(service, 0.01)
    *_, error, done = asyncio.run(run())
    assert "the card has left" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert done == "data: [DONE]\n\n"


def test_an_event_is_one_line():
    assert to_event({"a": "你\n\r"}) == 'data: {"a":"你\\n\\r"}\n\n'
