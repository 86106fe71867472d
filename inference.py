"""Talk with a trained model in the terminal.

A language model does one thing: it continues a list of tokens. There are two ways to use that:

- completion: the model reads <|bos|>text and goes on with the text;
- instruction (-i): it reads the template it was fine-tuned on,
  <|instruct_mark|>question<|response_mark|>, and what follows, up to <|eos|>, is its answer.
  A conversation is several of these one after the other.

    python inference.py -i                                   # talk with the newest fine-tuned model
    python inference.py --prompt "Once upon a time" -t 0.8   # complete one text
    python inference.py --eval dataset/eval.jsonl            # how many questions are answered exactly?

In Python it takes no more than:

    from inference import TextGenerator
    text_generator = TextGenerator.load("checkpoint/x.pt", temperature=0.8)
    for text in text_generator.chat([{"role": "user", "content": "Who are you?"}]):
        print(text, end="", flush=True)

`text_generator.complete("Once upon")` continues a text.
"""

import argparse
import math
import re
import sys
import time

from common.errors import UserError, run

# ---- the command line ------------------------------------------------------------------------------


def parse_arguments():
    parser = argparse.ArgumentParser(
        usage="python inference.py [-i] [-m checkpoint/x.pt] [options]",
        description="Complete text and answer questions in the terminal. Without --prompt it talks: Ctrl-C\n"
        "stops an answer, Ctrl-D leaves. Lines piped in are answered one by one.",
        epilog="examples:\n"
        "  python inference.py -i                              talk with the newest fine-tuned model\n"
        "  python inference.py -m checkpoint/x.pt -t 0.8       complete texts with a certain model\n"
        '  python inference.py -i --prompt "Who are you?" -t 0 -r 1\n'
        "  python inference.py -i < questions.txt > answers.txt\n"
        "  python inference.py --eval dataset/eval.jsonl       score on questions with known answers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-m", "--model", metavar="FILE", default="newest",
        help="checkpoint, or newest (with -i, of SFT), or best: the one of the newest run that has "
        "the lowest validation loss (newest)")  # fmt: skip
    add("-i", "--instruct", action="store_true", help="wrap what you type in the instruction template")
    add("-l", "--max_length", type=int, metavar="N",
        help="most tokens of prompt and answer together (the context window)")  # fmt: skip
    add("-t", "--temperature", type=float, default=1.0, metavar="T",
        help="higher is more random, 0 always takes the likeliest token (1.0)")  # fmt: skip
    add("-k", "--top_k", type=int, default=5, metavar="K",
        help="draw from the K likeliest tokens, 0: from all (5)")  # fmt: skip
    add("-p", "--top_p", type=float, default=1.0, metavar="P",
        help="draw from the likeliest tokens that together have this probability (1.0)")  # fmt: skip
    add("-r", "--repetition_penalty", type=float, default=1.2, metavar="R",
        help="higher makes it less likely that tokens come again, 1: off (1.2)")  # fmt: skip
    add("-s", "--seed", type=int, metavar="N", help="the same seed gives the same answer (random)")
    add("--profile", action="store_true", help="tell the time to the first token, and tokens/s")
    add("-q", "--quantize", choices=("int8",), help="weights in 8 bits: less memory, and faster on a CPU")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N (auto)")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--prompt", metavar="TEXT", help="answer this and leave")
    one.add_argument(
        "--eval", metavar="FILE", help="count the questions of a .jsonl that are answered exactly"
    )
    args = parser.parse_args()
    for name, is_valid, needs in (
        ("max_length", lambda n: n is None or n >= 2, "2 or more"),
        ("temperature", lambda t: 0 <= t < math.inf, "0 or more"),
        ("top_k", lambda k: k >= 0, "0 or more"),
        ("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
        ("repetition_penalty", lambda r: 0.01 <= r <= 100, "between 0.01 and 100"),
        ("seed", lambda s: s is None or 0 <= s < 2**63, "0 or more and fit in 63 bits"),
        ("device", re.compile("auto|cpu|mps|cuda(:[0-9]{1,3})?").fullmatch, "auto, cpu, mps, cuda or cuda:N"),
        ("prompt", lambda text: text is None or text.strip() or not args.instruct, "a question"),
    ):
        value = getattr(args, name)
        if not is_valid(value):
            raise UserError(f"--{name} must be {needs}, not {value!r}")
    return args


# ---- the terminal ----------------------------------------------------------------------------------

# Characters that would move the cursor or worse, should a model have learned them.
CONTROL = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)]) | {ord("\n"): "\n", ord("\t"): "\t"}


