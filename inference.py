"""Talk with a trained model in the terminal.

A language model does one thing: it continues a list of tokens. There are two ways to use that:

- completion: the model reads <|bos|>text and continues the text;
- instruction (-i): it reads a question in the template it was fine-tuned on,
  <|instruct_mark|>question<|response_mark|>, and its continuation, up to <|eos|>, is the answer.
  A conversation is several of these one after the other.

    python inference.py -i                                   # talk with the newest fine-tuned model
    python inference.py --prompt "Once upon a time" -t 0.8   # complete one text
    python inference.py --eval dataset/eval.jsonl            # how many questions are answered exactly?

In Python:

    from inference import TextGenerator
    text_generator = TextGenerator.load("checkpoint/x.pt", temperature=0.8)
    for text in text_generator.chat([{"role": "user", "content": "Who are you?"}]):
        print(text, end="", flush=True)

`text_generator.complete("Once upon")` continues a text. How a token is chosen: decoding/sampling.py.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from common.config import resolve_path
from common.errors import UserError, run, write_utf8
from decoding.text_generator import (
    TextGenerator,
    check_device,
    check_model_file,
    describe_model,
    load_model,
    print_notice,
)

if TYPE_CHECKING:
    from tasks import Task

# ---- the command line ------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python inference.py [-i] [-m checkpoint/x.pt] [options]",
        description="Complete text and answer questions in the terminal. Without --prompt you talk with the\n"
        "model: Ctrl-C stops an answer, Ctrl-D leaves. Lines piped in are answered one by one.",
        epilog="examples:\n"
        "  python inference.py -i                              talk with the newest fine-tuned model\n"
        "  python inference.py -m checkpoint/x.pt -t 0.8       complete texts with a given model\n"
        '  python inference.py -i --prompt "Who are you?" -t 0 -r 1\n'
        "  python inference.py -i < questions.txt > answers.txt\n"
        "  python inference.py --eval dataset/eval.jsonl       score on questions with known answers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-m", "--model", metavar="FILE", default="newest",
        help="a checkpoint file; or newest (with -i, of SFT); or best: the checkpoint of the newest run "
        "with the lowest validation loss (newest)")  # fmt: skip
    add("-i", "--instruct", action="store_true", help="wrap what you type in the instruction template")
    add("-l", "--max_length", type=int, metavar="N",
        help="at most N tokens of prompt and answer together (the context window)")  # fmt: skip
    add("-t", "--temperature", type=float, default=1.0, metavar="T",
        help="higher is more random, 0 always chooses the likeliest token (1.0)")  # fmt: skip
    add("-k", "--top_k", type=int, default=5, metavar="K",
        help="choose from the K likeliest tokens, 0: from all (5)")  # fmt: skip
    add("-p", "--top_p", type=float, default=1.0, metavar="P",
        help="choose from the likeliest tokens that together have this probability (1.0)")  # fmt: skip
    add("-r", "--repetition_penalty", type=float, default=1.2, metavar="R",
        help="higher makes repeated tokens less likely, 1: off (1.2)")  # fmt: skip
    add("-s", "--seed", type=int, metavar="N", help="the same seed gives the same answer (random)")
    add("--profile", action="store_true", help="print the time to the first token, and tokens/s")
    add("-q", "--quantize", choices=("int8",), help="weights in 8 bits: less memory, and faster on a CPU")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N (auto)")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    one.add_argument("--eval", metavar="FILE", help="count the exactly answered questions of a .jsonl file")
    args = parser.parse_args()
    for name, is_valid, needs in (
        ("max_length", lambda n: n is None or n >= 2, "2 or more"),
        ("temperature", lambda t: 0 <= t < math.inf, "0 or more"),
        ("top_k", lambda k: k >= 0, "0 or more"),
        ("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
        ("repetition_penalty", lambda r: 0.01 <= r <= 100, "between 0.01 and 100"),
        ("seed", lambda s: s is None or 0 <= s < 2**63, "0 or more and fit in 63 bits"),
        ("prompt", lambda text: text is None or text.strip() or not args.instruct, "a question"),
    ):
        value = getattr(args, name)
        if not is_valid(value):
            raise UserError(f"--{name} must be {needs}, not {value!r}")
    check_device(args.device)
    return args


# ---- the terminal ----------------------------------------------------------------------------------

# Control characters could move the cursor or worse, should a model have learned to write them.
CONTROL = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)]) | {ord("\n"): "\n", ord("\t"): "\t"}


def prompt_sign() -> str:
    """What is printed before the user's input. Imports readline where available, for history and editing."""
    from rich.console import Console

    console = Console()
    try:
        import readline  # noqa: F401
    except ImportError:
        return "> "
    if console.no_color or not console.color_system:
        return "> "
    return "\001\033[1;36m\002>\001\033[0m\002 "  # \001 and \002 tell readline what has no width


def print_notices(text_generator: TextGenerator, text: str, left_out: int) -> None:
    """Say what the model does not get to see of a prompt."""
    ids = text_generator.tokenizer.encode(text).tolist()
    if sentence := text_generator.unknown_characters(ids):
        print_notice(f"{sentence}: <|unknown|>")
    if left_out:
        print_notice(f"the prompt is too long: its oldest {left_out:,} tokens are left out")


