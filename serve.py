"""Serve a model to a browser and to programs that speak OpenAI's API.

    python serve.py                                     the newest fine-tuned model, at http://127.0.0.1:8000
    python serve.py -m checkpoint/x.pt --port 9000
    NANO_API_KEY=secret python serve.py --host 0.0.0.0  for the whole network, to those who have the key

A page to chat on is at /, the API at /v1/models, /v1/chat/completions and /v1/completions, the server's
state at /health and /metrics. doc/serving.md is the guide.

The way of a request: a `Gate` (server/middleware.py) checks who sends it and how much; pydantic checks its
fields (server/openai_api.py), and a `Service` makes a prompt of it, both in a thread that is there to read;
an `Engine` draws its tokens, beside those of others, and a `Choice` makes text of them (server/service.py);
a `Reply` writes it as OpenAI's clients expect it (server/openai_api.py), whole or piece by piece.
"""

import argparse
import errno
import gc
import ipaddress
import os
import re
import secrets
import socket

from common.errors import UserError, describe_os_error, is_out_of_memory, run
from common.packages import require

USUAL = {"http": ":80", "https": ":443"}  # ports
SPARE = 32  # files that may be opened beside connections

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
        help="checkpoint, or newest (of SFT, if there is one), or best: the one of the newest run that has "
        "the lowest validation loss (newest)")  # fmt: skip
    add("--host", default="127.0.0.1",
        help="address to listen at (127.0.0.1); one that other machines can reach needs a key")  # fmt: skip
    add("--port", type=int, default=8000, help="0: any that is free (8000)")
    add("--api_key", metavar="KEY", default=os.environ.get("NANO_API_KEY") or None,
        help="key that clients must send (NANO_API_KEY, or on a network a random one)")  # fmt: skip
    add("--cors", nargs="+", default=[], metavar="ORIGIN",
        help="where pages come from that may use it, too, such as https://example.org")  # fmt: skip
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
    args.cors = [origin_of(text) for text in args.cors]
    return args


def origin_of(text):
    """An origin as browsers send it: in lower case, and without the port that its scheme stands for."""
    match = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^/\s?#@*:]+|\[[0-9a-f:]+\])(:\d+)?", text.lower())
    if not match:
        raise UserError(f"--cors takes origins such as https://example.org, not {text!r}")
    scheme, host, port = match.groups()
    return f"{scheme}://{host}{'' if port in (None, USUAL.get(scheme)) else port}"


# ---- connections ---------------------------------------------------------------------------------------


class Listener(socket.socket):
    """Accepts so many connections that the files a process may have open are never all in use.

    When `limit` are open, the one that has waited longest for its client makes room for the next: silent ones
    keep nobody out. If none waits, as all are being answered, it is the new one that is closed.
    """

    limit, connections = None, ()  # connections: uvicorn's set of them

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accepted, self.is_resting = set(), False

    def accept(self):
        # asyncio accepts until there is nothing left; closing takes it another round.
        if self.is_resting:
            self.is_resting = False
            raise BlockingIOError
        try:
            connection, address = super().accept()
        except OSError as error:
            # asyncio tries again in a second, but before that as often as its queue is long, and logs it all.
            self.is_resting = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
            raise
        if self.limit and len(self.accepted) >= self.limit:
            self.accepted = {one for one in self.accepted if one.fileno() >= 0}
        if self.limit and len(self.accepted) >= self.limit:
            self.is_resting = True
            waiting = [one for one in self.connections if one.awaits_client and not one.is_cut_off]
            if not waiting:
                connection.close()
                raise ConnectionAbortedError
            min(waiting, key=lambda one: one.since).cut_off()
        self.accepted.add(connection)
        return connection, address


def most_connections(wanted):
    """So many, or fewer where the files that this process may open do not suffice (`ulimit -n`)."""
    try:
        import resource

        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/dev/fd"))
    except (ImportError, OSError):  # no POSIX
        return wanted
    return wanted if files == resource.RLIM_INFINITY else min(wanted, files - used - SPARE)


