"""formats/llama2c.py: bytes are where llama2.c reads them, and (slow) its run.c generates the same."""

import errno
import math
import os
import re
import shutil
import struct
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import told
from test_huggingface import LLAMA3, MIXTURE, SMALL, random_checkpoint
from test_tokenizer import BPE, CHAR, SAMPLE, any_text, awkward

from decoding.sampling import generate
from engine.checkpoint import build
from formats import llama2c
from inference import TextGenerator
from tokenizer import N_SPECIAL, CharTokenizer, render_chat

PLAIN = SMALL | dict(qk_norm=False)
CASES = {
    "characters": (PLAIN, CHAR),
    "bpe": (PLAIN | dict(n_kv_head=2, tie_embeddings=False), BPE),
    "more rows than tokens": (PLAIN | dict(n_kv_head=1, n_layer=3, vocab_size=60), CHAR),
}


@pytest.fixture
def written(command, tmp_path):
    """written(checkpoint, "--type", "q8_0"): the folder that export.py writes."""

    def written(checkpoint, *args):
        folder = tmp_path / "交给 C"
        shutil.rmtree(folder, ignore_errors=True)
        done = command("-m", checkpoint.save(), "--format", "llama2c", "-o", folder, *args)
        assert done.returncode == 0, done.stderr
        assert sorted(file.name for file in folder.iterdir()) == ["model.bin", "tokenizer.bin"]
        return folder

    return written


# ---- an independent reader ---------------------------------------------------------------------------


