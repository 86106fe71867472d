"""Requests as the API takes them, and what it says of those it refuses. No server is needed."""

import json

import pytest

from server.openai_api import (
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    TokenizeRequest,
    parse_request,
)

HI = [{"role": "user", "content": "Hello?"}]


def chat(**fields):
    body = json.dumps({"messages": HI, **fields}).encode()
    return parse_request(ChatCompletionRequest, "application/json", body)


def complete(prompt="1", **fields):
    body = json.dumps({"prompt": prompt, **fields}).encode()
    return parse_request(CompletionRequest, "application/json; charset=utf-8", body)


def refusal(function, *args, **fields):
    with pytest.raises(ApiError) as caught:
        function(*args, **fields)
    return caught.value


def test_defaults():
    params = chat()
    assert (params.stop_strings, params.max_new_tokens, params.n_logprobs, params.echo) == (
        [],
        None,
        None,
        False,
    )
    assert params.sampling_options == {"top_k": 0}
    params = complete()
    assert (params.stop_strings, params.max_new_tokens, params.n_logprobs) == ([], 16, None)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 7}, 7),
        ({"max_tokens": -1}, None),
        ({"max_completion_tokens": 5, "max_tokens": 7}, 5),
        ({"max_completion_tokens": -1, "max_tokens": 7}, 7),
    ],
)
def test_both_names_of_the_limit(fields, limit):
    assert chat(**fields).max_new_tokens == limit


def test_sampling_options_are_those_of_logits_to_probs():
    options = chat(
        temperature=0.5, top_k=-1, top_p=0.9, logit_bias={"5": 3}, presence_penalty=1
    ).sampling_options
    assert options == {
        "temperature": 0.5, "top_k": 0, "top_p": 0.9, "logit_bias": {5: 3.0}, "presence_penalty": 1.0
    }  # fmt: skip


def test_messages_are_flattened():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]
    sent = [{"role": "developer", "content": parts}, {"role": "assistant", "content": None, "name": "x"}]
    assert chat(messages=sent).messages == [
        {"role": "system", "content": "Hello?"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize("prompt", ["", "1", [1, 2], ["a", "b"], [[1], [2, 3]]])
def test_prompts(prompt):
    is_list = isinstance(prompt, list) and not isinstance(prompt[0], int)
    assert complete(prompt).prompts == (prompt if is_list else [prompt])


def test_logprobs():
    assert chat(logprobs=True).n_logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).n_logprobs == 3
    assert chat(top_logprobs=3).n_logprobs is None
    assert complete(logprobs=0).n_logprobs == 0


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'{"prompt": "1"}', "text/plain"),
        (b'{"prompt": "1"}', ""),
        (b"", "application/json"),
        (b"[1]", "application/json"),
        (b'{"prompt": "\xff"}', "application/json"),
        (b"[" * 100_000, "application/json"),
    ],
)
def test_bodies_that_are_no_json_object(body, content_type):
    error = refusal(parse_request, CompletionRequest, content_type, body)
    assert (error.status, error.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
        ({"stop": ["1"] * 65}, "stop", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "wizard"}]}, "messages", "invalid_value"),
        ({"tools": [{}]}, "tools", "unsupported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported"),
    ],
)
def test_fields_that_are_wrong(fields, param, code):
    error = refusal(chat, **fields)
    assert (error.status, error.param, error.code) == (400, param, code)
    assert error.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (500, "server_error"),
    ],
)
def test_types_of_errors(status, kind):
    assert ApiError(status, "text", "code", "field").body == {
        "error": {"message": "text", "type": kind, "param": "field", "code": "code"}
    }


def test_fields_that_are_unknown_are_ignored():
    body = json.dumps({"prompt": "1", "user": "me", "what": [1]}).encode()
    assert parse_request(TokenizeRequest, "application/json", body).prompt == "1"