def say(text_generator: TextGenerator, ids: list[int], profile: bool = False) -> str:
    """Print the answer to the prompt `ids` as it is written, and return it. Ctrl-C passes through."""
    pieces, is_terminal = [], sys.stdout.isatty()
    try:
        for piece in text_generator.stream(ids):
            pieces.append(piece)
            sys.stdout.write(piece.translate(CONTROL) if is_terminal else piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    if profile:
        print_notice(text_generator.profile())
    return "".join(pieces)


def converse(text_generator: TextGenerator, messages: list[dict[str, str]], text: str, profile: bool) -> None:
    """Add a turn to the conversation `messages`. An answer that is interrupted leaves it unchanged."""
    turns = [*messages, {"role": "user", "content": text}]
    ids, left_out = text_generator.chat_prompt(turns)
    if len(turns) <= len(messages):
        print_notice("the context is full: the oldest turns are forgotten")
    print_notices(text_generator, text, left_out)
    answer = say(text_generator, ids, profile)
    if len(ids) + text_generator.n_tokens >= text_generator.max_length:
        print_notice(f"cut off: prompt and answer have reached {text_generator.max_length:,} tokens")
    messages[:] = [*turns, {"role": "assistant", "content": answer}]


def answer_once(text_generator: TextGenerator, text: str, instruct: bool, profile: bool) -> None:
    """Answer a prompt that is not part of a conversation."""
    if instruct:
        converse(text_generator, [], text, profile)
        return
    ids, left_out = text_generator.completion_prompt(text)
    print_notices(text_generator, text, left_out)
    say(text_generator, ids, profile)


def answer_lines(
    text_generator: TextGenerator, lines: Iterable[bytes], instruct: bool, profile: bool
) -> None:
    """Answer every line. Completions, which may have many lines, are separated by an empty one."""
    is_first = True
    for line_number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if line_number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input, line {line_number}: not UTF-8 ({error.reason})") from None
        if not text.strip():
            continue
        if not instruct and not is_first:
            print()
        answer_once(text_generator, text, instruct, profile)
        is_first = False


def read_input(sign: str) -> str | None:
    """What the user types; None after Ctrl-D."""
    while True:
        try:
            return input(sign)
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            print_notice("Ctrl-D leaves")


def talk(text_generator: TextGenerator, instruct: bool, profile: bool) -> None:
    """Read and answer until Ctrl-D."""
    sign = prompt_sign()
    messages: list[dict[str, str]] = []
    while (text := read_input(sign)) is not None:
        if not text.strip():
            continue
        if instruct and text.strip() == "/new":
            messages = []
            print_notice("a new conversation")
            continue
        try:
            if instruct:
                converse(text_generator, messages, text, profile)
            else:
                answer_once(text_generator, text, instruct, profile)
        except KeyboardInterrupt:
            print_notice("stopped")
        print()


# ---- questions with known answers ------------------------------------------------------------------


def evaluate(text_generator: TextGenerator, task: Task) -> None:
    """Ask all questions of a task; print some answers and the scores. evaluate.py can do more."""
    from rich.console import Console

    from evaluation import runner, tables

    model, tokenizer = text_generator.model, text_generator.tokenizer
    prepared = runner.prepare(task, runner.examples_of(task), tokenizer, model.config, chat=True)
    for sentence in prepared.notes:
        print_notice(sentence)
    start, n = time.perf_counter(), len(prepared.examples)
    with tables.progress("asking", n) as advance:
        scores = list(runner.score(model, prepared, on_each=advance))
    seconds = time.perf_counter() - start
    result = runner.result_of(prepared, scores, seconds)
    console = Console(highlight=False)
    tables.print_samples(console, prepared, result, 10)
    tables.print_scores(console, [result])
    if task.metric == "exact":
        n_right = round(result.score * n)
        console.print(f"exact match: {n_right:,} of {n:,} = {100 * result.score:.1f} % in {seconds:.1f} s")


# ---- the script ------------------------------------------------------------------------------------


def load_text_generator(
    args: argparse.Namespace, instruct: bool
) -> tuple[TextGenerator, str, AbstractContextManager]:
    """Returns (the TextGenerator, the model in two lines, the attention kernels to run it with)."""
    from common import hardware

    loaded = load_model(args.model, instruct, args.device, args.quantize)
    if instruct and loaded.checkpoint.chat_template is None:
        print_notice(f"{loaded.name} was not fine-tuned: it continues texts, and never learned to answer")
    if not instruct and loaded.checkpoint.chat_template is not None:
        print_notice(f"{loaded.name} was fine-tuned to answer: use -i to ask it")
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    options = {name: getattr(args, name) for name in names}
    text_generator = TextGenerator(loaded.model, loaded.tokenizer, args.max_length, **options)
    return text_generator, describe_model(loaded, args.model), hardware.attention_context(loaded.compute)


def main() -> None:
    args = parse_arguments()
    check_model_file(args.model)
    if sys.stdin is None and args.prompt is None and args.eval is None:
        raise UserError("standard input is closed, so nothing can be asked; use --prompt")
    task = None
    if args.eval is not None:
        from tasks.questions import Questions

        task = Questions(resolve_path(args.eval))
    write_utf8()

    instruct = args.instruct or task is not None
    text_generator, about, attention = load_text_generator(args, instruct)
    is_talk = args.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    if is_talk:
        text_generator.decoder.compile()  # in the background, while the first question is typed
    with attention:
        if task is not None:
            print(about)
            evaluate(text_generator, task)
        elif args.prompt is not None:
            answer_once(text_generator, args.prompt, instruct, args.profile)
        elif is_talk:
            assert isinstance(sys.stdin, io.TextIOWrapper)
            sys.stdin.reconfigure(errors="replace")
            print(about)
            print(
                "Ask; it remembers the conversation, /new starts another." if instruct
                else "Begin a text; the model goes on with it.",
                "Ctrl-C stops an answer, Ctrl-D leaves.\n",
            )  # fmt: skip
            talk(text_generator, instruct, args.profile)
        else:
            answer_lines(text_generator, sys.stdin.buffer, instruct, args.profile)


if __name__ == "__main__":
    run(main)