class Model:
    """The content of a model.bin of either version, read at the offsets that run.c and runq.c use."""

    def __init__(self, path):
        self.data, self.at = path.read_bytes(), 0
        self.version = 0
        if self.data[:4] == struct.pack("<I", 0x616B3432):  # "ak42"
            _, self.version = self.take("<Ii")
        self.dim, self.hidden, self.layers, self.heads, self.kv_heads, vocab, self.context = self.take("<7i")
        self.vocab, shared = abs(vocab), vocab > 0
        C, M, L, V = self.dim, self.hidden, self.layers, self.vocab
        D = self.size = C // self.heads
        G = self.kv_heads
        if self.version == 0:
            self.embedding = self.floats(V, C)
            self.att_norm = self.floats(L, C)
            self.q, self.k, self.v = self.floats(L, C, C), self.floats(L, G * D, C), self.floats(L, G * D, C)
            self.o = self.floats(L, C, C)
            self.mlp_norm = self.floats(L, C)
            self.w1, self.w2, self.w3 = self.floats(L, M, C), self.floats(L, C, M), self.floats(L, M, C)
            self.norm = self.floats(C)
            self.cos, self.sin = self.floats(self.context, D // 2), self.floats(self.context, D // 2)
            self.head = self.embedding if shared else self.floats(V, C)
        else:
            shared, self.group = self.take("<Bi")
            assert not any(self.data[self.at : 256])
            self.at = 256
            self.att_norm, self.mlp_norm, self.norm = self.floats(L, C), self.floats(L, C), self.floats(C)
            self.embedding = self.int8(V, C)
            self.q, self.k, self.v, self.o, self.w1, self.w2, self.w3 = (
                torch.stack([self.int8(*shape) for _ in range(L)])
                for shape in ((C, C), (G * D, C), (G * D, C), (C, C), (M, C), (C, M), (M, C))
            )
            self.head = self.embedding if shared else self.int8(V, C)
        assert self.at == len(self.data)

    def take(self, kind):
        values = struct.unpack_from(kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        return values

    def floats(self, *shape):
        count = math.prod(shape)
        assert self.at % 4 == 0  # the alignment that C expects of a float
        found = np.frombuffer(self.data, "<f4", count, self.at).reshape(shape)
        self.at += 4 * count
        return torch.tensor(found)

    def int8(self, *shape):
        count = math.prod(shape)
        numbers = torch.tensor(np.frombuffer(self.data, "i1", count, self.at)).float()
        self.at += count
        scales = self.floats(count // self.group, 1)
        assert shape[-1] % self.group == 0 and numbers.min() >= -127
        return (numbers.view(-1, self.group) * scales).view(shape)

    def logits(self, tokens):
        """The logits [T, V] that run.c computes for tokens [T]."""
        T, H, D = len(tokens), self.heads, self.size
        angles = torch.arange(T)[:, None] * 10000.0 ** -(torch.arange(0, D, 2) / D)
        by = torch.polar(torch.ones_like(angles), angles)[:, None]

        def norm(x, weight):
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

        def turn(x):
            pairs = torch.view_as_complex(x.view(T, -1, D // 2, 2).contiguous())
            return torch.view_as_real(pairs * by).flatten(2)

        x = self.embedding[tokens]
        for layer in range(self.layers):
            y = norm(x, self.att_norm[layer])
            q, k, v = turn(y @ self.q[layer].T), turn(y @ self.k[layer].T), y @ self.v[layer].T
            k, v = (part.reshape(T, -1, D).repeat_interleave(H // self.kv_heads, 1) for part in (k, v))
            scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(D)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
            x = x + torch.einsum("hts,shd->thd", scores, v).flatten(1) @ self.o[layer].T
            y = norm(x, self.mlp_norm[layer])
            hidden = torch.nn.functional.silu(y @ self.w1[layer].T) * (y @ self.w3[layer].T)
            x = x + hidden @ self.w2[layer].T
        return norm(x, self.norm) @ self.head.T


class Text:
    """The content of a tokenizer.bin with n_tokens tokens, and how run.c tokenizes with it."""

    def __init__(self, data, n_tokens):
        (self.longest,), at = struct.unpack_from("<i", data), 4
        self.words, self.scores = [], []
        for _ in range(n_tokens):
            score, length = struct.unpack_from("<fi", data, at)
            self.words.append(data[at + 8 : at + 8 + length])
            self.scores.append(score)
            at += 8 + length
        assert at == len(data) and self.longest == max(map(len, self.words)) and all(self.words)
        self.number = {word: i for i, word in reversed(list(enumerate(self.words)))}

    def encode(self, text):
        """Ids of a prompt: <s>, a space, the characters or their bytes, then merges by highest score."""
        ids = [1]
        if text:
            ids.append(self.number[b" "])
        for character in text:
            word = character.encode()
            ids += [self.number[word]] if word in self.number else [byte + 3 for byte in word]
        while True:
            pairs = [
                (self.scores[i], -at, i)
                for at, pair in enumerate(zip(ids, ids[1:], strict=False))
                if (i := self.number.get(self.words[pair[0]] + self.words[pair[1]])) is not None
            ]
            if not pairs or max(pairs)[0] <= -1e10:
                return ids
            _, at, i = max(pairs)
            ids[-at : 2 - at] = [i]


def text_of(tokenizer, n_rows=0):
    """(Text, rows): rows[i] is the embedding row of llama2.c's token i."""
    tokens = llama2c.vocabulary(tokenizer, n_rows or tokenizer.vocab_size)
    return Text(llama2c.tokenizer_file(tokens), len(tokens)), [row for _, _, row, _ in tokens]


# ---- the network -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["float32", "q8_0"])
@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_the_same(case, kind, written):
    checkpoint = random_checkpoint(*CASES[case])
    model, tokenizer = build(checkpoint, "the test")
    folder = written(checkpoint, "--type", kind)
    there = Model(folder / "model.bin")
    assert there.version == {"float32": 0, "q8_0": 2}[kind]
    sizes = there.dim, there.hidden, there.layers, there.heads, there.kv_heads, there.context
    c = model.config
    assert sizes == (c.n_embd, c.n_hidden, c.n_layer, c.n_head, c.n_kv_head, c.block_size)
    tokens = llama2c.vocabulary(tokenizer, c.vocab_size)
    Text((folder / "tokenizer.bin").read_bytes(), there.vocab)
    assert there.vocab == len(tokens)

    theirs = torch.randint(there.vocab, (40,), generator=torch.Generator().manual_seed(1))
    read, generated = (torch.tensor(rows) for rows in list(zip(*tokens, strict=True))[2:])
    ours = model(read[theirs][None])[0][:, generated]
    off = (there.logits(theirs) - ours) / ours.std()
    if kind == "float32":
        assert ours.std() > 0.3 and off.abs().max() < 1e-4
        assert torch.equal(there.cos, model.rotary_cos) and torch.equal(there.sin, model.rotary_sin)
    else:
        assert off.std() < 0.1
        # The error is at most half a step; 24 and 40 are multiples of 8.
        groups = checkpoint.model["blocks.1.mlp.down.weight"].view(-1, 8)
        found = there.w2[1].view(-1, 8)
        assert there.group == 8
        assert ((found - groups).abs() <= groups.abs().amax(1, keepdim=True) / 254 + 1e-7).all()


def test_offsets_of_a_file(written):
    """Some bytes at offsets computed by hand: 24 wide, 40 in the MLP, 2 layers, 4 heads, V tokens."""
    checkpoint = random_checkpoint(*CASES["characters"])
    data = (written(checkpoint) / "model.bin").read_bytes()
    V = len(llama2c.vocabulary(CHAR, CHAR.vocab_size))
    assert struct.unpack_from("<7i", data) == (24, 40, 2, 4, 4, -V, 64)
    state = checkpoint.model

    def at(offset, count=24):
        return torch.tensor(np.frombuffer(data, "<f4", count, 28 + 4 * offset))

    assert torch.equal(at(24), state["wte.weight"][CHAR.bos_id])  # token 1
    assert torch.equal(at(24 * V), state["blocks.0.attn_norm.weight"])
    q = 24 * V + 2 * 24
    # The second row of the queries is the partner of the first: row 3 of a head of 6.
    assert torch.equal(at(q + 24), state["blocks.0.attn.qkv.weight"][3])
    norms = q + 4 * 2 * 24 * 24
    assert torch.equal(at(norms + 24), state["blocks.1.mlp_norm.weight"])
    gate = norms + 2 * 24
    assert torch.equal(at(gate, 40 * 24).view(40, 24), state["blocks.0.mlp.gate_up.weight"][:40])
    assert torch.equal(at(gate + 2 * 40 * 24, 40), state["blocks.0.mlp.down.weight"][0])
    end = gate + 6 * 40 * 24
    assert torch.equal(at(end), state["norm.weight"])
    head = end + 24 + 2 * 64 * 3
    assert torch.equal(at(head + 24), state["wte.weight"][CHAR.eos_id])  # token 1 ends an answer
    assert len(data) == 28 + 4 * (head + 24 * V)


@pytest.mark.parametrize("kind", ["float32", "q8_0"])
def test_a_checkpoint_in_half_precision(kind, written):
    checkpoint = random_checkpoint(*CASES["characters"])
    checkpoint.model = {name: tensor.bfloat16() for name, tensor in checkpoint.model.items()}
    there = Model(written(checkpoint, "--type", kind) / "model.bin")
    assert torch.equal(there.norm, checkpoint.model["norm.weight"].float())


def test_a_group_of_zeros(written):
    checkpoint = random_checkpoint(*CASES["characters"])
    checkpoint.model["blocks.0.attn.proj.weight"].zero_()
    assert not Model(written(checkpoint, "--type", "q8_0") / "model.bin").o[0].any()


# ---- the tokenizer ---------------------------------------------------------------------------------

TEXTS = {tokenizer.kind: text_of(tokenizer) for tokenizer in (CHAR, BPE)}


@settings(deadline=None)
@given(text=any_text | awkward)
def test_a_prompt_of_characters_is_the_same(text):
    theirs, rows = TEXTS["char"]
    text = re.sub("[\0\ue000-\ue007]", "", text)
    assert [rows[i] for i in theirs.encode(text)] == [CHAR.bos_id, *CHAR.encode(text).tolist()]


@settings(deadline=None, max_examples=50)
@given(corpus=any_text, text=any_text)
def test_a_prompt_of_any_characters_is_the_same(corpus, text):
    """... even if the space is unknown."""
    corpus, text = (re.sub("[\0\ue000-\ue007]", "", part) for part in (corpus, text))
    tokenizer = CharTokenizer.train([corpus])
    theirs, rows = text_of(tokenizer)
    assert [rows[i] for i in theirs.encode(text)] == [tokenizer.bos_id, *tokenizer.encode(text).tolist()]


def typed(messages):
    """A conversation as it is typed: each special token is one character."""
    mark = {"system": chr(0xE006), "user": chr(0xE004), "assistant": chr(0xE005)}
    end = {"assistant": chr(0xE003)}
    turns = [mark[m["role"]] + m["content"] + end.get(m["role"], "") for m in messages]
    return "".join(turns) + mark["assistant"]


@settings(deadline=None, max_examples=50)
@given(contents=st.lists(st.text(st.sampled_from(sorted(set(SAMPLE))), max_size=20), min_size=1, max_size=3))
def test_a_conversation_is_the_same(contents):
    roles = ("user", "assistant", "user")
    messages = [dict(role=role, content=text) for role, text in zip(roles, contents, strict=False)]
    messages = messages[: len(messages) - (len(messages) + 1) % 2]  # the user's turn is the last
    theirs, rows = TEXTS["char"]
    for chat in (messages, [dict(role="system", content=" x"), *messages]):
        assert [rows[i] for i in theirs.encode(typed(chat))] == render_chat(CHAR, chat, True)[0].tolist()


def test_most_bpe_prompts_are_the_same():
    """run.c does not split text into words first, so it merges a few pairs differently."""
    theirs, rows = TEXTS["bpe"]
    pieces = [SAMPLE[i : i + 20] for i in range(0, len(SAMPLE) // 3, 5)]
    same = 0
    for piece in pieces:
        ids = [rows[i] for i in theirs.encode(piece)]
        assert ids[0] == BPE.bos_id and BPE.decode(ids[1:]) == piece  # the text is always the same
        same += ids[1:] == BPE.encode(piece).tolist()
    assert same >= 0.6 * len(pieces)


# ---- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            SMALL,
            "qk_norm is true in this model, but llama2.c supports only false: train with --set qk_norm=false",
        ),
        (PLAIN | dict(bias=True), "bias is true in this model, but llama2.c supports only false"),
        (PLAIN | dict(use_rope=False), "use_rope is false in this model, but llama2.c supports only true"),
        (
            PLAIN | dict(is_causal=False),
            "is_causal is false in this model, but llama2.c supports only true: ",
        ),
        (
            PLAIN | dict(rope_theta=5e5),
            "rope_theta is 500000.0 in this model, but llama2.c supports only 10000.0",
        ),
        (
            PLAIN | dict(rope_scaling=LLAMA3),
            'rope_scaling is "llama3" in this model, but llama2.c supports only n',
        ),
        (PLAIN | dict(norm_eps=1e-6), "norm_eps is 1e-06 in this model, but llama2.c supports only 1e-05"),
        (PLAIN | dict(head_dim=8), "needs head_dim to be n_embd / n_head; --format huggingface writes this"),
        (
            MIXTURE,
            'architecture is "deepseek_v3" in this model, but llama2.c supports only "nano": train with',
        ),
        (SMALL | dict(architecture="nanochat"), ': train with --set architecture="nano"; --format huggingfa'),
    ],
)
def test_a_model_without_counterpart(fields, sentence, command):
    path = random_checkpoint(fields, CHAR).save()
    assert sentence in told(command("-m", path, "--format", "llama2c"))
    assert list(path.parent.iterdir()) == [path]


def test_widths_without_a_group_size(command):
    path = random_checkpoint(PLAIN | dict(n_hidden=42), CHAR).save()
    sentence = told(command("-m", path, "--format", "llama2c", "--type", "q8_0"))
    assert sentence == "n_embd and n_hidden must be multiples of 4 for int8; use --type float32"
    assert command("-m", path, "--format", "llama2c").returncode == 0


def test_characters_that_stand_for_special_tokens(command):
    path = random_checkpoint(PLAIN, CharTokenizer.train([SAMPLE + "\ue004"])).save()
    assert "has characters from U+E000 on, which are special" in told(
        command("-m", path, "--format", "llama2c")
    )


def test_an_existing_folder_is_never_overwritten(command):
    path = random_checkpoint(PLAIN, CHAR).save()
    there = path.with_name(f"{path.stem}_llama2c")
    there.mkdir()
    assert f"{there.name} already exists; remove it" in told(command("-m", path, "--format", "llama2c"))
    assert not list(there.iterdir())


def test_nothing_is_left_of_half_a_folder(command, monkeypatch):
    def full(tokens):
        raise OSError(errno.ENOSPC, "no space")

    path = random_checkpoint(PLAIN, CHAR).save()
    monkeypatch.setattr(llama2c, "tokenizer_file", full)
    assert "the disk is full" in told(command("-m", path, "--format", "llama2c"))
    assert list(path.parent.iterdir()) == [path]


# ---- llama2.c --------------------------------------------------------------------------------------

# Reads lines of text in hexadecimal; prints the ids that run.c makes of each.
ENCODE = r"""
#define TESTING
#include "run.c"
int main(int argc, char *argv[]) {
    Tokenizer t;
    build_tokenizer(&t, argv[1], atoi(argv[2]));
    static char hex[100000], text[50000];
    static int tokens[100000];
    while (scanf("%99999s", hex) == 1) {
        int n = 0, count;
        for (char *c = hex + 1; *c; c += 2) { unsigned byte; sscanf(c, "%2x", &byte); text[n++] = byte; }
        text[n] = 0;
        encode(&t, text, 1, 0, tokens, &count);
        for (int i = 0; i < count; i++) printf("%d ", tokens[i]);
        printf("\n");
    }
}
"""
# Reads ids; writes the logits after each.
SCORES = r"""
#define TESTING
#include SOURCE
int main(int argc, char *argv[]) {
    Transformer t;
    build_transformer(&t, argv[1]);
    for (int pos = 0, token; scanf("%d", &token) == 1; pos++)
        fwrite(forward(&t, token, pos), sizeof(float), t.config.vocab_size, stdout);
}
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """{name: path} of run, runq and the two programs above, compiled from llama2.c's source."""
    source = os.environ.get("LLAMA2C")
    if not source:
        pytest.skip("LLAMA2C does not name a folder with run.c and runq.c of github.com/karpathy/llama2.c")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("llama2c")
    (folder / "encode.c").write_text(ENCODE)
    (folder / "scores.c").write_text(SCORES)
    for name, path, *options in (
        ("run", f"{source}/run.c"),
        ("runq", f"{source}/runq.c"),
        ("encode", folder / "encode.c"),
        ("scores_of_run", folder / "scores.c", '-DSOURCE="run.c"'),
        ("scores_of_runq", folder / "scores.c", '-DSOURCE="runq.c"'),
    ):
        command = [compiler, "-O2", "-w", *options, "-I", source, "-o", folder / name, path, "-lm"]
        subprocess.run(list(map(str, command)), check=True)
    return {path.name: path for path in folder.iterdir()}


def output(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, check=True, **options).stdout


def generated_text(program, folder, text):
    """The program's greedy output up to the end of the context."""
    return output(program, folder / "model.bin", "-z", folder / "tokenizer.bin", "-t", 0, "-n", 0, "-i", text)


def printed(words):
    """What run.c prints of these words: it leaves out single bytes that are not printable or white space."""
    spaces = (b"\t", b"\n", b"\v", b"\f", b"\r")
    return b"".join(w for w in words if len(w) > 1 or 0x20 <= w[0] < 0x7F or w in spaces)


def talkative(case):
    """The case's checkpoint, with special tokens made unlikely, so that it stops rarely."""
    checkpoint = random_checkpoint(*CASES[case])
    checkpoint.model["lm_head.weight"][: N_SPECIAL - 3] *= 0.1
    return checkpoint


PROMPTS = ("The fox", " 狐狸 é  x", "1 + 1 = 2\n", "\t敏捷", "<|eos|> 1", "")


def check_generation(checkpoint, folder, program, prompts):
    """prompts: {typed text: Nano's ids}. Returns how many tokens were generated."""
    model, tokenizer = build(checkpoint, "the test")
    theirs, rows = text_of(tokenizer, model.config.vocab_size)
    number = {row: i for i, row in reversed(list(enumerate(rows)))}
    length = 0
    for text, ids in prompts.items():
        numbers = theirs.encode(text)
        if tokenizer.kind == "bpe":
            ids = [rows[i] for i in numbers]  # may differ from Nano's: see above
        assert [rows[i] for i in numbers] == ids
        answer = list(generate(model, ids, 64 - len(ids), temperature=0, stop_tokens=[tokenizer.eos_id]))
        expected = printed([theirs.words[i] for i in (*numbers[1:], *(number[row] for row in answer))])
        assert (
            generated_text(program, folder, text).removesuffix(b"\n").startswith(expected.removesuffix(b"\n"))
        )
        length += len(answer)
    return length


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_run_c_generates_the_same(case, written, programs):
    checkpoint = talkative(case)
    text_generator = TextGenerator(*build(checkpoint, "the test"))
    prompts = {text: text_generator.completion_prompt(text)[0] for text in PROMPTS}
    assert check_generation(checkpoint, written(checkpoint), programs["run"], prompts) > 60


@pytest.mark.slow
@torch.no_grad()
def test_run_c_answers_as_the_chat_does(written, programs):
    checkpoint = talkative("characters")
    text_generator = TextGenerator(*build(checkpoint, "the test"))
    chats = [
        [dict(role="user", content="The fox? Z狗🦊")],
        [dict(role="system", content=" 狐"), dict(role="user", content="1 + 1 = ")],
        [dict(role="user", content="1"), dict(role="assistant", content="2"), dict(role="user", content="3")],
    ]
    prompts = {typed(chat): text_generator.chat_prompt(chat)[0] for chat in chats}
    assert check_generation(checkpoint, written(checkpoint), programs["run"], prompts) > 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "q8_0"])
@pytest.mark.parametrize("case", CASES)
def test_run_c_computes_the_same(case, kind, written, programs):
    folder = written(random_checkpoint(*CASES[case]), "--type", kind)
    there = Model(folder / "model.bin")
    tokens = torch.randint(there.vocab, (60,), generator=torch.Generator().manual_seed(1))
    program = programs["scores_of_run" if kind == "float32" else "scores_of_runq"]
    scores = output(program, folder / "model.bin", input=" ".join(map(str, tokens.tolist())).encode())
    theirs = torch.tensor(np.frombuffer(scores, "<f4")).view(60, there.vocab)
    ours = there.logits(tokens)
    off = (ours - theirs) / ours.std()
    print(f"{case}, {kind}: off by {off.std():.1e} of their spread, at most {off.abs().max():.1e}")
    # runq also rounds activations to int8.
    assert off.std() < {"float32": 1e-5, "q8_0": 0.1}[kind]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_run_c_tokenizes_like_the_reader_here(case, written, programs):
    checkpoint = random_checkpoint(*CASES[case])
    theirs, _ = text_of(CASES[case][1], checkpoint.model_config["vocab_size"])
    folder = written(checkpoint)
    texts = [
        *PROMPTS, " ", "  ", "🦊🦊 Zebra 𝄞🙂 q", "\u0800\u00ff中文 语\U0010ffff", "don't 12345 a1b22c333  !!",
        typed([dict(role="user", content="fox 狐 Z")]),
        typed([dict(role="system", content=" "), dict(role="user", content="1 + 1")]),
        *(SAMPLE[i : i + 30] for i in range(0, 90, 7)),
    ]  # fmt: skip
    lines = "\n".join("x" + text.encode().hex() for text in texts)
    found = output(programs["encode"], folder / "tokenizer.bin", len(theirs.words), input=lines.encode())
    found = [list(map(int, line.split())) for line in found.decode().splitlines()]
    # Of several tokens with the same bytes, any may be found; they have the same embedding.
    word = [theirs.words[i] for i in range(len(theirs.words))]
    assert [[word[i] for i in ids] for ids in found] == [[word[i] for i in theirs.encode(t)] for t in texts]


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_the_example_prompt_is_quoted_for_the_shell(task):
    told = subprocess.run(
        ["sh", "-c", f"printf %s {llama2c.example_prompt(task == 'sft')}"], capture_output=True, check=True
    )
    chat = typed([dict(role="user", content="Who are you?")])
    assert told.stdout.decode() == {"pretrain": "Once upon a time", "sft": chat}[task]
