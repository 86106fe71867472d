"""inference.py, mostly through the real command line and a real (pseudo-)terminal.

The models are made by hand: for each token they know which one comes next, and nothing else. So
every answer is known beforehand.
"""

import dataclasses
import io
import json
import random
import re
import subprocess
import sys
import textwrap
import time

import pexpect
import pytest
import torch
from made_models import TEXT, chain, checkpoint, polite

import decoding.engine
import engine.checkpoint
import inference
from config.schema import ModelConfig
from decoding.sampling import generate
from decoding.text_generator import answer_greedily
from model import GPT
from tasks.questions import Questions
from tokenizer import BPETokenizer, CharTokenizer, render_chat

NEVER = {"loss": None, "step": None}
ERASE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x01\x02\r]")  # control sequences of a terminal


@pytest.fixture
def save(monkeypatch):
    """save(project, checkpoint): its path in that project."""

    def save(project, checkpoint):
        monkeypatch.setattr(engine.checkpoint, "FOLDER", project.root / "checkpoint")
        return checkpoint.save()

    return save


@pytest.fixture
def tokenizer():
    return CharTokenizer.train([TEXT])


def endless(tokenizer):
    """Answers 你好你好你好 … for ever."""
    ni, hao = tokenizer.encode("你好").tolist()
    return checkpoint(tokenizer, *chain(tokenizer, {tokenizer.response_id: ni, ni: hao, hao: ni}))


# ---- arguments, checked before torch is loaded ---------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["-t", "-1"], "--temperature must be 0 or more, not -1.0"),
        (["-t", "nan"], "--temperature must be 0 or more, not nan"),
        (["-t", "hot"], "invalid float value: 'hot'"),
        (["-k", "-1"], "--top_k must be 0 or more, not -1"),
        (["-p", "0"], "--top_p must be above 0 and at most 1, not 0.0"),
        (["-p", "1.5"], "--top_p must be above 0 and at most 1, not 1.5"),
        (["-r", "0"], "--repetition_penalty must be between 0.01 and 100, not 0.0"),
        (["-l", "0"], "--max_length must be 2 or more, not 0"),
        (["-s", "-1"], "--seed must be 0 or more and fit in 63 bits, not -1"),
        (["--device", "gpu"], "--device must be auto, cpu, mps, cuda or cuda:N, not 'gpu'"),
        (["-i", "--prompt", " "], "--prompt must be a question, not ' '"),
        (["--prompt", "a", "--eval", "b"], "not allowed with argument --prompt"),
        (["-m", "checkpoint/nowhere.pt"], "there is no file checkpoint/nowhere.pt"),
        (["--eval", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_wrong_arguments(args, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["inference.py", *args])
    monkeypatch.setattr(
        inference, "load_text_generator", lambda *_: pytest.fail("the model would have been loaded")
    )
    with pytest.raises(SystemExit) as exit:
        inference.run(inference.main)
    assert exit.value.code == 2
    output = capsys.readouterr()
    assert sentence in output.err and not output.out and "Traceback" not in output.err


def test_arguments_do_not_wait_for_torch(shared_project):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import inference; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, shared_project.root], capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "pydantic", "rich"} & set(done.stdout.split())
    start = time.perf_counter()
    help = shared_project.run("inference.py", "--help")
    assert help.returncode == 0 and "examples:" in help.stdout
    assert time.perf_counter() - start < 2  # 0.1 s, where the machine is not busy


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "there is no text in it"),
        (b'{"question": "a", "answer": "b"}\n{"question": 1}\n', "line 2"),
        (b"\xff\n", "line 1: not UTF-8"),
        (b"question,answer\n", "line 1: not JSON"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "line 1: ends without an answer"),
    ],
)
def test_wrong_questions(content, sentence, tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_bytes(content)
    with pytest.raises(inference.UserError, match=sentence):
        Questions(path)


# ---- checkpoints -------------------------------------------------------------------------------------


def load_in(project, monkeypatch, *args):
    monkeypatch.setattr(engine.checkpoint, "FOLDER", project.root / "checkpoint")
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, args)])
    args = inference.parse_arguments()
    return inference.load_text_generator(args, args.instruct)