def notice(text):
    """A remark to the user, on stderr: stdout holds answers only."""
    from rich.console import Console

    Console(stderr=True).print(f"({text})", style="dim", markup=False, highlight=False, soft_wrap=True)


def prompt_sign():
    """What stands before the user's words. Imports readline, where there is one: history and editing."""
    from rich.console import Console

    console = Console()
    try:
        import readline  # noqa: F401
    except ImportError:
        return "> "
    if console.no_color or not console.color_system:
        return "> "
    return "\001\033[1;36m\002>\001\033[0m\002 "  # \001 and \002 tell readline what takes no space


def facts(checkpoint, name, text_generator, device, asked):
    """The model in two lines. asked: -m."""
    parts = [
        f"{text_generator.model.n_params / 1e6:.2f} M parameters",
        f"context {text_generator.model.config.block_size:,}",
        f"{checkpoint.task} step {checkpoint.step:,}",
        validation(checkpoint),
        device,
    ]
    best, which = checkpoint.best, ""
    if asked in CHOICES:
        which = f" ({asked})"
    if asked == "newest" and best["step"] not in (None, checkpoint.step):
        which = f" (newest; -m best is step {best['step']:,}, with validation loss {best['loss']:.3f})"
    return f"{name}{which}\n{' · '.join(parts)}"


def validation(checkpoint):
    """The validation loss of these weights, in words, or of the last ones before them that have one."""
    loss, step = checkpoint.validation["loss"], checkpoint.validation["step"]
    if loss is None:
        return "not validated"
    return f"validation loss {loss:.3f}" + f" at step {step:,}" * (step != checkpoint.step)


# ---- text in, text out -----------------------------------------------------------------------------

LOADING, COMPILING = 0.5, 12.0  # seconds that it takes to have compiled steps


