"""The HTTP routes: OpenAI's API under /v1, the chat page, /health and /metrics, as one ASGI application.

A request passes `AccessMiddleware` (middleware.py), is parsed and checked (openai_api.py), becomes a `Prompt`
(service.py), gets its tokens from the `InferenceEngine` (scheduler.py), and `ResponseBuilder`
(responses.py) writes the response, whole or as a stream.
"""

import base64
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from common.config import ROOT
from server import openai_api
from server.middleware import AccessMiddleware, error_response
from server.openai_api import (
    ApiError,
    ChatCompletionRequest,
    CompletionParams,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from server.responses import ChatFormat, CompletionFormat, ResponseBuilder, ResponseFormat
from server.service import Prompt, Service

# When a request must be finished (time.monotonic()). `Depends` hides it from FastAPI's query parameters.
Deadline = Annotated[float, Depends(lambda: None)]

EVENT_SCHEMA = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
MAY_STREAM: dict[str, Any] = {
    "responses": {200: {"content": {"text/event-stream": {"itemSchema": EVENT_SCHEMA}}}}
}
PLAIN_TEXT: dict[str, Any] = {"responses": {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}}


def make_app(service: Service, api_key: str | None = None, cors: Sequence[str] = ()) -> ASGIApp:
    """The application behind its middleware. cors: origins whose pages may use it."""

    class ParsedRoute(APIRoute):
        """A route with a body, the parameter `params`: FastAPI describes it, but a reader thread parses it.

        FastAPI would parse it on the event loop, look for every error in it, and keep the body in each error.
        """

        def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
            schema = self.endpoint.__annotations__.get("params")
            if schema is None:
                return super().get_route_handler()

            async def handle(request: Request) -> Response:
                deadline = time.monotonic() + service.engine.timeout
                content_type, body = request.headers.get("content-type", ""), await request.body()
                params = await service.read(deadline, openai_api.parse_request, schema, content_type, body)
                return await self.endpoint(params, deadline)

            return handle

    app = FastAPI(
        title="Nano",
        description="A small language model behind OpenAI's API.",
        docs_url=None,  # the usual pages load scripts from elsewhere
        redoc_url=None,
        responses={"default": {"model": openai_api.ErrorResponse, "description": "what went wrong"}},
    )
    app.router.route_class = ParsedRoute
    # The middleware checks the key; this only says so in /openapi.json.
    protected: dict[str, Any] = {"dependencies": [Security(HTTPBearer(auto_error=False))]} if api_key else {}
    page, page_headers = read_page()

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return error_response(ApiError(error.status_code, str(error.detail), headers=headers))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "a bug in the server; its output says more", "bug"))

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=page_headers)

    @app.get("/health", response_model=openai_api.Health, responses={503: {"model": openai_api.Health}})
    async def health() -> Response:
        engine = service.engine
        has_failed = bool(engine.error or engine.is_stopped)
        state = {
            "status": "failed" if has_failed else "ok",
            "running": engine.n_running,
            "waiting": engine.n_waiting,
            "slots": engine.n_slots,
            "tokens": engine.n_tokens,
            "failures": engine.n_failures,
            "error": engine.error,
        }
        return JSONResponse(state, 503 if has_failed else 200)

    @app.get("/metrics", response_class=Response, **PLAIN_TEXT, **protected)
    async def metrics() -> Response:
        return Response(service.metrics.text, media_type=service.metrics.media_type)

    @app.get("/v1/models", response_model=openai_api.ModelList, **protected)
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [service.model_card]})

    @app.get("/v1/models/{name}", response_model=openai_api.ModelCard, **protected)
    async def retrieve_model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(service.model_card)

    async def respond(
        params: CompletionParams, response_format: ResponseFormat, prompt: Prompt, deadline: float
    ) -> Response:
        builder = ResponseBuilder(service, response_format, params, prompt, deadline)
        if not params.stream:
            return JSONResponse(await builder.full())
        # The last header keeps nginx from collecting events before it passes them on.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(await builder.events(), media_type="text/event-stream", headers=headers)

    @app.post(
        "/v1/chat/completions", response_model=openai_api.ChatCompletionResponse, **MAY_STREAM, **protected
    )
    async def create_chat_completion(params: ChatCompletionRequest, deadline: Deadline) -> Response:
        prompt = await service.read(deadline, service.chat_prompt, params)
        return await respond(params, ChatFormat(service.tokenizer), prompt, deadline)

    @app.post("/v1/completions", response_model=openai_api.CompletionResponse, **MAY_STREAM, **protected)
    async def create_completion(params: CompletionRequest, deadline: Deadline) -> Response:
        prompt = await service.read(deadline, service.completion_prompt, params)
        return await respond(params, CompletionFormat(service.tokenizer), prompt, deadline)

    @app.post("/tokenize", response_model=openai_api.TokenizeResponse, **protected)
    async def tokenize(params: TokenizeRequest, deadline: Deadline) -> Response:
        return JSONResponse(await service.tokenize(params, deadline))

    @app.post("/detokenize", response_model=openai_api.DetokenizeResponse, **protected)
    async def detokenize(params: DetokenizeRequest, deadline: Deadline) -> Response:
        service.check_model(params.model)
        return JSONResponse({"prompt": await service.read(deadline, service.decode, params.tokens)})

    guarded = AccessMiddleware(app, api_key, cors, service.metrics.count_request)
    if not cors:
        return guarded
    # Any header may be sent: OpenAI's client has a dozen of its own. There are no cookies.
    return CORSMiddleware(
        guarded,
        allow_origins=cors,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
        allow_private_network=True,
    )


def read_page() -> tuple[bytes, dict[str, str]]:
    """The chat page, and headers that let it run and load nothing but its own scripts and styles."""
    page = (ROOT / "web" / "chat.html").read_text("utf-8")

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
