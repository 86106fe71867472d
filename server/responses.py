"""From a `Service`'s deltas to OpenAI's JSON: a whole response, or a stream of server-sent events."""

# Not `sse-starlette`: it cuts off streams at SIGTERM, and an event takes twice the time (measured: 30 µs).

import collections
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from decoding.engine import Logprob
from decoding.text import word_of
from server.openai_api import ApiError, CompletionParams
from server.service import Delta, Prompt, Service, token_name
from tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI uses the same number

JSON = dict[str, Any]


class ResponseFormat(ABC):
    """How the answers of one response are written: a chat's or a completion's."""

    id_prefix: str
    object_name: str
    chunk_name: str
    first_chunk: JSON | None  # sent before a choice's first text
    last_chunk: JSON  # sent with the finish_reason

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @abstractmethod
    def content(self, text: str) -> JSON:
        """A whole answer."""

    @abstractmethod
    def chunk(self, text: str) -> JSON:
        """A piece of an answer."""

    @abstractmethod
    def logprobs(self, index: int, tokens: list[int], logprobs: list[Logprob | None]) -> JSON:
        """The logprobs of the next tokens of choice `index`: lists, by name, that can be concatenated.

        None, in place of a token's logprobs, marks the first token of an echoed prompt.
        """


class ChatFormat(ResponseFormat):
    id_prefix, object_name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    first_chunk = {"delta": {"role": "assistant", "content": ""}}
    last_chunk = {"delta": {}}

    def content(self, text: str) -> JSON:
        return {"message": {"role": "assistant", "content": text}}

    def chunk(self, text: str) -> JSON:
        return {"delta": {"content": text}}

    def logprobs(self, index: int, tokens: list[int], logprobs: list[Logprob | None]) -> JSON:
        content = []
        for token, entry in zip(tokens, logprobs, strict=True):
            assert entry is not None  # a chat has no echo
            logprob, top = entry
            top_logprobs = [self._token_logprob(*pair) for pair in top]
            content.append(self._token_logprob(token, logprob) | {"top_logprobs": top_logprobs})
        return {"content": content}

    def _token_logprob(self, token: int, logprob: float) -> JSON:
        data = word_of(self.tokenizer, token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}


class CompletionFormat(ResponseFormat):
    id_prefix, object_name, chunk_name = "cmpl-", "text_completion", "text_completion"
    first_chunk, last_chunk = None, {"text": ""}

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._offsets: collections.Counter[int] = collections.Counter()  # characters so far, by choice

    def content(self, text: str) -> JSON:
        return {"text": text}

    chunk = content

    def logprobs(self, index: int, tokens: list[int], logprobs: list[Logprob | None]) -> JSON:
        result: JSON = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in zip(tokens, logprobs, strict=True):
            result["tokens"].append(token_name(self.tokenizer, token))
            result["text_offset"].append(self._offsets[index])
            if entry is None:
                result["token_logprobs"].append(None)
                result["top_logprobs"].append(None)
            else:
                logprob, top = entry
                pairs = [(token, logprob), *top]
                named = {token_name(self.tokenizer, id): max(value, LOWEST_LOGPROB) for id, value in pairs}
                result["token_logprobs"].append(max(logprob, LOWEST_LOGPROB))
                result["top_logprobs"].append(named)
            if entry or token != self.tokenizer.bos_id:
                # A character has exactly one byte that is not a UTF-8 continuation byte.
                word = word_of(self.tokenizer, token)
                self._offsets[index] += sum(byte & 0xC0 != 0x80 for byte in word)
        return result


