"""formats/gguf.py: the content of the file, and (slow) that llama.cpp computes and generates the same."""

import errno
import math
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import told
from test_huggingface import FOREIGN, LLAMA3, MIXTURE, SMALL, YARN, random_checkpoint, read_foreign
from test_tokenizer import BPE, CHAR, SAMPLE, any_text, awkward

from common.errors import UserError
from decoding.sampling import generate
from engine.checkpoint import build
from formats import gguf as gguf_format
from formats.huggingface import CHAT_TEMPLATE
from inference import TextGenerator
from tokenizer import SPECIAL_TOKENS, BPETokenizer, CharTokenizer, byte_alphabet

NANO = {
    "llama": (SMALL | dict(qk_norm=False), BPE),
    "llama, all of it": (
        SMALL | dict(qk_norm=False, bias=True, n_kv_head=1, head_dim=10, tie_embeddings=False,
                     rope_theta=500.0, norm_eps=1e-3, rope_scaling=LLAMA3, vocab_size=60), CHAR),
    "llama, YaRN": (SMALL | dict(qk_norm=False, rope_scaling=YARN), CHAR),
    "qwen3": (SMALL | dict(n_kv_head=2), CHAR),
    "qwen3, all of it": (
        SMALL | dict(n_kv_head=2, head_dim=14, tie_embeddings=False, rope_scaling=YARN, vocab_size=400),
        BPE),
}  # fmt: skip
LATENT = MIXTURE | dict(q_lora_rank=20, norm_eps=1e-6)
CASES = NANO | {
    "deepseek2": (LATENT, CHAR),
    "deepseek2, all of it": (
        LATENT | dict(n_shared_experts=2, tie_embeddings=True, rope_scaling=YARN), BPE),
    "deepseek2, experts only": (
        LATENT | dict(num_nextn_predict_layers=0, first_k_dense_replace=0, norm_topk_prob=False), CHAR),
}  # fmt: skip


@pytest.fixture
def written(command, tmp_path):
    """written(checkpoint, "--type", "q8_0"): the file that export.py writes."""

    def written(checkpoint, *args):
        path = tmp_path / "交给 others.gguf"
        path.unlink(missing_ok=True)
        done = command("-m", checkpoint.save(), "--format", "gguf", "-o", path, *args)
        assert done.returncode == 0, done.stderr
        assert [file.name for file in tmp_path.iterdir()] == [engine_folder(tmp_path), path.name]
        return path

    return written


def engine_folder(tmp_path):
    return next(file.name for file in tmp_path.iterdir() if file.is_dir())