def bind(host, port):
    """A Listener: taken before the model is read, so that a port in use is told at once."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: there is no such address") from None
    listener = Listener(family, socket.SOCK_STREAM)
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


def make_app(service, api_key=None, cors=()):
    """The routes, as an ASGI application behind its gate. cors: origins whose pages may use it."""
    import time
    from typing import Annotated

    from fastapi import Depends, FastAPI, Security
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from fastapi.routing import APIRoute
    from fastapi.security import HTTPBearer
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    from server import openai_api
    from server.middleware import Gate
    from server.openai_api import ApiError

    # Until when a request must be answered; a dependency only that FastAPI does not take it for a parameter.
    Deadline = Annotated[float, Depends(lambda: None)]

    class Route(APIRoute):
        """A route whose body, the argument `asked`, is described by FastAPI, but read by the service.

        FastAPI would do it on the event loop, look for every error there is, and keep the body in each.
        """

        def get_route_handler(self):
            form = self.endpoint.__annotations__.get("asked")
            if form is None:
                return super().get_route_handler()

            async def handle(request):
                deadline = time.monotonic() + service.engine.seconds
                kind, body = request.headers.get("content-type", ""), await request.body()
                asked = await service.read(deadline, openai_api.read, form, kind, body)
                return await self.endpoint(asked, deadline)

            return handle

    app = FastAPI(
        title="Nano",
        description="A small language model, by OpenAI's API.",
        docs_url=None,  # the usual pages load scripts from elsewhere
        redoc_url=None,
        responses={"default": {"model": openai_api.ErrorReply, "description": "what went wrong"}},
    )
    app.router.route_class = Route
    # The gate checks the key; this tells of it in /openapi.json.
    for_members = {"dependencies": [Security(HTTPBearer(auto_error=False))]} if api_key else {}
    an_event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    may_stream = {"responses": {200: {"content": {"text/event-stream": {"itemSchema": an_event}}}}}
    page, page_headers = read_page()

    @app.exception_handler(ApiError)
    async def on_error(request, error):
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def on_http_error(request, error):
        return await on_error(request, ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def on_bug(request, error):
        return await on_error(request, ApiError(500, "a bug in the server; its output tells more", "bug"))

    @app.get("/", include_in_schema=False)
    async def chat_page():
        return Response(page, media_type="text/html; charset=utf-8", headers=page_headers)

    @app.get("/health", response_model=openai_api.Health, responses={503: {"model": openai_api.Health}})
    async def health():
        engine = service.engine
        has_failed = bool(engine.error or engine.is_stopped)
        state = {
            "status": "failed" if has_failed else "ok",
            "running": engine.n_running,
            "waiting": engine.n_open - engine.n_running,
            "slots": engine.n_slots,
            "tokens": engine.n_tokens,
            "failures": engine.n_failures,
            "error": engine.error,
        }
        return JSONResponse(state, 503 if has_failed else 200)

    metrics_text = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, responses=metrics_text, **for_members)
    async def metrics():
        return Response(service.metrics.text, media_type=service.metrics.media_type)

    @app.get("/v1/models", response_model=openai_api.ModelList, **for_members)
    async def models():
        return JSONResponse({"object": "list", "data": [service.facts]})

    @app.get("/v1/models/{name}", response_model=openai_api.Model, **for_members)
    async def model(name: str):
        service.check_model(name)
        return JSONResponse(service.facts)

    async def answer(asked, form, read, deadline):
        prompt = await service.read(deadline, read, asked)
        reply = openai_api.Reply(service, form(service.tokenizer), asked, prompt, deadline)
        if not asked.stream:
            return JSONResponse(await reply.whole())
        # The last header tells nginx not to collect events before it passes them on.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(await reply.events(), media_type="text/event-stream", headers=headers)

    @app.post("/v1/chat/completions", response_model=openai_api.ChatReply, **may_stream, **for_members)
    async def chat(asked: openai_api.ChatRequest, deadline: Deadline):
        return await answer(asked, openai_api.ChatForm, service.conversation, deadline)

    @app.post("/v1/completions", response_model=openai_api.CompletionReply, **may_stream, **for_members)
    async def completions(asked: openai_api.CompletionRequest, deadline: Deadline):
        return await answer(asked, openai_api.TextForm, service.continuation, deadline)

    @app.post("/tokenize", response_model=openai_api.TokenizeReply, **for_members)
    async def tokenize(asked: openai_api.TokenizeRequest, deadline: Deadline):
        return JSONResponse(await service.tokens_of(asked, deadline))

    @app.post("/detokenize", response_model=openai_api.DetokenizeReply, **for_members)
    async def detokenize(asked: openai_api.DetokenizeRequest, deadline: Deadline):
        service.check_model(asked.model)
        return JSONResponse({"prompt": await service.read(deadline, service.to_text, asked.tokens)})

    gate = Gate(app, api_key, cors, service.metrics.count)
    if not cors:
        return gate
    # Any header may be sent: OpenAI's client has a dozen of its own. There are no cookies.
    return CORSMiddleware(
        gate, allow_origins=cors, allow_methods=["GET", "HEAD", "POST"], allow_headers=["*"],
        expose_headers=["Retry-After"], allow_private_network=True,
    )  # fmt: skip


def read_page():
    """(the chat page, the headers that keep it from running or loading anything but what is in it)"""
    import base64
    import hashlib

    from common.config import ROOT

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


def make_server(app, listener, args):
    """Uvicorn, which ends with exit code 0 on SIGTERM or Ctrl-C, when the answers under way are done."""
    import asyncio
    import logging

    import uvicorn

    from common.hardware import return_freed_memory
    from server.middleware import Connection, Sparing

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):
            self.force_exit = self.should_exit  # the second time: at once
            self.should_exit = True

        async def on_tick(self, counter):
            if counter % 100 == 99:  # every ten seconds
                asyncio.get_running_loop().run_in_executor(None, return_freed_memory)
            return await super().on_tick(counter)

    config = uvicorn.Config(
        app,
        http=Connection,
        loop="asyncio",  # for the listener
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=args.timeout,
    )
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).filters = [Sparing()]
    server, n_answers = Server(config), args.slots + args.max_queue
    listener.connections = server.server_state.connections
    listener.limit = most_connections(n_answers + 256)
    if listener.limit < 8:
        raise UserError("this process may open too few files for connections; raise the limit, ulimit -n")
    if listener.limit < n_answers:
        print(f"Only {listener.limit} connections fit in the limit of open files; `ulimit -n` raises it.")
    return server


def load_service(args):
    """(the Service, the model in two lines)"""
    from common.config import find
    from common.hardware import attention_context
    from inference import TextGenerator, facts, load_model
    from server.service import Engine, Service

    checkpoint, name, model, tokenizer, compute = load_model(args.model, True, args.device, args.quantize)
    text_generator = TextGenerator(model, tokenizer)
    try:
        engine = Engine(model, args.slots, args.max_queue, args.timeout, attention_context(compute))
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise UserError(f"memory does not suffice for {args.slots} slots; lower --slots") from None
        raise
    service = Service(checkpoint, find(name), text_generator, engine, compute.device)
    return service, facts(checkpoint, name, text_generator, compute.device, args.model)


def main():
    args = parse_arguments()
    from inference import check_model_file

    check_model_file(args.model)
    require("fastapi", "uvicorn", "prometheus_client")
    listener = bind(args.host, args.port)
    address, port = listener.getsockname()[:2]
    if not args.api_key and not ipaddress.ip_address(address).is_loopback:
        args.api_key = secrets.token_urlsafe(24)
        print(f"key: {args.api_key}   (a new one each time, unless NANO_API_KEY or --api_key is set)")
    service, about = load_service(args)
    # What is there now stays: to look through it for what may go, again and again, takes half a second each.
    gc.collect()
    gc.freeze()
    server = make_server(make_app(service, args.api_key, args.cors), listener, args)
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
