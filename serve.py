"""Serve a model to a browser and to programs that speak OpenAI's API.

    python serve.py                                     the newest fine-tuned model, at http://127.0.0.1:8000
    python serve.py -m checkpoint/x.pt --port 9000
    NANO_API_KEY=secret python serve.py --host 0.0.0.0  for the whole network, to those who have the key

A page to chat on is at /, the API at /v1/models, /v1/chat/completions and /v1/completions, the server's
state at /health. doc/serving.md is the guide.

The way of a request: a `Gate` (engine/gate.py) checks who sends it and how much; pydantic checks its fields
(engine/wire.py); a `Service` makes a prompt of it, an `Engine` draws its tokens, beside those of others, and
a `Choice` makes text of them (engine/serving.py); a `Reply` writes it as OpenAI's clients expect it
(engine/wire.py), whole or piece by piece.
"""

import argparse
import ipaddress
import os
import re
import secrets
import socket

from engine.errors import UserError, describe_os_error, is_out_of_memory, run

# ---- the command line ------------------------------------------------------------------------------


def parse_arguments():
    description, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=examples.partition("\n\nThe way")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-m", "--model", metavar="FILE", default="newest",
        help="checkpoint, or newest (of SFT, if there is one), or best: that of the newest run with the "
        "lowest validation loss (newest)")  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen at; all but this machine's own need a key")
    add("--port", type=int, default=8000, help="0: any that is free (8000)")
    add("--api_key", metavar="KEY", default=os.environ.get("NANO_API_KEY") or None,
        help="what clients must send (NANO_API_KEY; for a network else a random one)")  # fmt: skip
    add("--slots", type=int, default=8, metavar="N", help="answers written at the same time (8)")
    add("--max_queue", type=int, default=64, metavar="N", help="answers that may wait for a slot (64)")
    add("--timeout", type=int, default=300, metavar="SECONDS", help="the longest a request may take (300)")
    add("-q", "--quantize", choices=("int8",), help="weights in 8 bits: less memory, and faster on a CPU")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N (auto)")
    args = parser.parse_args()
    for name, is_valid, needs in (
        ("port", lambda n: 0 <= n < 65536, "between 0 and 65535"),
        ("slots", lambda n: 1 <= n <= 1024, "between 1 and 1024"),
        ("max_queue", lambda n: n >= 0, "0 or more"),
        ("timeout", lambda n: n >= 1, "1 or more"),
        ("device", lambda d: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", d), "auto, cpu, mps, cuda or cuda:N"),
        ("api_key", lambda key: key is None or re.fullmatch("[!-~]+", key), "ASCII without spaces"),
    ):
        if not is_valid(getattr(args, name)):
            raise UserError(f"--{name} must be {needs}, not {getattr(args, name)!r}")
    return args


def bind(host, port):
    """A listening socket: taken before the model is read, so that a port in use is told at once."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: there is no such address") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    if os.name == "posix":  # elsewhere it would let two servers share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        why = describe_os_error(error)
        raise UserError(f"cannot listen at port {port} of {host}: {why}; --port chooses another") from None
    return listener


# ---- the application -----------------------------------------------------------------------------------


def make_app(service, api_key=None):
    """The routes, as an ASGI application behind its gate."""
    import asyncio

    from fastapi import FastAPI, Security
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from fastapi.security import HTTPBearer
    from starlette.exceptions import HTTPException

    from engine import wire
    from engine.gate import Gate
    from engine.wire import ApiError

    app = FastAPI(
        title="Nano",
        description="A small language model, by OpenAI's API.",
        docs_url=None,  # the usual pages load scripts from elsewhere
        redoc_url=None,
        responses={"default": {"model": wire.ErrorReply, "description": "what went wrong"}},
    )
    # The gate checks the key; this tells of it in /openapi.json.
    for_members = {"dependencies": [Security(HTTPBearer(auto_error=False))]} if api_key else {}
    an_event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    may_stream = {"responses": {200: {"content": {"text/event-stream": {"itemSchema": an_event}}}}}
    page, page_headers = read_page()

    @app.exception_handler(ApiError)
    async def on_error(request, error):
        return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 429 else None)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request, error):
        return await on_error(request, wire.explain(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(request, error):
        reply = await on_error(request, ApiError(error.status_code, str(error.detail)))
        reply.headers.update(error.headers or {})
        return reply

    @app.exception_handler(Exception)
    async def on_bug(request, error):
        return await on_error(request, ApiError(500, "a bug in the server; its output tells more", "bug"))

    @app.get("/", include_in_schema=False)
    async def chat_page():
        return Response(page, media_type="text/html; charset=utf-8", headers=page_headers)

    @app.get("/health", response_model=wire.Health, responses={503: {"model": wire.Health}})
    async def health():
        engine = service.engine
        has_failed = bool(engine.error or engine.is_stopped)
        state = {
            "status": "failed" if has_failed else "ok",
            "running": min(engine.n_open, engine.n_slots),
            "waiting": max(0, engine.n_open - engine.n_slots),
            "slots": engine.n_slots,
            "tokens": engine.n_tokens,
            "failures": engine.n_failures,
            "error": engine.error,
        }
        return JSONResponse(state, 503 if has_failed else 200)

    @app.get("/v1/models", response_model=wire.ModelList, **for_members)
    async def models():
        return JSONResponse({"object": "list", "data": [service.facts]})

    @app.get("/v1/models/{name}", response_model=wire.Model, **for_members)
    async def model(name: str):
        service.check_model(name)
        return JSONResponse(service.facts)

    async def respond(reply):
        if not reply.asked.stream:
            return JSONResponse(await reply.whole())
        # The last header tells nginx not to collect events before it passes them on.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(await reply.events(), media_type="text/event-stream", headers=headers)

    @app.post("/v1/chat/completions", response_model=wire.ChatReply, **may_stream, **for_members)
    async def chat(asked: wire.ChatRequest):
        service.check_model(asked.model)
        service.check_count(asked.n or 1)
        # In another thread: of a long text even the tokens take a while to count.
        ids, n_dropped = await asyncio.to_thread(service.chat_prompt, asked)
        n_logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        max_tokens = asked.max_completion_tokens or asked.max_tokens
        requests = service.requests([ids], asked, max_tokens, n_logprobs)
        form = wire.ChatForm(service.tokenizer)
        return await respond(wire.Reply(service, form, asked, [ids], requests, dropped_messages=n_dropped))

    @app.post("/v1/completions", response_model=wire.CompletionReply, **may_stream, **for_members)
    async def completions(asked: wire.CompletionRequest):
        service.check_model(asked.model)
        service.check_count((asked.n or 1) * len(asked.prompts))
        prompts = [await asyncio.to_thread(service.completion_prompt, prompt) for prompt in asked.prompts]
        max_tokens = asked.max_tokens or 16  # OpenAI's default
        requests = service.requests(prompts, asked, max_tokens, asked.logprobs)
        return await respond(wire.Reply(service, wire.TextForm(service.tokenizer), asked, prompts, requests))

    return Gate(app, api_key)


def read_page():
    """(the chat page, the headers that keep it from running or loading anything but what is in it)"""
    import base64
    import hashlib

    from engine.config import ROOT

    page = (ROOT / "web" / "chat.html").read_text("utf-8")

    def sources(tag):
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


# ---- the server ----------------------------------------------------------------------------------------


def make_server(app, timeout):
    """Uvicorn, which ends with exit code 0 on SIGTERM or Ctrl-C, when the answers under way are done."""
    import uvicorn

    from engine.gate import Connection

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):
            self.force_exit = self.should_exit  # the second time: at once
            self.should_exit = True

    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=512,  # connections
        timeout_keep_alive=15,
        timeout_graceful_shutdown=timeout,
    )
    return Server(config)


def load_service(args):
    """(the Service, the model in two lines)"""
    from engine.config import find
    from engine.hardware import attention_context
    from engine.serving import Engine, Service
    from inference import Speaker, facts, load_model

    checkpoint, name, model, tokenizer, choice = load_model(args.model, True, args.device, args.quantize)
    speaker = Speaker(model, tokenizer)
    try:
        engine = Engine(model, args.slots, args.max_queue, args.timeout, attention_context(choice))
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise UserError(f"memory does not suffice for {args.slots} slots; lower --slots") from None
        raise
    service = Service(checkpoint, find(name), speaker, engine, choice.device)
    return service, facts(checkpoint, name, speaker, choice.device, args.model)


def main():
    args = parse_arguments()
    from inference import check_model_file

    check_model_file(args.model)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is missing: python -m pip install fastapi uvicorn") from None
    listener = bind(args.host, args.port)
    address, port = listener.getsockname()[:2]
    if not args.api_key and not ipaddress.ip_address(address).is_loopback:
        args.api_key = secrets.token_urlsafe(24)
        print(f"key: {args.api_key}   (a new one each time, unless NANO_API_KEY or --api_key is set)")
    service, about = load_service(args)
    server = make_server(make_app(service, args.api_key), args.timeout)
    service.engine.start()
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{port}"
    print(about, f"chat: {url}/", f"API:  {url}/v1", sep="\n", flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        service.engine.stop()


if __name__ == "__main__":
    run(main)
