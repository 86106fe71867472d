"""From requests to prompts, and from tokens to text."""

import asyncio
import time

import pytest
from handmade import handmade_service

from decoding.text import StopStrings
from server.openai_api import ApiError, ChatCompletionRequest, CompletionRequest, TokenizeRequest
from server.service import Choice, token_name
from tokenizer import N_SPECIAL, BPETokenizer

HI = [{"role": "user", "content": "Hello?"}]


@pytest.fixture
def service(tmp_path):
    with handmade_service(tmp_path) as service:
        yield service


def test_a_choice_ends_at_a_stop_string(service):
    ids = service.tokenizer.encode("你好吗1").tolist()
    choice = Choice(0, service.tokenizer, StopStrings(["吗"]))
    assert choice.feed(ids[:1], None) == "你" and choice.finish_reason is None
    assert choice.feed(ids[1:], None) == "好"
    assert (choice.finish_reason, choice.n_tokens, choice.has_stop_token) == ("stop", 3, False)


def test_a_choice_that_the_model_ends(service):
    choice = Choice(0, service.tokenizer, StopStrings([]))
    assert choice.feed(service.tokenizer.encode("你").tolist(), "stop") == "你" and choice.has_stop_token


def test_names_of_tokens():
    tokenizer = BPETokenizer.train(["1"], vocab_size=N_SPECIAL + 256)
    assert [token_name(tokenizer, token) for token in tokenizer.encode("你").tolist()] == [
        "bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0"
    ]  # fmt: skip
    assert token_name(tokenizer, tokenizer.eos_id) == "<|eos|>"


def test_a_chat_becomes_a_prompt(service):
    said = [{"role": "user", "content": "Hello?"}, {"role": "user", "content": "狐"}]
    prompt = service.chat_prompt(ChatCompletionRequest(messages=said))
    assert len(prompt.ids) == 1 and len(prompt.ids[0]) == len("Hello?\n狐") + 2
    assert prompt.warnings == [
        "1 message was joined to the one before, from the same role",
        "1 character is unknown to this model",
    ]
    assert prompt.dropped_messages == 0


def test_the_oldest_messages_are_dropped_if_asked(service):
    said = [*HI, {"role": "assistant", "content": "1" * 30}] * 4 + HI
    with pytest.raises(ApiError) as caught:
        service.chat_prompt(ChatCompletionRequest(messages=said))
    assert caught.value.code == "context_length_exceeded"
    prompt = service.chat_prompt(ChatCompletionRequest(messages=said, truncation="auto"))
    assert prompt.dropped_messages > 0 and len(prompt.ids[0]) < service.context


def test_texts_become_prompts(service):
    prompt = service.completion_prompt(CompletionRequest(prompt=["1+", "你"], echo=True))
    assert prompt.texts == ["1+", "你"] and [len(ids) for ids in prompt.ids] == [3, 2]
    assert service.decode(prompt.ids[0][1:]) == "1+"
    with pytest.raises(ApiError) as caught:
        service.completion_prompt(CompletionRequest(prompt=["1"] * 3))
    assert caught.value.code == "too_many_answers"


def test_each_answer_has_a_seed_of_its_own(service):
    params = CompletionRequest(prompt=["1", "2"], n=2, seed=5)
    prompt = service.completion_prompt(CompletionRequest(prompt=["1", "2"]))
    requests = service.make_requests(prompt, params)
    assert [request.seed for request in requests] == [5, 6, 5, 6]
    assert [request.max_tokens for request in requests] == [16] * 4


def test_tokenize(service):
    params = TokenizeRequest(prompt="1+", return_token_strs=True)
    reply = asyncio.run(service.tokenize(params, time.monotonic() + 20))
    assert reply["token_strs"] == ["<|bos|>", "1", "+"] and reply["count"] == 3
    with pytest.raises(ApiError) as caught:
        asyncio.run(service.tokenize(TokenizeRequest(), time.monotonic() + 20))
    assert caught.value.status == 400


def test_reading_ends_at_the_deadline(service):
    with pytest.raises(ApiError) as caught:
        asyncio.run(service.read(time.monotonic() + 0.05, time.sleep, 0.5))
    assert caught.value.status == 504 and service.n_reading == 0
