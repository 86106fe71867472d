"""Serve a model to a browser and to programs that speak OpenAI's API.

    python serve.py                                     the newest fine-tuned model, at http://127.0.0.1:8000
    python serve.py -m checkpoint/x.pt --port 9000
    NANO_API_KEY=secret python serve.py --host 0.0.0.0  for the whole network, with a key

The chat page is at /, the API at /v1/models, /v1/chat/completions and /v1/completions, the server's state at
/health and /metrics. See doc/serving.md.
"""

import argparse
import gc
import ipaddress
import os
import re
import secrets
from typing import TYPE_CHECKING

from common.errors import UserError, is_out_of_memory, run
from common.packages import require

if TYPE_CHECKING:
    from server.service import Service

DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def parse_arguments() -> argparse.Namespace:
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-m", "--model", metavar="FILE", default="newest",
        help="a checkpoint; or newest (a fine-tuned one, if there is any); or best, the one with the lowest "
        "validation loss in the newest run (default: newest)")  # fmt: skip
    add("--host", default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1); a key is needed if other machines can "
        "connect")  # fmt: skip
    add("--port", type=int, default=8000, help="0 takes any free port (default: 8000)")
    add("--api_key", metavar="KEY", default=os.environ.get("NANO_API_KEY") or None,
        help="key that clients must send (default: NANO_API_KEY; on a network, a random one)")  # fmt: skip
    add("--cors", nargs="+", default=[], metavar="ORIGIN",
        help="origins whose web pages may use the server, such as https://example.org")  # fmt: skip
    add("--slots", type=int, default=8, metavar="N", help="answers generated at the same time (default: 8)")
    add("--max_queue", type=int, default=64, metavar="N",
        help="answers that may wait for a slot (default: 64)")  # fmt: skip
    add("--timeout", type=int, default=300, metavar="SECONDS",
        help="the longest that a request may take (default: 300)")  # fmt: skip
    add("-q", "--quantize", choices=("int8",), help="8-bit weights: less memory, and faster on a CPU")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N (default: auto)")
    args = parser.parse_args()
    for name, is_valid, requirement in (
        ("port", lambda n: 0 <= n < 65536, "between 0 and 65535"),
        ("slots", lambda n: 1 <= n <= 1024, "between 1 and 1024"),
        ("max_queue", lambda n: n >= 0, "0 or more"),
        ("timeout", lambda n: n >= 1, "1 or more"),
        ("api_key", lambda key: key is None or re.fullmatch("[!-~]+", key), "ASCII without spaces"),
    ):
        if not is_valid(getattr(args, name)):
            raise UserError(f"--{name} must be {requirement}, not {getattr(args, name)!r}")
    args.cors = [parse_origin(text) for text in args.cors]
    return args


def parse_origin(text: str) -> str:
    """An origin as browsers send it: in lower case, without the scheme's default port."""
    match = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^/\s?#@*:]+|\[[0-9a-f:]+\])(:\d+)?", text.lower())
    if not match:
        raise UserError(f"--cors takes origins such as https://example.org, not {text!r}")
    scheme, host, port = match.groups()
    return f"{scheme}://{host}{'' if port in (None, DEFAULT_PORTS.get(scheme)) else port}"


def load_service(args: argparse.Namespace) -> "tuple[Service, str]":
    """Load the model. Returns (the Service, a description of the model in two lines)."""
    from common.hardware import attention_context
    from decoding.text_generator import TextGenerator, describe_model, load_model
    from server.scheduler import InferenceEngine
    from server.service import Service

    loaded = load_model(args.model, True, args.device, args.quantize)
    text_generator = TextGenerator(loaded.model, loaded.tokenizer)
    try:
        attention = attention_context(loaded.compute)
        engine = InferenceEngine(loaded.model, args.slots, args.max_queue, args.timeout, attention)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise UserError(f"not enough memory for {args.slots} slots; lower --slots") from None
        raise
    service = Service(loaded.checkpoint, loaded.path, text_generator, engine, loaded.compute.device)
    return service, describe_model(loaded, args.model)


def main() -> None:
    args = parse_arguments()
    from decoding.text_generator import check_device, check_model_file

    check_device(args.device)
    check_model_file(args.model)
    require("fastapi", "uvicorn", "prometheus_client")
    from server.connections import bind, make_server

    listener = bind(args.host, args.port)
    address, port = listener.getsockname()[:2]
    if not args.api_key and not ipaddress.ip_address(address).is_loopback:
        args.api_key = secrets.token_urlsafe(24)
        print(f"key: {args.api_key}   (a new one each time, unless NANO_API_KEY or --api_key is set)")
    service, description = load_service(args)
    from server.app import make_app

    app = make_app(service, args.api_key, args.cors)
    server = make_server(app, listener, args.slots + args.max_queue, args.timeout)
    # Keep the garbage collector from scanning long-lived objects: each full collection takes half a second.
    gc.collect()
    gc.freeze()
    service.engine.start()
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{port}"
    print(description, f"chat: {url}/", f"API:  {url}/v1", sep="\n", flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        service.engine.stop()


if __name__ == "__main__":
    run(main)
