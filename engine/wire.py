"""What goes over the wire: the requests and replies of OpenAI's API, as far as a small model can serve it.

https://platform.openai.com/docs/api-reference/chat and /completions. A field that asks for something no
answer could show (`user`, `store`, `metadata`, ...) is ignored, as clients send many; one whose neglect would
make the answer wrong (`tools`, `logit_bias`, ...) is refused with a sentence of `REFUSED`. Beyond OpenAI's:
`top_k`, `min_p` and `repetition_penalty` by the names that vLLM gave them, and for chat the `truncation` of
OpenAI's newer Responses API.
"""

import json
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from engine.decoding import word_of

REFUSED = {
    "tools": "this model cannot call tools",
    "functions": "this model cannot call functions",
    "response_format": 'only {"type": "text"} is offered: this model cannot be held to a format',
    "logit_bias": "logit_bias is not offered",
    "presence_penalty": "presence_penalty is not offered; use repetition_penalty (1: off, 1.2: some)",
    "frequency_penalty": "frequency_penalty is not offered; use repetition_penalty (1: off, 1.2: some)",
    "echo": "the prompt is not repeated, nor are its logprobs computed",
    "suffix": "this model only writes on at the end: there is no suffix",
    "best_of": "best_of is not offered; ask for n answers and choose",
    "modalities": "this model reads and writes text only",
    "audio": "this model reads and writes text only",
}


def is_false(value):
    if value:
        raise ValueError("Input should be false")
    return value