def test_the_newest_checkpoint_is_taken(project, save, tokenizer, monkeypatch, capsys):
    with pytest.raises(inference.UserError, match="no model in checkpoint/ yet"):
        load_in(project, monkeypatch)
    save(project, polite(tokenizer, stage="pretrain", chat_template=None, run="20260103_000000"))
    _, about, _ = load_in(project, monkeypatch, "-i")
    assert "pretrain step 7" in about and "was not fine-tuned" in capsys.readouterr().err
    save(project, polite(tokenizer, run="20260102_000000"))
    assert "sft step 7" in load_in(project, monkeypatch, "-i")[1]
    assert "pretrain step 7" in load_in(project, monkeypatch)[1] and not capsys.readouterr().err
    save(project, polite(tokenizer, run="20260104_000000", step=12345))
    _, about, _ = load_in(project, monkeypatch)
    assert "sft step 12,345 · validation loss 0.125 at step 7 ·" in about and "context 64" in about
    assert "use -i" in capsys.readouterr().err


def test_of_those_that_can_chat_the_last_stage_is_preferred(project, save, tokenizer, monkeypatch):
    save(project, polite(tokenizer, stage="pretrain", chat_template=None, run="20260104_000000"))
    save(project, polite(tokenizer, stage="mid", run="20260103_000000"))
    assert "mid step 7" in load_in(project, monkeypatch, "-i")[1]
    save(project, polite(tokenizer, run="20260101_000000"))
    assert "sft step 7" in load_in(project, monkeypatch, "-i")[1]  # although it is older
    assert "pretrain step 7" in load_in(project, monkeypatch)[1]


def test_best_and_newest(project, save, tokenizer, monkeypatch):
    """Each shows the loss of its own weights, and the default says which one it is."""
    best = {"loss": 0.125, "step": 7}
    path = save(project, polite(tokenizer, best=best))
    save(project, polite(tokenizer, step=9, best=best, validation={"loss": 0.5, "step": 9}))
    for arguments in ([], ["-m", "newest"]):
        about = load_in(project, monkeypatch, "-i", *arguments)[1]
        assert "step_9.pt (newest; -m best is step 7, with validation loss 0.125)\n" in about
        assert "sft step 9 · validation loss 0.500 ·" in about
    about = load_in(project, monkeypatch, "-i", "-m", "best")[1]
    assert "step_7.pt (best)\n" in about and "sft step 7 · validation loss 0.125 ·" in about
    assert "step_7.pt\n" in load_in(project, monkeypatch, "-i", "-m", path)[1]
    path.unlink()
    with pytest.raises(inference.UserError, match="there is no checkpoint .*step_7.pt"):
        load_in(project, monkeypatch, "-i", "-m", "best")
    save(project, polite(tokenizer, step=11, best=NEVER, validation=NEVER))
    assert "· not validated ·" in load_in(project, monkeypatch, "-i")[1]
    with pytest.raises(inference.UserError, match="nothing was validated up to .*; take it with -m newest"):
        load_in(project, monkeypatch, "-i", "-m", "best")


def test_models_that_cannot_write_text_are_refused(project, save, tokenizer, monkeypatch):
    sound = polite(tokenizer)
    backwards = dataclasses.replace(sound, model_config=sound.model_config | {"is_causal": False})
    with pytest.raises(inference.UserError, match="is_causal"):
        load_in(project, monkeypatch, "-m", save(project, backwards))
    sound.model["norm.weight"][0] = torch.nan
    with pytest.raises(inference.UserError, match="not finite"):
        load_in(project, monkeypatch, "-m", save(project, sound))


def test_a_damaged_checkpoint_is_one_sentence(project, save, tokenizer):
    path = save(project, polite(tokenizer))
    path.write_bytes(path.read_bytes()[:-1000])
    done = project.run("inference.py", "-m", "checkpoint/sft_20260102_030405_step_7.pt", "--prompt", "你")
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: checkpoint/.*step_7\.pt is damaged.*\n", done.stderr)