class TextGenerator:
    """A model with its tokenizer and the options of decoding: a prompt in, pieces of text out.

    `options`: those of `GPT.generate`. `max_length`: tokens of prompt and answer together.
    """

    def __init__(self, model, tokenizer, max_length=None, **options):
        from decoding.engine import Decoder

        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.decoder, self.waited = Decoder(model), 0.0  # seconds, until compiled steps are wanted
        self.context = model.config.block_size
        self.max_length = max_length or self.context
        # A mark the model writes itself ends its answer; only <|unknown|> is a part of the text.
        self.stop_tokens = (
            tokenizer.eos_id, tokenizer.bos_id, tokenizer.padding_id,
            tokenizer.instruct_id, tokenizer.response_id, tokenizer.system_id,
        )  # fmt: skip

    @classmethod
    def load(cls, path="newest", max_length=None, device="auto", quantize=None, **options):
        """The model of a checkpoint, or "newest", or "best". quantize: "int8". options: `seed`, and see
        `sampling.logits_to_probs`; what is not said is greedy. UserError if there is no such model."""
        _, _, model, tokenizer, _ = load_model(path, True, device, quantize)
        return cls(model, tokenizer, max_length, **{"temperature": 0, **options})

    def chat(self, messages):
        """Yield the answer to a conversation in pieces: [{"role": "user", "content": str}, ...]."""
        yield from self.speak(self.chat_prompt(list(messages))[0])

    def complete(self, text):
        """Yield what follows a text, in pieces."""
        yield from self.speak(self.completion_prompt(text)[0])

    def completion_prompt(self, text):
        """(ids, how many tokens had to be left out)"""
        return self.fit([self.tokenizer.bos_id, *self.tokenizer.encode(text).tolist()])

    def chat_prompt(self, messages):
        """The same for a conversation. Turns that no longer fit are removed from `messages`, oldest first.

        A last message of the assistant's is the beginning of its answer.
        """
        limit, much_less = self.room - self.room // 4, self.room // 2  # not to do it again at every turn
        # What cannot fit in any case is not even encoded: each message is a mark and some tokens at least.
        sizes = [1 + self.tokenizer.min_tokens(message["content"]) for message in messages]
        if sum(sizes) > limit:
            limit = much_less
            forget(messages, sizes, limit)
        ids = self.rendered(messages)
        if len(ids) > limit:
            tokenizer, first = self.tokenizer, int(messages[0]["role"] == "system")
            marks = {tokenizer.system_id, tokenizer.instruct_id, tokenizer.response_id}  # which no text holds
            starts = [i for i, token in enumerate(ids) if token in marks][: len(messages)]
            sizes = [end - start for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
            n = forget(messages, sizes, much_less)
            del ids[sum(sizes[:first]) : sum(sizes[: first + n])]
        return self.fit(ids)

    def rendered(self, messages):
        """The ids of a conversation, up to where the model goes on with it."""
        from tokenizer import render_chat

        has_begun = messages[-1]["role"] == "assistant"
        ids, _ = render_chat(self.tokenizer, messages, add_generation_prompt=not has_begun)
        return ids[: len(ids) - has_begun].tolist()  # without the mark at the end of what has only begun

    @property
    def room(self):
        """The longest prompt that leaves a token to be said, or the context if that is less."""
        return min(self.max_length - 1, self.context)

    def fit(self, ids):
        """A prompt that is too long loses its oldest tokens; a quarter of the room is left to the answer."""
        if len(ids) <= self.room:
            return ids, 0
        keep = self.room - self.room // 4
        # The first one stays: it is the mark that says what this is.
        return [ids[0], *ids[len(ids) - keep + 1 :]], len(ids) - keep

    def notice_unknown(self, text):
        if sentence := self.unknown(self.tokenizer.encode(text).tolist()):
            notice(f"{sentence}: <|unknown|>")

    def unknown(self, ids):
        """A sentence about the characters that the model does not know, or None."""
        count = ids.count(self.tokenizer.unknown_id)
        are = "character is" if count == 1 else "characters are"
        return f"{count:,} {are} unknown to this model" if count else None

    def speak(self, ids):
        """Yield what follows `ids`, token by token, as text; "" where a character is not whole yet."""
        from decoding.engine import TextStream

        text = TextStream(self.tokenizer)
        self.n_prompt, self.n_tokens, self.first_seconds = len(ids), 0, None
        start = time.perf_counter()
        for token in self.tokens(ids, self.max_length - len(ids)):
            self.n_tokens += 1
            self.seconds = time.perf_counter() - start
            self.first_seconds = self.first_seconds or self.seconds
            yield text.feed(token)
        yield text.end()

    def tokens(self, ids, max_tokens):
        """Yield what follows `ids`, as ids."""
        from decoding.engine import Request

        options = self.options | {"stop_tokens": self.stop_tokens}
        if options.get("temperature") == 0 and self.model.drafter():
            yield from self.model.generate(ids, max_tokens, **options)
            return
        request = self.decoder.add(Request(ids, max_tokens, **options))
        try:
            while request.finish_reason is None:
                n_before, start = len(request.context), time.perf_counter()
                self.decoder.step()
                self.waited += time.perf_counter() - start
                if self.waited > COMPILING or self.waited > LOADING and self.decoder.is_prepared:
                    # Who has waited that long may wait as long again: it costs no more than it saves.
                    self.decoder.compile()
                    self.waited = -math.inf
                yield from request.context[n_before:]
        finally:
            self.decoder.remove(request)  # of which the rest is not to be heard, after Ctrl-C

    def profile(self):
        """What the last answer cost, in words."""
        if not self.n_tokens:
            return f"prompt {self.n_prompt} tokens, no answer"
        rest = self.seconds - self.first_seconds
        speed = f", {(self.n_tokens - 1) / rest:,.0f} tokens/s" if self.n_tokens > 1 else ""
        return (
            f"prompt {self.n_prompt} tokens, answer {self.n_tokens}; "
            f"first token after {1000 * self.first_seconds:.1f} ms{speed}"
        )


def forget(messages, sizes, limit):
    """Remove the oldest turns until the tokens of all messages, `sizes`, are `limit` at most.

    What the system says stays, and the last thing that the user does. Returns how many messages went.
    """
    first = int(messages[0]["role"] == "system")
    total, end = sum(sizes), first
    for i in range(first + 1, len(messages)):
        if messages[i]["role"] == "user" and total > limit:
            total -= sum(sizes[end:i])
            end = i
    del messages[first:end]
    return end - first


def notice_left_out(count):
    if count:
        notice(f"the prompt is too long: its oldest {count:,} tokens are left out")


def say(text_generator, ids, profile=False):
    """Write the answer to the prompt `ids` to stdout as it comes; returns it. Ctrl-C passes through."""
    said, is_terminal = [], sys.stdout.isatty()
    try:
        for piece in text_generator.speak(ids):
            said.append(piece)
            sys.stdout.write(piece.translate(CONTROL) if is_terminal else piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    if profile:
        notice(text_generator.profile())
    return "".join(said)


def converse(text_generator, messages, text, profile):
    """One more turn of the conversation `messages`, which grows only if the answer is not stopped."""
    text_generator.notice_unknown(text)
    turns = [*messages, {"role": "user", "content": text}]
    ids, left_out = text_generator.chat_prompt(turns)
    if len(turns) <= len(messages):
        notice("the context is full: the oldest turns are forgotten")
    notice_left_out(left_out)
    answer = say(text_generator, ids, profile)
    if len(ids) + text_generator.n_tokens >= text_generator.max_length:
        notice(f"cut off: prompt and answer have reached {text_generator.max_length:,} tokens")
    messages[:] = [*turns, {"role": "assistant", "content": answer}]


def answer_once(text_generator, text, instruct, profile):
    """A prompt on its own, without a conversation around it."""
    if instruct:
        converse(text_generator, [], text, profile)
        return
    text_generator.notice_unknown(text)
    ids, left_out = text_generator.completion_prompt(text)
    notice_left_out(left_out)
    say(text_generator, ids, profile)


def answer_lines(text_generator, lines, instruct, profile):
    """Every line (bytes) is a prompt. An empty line parts completions: these may have many lines."""
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


def read(sign):
    """What the user types; None when they leave."""
    while True:
        try:
            return input(sign)
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            notice("Ctrl-D leaves")


def talk(text_generator, instruct, profile):
    """Read and answer until Ctrl-D."""
    sign, messages = prompt_sign(), []
    while (text := read(sign)) is not None:
        if not text.strip():
            continue
        if instruct and text.strip() == "/new":
            messages = []
            notice("a new conversation")
            continue
        try:
            if instruct:
                converse(text_generator, messages, text, profile)
            else:
                answer_once(text_generator, text, instruct, profile)
        except KeyboardInterrupt:
            notice("stopped")
        print()


# ---- questions with known answers ------------------------------------------------------------------


def read_questions(path):
    """[(messages, kind)] of a file of what `python data.py` takes for SFT; "kind" may be added."""
    from preparation.corpus import conversation_of
    from sources import ReadReport, Source

    def question_of(record):
        messages, notes = conversation_of(record)
        kind = record.get("kind", "question") if isinstance(record, dict) else "question"
        return (messages, str(kind)), [note for note in notes if note != ("not read", "kind")]

    source, found = Source(path, question_of, needs_records=True), ReadReport()
    questions = [question for questions, _ in source.documents(found) for question in questions]
    for sentence in found.summary(path):
        notice(sentence)
    return questions


def answer_greedily(model, prompts, max_tokens, stop_tokens, on_answers=lambda count: None):
    """The likeliest continuation of each of `prompts` (lists of ids): a list of (ids, whether it stopped).

    `max_tokens[i]` bounds the i-th, its stop token included, and so does the context.
    """
    from decoding.engine import Decoder, Request

    requests = [
        Request(
            prompt, min(n, model.config.block_size - len(prompt) + 1), stop_tokens=stop_tokens, temperature=0
        )
        for prompt, n in zip(prompts, max_tokens, strict=True)
    ]
    decoder = Decoder(model, n_slots=64)
    if decoder.is_prepared:
        decoder.compile(wait=True)
    decoder.run(requests, on_end=lambda request: on_answers(1))
    return [(request.tokens, request.finish_reason == "stop") for request in requests]


def evaluate(text_generator, questions):
    """Ask all, greedily and without repetition penalty; print some answers and the score of every kind."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from rich.text import Text

    tokenizer, console = text_generator.tokenizer, Console(highlight=False)
    prompts, left_out = zip(
        *(text_generator.chat_prompt(messages[:-1]) for messages, _ in questions), strict=True
    )
    if n_cut := sum(map(bool, left_out)):
        notice(f"{n_cut:,} questions are too long for the context: their oldest tokens are left out")
    expected = [messages[-1]["content"].strip() for messages, _ in questions]
    # An answer that is longer than the right one is wrong already: no need to hear the end of it.
    max_tokens = [len(ids) + 1 for ids in tokenizer.encode_batch(expected)]
    columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    progress_console = Console(stderr=True)
    with Progress(
        *columns, console=progress_console, transient=True, disable=not progress_console.is_terminal
    ) as bar:
        task = bar.add_task("", total=len(questions))
        answers = answer_greedily(
            text_generator.model,
            prompts,
            max_tokens,
            text_generator.stop_tokens,
            lambda count: bar.advance(task, count),
        )
    seconds = time.perf_counter() - start

    given, is_right, scores = [], [], {}
    for (ids, has_stopped), (_, kind), answer in zip(answers, questions, expected, strict=True):
        ids = [i if i < tokenizer.vocab_size else tokenizer.unknown_id for i in ids]
        text = tokenizer.decode(ids).strip()
        given.append(text if has_stopped else text + " …")
        is_right.append(has_stopped and text == answer)
        scores.setdefault(kind, []).append(is_right[-1])

    samples = Table("question", "the model's answer", "", title="some of the questions")
    by_kind = sorted(range(len(questions)), key=lambda i: questions[i][1])
    n_samples = min(10, len(questions))
    for i in (by_kind[k * len(by_kind) // n_samples] for k in range(n_samples)):
        *before, question = (message["content"] for message in questions[i][0][:-1])
        shown = Text("".join(f"({text})\n" for text in before), style="dim")
        shown.append(question, style="not dim")
        answer, mark = Text(given[i]), Text("✓", style="green")
        if not is_right[i]:
            answer.append(f"\nnot: {expected[i]}", style="dim")
            mark = Text("✗", style="red")
        samples.add_row(shown, answer, mark)
    console.print(samples)

    table = Table(title="exact answers", show_footer=True)
    total = sum(is_right)
    table.add_column("kind", "total")
    table.add_column("right", f"{total:,}", justify="right")
    table.add_column("of", f"{len(questions):,}", justify="right")
    table.add_column("%", f"{100 * total / len(questions):.1f}", justify="right")
    for kind, rights in sorted(scores.items()):
        share = f"{100 * sum(rights) / len(rights):.1f}"
        table.add_row(Text(kind), f"{sum(rights):,}", f"{len(rights):,}", share)
    console.print(table)
    console.print(
        f"exact match: {total:,} of {len(questions):,} = {100 * total / len(questions):.1f} %"
        f" in {seconds:.1f} s"
    )


# ---- the model -------------------------------------------------------------------------------------


CHOICES = ("newest", "best")


def check_model_file(path):
    """UserError unless there is such a file, or `path` is one of CHOICES. Needs no torch."""
    from common.config import display_path, resolve_path

    if path not in CHOICES and not resolve_path(path).is_file():
        raise UserError(
            f"there is no file {display_path(resolve_path(path))}; without -m the newest model is taken"
        )


def load_checkpoint(path, instruct):
    """(checkpoint, its name): of the file, or of the newest run here, if `path` is one of CHOICES."""
    from common.config import display_path, resolve_path
    from engine import checkpoint as checkpoints
    from engine import runs

    if path not in CHOICES:
        path = resolve_path(path)
        return checkpoints.load(path), display_path(path)
    choose, tasks = {"newest": runs.newest, "best": runs.best}[path], ["sft", "pretrain"]
    if not instruct:
        tasks.sort(key=lambda task: [entry.run for entry in runs.saved(task)[-1:]], reverse=True)
    for task in tasks:
        if found := choose(task):
            checkpoint, path, notices = found
            for text in notices:
                notice(text)
            return checkpoint, display_path(path)
    raise UserError("there is no model in checkpoint/ yet; `python train.py -t pretrain` makes one")


def load_model(path, instruct, device="auto", quantize=None):
    """(checkpoint, its name, model, tokenizer, the hardware's ComputeConfig), ready to continue texts."""
    from common import hardware
    from decoding.packed import quantize as to_int8
    from engine.checkpoint import build

    checkpoint, name = load_checkpoint(path, instruct)
    # Small models gain nothing from half precision when they write one token at a time.
    compute = hardware.resolve_compute(hardware.detect_machine(device), device, dtype="float32")
    model, tokenizer = build(checkpoint, name)
    if not model.config.is_causal:
        raise UserError(f"{name} sees all tokens at once (is_causal is false): it cannot continue a text")
    if not all(weights.isfinite().all() for weights in model.parameters()):
        raise UserError(f"{name} holds weights that are not finite numbers: its training had diverged")
    model = to_int8(model) if quantize == "int8" else model
    return checkpoint, name, model.to(compute.device), tokenizer, compute


def load_text_generator(args, instruct):
    """(the TextGenerator that the arguments ask for, what it is in two lines, the context to run it in)."""
    from common import hardware

    checkpoint, name, model, tokenizer, compute = load_model(args.model, instruct, args.device, args.quantize)
    if instruct and checkpoint.task != "sft":
        notice(f"{name} was not fine-tuned: it continues texts, and never learned to answer")
    if not instruct and checkpoint.task == "sft":
        notice(f"{name} was fine-tuned to answer: use -i to ask it")
    options = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    text_generator = TextGenerator(
        model, tokenizer, args.max_length, **{key: getattr(args, key) for key in options}
    )
    about = facts(checkpoint, name, text_generator, compute.device, args.model)
    return text_generator, about, hardware.attention_context(compute)


def main():
    args = parse_arguments()
    check_model_file(args.model)
    from common.config import resolve_path

    if sys.stdin is None and args.prompt is None and args.eval is None:
        raise UserError("standard input is closed, so nothing can be asked; use --prompt")
    questions = read_questions(resolve_path(args.eval)) if args.eval is not None else None
    for stream in (sys.stdout, sys.stderr):
        # Through a pipe goes UTF-8; a terminal that lacks a character shows a question mark.
        stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")

    instruct = args.instruct or questions is not None
    text_generator, about, attention = load_text_generator(args, instruct)
    is_talk = args.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    if is_talk:
        text_generator.decoder.compile()  # while the first question is typed
    with attention:
        if questions is not None:
            print(about)
            evaluate(text_generator, questions)
        elif args.prompt is not None:
            answer_once(text_generator, args.prompt, instruct, args.profile)
        elif is_talk:
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