# (Literal[False] would take 0.0 for it.)
No = Annotated[bool, AfterValidator(is_false), WithJsonSchema({"type": "boolean", "const": False})]
Off = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[list[Any], Field(max_length=0)]
Empty = Annotated[dict[str, Any], Field(max_length=0)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
SEED = 2**63


def error_body(message, kind, code=None, param=None):
    """An error as OpenAI's API tells it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ApiError(Exception):
    """What a client did wrong, or what we cannot do for it."""

    def __init__(self, status, message, code=None, param=None):
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self):
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return error_body(self.message, kind, self.code, self.param)


# ---- requests


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextOnly(Strict):
    type: Literal["text"]


class StreamOptions(Strict):
    include_usage: bool | None = None


class Asked(Strict):
    """What both kinds of request have in common; null means the same as leaving a field out."""

    model: str | None = Field(None, description="the name from /v1/models, or nano, or nothing")
    n: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="answers; the i-th is drawn with seed + i; at most as many as there are slots"
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="bounded by the context")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy (1.0)")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="-1 and 0: off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(None, description="1: off")
    seed: Annotated[int, Field(ge=-SEED, lt=SEED)] | None = Field(None, description="the same answer again")
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Empty | None = None
    presence_penalty: Off | None = None
    frequency_penalty: Off | None = None

    @property
    def stops(self):
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def sampling(self):
        """The options of `model.candidates`."""
        options = self.model_dump(include={"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
        options["top_k"] = max(0, options["top_k"] or 0)
        return {name: value for name, value in options.items() if value is not None}


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None

    def plain(self):
        """The message as `render_chat` takes it."""
        content = self.content or ""
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Asked):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="= max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: the oldest turns go if they do not fit; else that is an error"
    )
    response_format: TextOnly | None = None
    tools: Nothing | None = None
    functions: Nothing | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: Empty | None = None


TokenIds = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(Asked):
    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: No | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def prompts(self):
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt


def explain(errors):
    """pydantic's findings as one error of the API: about the first field that is wrong."""
    where = [str(part) for part in errors[0]["loc"][1:]]
    field = where[0] if where else None
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {errors[0]['ctx']['error']}", "invalid_json")
    if field is None:
        return ApiError(400, "the body must be a JSON object, sent as application/json", "invalid_json")
    if field in REFUSED:
        return ApiError(400, REFUSED[field], "unsupported", field)
    found = [error["msg"] for error in errors if error["loc"][1:2] == errors[0]["loc"][1:2]]
    place = ".".join(part for part in where if part.isidentifier() or part.isdigit())
    return ApiError(400, f"{place}: {'; or: '.join(dict.fromkeys(found))}", "invalid_value", field)


# ---- replies: their description, for /openapi.json

FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Reply(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatReply(Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    dropped_messages: int = Field(description="so many of the oldest did not fit (truncation: auto)")


class CompletionReply(Reply):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class Model(BaseModel):
    """OpenAI's four fields, and what the chat page shows."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: str
    step: int
    validation_loss: float | None
    architecture: str
    parameters: int
    context: int
    vocabulary: int
    device: str
    slots: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """status: "failed" as long as the last step did; running and waiting: requests."""

    status: Literal["ok", "failed"]
    running: int
    waiting: int
    slots: int
    tokens: int
    failures: int
    error: str | None


# ---- replies: how they are written


class Form:
    """How a reply is written down. logprobs are told for every token that `usage` counts."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


class ChatForm(Form):
    prefix, name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    first = {"delta": {"role": "assistant", "content": ""}}
    last = {"delta": {}}

    def whole(self, text):
        return {"message": {"role": "assistant", "content": text}}

    def piece(self, text):
        return {"delta": {"content": text}}

    def logprobs(self, choice, tokens, logprobs):
        told = [
            self.told(token, logprob) | {"top_logprobs": [self.told(*pair) for pair in likeliest]}
            for token, (logprob, likeliest) in zip(tokens, logprobs, strict=True)
        ]
        return {"content": told}

    def told(self, token, logprob):
        data = word_of(self.tokenizer, token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}


class TextForm(Form):
    prefix, name, chunk_name = "cmpl-", "text_completion", "text_completion"
    first, last = None, {"text": ""}

    def whole(self, text):
        return {"text": text}

    piece = whole

    def logprobs(self, choice, tokens, logprobs):
        names = [self.name_of(token) for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(choice.n_characters)
            # Each character has one byte that is none of UTF-8's continuation bytes.
            choice.n_characters += sum(byte & 0xC0 != 0x80 for byte in word_of(self.tokenizer, token))
        return {
            "tokens": names,
            "token_logprobs": [max(logprob, -9999.0) for logprob, _ in logprobs],
            "top_logprobs": [
                {self.name_of(one): max(value, -9999.0) for one, value in [(token, logprob), *likeliest]}
                for token, (logprob, likeliest) in zip(tokens, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }

    def name_of(self, token):
        data = word_of(self.tokenizer, token)
        try:
            return data.decode()
        except UnicodeDecodeError:  # a part of a character
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Reply:
    """The reply to one request, whole or as a stream of events."""

    def __init__(self, service, form, asked, prompts, requests, **extra):
        self.form, self.asked, self.requests, self.extra = form, asked, requests, extra
        self.n_prompt, self.n_tokens = sum(map(len, prompts)), 0
        self.answers = service.follow(requests, asked.stops)
        self.head = {
            "id": form.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.name,  # what has to be the same for the same seed's answer
        }

    @property
    def usage(self):
        total = self.n_prompt + self.n_tokens
        return {"prompt_tokens": self.n_prompt, "completion_tokens": self.n_tokens, "total_tokens": total}

    def logprobs(self, choice, tokens, logprobs):
        if self.requests[0].n_logprobs is None:
            return None
        return self.form.logprobs(choice, tokens, logprobs)

    async def whole(self):
        texts, drawn, finished = {}, {}, {}
        async for choice, text, tokens, logprobs in self.answers:
            texts[choice.index] = texts.get(choice.index, "") + text
            ids, values = drawn.setdefault(choice.index, ([], []))
            ids.extend(tokens)
            values.extend(logprobs)
            self.n_tokens += len(tokens)
            finished[choice.index] = choice
        choices = [
            {
                "index": index,
                **self.form.whole(texts[index]),
                "logprobs": self.logprobs(choice, *drawn[index]),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in sorted(finished.items())
        ]
        return {**self.head, "object": self.form.name, "choices": choices, "usage": self.usage, **self.extra}

    async def events(self):
        """Server-sent events. The first one is there before the reply begins: errors still have a status."""
        chunks = self.chunks()
        first = await anext(chunks)

        async def events():
            try:
                yield event(first)
                async for chunk in chunks:
                    yield event(chunk)
            except ApiError as error:
                yield event(error.body)
            yield "data: [DONE]\n\n"

        return events()

    async def chunks(self):
        with_usage = self.asked.stream_options and self.asked.stream_options.include_usage
        head = {**self.head, "object": self.form.chunk_name, **self.extra}
        if with_usage:
            head["usage"] = None
        waiting = {}  # tokens whose text is not certain yet, by choice, for their logprobs

        def chunk(choice, content, finish_reason=None):
            logprobs = None
            if (drawn := waiting.pop(choice, None)) and drawn[0]:
                logprobs = self.logprobs(choice, *drawn)
            part = {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
            return {**head, "choices": [part]}

        async for choice, text, tokens, logprobs in self.answers:
            if self.form.first and not choice.has_begun:
                yield chunk(choice, self.form.first)
            choice.has_begun = True
            self.n_tokens += len(tokens)
            ids, values = waiting.setdefault(choice, ([], []))
            ids.extend(tokens)
            values.extend(logprobs)
            if text:
                yield chunk(choice, self.form.piece(text))
            if choice.finish_reason:
                yield chunk(choice, self.form.last, choice.finish_reason)
        if with_usage:
            yield {**head, "choices": [], "usage": self.usage}


def event(data):
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