# ---- prompts -----------------------------------------------------------------------------------------


def text_generator(checkpoint, **options):
    model, tokenizer = engine.checkpoint.build(checkpoint, "a test's")
    return inference.TextGenerator(model, tokenizer, **{"temperature": 0, **options})


def test_long_prompts_lose_their_oldest_tokens(tokenizer):
    talker = text_generator(polite(tokenizer))
    hello = tokenizer.encode("Hello").tolist()
    assert talker.completion_prompt("Hello") == ([tokenizer.bos_id, *hello], 0)
    ids, left_out = talker.completion_prompt("H" * 100 + "ello")
    assert len(ids) == 48 and ids[0] == tokenizer.bos_id and ids[-4:] == hello[1:]
    assert left_out == 105 - 48
    ids, _ = talker.chat_prompt([{"role": "user", "content": "H" * 100 + "ello"}])
    assert ids[0] == tokenizer.instruct_id and ids[-5:] == [*hello[1:], tokenizer.response_id]
    assert "".join(talker.stream(ids)) == "好吗"

    short = text_generator(polite(tokenizer), max_length=2)
    ids, _ = short.completion_prompt("HHHHH你")
    assert "".join(short.stream(ids)) == "好" and short.n_prompt == 1


def test_an_answer_may_outgrow_the_context(tokenizer):
    talker = text_generator(endless(tokenizer), max_length=200)
    ids, _ = talker.chat_prompt([{"role": "user", "content": "Hello"}])
    assert "".join(talker.stream(ids)) == "你好" * 96 + "你"


def test_special_tokens_in_a_prompt_are_text(tokenizer):
    ids, _ = text_generator(polite(tokenizer)).chat_prompt([{"role": "user", "content": "<|response_mark|>"}])
    assert ids.count(tokenizer.response_id) == 1 and ids[-1] == tokenizer.response_id


def test_a_system_message_is_kept(tokenizer):
    messages = [{"role": "system", "content": "Hello"}]
    messages += [{"role": role, "content": "1+2=3" * 3} for role in ("user", "assistant") * 9] + [
        {"role": "user", "content": "你好吗"}
    ]
    ids, left_out = text_generator(polite(tokenizer)).chat_prompt(messages)
    assert ids[0] == tokenizer.system_id and len(ids) <= 48 and not left_out
    assert [message["role"] for message in messages] == ["system", "user"]


def test_a_greeting_is_forgotten_first(tokenizer):
    turns = [("assistant", "Hello"), ("user", "1+2=" * 12), ("assistant", "3"), ("user", "你好吗")]
    for kept in (2, 4):
        messages = [{"role": role, "content": text} for role, text in turns[:kept]]
        ids, _ = text_generator(polite(tokenizer)).chat_prompt(messages)
        assert messages == [{"role": "user", "content": turns[kept - 1][1]}] and len(ids) < 64


def test_a_long_conversation_forgets_its_oldest_turns(tokenizer, capsys):
    talker, messages, forgotten = text_generator(polite(tokenizer)), [], 0
    for turn in range(20):
        inference.converse(talker, messages, f"Hello{turn % 3 + 1}", profile=False)
        assert messages[-1] == {"role": "assistant", "content": "好吗"}
        assert messages[0]["role"] == "user" and talker.n_prompt <= 48
        forgotten += capsys.readouterr().err.count("turns are forgotten")
    assert 4 < len(messages) < 12 and 2 <= forgotten < 10


def reference_prompt(text_generator, messages):
    """What `chat_prompt` does to a conversation that the user ends, one turn at a time."""
    messages, limit, first = (
        list(messages),
        text_generator.max_prompt - text_generator.max_prompt // 4,
        messages[0]["role"] == "system",
    )
    while True:
        ids, _ = render_chat(text_generator.tokenizer, messages, add_generation_prompt=True)
        if len(ids) <= limit or len(messages) == first + 1:
            return messages, *text_generator.truncate_prompt(ids.tolist())
        del messages[first]
        while messages[first]["role"] == "assistant":
            del messages[first]
        limit = text_generator.max_prompt // 2