class ResponseBuilder:
    """Builds the response to one request: use either `full` or `events`, once."""

    def __init__(
        self,
        service: Service,
        response_format: ResponseFormat,
        params: CompletionParams,
        prompt: Prompt,
        deadline: float,
    ) -> None:
        self.format, self.params, self.prompt = response_format, params, prompt
        self.requests = service.make_requests(prompt, params)
        self.n_prompt, self.n_tokens = sum(map(len, prompt.ids)), 0
        self._generated = service.generate(self.requests, prompt.stop, deadline)
        self.head: JSON = {
            "id": response_format.id_prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.name,  # the same seed gives the same answer while this is the same
        }
        self.dropped: JSON = {}
        if prompt.dropped_messages is not None:
            self.dropped = {"dropped_messages": prompt.dropped_messages}

    @property
    def usage(self) -> dict[str, int]:
        total = self.n_prompt + self.n_tokens
        return {"prompt_tokens": self.n_prompt, "completion_tokens": self.n_tokens, "total_tokens": total}

    async def full(self) -> JSON:
        """The whole response. Raises ApiError."""
        texts: dict[int, list[str]] = collections.defaultdict(list)
        logprobs: dict[int, JSON] = {}
        finish_reasons: dict[int, str | None] = {}
        async for delta, tokens_logprobs in self._deltas():
            index = delta.choice.index
            texts[index].append(delta.text)
            finish_reasons[index] = delta.choice.finish_reason
            if (new := self._logprobs(index, *tokens_logprobs)) is not None:
                lists = logprobs.setdefault(index, {name: [] for name in new})
                for name, values in new.items():
                    lists[name] += values
        choices = [
            {
                "index": index,
                **self.format.content("".join(texts[index])),
                "logprobs": logprobs.get(index),
                "finish_reason": finish_reasons[index],
            }
            for index in sorted(texts)
        ]
        return {
            **self.head,
            "object": self.format.object_name,
            "choices": choices,
            "usage": self.usage,
            "warnings": self.prompt.warnings,
            **self.dropped,
        }

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events. Waits for the first one, so that an ApiError before it still has its status."""
        chunks = self._chunks()
        first = await anext(chunks)

        async def events() -> AsyncIterator[str]:
            try:
                yield to_event(first)
                async for chunk in chunks:
                    yield to_event(chunk)
            except ApiError as error:
                yield to_event(error.body)
            yield "data: [DONE]\n\n"

        return events()

    async def _deltas(self) -> AsyncIterator[tuple[Delta, tuple[list[int], list[Logprob | None]]]]:
        """Yield each delta, and the tokens to report logprobs for; with `echo`, both include the prompt.

        A stop token then has logprobs, too: lm-evaluation-harness scores a text by asking for one token more,
        and expects to find it.
        """
        echo, has_logprobs = self.params.echo, self.params.n_logprobs is not None
        async for delta in self._generated:
            self.n_tokens += len(delta.tokens)
            request = self.requests[delta.choice.index]
            tokens: list[int] = delta.tokens
            logprobs: list[Logprob | None] = [*delta.logprobs]
            if echo and delta.is_first:
                index = delta.choice.index // (self.params.n or 1)
                delta.text = self.prompt.texts[index] + delta.text
                if has_logprobs:
                    tokens = self.prompt.ids[index] + tokens
                    logprobs = [None, *request.prompt_logprobs, *logprobs]
            if echo and delta.choice.has_stop_token and request.ending:
                tokens, logprobs = [*tokens, request.ending[0]], [*logprobs, request.ending[1]]
            yield delta, (tokens, logprobs)

    def _logprobs(self, index: int, tokens: list[int], logprobs: list[Logprob | None]) -> JSON | None:
        if self.params.n_logprobs is None:
            return None
        return self.format.logprobs(index, tokens, logprobs)

    async def _chunks(self) -> AsyncGenerator[JSON, None]:
        with_usage = self.params.stream_options and self.params.stream_options.include_usage
        head = {**self.head, "object": self.format.chunk_name, **self.dropped}
        if with_usage:
            head["usage"] = None
        warnings = {"warnings": self.prompt.warnings}  # sent with the first chunk only
        # By choice, the tokens whose text has not been sent yet: their logprobs go with it.
        unsent: dict[int, tuple[list[int], list[Logprob | None]]] = {}

        def chunk(index: int, content: JSON, finish_reason: str | None = None) -> JSON:
            tokens, values = unsent.pop(index, ([], []))
            choice = {
                "index": index,
                **content,
                "logprobs": self._logprobs(index, tokens, values) if tokens else None,
                "finish_reason": finish_reason,
            }
            data = {**head, **warnings, "choices": [choice]}
            warnings.clear()
            return data

        async for delta, (tokens, logprobs) in self._deltas():
            index, finish_reason = delta.choice.index, delta.choice.finish_reason
            if self.format.first_chunk and delta.is_first:
                yield chunk(index, self.format.first_chunk)
            ids, values = unsent.setdefault(index, ([], []))
            ids.extend(tokens)
            values.extend(logprobs)
            if delta.text:
                yield chunk(index, self.format.chunk(delta.text))
            if finish_reason:
                yield chunk(index, self.format.last_chunk, finish_reason)
        if with_usage:
            yield {**head, "choices": [], "usage": self.usage}


def to_event(data: JSON) -> str:
    """A server-sent event: https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