def keys_of(path):
    """{key: value} of a file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path):
    """{name: float32 tensor} of a file, whatever it is stored as."""
    return {
        tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        for tensor in gguf.GGUFReader(path).tensors
    }


# ---- the network -----------------------------------------------------------------------------------


def rotate(x, frequencies, gain, pairs):
    """Rotary embedding of x [T, heads, D]. pairs: "neighbours" or "halves" are rotated together."""
    angles = torch.arange(len(x))[:, None] * frequencies
    by = torch.polar(torch.full_like(angles, gain), angles)[:, None]  # [T, 1, D / 2]
    shape = (-1, 2) if pairs == "neighbours" else (2, -1)
    x = x.unflatten(-1, shape).transpose(-1, -2) if pairs == "halves" else x.unflatten(-1, shape)
    y = torch.view_as_real(torch.view_as_complex(x.contiguous()) * by)
    return (y.transpose(-1, -2) if pairs == "halves" else y).flatten(-2)


def logits_of(keys, tensors, tokens):
    """Logits [T, V] of tokens [T] for a llama or qwen3 in GGUF, written from llama.cpp's description."""
    architecture = keys["general.architecture"]
    key = {name.removeprefix(architecture + "."): value for name, value in keys.items()}
    H, G = key["attention.head_count"], key["attention.head_count_kv"]
    D, T, eps = key["attention.key_length"], len(tokens), key["attention.layer_norm_rms_epsilon"]
    frequencies = key["rope.freq_base"] ** -(torch.arange(0, D, 2) / D)
    frequencies = frequencies / tensors.get("rope_freqs.weight", 1.0)
    gain = 1.0
    if key.get("rope.scaling.type") == "yarn":
        factor, context = key["rope.scaling.factor"], key["rope.scaling.original_context_length"]
        low, high = (
            D * math.log(context / (key[f"rope.scaling.yarn_beta_{side}"] * 2 * math.pi))
            / (2 * math.log(key["rope.freq_base"])) for side in ("fast", "slow")
        )  # fmt: skip
        low, high = max(0, math.floor(low)), min(D - 1, math.ceil(high))
        ramp = 1 - ((torch.arange(D // 2) - low) / max(0.001, high - low)).clamp(0, 1)
        frequencies = frequencies / factor * (1 - ramp) + frequencies * ramp
        gain = 1 + 0.1 * math.log(factor)

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * tensors[name + ".weight"]

    def linear(x, name):
        return x @ tensors[name + ".weight"].T + tensors.get(name + ".bias", 0.0)

    x = tensors["token_embd.weight"][tokens]
    for layer in range(key["block_count"]):
        block = f"blk.{layer}."
        y = norm(x, block + "attn_norm")
        q, k, v = (linear(y, f"{block}attn_{name}").unflatten(-1, (-1, D)) for name in "qkv")
        if architecture == "qwen3":
            q, k = norm(q, block + "attn_q_norm"), norm(k, block + "attn_k_norm")
        pairs = "halves" if architecture == "qwen3" else "neighbours"
        q, k = (rotate(heads, frequencies, gain, pairs) for heads in (q, k))
        k, v = (heads.repeat_interleave(H // G, dim=1) for heads in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(D)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
        y = torch.einsum("hts,shd->thd", scores, v).flatten(1)
        x = x + linear(y, block + "attn_output")
        y = norm(x, block + "ffn_norm")
        gate = torch.nn.functional.silu(linear(y, block + "ffn_gate"))
        x = x + linear(gate * linear(y, block + "ffn_up"), block + "ffn_down")
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return norm(x, "output_norm") @ head.T


@torch.no_grad()
@pytest.mark.parametrize("case", NANO)
def test_the_file_computes_the_same(case, written):
    checkpoint = random_checkpoint(*NANO[case])
    model, tokenizer = build(checkpoint, "the test")
    path = written(checkpoint)
    tokens = torch.randint(tokenizer.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    ours, theirs = model(tokens[None])[0], logits_of(keys_of(path), tensors_of(path), tokens)
    n_rows = model.config.vocab_size
    assert ours.std() > 0.5 and (ours - theirs[:, :n_rows]).abs().max() < 1e-4
    # The tokens for unknown characters are as unlikely as <|padding|>.
    torch.testing.assert_close(theirs[:, n_rows:], theirs[:, :1].expand(-1, theirs.shape[1] - n_rows))


def test_keys(written):
    fields, tokenizer = NANO["qwen3, all of it"]
    keys = keys_of(written(random_checkpoint(fields, tokenizer)))
    expected = {
        "general.architecture": "qwen3", "general.name": "Nano sft", "general.file_type": 0,
        "qwen3.context_length": 64, "qwen3.embedding_length": 24, "qwen3.block_count": 2,
        "qwen3.feed_forward_length": 40, "qwen3.attention.head_count": 4, "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 14, "qwen3.attention.value_length": 14,
        "qwen3.rope.dimension_count": 14, "qwen3.rope.freq_base": 10000.0, "qwen3.vocab_size": 400,
        "qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 16,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    assert {key: keys.get(key) for key in expected} == expected
    assert keys["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    # All special tokens but <|unknown|> have one of the kinds at which llama.cpp stops.
    kinds = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    assert sorted(keys[f"tokenizer.ggml.{kind}_token_id"] for kind in kinds) == [0, 2, 3, 4, 5, 6]
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[:7] == list(SPECIAL_TOKENS) and tokens[330:332] == ["<|unused_330|>", "<|unused_331|>"]
    assert len(tokens) == len(types) == 400
    kind = gguf.TokenType
    assert types[:7] == [kind.CONTROL, kind.UNKNOWN, *[kind.CONTROL] * 5]
    assert set(types[7:330]) == {kind.NORMAL} and set(types[330:]) == {kind.UNUSED}
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in BPE.merges]


ASCII = CharTokenizer.train(["abc "])


@pytest.mark.parametrize("tokenizer", [ASCII, BPETokenizer([])], ids=["char", "bpe"])
def test_there_always_is_a_merge(tokenizer):
    """llama.cpp does not open a file without merges, so there is one of two bytes that UTF-8 never has."""
    merges = gguf_format.vocabulary(tokenizer, tokenizer.vocab_size)[2]
    assert merges == ["À Á"]


def test_a_pretrained_model_begins_with_bos_and_has_no_template(written):
    keys = keys_of(written(random_checkpoint(*NANO["qwen3"], task="pretrain")))
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.chat_template" not in keys


def test_names_and_shapes_of_experts(written):
    checkpoint = random_checkpoint(*CASES["deepseek2"])
    tensors = tensors_of(written(checkpoint))
    assert not [name for name in tensors if name.startswith("blk.3.")]  # the multi-token prediction module
    assert tensors["blk.1.ffn_gate_exps.weight"].shape == (8, 16, 24)
    assert tensors["blk.1.ffn_down_exps.weight"].shape == (8, 24, 16)
    assert tensors["blk.1.exp_probs_b.bias"].shape == (8,)
    assert tensors["blk.0.attn_k_b.weight"].shape == (4, 16, 8)
    assert tensors["blk.0.attn_v_b.weight"].shape == (4, 12, 16)
    both = checkpoint.model["blocks.1.mlp.experts.gate_up"]  # [8, 24, 32]
    torch.testing.assert_close(tensors["blk.1.ffn_gate_exps.weight"], both[:, :, :16].mT)
    torch.testing.assert_close(tensors["blk.1.ffn_up_exps.weight"], both[:, :, 16:].mT)


@pytest.mark.parametrize("kind", ["float32", "float16", "q8_0"])
def test_types(kind, written, command):
    """Matrices have the requested type if their rows allow it; vectors stay float32."""
    fields = SMALL | dict(n_embd=64, n_hidden=96, head_dim=12)  # the output projection has rows of 48
    checkpoint = random_checkpoint(fields, BPE)
    path = written(checkpoint, "--type", kind)
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    name = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}[kind]
    assert stored["token_embd.weight"] == stored["blk.0.ffn_down.weight"] == name
    assert stored["blk.1.attn_output.weight"] == {"q8_0": "F16"}.get(kind, name)
    assert {stored["output_norm.weight"], stored["blk.0.attn_q_norm.weight"]} == {"F32"}
    ours, theirs = checkpoint.model["blocks.0.mlp.down.weight"], tensors_of(path)["blk.0.ffn_down.weight"]
    groups = ours.view(-1, 32)
    bound = {
        "float32": 0.0,
        "float16": 2**-11 * groups.abs(),
        # half a step, plus the rounding of the scale to float16
        "q8_0": (0.5 + 127 * 2**-11) * groups.abs().amax(1, keepdim=True) / 127,
    }[kind]
    assert ((groups - theirs.view(-1, 32)).abs() <= bound).all()


def test_a_checkpoint_in_half_precision(written):
    checkpoint = random_checkpoint(*NANO["llama"])
    checkpoint.model = {name: tensor.bfloat16() for name, tensor in checkpoint.model.items()}
    tensors = tensors_of(written(checkpoint))
    assert torch.equal(tensors["token_embd.weight"], checkpoint.model["wte.weight"].float())


def test_values_too_large_for_float16(command):
    checkpoint = random_checkpoint(*NANO["qwen3"])
    checkpoint.model["blocks.0.mlp.down.weight"][0, 0] = 1e5
    path = checkpoint.save()
    assert "blk.0.ffn_down.weight has values too large for float16; use --type float32" in told(
        command("-m", path, "--format", "gguf", "--type", "float16")
    )
    assert not path.with_suffix(".gguf").exists()


# ---- the tokenizer ---------------------------------------------------------------------------------


def ids_of(keys, text):
    """llama.cpp's BPE of a single word: merges the pair of lowest rank first, the leftmost of equals."""
    letters = byte_alphabet()
    number = {token: i for i, token in enumerate(keys["tokenizer.ggml.tokens"])}
    rank = {tuple(pair.split(" ")): i for i, pair in enumerate(keys["tokenizer.ggml.merges"])}
    parts = [letters[byte] for byte in text.encode()]
    while pairs := [
        (rank[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in rank
    ]:
        _, i = min(pairs)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
    return [number[part] for part in parts if part in number]


KEYS = {}


def keys_of_tokenizer(tokenizer, n_rows):
    if tokenizer.fingerprint not in KEYS:
        tokens, _, merges, _ = gguf_format.vocabulary(tokenizer, n_rows)
        KEYS[tokenizer.fingerprint] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
    return KEYS[tokenizer.fingerprint]


def check_characters(tokenizer, text):
    n_rows = tokenizer.vocab_size + 3
    keys = keys_of_tokenizer(tokenizer, n_rows)
    ids = ids_of(keys, text)
    assert [1 if i >= n_rows else i for i in ids] == tokenizer.encode(text).tolist()


@settings(deadline=None)
@given(text=any_text | awkward)
def test_characters_are_assembled_from_bytes(text):
    check_characters(CHAR, text)


# Characters whose UTF-8 bytes are nearly the same, or repeat.
alike = st.text(st.sampled_from(
    "aé\u00ff\u0100\u0800\u0801\u0888\u4e00\u4e40\u8000\U00010000\U00010001\U00020820"
    "\U00010410\U0001f642\U0001f643\U0001f602\U0010ffff\U00088888"
))  # fmt: skip


@settings(deadline=None)
@given(corpus=alike, text=alike)
def test_characters_with_similar_bytes(corpus, text):
    KEYS.clear()
    check_characters(CharTokenizer.train([corpus]), text)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GPT-2", "gpt-2"), ("Llama 3", "llama-bpe"), ("Qwen3", "qwen2"), ("DeepSeek V3", "deepseek-v3"),
        ("SmolLM", "smollm"), ("nanochat", None), ("uncut", None),
    ],
)  # fmt: skip
def test_names_of_pre_tokenizers(name, expected):
    tokenizer = read_foreign(name)[0]
    if expected is None:
        with pytest.raises(
            UserError, match="cannot split text the way this tokenizer does; --format hugging"
        ):
            gguf_format.pre_tokenizer_name(tokenizer)
    else:
        assert gguf_format.pre_tokenizer_name(tokenizer) == expected
        rules = tokenizer.rules | dict(ignore_merges=not tokenizer.rules.get("ignore_merges"), words=[])
        other = BPETokenizer(tokenizer.merges, **rules)
        if name == "Llama 3":
            assert gguf_format.pre_tokenizer_name(other) == "smaug-bpe"
        else:
            with pytest.raises(UserError, match="cannot split text"):
                gguf_format.pre_tokenizer_name(other)


def test_missing_normalization_is_reported(command, tmp_path):
    path = random_checkpoint(SMALL, read_foreign("Qwen3")[0]).save()
    assert "does not normalise text to NFC" in command("-m", path, "--format", "gguf").stdout


# ---- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (SMALL | dict(use_rope=False), "use_rope is false in this model"),
        (SMALL | dict(is_causal=False), "is_causal is false in this model"),
        (SMALL | dict(bias=True), "bias is true in this model"),
        (SMALL | dict(rope_scaling=LLAMA3), 'rope_scaling.rope_type is "llama3" in this model, but llama'),
        (SMALL | dict(architecture="nanochat"), "llama.cpp does not know nanochat; --format huggingface"),
        (LATENT | dict(q_lora_rank=None), "llama.cpp supports deepseek_v3 only with a q_lora_rank; --format"),
        (
            LATENT | dict(norm_eps=1e-5),
            "norm_eps is 1e-05 in this model, but llama.cpp's deepseek2 supports only",
        ),
        (LATENT | dict(n_layer=26), "with 26 or 27 layers only without a q_lora_rank; --format hugging"),
    ],
)
def test_a_model_without_counterpart(fields, sentence, command):
    path = random_checkpoint(fields, CHAR).save()
    assert sentence in told(command("-m", path, "--format", "gguf"))
    assert list(path.parent.iterdir()) == [path]


def test_a_word_spelled_like_a_special_token(command):
    letters = [*"<|bos|>"]
    merges = [["".join(letters[:n]), letters[n]] for n in range(1, len(letters))]
    path = random_checkpoint(SMALL, BPETokenizer(merges)).save()
    assert "spelled like one of its special tokens" in told(command("-m", path, "--format", "gguf"))


def test_an_existing_file_is_never_overwritten(command):
    path = random_checkpoint(*NANO["qwen3"]).save()
    there = path.with_suffix(".gguf")
    there.write_text("mine")
    sentence = told(command("-m", path, "--format", "gguf"))
    assert sentence.endswith(f"{there.name} already exists; remove it, or choose another name with --output")
    assert there.read_text() == "mine"


def test_nothing_is_left_of_half_a_file(command, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    path = random_checkpoint(*NANO["qwen3"]).save()
    monkeypatch.setattr(gguf.GGUFWriter, "write_ti_data_to_file", full)
    assert "the disk is full" in told(command("-m", path, "--format", "gguf"))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--type", "q8_0"], "huggingface cannot write --type q8_0: it keeps the number type of the c"),
        (
            ["--format", "llama2c", "--type", "float16"],
            "llama2c cannot write --type float16: choose float32 or q8_0",
        ),
        (["--format", "onnx"], "argument --format: invalid choice: 'onnx'"),
        (["--format", "gguf", "--type", "int4"], "gguf cannot write --type int4: choose float32 or"),
        (["--read", ".", "--format", "gguf"], "it takes neither --format nor --type"),
        (["-o", "there", "--format", "gguf"], "there already exists"),
    ],
)
def test_wrong_arguments(args, sentence, shared_project):
    """... are reported before torch is imported."""
    (shared_project.elsewhere / "there").mkdir(exist_ok=True)
    code = (
        "import runpy, sys; script = sys.argv.pop(1)\n"
        "try: runpy.run_path(script, run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(shared_project.root / "export.py"), *args],
        cwd=shared_project.elsewhere, capture_output=True, text=True,
        env=shared_project.environment | {"PYTHONPATH": str(shared_project.root)},
    )  # fmt: skip
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.split() == ["False"]


# ---- llama.cpp -------------------------------------------------------------------------------------

TEXTS = (
    "", " ", "The fox", " 狐狸 é\n\n  x ", "\n\t 1 + 1 = 2\r\n\r\n", "🦊🦊 Zebra 𝄞🙂 q", "<|eos|> <|bos|>x",
    "don't DON'T 12345 a1b22c333  !!\n", "e\u0301 中文，语言。\u3000x", SAMPLE[:60], "   ", "\u200b\ufeff",
)  # fmt: skip
CHAT = [
    {"role": "system", "content": " \n1 = 2 "},
    {"role": "user", "content": "\nfox? 狐 Zq"},
    {"role": "assistant", "content": "dog.\n"},
    {"role": "user", "content": " 1 + 1"},
]


@pytest.fixture
def opened():
    """opened(path): the model in llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

    def opened(path):
        # Keys and values in float32 (type 0), as in Nano.
        exact = dict(n_threads=1, type_k=0, type_v=0, flash_attn=False)
        return llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, **exact)

    return opened


def is_stop_token(llama, token):
    import llama_cpp

    return llama_cpp.llama_vocab_is_eog(llama._model.vocab, token)


def as_nano_ids(ids, n_rows):
    """Replace the first bytes of unknown characters with <|unknown|>."""
    return [1 if i >= n_rows else i for i in ids]


@pytest.mark.slow
def test_a_tokenizer_without_merges_opens_in_llama_cpp(written, opened):
    for tokenizer in (ASCII, BPETokenizer([])):
        llama = opened(written(random_checkpoint(NANO["llama"][0], tokenizer)))
        ids = llama.tokenize(b"fox cab", add_bos=False, special=False)
        assert as_nano_ids(ids, tokenizer.vocab_size) == tokenizer.encode("fox cab").tolist()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["float32", "float16", "q8_0"])
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_and_generates_the_same(case, kind, written, opened):
    fields, tokenizer = CASES[case]
    if kind == "q8_0" and not case.startswith("deepseek2"):
        fields = fields | dict(n_embd=64, n_hidden=96)
    checkpoint = random_checkpoint(fields, tokenizer)
    checkpoint.model["lm_head.weight"][:7] *= 0.1  # make it stop rarely
    model, tokenizer = build(checkpoint, "the test")
    llama = opened(written(checkpoint, "--type", kind))
    n_rows = model.config.vocab_size
    for text in TEXTS:
        ids = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert as_nano_ids(ids, n_rows) == tokenizer.encode(text).tolist(), text

    tokens = torch.randint(tokenizer.vocab_size, (60,), generator=torch.Generator().manual_seed(1))
    llama.eval(tokens.tolist())
    ours, theirs = model(tokens[None])[0], torch.tensor(llama.scores[:60, :n_rows])
    off = (ours - theirs) / ours.std()
    usual, largest = off.std().item(), off.abs().max().item()
    print(f"{case}, {kind}: logits differ by {usual:.1e} of their spread, at most {largest:.1e}")
    # With less precision, a token may be routed to another expert.
    assert usual < {"float32": 1e-5, "float16": 0.03, "q8_0": 0.15}[kind]
    if kind != "float32":
        return

    text_generator = TextGenerator(model, tokenizer)
    length = 0
    for text in ("The fox", " 狐狸 é\n", "🦊 1 + 1 ="):
        ids = text_generator.completion_prompt(text)[0]
        expected = list(generate(model, ids, 40, temperature=0, stop_tokens=text_generator.stop_tokens))
        # llama.cpp adds nothing to the prompt of a chat model, so begin with <|bos|> like a completion.
        theirs = llama.tokenize(b"<|bos|>" + text.encode(), add_bos=False, special=True)
        assert as_nano_ids(theirs, n_rows) == ids
        drawn = []
        for token in llama.generate(theirs, temp=0.0, repeat_penalty=1.0):
            if is_stop_token(llama, token) or len(drawn) == 40:
                break
            drawn.append(token)
        assert drawn == expected
        length += len(drawn)
    assert length > 60
    stops = [i for i in range(n_rows) if is_stop_token(llama, i)]
    assert stops == sorted(text_generator.stop_tokens)

    ids = text_generator.chat_prompt([dict(message) for message in CHAT])[0]
    answer = list(generate(model, ids, 30, temperature=0, stop_tokens=text_generator.stop_tokens))
    # llama.cpp does not print <|unknown|> and rows without a token.
    whole = [i for i in answer if i != tokenizer.unknown_id and i < tokenizer.vocab_size]
    expected = tokenizer.decode_bytes(whole).decode("utf-8", "ignore")
    done = llama.create_chat_completion(CHAT, temperature=0, repeat_penalty=1.0, max_tokens=30)
    assert done["usage"]["prompt_tokens"] == len(ids)
    # It may generate a few tokens more to complete a character.
    content = done["choices"][0]["message"]["content"]
    assert content.startswith(expected) and len(content) <= len(expected) + 10


@pytest.mark.slow
def test_a_pretrained_model_continues_in_llama_cpp(written, opened):
    checkpoint = random_checkpoint(*NANO["qwen3"], task="pretrain")
    model, tokenizer = build(checkpoint, "the test")
    llama, text_generator = opened(written(checkpoint)), TextGenerator(model, tokenizer)
    for text in ("The fox", " 狐狸 "):
        ids = text_generator.completion_prompt(text)[0]
        assert llama.tokenize(text.encode()) == ids  # <|bos|> is added automatically
        answer = list(generate(model, ids, 30, temperature=0, stop_tokens=text_generator.stop_tokens))
        expected = tokenizer.decode([i for i in answer if i != tokenizer.unknown_id])
        done = llama.create_completion(text, temperature=0, repeat_penalty=1.0, max_tokens=30)
        assert done["choices"][0]["text"] == expected and done["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FOREIGN if name not in ("nanochat", "uncut")])
def test_foreign_tokenizers_split_the_same_in_llama_cpp(name, written, opened):
    tokenizer = read_foreign(name)[0]
    llama = opened(written(random_checkpoint(SMALL, tokenizer)))
    texts = [text for text in TEXTS if name != "Qwen3" or "e\u0301" not in text]
    for text in (*texts, " zebra zebras zz"):
        assert llama.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text).tolist(), text