@pytest.mark.parametrize("kind", ["char", "bpe", "NFC"])
def test_turns_are_forgotten_as_if_one_at_a_time(tokenizer, kind):
    if kind != "char":
        merges = BPETokenizer.train(["Hello 你好吗 1+2=3 " * 40], 320).merges
        tokenizer = BPETokenizer(merges, normalizer=kind if kind == "NFC" else None)
    chance, talker = random.Random(0), text_generator(checkpoint(tokenizer, *chain(tokenizer, {})))
    for _ in range(200):
        roles = ["system"] * chance.randrange(2) + ["assistant"] * chance.randrange(2)
        roles += ["user", "assistant"] * chance.randrange(12) + ["user"]
        letters = "Helo 你好吗1+\u0065\u0301"
        messages = [
            {"role": role, "content": "".join(chance.choices(letters, k=chance.randrange(12)))}
            for role in roles
        ]
        expected = reference_prompt(talker, messages)
        assert (messages, *talker.chat_prompt(messages)) == expected


@pytest.mark.parametrize("n", [101, 4001, 27_001])
def test_a_long_conversation_is_encoded_once_and_as_far_as_it_may_fit(tokenizer, monkeypatch, n):
    """However many turns have to be forgotten."""
    talker, encoded = text_generator(polite(tokenizer)), []
    encode = tokenizer.encode_flat
    monkeypatch.setattr(talker.tokenizer, "encode_flat", lambda texts: encoded.extend(texts) or encode(texts))
    messages = [{"role": ("user", "assistant")[i % 2], "content": "1"} for i in range(n)]
    ids, left_out = talker.chat_prompt(messages)
    assert len(ids) <= talker.max_prompt and not left_out and len(messages) % 2 == 1
    assert len(encoded) < talker.max_prompt


def test_an_answer_that_has_begun_is_continued(tokenizer):
    talker = text_generator(polite(tokenizer))
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "好"}]
    assert "".join(talker.chat(messages)) == "吗"
    ids, _ = talker.chat_prompt(list(messages))
    assert ids == talker.chat_prompt(messages[:1])[0] + tokenizer.encode("好").tolist()
    nothing = {"role": "assistant", "content": ""}
    assert talker.chat_prompt([messages[0], nothing]) == talker.chat_prompt(messages[:1])
    long = [{"role": role, "content": "1" * 20} for role in ("user", "assistant")] * 3
    assert talker.chat_prompt(long)[0][0] == tokenizer.instruct_id
    assert [message["role"] for message in long] == ["user", "assistant"]


def test_unknown_characters_are_counted(tokenizer, capsys):
    talker = text_generator(polite(tokenizer))
    inference.print_notices(talker, "Hello你", 0)
    assert not capsys.readouterr().err
    inference.print_notices(talker, "H龘🐉你", 0)
    assert "2 characters are unknown" in capsys.readouterr().err


def test_no_character_is_cut_in_half():
    bpe = BPETokenizer.train(["ab"], 263)  # nothing but bytes
    a, *bytes_of = bpe.encode("a中🐉").tolist()
    after = dict(zip([bpe.bos_id, a, *bytes_of], [a, *bytes_of], strict=False))
    talker = text_generator(checkpoint(bpe, *chain(bpe, after)))
    assert list(talker.stream([bpe.bos_id])) == ["a", "", "", "中", "", "", "", "🐉", ""]
    cut = text_generator(checkpoint(bpe, *chain(bpe, after)), max_length=3)
    assert "".join(cut.stream([bpe.bos_id])) == "a\ufffd"


def test_control_characters_do_not_reach_a_terminal(tokenizer, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    talker = text_generator(polite(tokenizer))
    talker.stream = lambda ids: iter(["a\x1b[2J", "b\n\tc\r\x9b"])
    monkeypatch.setattr(sys, "stdout", Terminal())
    inference.say(talker, [])
    assert sys.stdout.getvalue() == "a[2Jb\n\tc\n"


# ---- the command line --------------------------------------------------------------------------------


def test_one_prompt(project, save, tokenizer):
    save(project, polite(tokenizer))
    done = project.run("inference.py", "-i", "--prompt", "Hello龘" + "?" * 99, "--profile", "-s", "1")
    assert (done.returncode, done.stdout) == (0, "好吗\n")
    assert "(1 character is unknown to this model: <|unknown|>)" in done.stderr
    assert "(the prompt is too long: its oldest 59 tokens are left out)" in done.stderr
    assert re.search(r"prompt 48 tokens, answer 2; first token after [\d.]+ ms, [\d,]+ tokens/s", done.stderr)
    assert "\x1b" not in done.stderr


def test_eight_bits_say_the_same(project, save, tokenizer):
    save(project, polite(tokenizer))
    done = project.run("inference.py", "-i", "--prompt", "Hello", "-q", "int8")
    assert (done.returncode, done.stdout) == (0, "好吗\n")


def test_five_lines_of_python(project, save, tokenizer, capsys):
    """Those at the top of inference.py. The default is greedy decoding with the newest model."""
    path = save(project, polite(tokenizer))
    lines = textwrap.dedent(re.search(r"In Python:\n\n((?:    .*\n)+)", inference.__doc__)[1])
    assert len(lines.splitlines()) <= 5 and "checkpoint/x.pt" in lines
    exec(lines.replace("checkpoint/x.pt", str(path)), {})
    assert capsys.readouterr().out == "好吗"
    assert "".join(inference.TextGenerator.load().complete("Hello你")) == "好吗"


@pytest.mark.parametrize("is_ready, when", [(True, 5), (False, 120)])
def test_the_compiled_backend_is_loaded_once_it_pays(tokenizer, monkeypatch, is_ready, when):
    """Once, when answering has taken as long as loading would: not for a short answer."""
    monkeypatch.setattr(decoding.engine, "is_compiled", lambda weights: is_ready)
    again = {i: i for i in range(tokenizer.vocab_size)}
    talker = text_generator(checkpoint(tokenizer, *chain(tokenizer, again)))
    calls, clock, step = [], 0.0, talker.decoder.step

    def slow_step():
        nonlocal clock
        clock += 0.1001
        step()

    monkeypatch.setattr(inference.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(talker.decoder, "step", slow_step)
    monkeypatch.setattr(talker.decoder, "compile", lambda: calls.append(round(clock, 1)))
    for _ in range(10):
        list(talker.stream_tokens([tokenizer.bos_id, 9], 30))
    assert calls == [when / 10]


def test_lines_piped_in(project, save, tokenizer):
    save(project, polite(tokenizer))
    lines = "\ufeffHello?\r\n\n  \n你好吗？\n".encode() + b"\xff\n"
    done = project.run("inference.py", "-i", input=lines, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (2, "好吗\n好吗\n")
    assert done.stderr == "error: standard input, line 5: not UTF-8 (invalid start byte)\n"


def test_completions_are_parted_by_an_empty_line(tokenizer, capsys):
    inference.answer_lines(
        text_generator(polite(tokenizer)), ["你\n".encode(), b"\n", "吗".encode()], False, False
    )
    assert capsys.readouterr().out == "好吗\n\n\n"  # nothing follows 吗


def test_questions_with_known_answers(project, save, tokenizer, monkeypatch, capsys):
    path = save(project, polite(tokenizer))
    chat = [("user", "Hello?"), ("assistant", "你"), ("user", "1+2="), ("assistant", "好吗")]
    lengths = [*range(1, 61), *range(65, 105)]
    rows = [{"question": "你" * n, "answer": "好吗" if n % 4 else "好"} for n in lengths]
    rows += [{"messages": [{"role": role, "content": text} for role, text in chat], "kind": "chat"}]
    questions = project.root / "my eval.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    argv = ["inference.py", "--eval", str(questions), "-m", str(path), "-t", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("COLUMNS", "80")
    inference.main()
    out, err = capsys.readouterr()
    assert "exact match: 76 of 101 = 75.2 %" in out and out.count("✓") + out.count("✗") == 10
    assert re.search(r"chat\W+100\.0 %\W+1\b", out)
    assert re.search(r"question\W+75\.0 % ± 4\.4\W+100\b", out)  # sqrt(0.75 * 0.25 / 99)
    assert "✓" in out and "好吗 …" in out and "not: 好" in out
    assert "(40 questions are too long for the context: their oldest tokens are left out)" in err


def test_batches_answer_as_one_by_one(tokenizer):
    torch.manual_seed(1)
    config = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=24).resolved(
        tokenizer.vocab_size
    )
    model = GPT(config).eval()
    for weights in model.parameters():  # a new model's own small weights would repeat one token
        torch.nn.init.normal_(weights, std=0.3)
    prompts = [torch.randint(7, tokenizer.vocab_size, (1 + i % 24,)).tolist() for i in range(72)]
    stops = (tokenizer.eos_id, *tokenizer.encode("Hel").tolist())
    answers = answer_greedily(model, prompts, [8] * len(prompts), stops)
    for prompt, (ids, has_stopped) in zip(prompts, answers, strict=True):
        room = min(8, config.block_size - len(prompt) + 1)
        alone = list(generate(model, prompt, room, temperature=0, stop_tokens=stops))
        assert (ids, has_stopped) == (alone, len(alone) < room)
    assert {has_stopped for _, has_stopped in answers} == {True, False}


# ---- in a terminal -----------------------------------------------------------------------------------


class Terminal:
    """inference.py under a pseudo-terminal."""

    def __init__(self, project, *args, **environment):
        command, *rest = project.command("inference.py", *args)
        environment = project.environment | {"TERM": "xterm", "INPUTRC": "/dev/null"} | environment
        self.child = pexpect.spawn(
            command, rest, cwd=project.elsewhere, env=environment, encoding="utf-8", timeout=60
        )

    def sees(self, pattern):
        """What is on the screen up to the next `pattern`, without colours and the like."""
        self.child.expect(pattern)
        return ERASE.sub("", self.child.before + self.child.after)

    def leave(self):
        self.child.sendcontrol("d")
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.exitstatus == 0, self.child.before


def test_a_conversation_in_a_terminal(project, save, tokenizer):
    save(project, polite(tokenizer))
    screen = Terminal(project, "-i", "--profile")
    start = screen.sees("leaves")
    assert "sft_20260102_030405_step_7.pt (newest)\n0.0" in start
    assert "sft step 7 · validation loss 0.125" in start
    screen.sees(">")
    screen.child.sendline("")
    screen.sees(">")
    screen.child.sendline("Hello")
    assert "Hello\n好吗\n(prompt 7 tokens, answer 2;" in screen.sees("tokens/s")
    screen.child.sendline("Hello")
    screen.sees("prompt 17 tokens")  # the first turn is still there
    screen.child.sendline("/new")
    screen.sees("a new conversation")
    screen.child.sendline("Hello")
    screen.sees("prompt 7 tokens.*>")
    time.sleep(0.5)  # Python misses a Ctrl-C between showing the prompt and waiting for input
    screen.child.sendcontrol("c")
    screen.sees("Ctrl-D leaves.*>")
    screen.child.send("\x1b[A")  # the key that brings back the line before
    screen.sees("Hello")
    screen.child.sendline("?")
    screen.sees("prompt 18 tokens.*>")
    screen.leave()


def test_an_answer_is_stopped(project, save, tokenizer):
    save(project, endless(tokenizer))
    screen = Terminal(project, "-l", "1000000000", NO_COLOR="1")
    assert "use -i" in screen.sees("Begin a text.*>")
    for _ in range(2):
        screen.child.sendline("你")
        screen.sees("好你好你好你")
        screen.child.sendcontrol("c")
        last = screen.sees(r"\(stopped\)[^>]*>")
        assert "Traceback" not in last and "[36m" not in screen.child.before
    screen.leave()
