"""export.py and formats/huggingface.py: Transformers opens what Nano writes, and Nano reads what it saves."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import told
from test_model import differ, random_tokens
from test_tokenizer import BPE, CHAR, SAMPLE, any_text, awkward
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from tokenizers import models as library_models

import engine.checkpoint
import inference
import models
from config.stages import STAGES
from decoding.sampling import generate
from engine.checkpoint import Checkpoint, build, load
from formats import huggingface, load_tokenizer, load_tokenizer_and_rows
from inference import TextGenerator
from model import GPT
from tokenizer import SPECIAL_TOKENS, BPETokenizer, byte_alphabet, from_dict, render_chat

transformers = pytest.importorskip("transformers")

LLAMA3 = dict(rope_type="llama3", factor=4.0, original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
SMALL = dict(block_size=64, n_layer=2, n_head=4, n_embd=24, n_hidden=40)
MIXTURE = dict(
    architecture="deepseek_v3", **(SMALL | dict(n_layer=3)), kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3,
    moe_intermediate_size=16,
)  # fmt: skip
CASES = {
    "Llama": (SMALL | dict(qk_norm=False), BPE),
    "Llama, all of it": (
        SMALL | dict(qk_norm=False, bias=True, n_kv_head=1, head_dim=10, tie_embeddings=False,
                     rope_theta=500.0, norm_eps=1e-3, rope_scaling=LLAMA3), CHAR),
    "Qwen3": (SMALL | dict(qk_norm=True, n_kv_head=2), CHAR),
    "Qwen3, all of it": (
        SMALL | dict(qk_norm=True, n_kv_head=2, head_dim=14, tie_embeddings=False, rope_scaling=YARN,
                     vocab_size=400), BPE),
    "nanochat": (SMALL | dict(architecture="nanochat", n_kv_head=2, head_dim=10), BPE),
    "DeepSeek V3": (MIXTURE, CHAR),
    "DeepSeek V3, all of it": (
        MIXTURE | dict(q_lora_rank=20, n_shared_experts=2, tie_embeddings=True, rope_scaling=YARN,
                       bias_update_speed=0.01), BPE),
    "DeepSeek V3, no prediction": (
        MIXTURE | dict(num_nextn_predict_layers=0, first_k_dense_replace=0, norm_topk_prob=False), CHAR),
}  # fmt: skip


def random_checkpoint(fields, tokenizer, task="sft"):
    """A model whose weights are large enough for mistakes to show."""
    torch.manual_seed(0)
    model = models.build(models.check_config(fields, "the test").resolved(tokenizer.vocab_size))
    for name, tensor in model.state_dict().items():
        tensor.normal_(float("norm" in name), 0.2)
    return Checkpoint(
        task, "20260102_030405", 7, model.config.model_dump(), {}, tokenizer.to_dict(), model.state_dict(),
        {}, chat_template=STAGES[task].chat_template,
    )  # fmt: skip


def newest():
    """The most recently written checkpoint."""
    return load(max(engine.checkpoint.FOLDER.glob("*.pt"), key=lambda path: path.stat().st_mtime_ns))


@pytest.fixture
def written(command, tmp_path):
    """written(checkpoint): the folder that export.py writes."""

    def written(checkpoint):
        done = command("-m", checkpoint.save(), "-o", tmp_path / "交给 others")
        assert done.returncode == 0, done.stderr
        return tmp_path / "交给 others"

    return written


def in_transformers(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


# ---- both directions -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_what_is_written(case, written):
    checkpoint = random_checkpoint(*CASES[case])
    model, tokenizer = build(checkpoint, "the test")
    other, its_tokenizer = in_transformers(written(checkpoint))
    assert case.replace(" ", "").lower().startswith(other.config.model_type.replace("_", ""))
    tokens = random_tokens(2, 40, vocab_size=tokenizer.vocab_size)
    ours = model(tokens)
    assert ours.std() > 0.5  # not equal merely because all are small
    assert differ(ours, other(tokens).logits) < 1e-4

    text_generator = TextGenerator(model, tokenizer)
    conversation = [
        {"role": "system", "content": " \n1 = 2 "},
        {"role": "user", "content": "\nfox? 狐"},
        {"role": "assistant", "content": "dog.\n"},
        {"role": "user", "content": " 1 + 1"},
    ]
    prompts = [its_tokenizer(text, return_tensors="pt") for text in ("", "The fox", "狐狸 é")]
    expected = [text_generator.completion_prompt(text)[0] for text in ("", "The fox", "狐狸 é")]
    prompts.append(
        its_tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
    )
    expected.append(text_generator.chat_prompt(conversation)[0])
    length = 0
    for prompt, ids in zip(prompts, expected, strict=True):
        assert prompt["input_ids"][0].tolist() == ids
        answer = other.generate(**prompt, do_sample=False, max_new_tokens=20)[0, len(ids) :].tolist()
        if answer[-1] in other.generation_config.eos_token_id:
            answer.pop()
        assert answer == list(generate(model, ids, 20, temperature=0, stop_tokens=text_generator.stop_tokens))
        answer = [i for i in answer if i < tokenizer.vocab_size]
        assert its_tokenizer.decode(answer) == tokenizer.decode(answer)
        length += len(answer)
    assert length > 20


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, written, command):
    """All is equal bit for bit, even after Transformers has opened it and saved it in several files."""
    checkpoint = random_checkpoint(*CASES[case])
    folder = written(checkpoint)
    done = command("--read", folder)
    assert done.returncode == 0, done.stderr
    back = newest()
    assert (back.stage, back.step) == ("sft", 0)
    same = ("model_config", "tokenizer")
    assert all(getattr(back, name) == getattr(checkpoint, name) for name in same)
    assert back.model.keys() == checkpoint.model.keys()
    assert all(torch.equal(back.model[name], checkpoint.model[name]) for name in back.model)
    build(back, "the test")

    other, its_tokenizer = in_transformers(folder)
    other.save_pretrained(folder.parent / "again", max_shard_size="20KB")
    its_tokenizer.save_pretrained(folder.parent / "again")
    assert len(list((folder.parent / "again").glob("*.safetensors"))) > 1
    done = command("--read", folder.parent / "again", "-t", "pretrain")
    assert done.returncode == 0, done.stderr
    back = newest()
    assert back.stage == "pretrain" and back.tokenizer == checkpoint.tokenizer
    # Transformers does not keep the multi-token prediction module.
    lost = {name for name in checkpoint.model if name.startswith("mtp.")}
    assert back.model.keys() == checkpoint.model.keys() - lost
    assert all(torch.equal(back.model[name], checkpoint.model[name]) for name in back.model)
    build(back, "the test")


@torch.no_grad()
def test_the_prediction_module_is_the_same(written, monkeypatch):
    """Transformers reads it for drafting; its class hard-codes the layer number of the released model."""
    from transformers import modeling_layers

    if not hasattr(modeling_layers, "MtpModel"):
        pytest.skip("this release of Transformers has no multi-token prediction")
    their_class = transformers.DeepseekV3ForCausalLM
    monkeypatch.setattr(their_class, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\."])
    checkpoint = random_checkpoint(*CASES["DeepSeek V3"])
    model, tokenizer = build(checkpoint, "the test")
    module = modeling_layers.MtpModel.from_pretrained(in_transformers(written(checkpoint))[0])
    tokens = random_tokens(2, 20, vocab_size=tokenizer.vocab_size)
    x, following = model.hidden(tokens)[:, :-1], tokens[:, 1:]
    ours = model.predict(x, following)
    theirs = module.forward_layer(0, x, torch.arange(19)[None], None, input_ids=following)
    assert ours.std() > 0.5 and differ(ours, theirs) < 1e-4


SIZES = dict(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32, pad_token_id=0, bos_token_id=2, eos_token_id=3,
)  # fmt: skip
THEIRS = {
    "Llama": dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "Qwen3": dict(head_dim=16, num_key_value_heads=1, rope_parameters={"rope_theta": 1e6, **YARN}),
    "NanoChat": dict(num_key_value_heads=2),
    "DeepseekV3": dict(
        moe_intermediate_size=16, n_routed_experts=8, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8,
        v_head_dim=12, qk_nope_head_dim=8, n_group=4, topk_group=2, num_experts_per_tok=3,
        first_k_dense_replace=1, num_key_value_heads=4,
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", THEIRS)
def test_a_model_of_transformers_is_read(family, command, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **THEIRS[family])
    other = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, tensor in other.state_dict().items():
        tensor.normal_(float("norm" in name), 0.2)
    other.save_pretrained(tmp_path / "theirs")
    CHAR.save(tmp_path / "tokenizer.json")
    done = command("--read", tmp_path / "theirs", "--tokenizer", tmp_path / "tokenizer.json")
    assert done.returncode == 0, done.stderr
    model, tokenizer = build(newest(), "the test")
    assert tokenizer.fingerprint == CHAR.fingerprint and newest().stage == "pretrain"
    tokens = random_tokens(2, 32, vocab_size=60)
    theirs = other(tokens).logits
    assert theirs.std() > 0.5 and differ(model(tokens), theirs) < 1e-4
    prompt = tokens[:1, :5]
    answer = other.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20, eos_token_id=None
    )
    assert list(generate(model, prompt[0], 20, temperature=0)) == answer[0, 5:].tolist()


# Regular expressions in the tokenizer.json of released models.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def split(*patterns):
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


FOREIGN = {
    "GPT-2": (None, [], {}),
    "Llama 3": (None, split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), dict(ignore_merges=True)),
    "Qwen3": (normalizers.NFC(), split(QWEN), {}),
    "DeepSeek V3": (normalizers.Sequence([]), split(*DEEPSEEK), {}),
    "nanochat": (None, split(QWEN.replace(r"\p{N}|", r"\p{N}{1,2}|")), dict(byte_fallback=True)),
    "SmolLM": (None, [pre_tokenizers.Digits(individual_digits=True)], {}),
    "uncut": (None, [], {}),
}
NUMBERS = "12345 a1b22c333\r\n\r\n  don't DON'T 2026年 é e\u0301 !!\n"


@functools.cache
def foreign(name):
    """A byte-level BPE of the `tokenizers` library that splits text like the released one of this name."""
    normalizer, cuts, options = FOREIGN[name]
    library = Library(library_models.BPE(**options))
    if normalizer is not None:
        library.normalizer = normalizer
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("GPT-2", "SmolLM"))
    library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=byte_alphabet(), special_tokens=["<s>", "</s>", "<mask>"],
        show_progress=False,
    )  # fmt: skip
    library.train_from_iterator([SAMPLE + NUMBERS] * 3, trainer)
    content = json.loads(library.to_str())
    if options.get("ignore_merges"):
        # Some of Llama 3's tokens are not the result of a merge; they only match whole words.
        vocabulary = content["model"]["vocab"]
        vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(["Ġzebra", "zz"])}
    return Library.from_str(json.dumps(content))


@functools.cache
def read_foreign(name):
    """(Nano's tokenizer, rows) of the same one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        foreign(name).save(str(path))
        return huggingface.from_hf_tokenizer(path, dict(bos_token_id=0, eos_token_id=1))


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama 3", "Qwen3", "DeepSeek V3"])
def test_a_foreign_tokenizer_is_read(name, tied, command, tmp_path):
    """Byte-level BPE: ids become Nano's, and the rows of the embedding are reordered accordingly."""
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=foreign(name), bos_token="<s>", eos_token="</s>"
    )
    sizes = SIZES | dict(vocab_size=440, bos_token_id=0, eos_token_id=[1], pad_token_id=None)
    torch.manual_seed(0)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()
    for name, tensor in other.state_dict().items():
        tensor.normal_(float("norm" in name), 0.2)
    for part in (other, theirs):
        part.save_pretrained(tmp_path / "theirs")
    done = command("--read", tmp_path / "theirs")
    assert done.returncode == 0, done.stderr
    assert "new to the model: <|padding|>, <|unknown|>, <|instruct_mark|>" in done.stdout
    model, tokenizer = build(newest(), "the test")
    assert model.config.vocab_size == tokenizer.vocab_size == len(theirs) - 3 + len(SPECIAL_TOKENS)
    assert model.config.tie_embeddings == tied
    left_out = [2, *range(len(theirs), 440)]  # <mask>, and rows without a token
    for text in ("The fox", "狐狸 é\r\n", SAMPLE[:20]):
        prompt = theirs(text, return_tensors="pt")
        ids = tokenizer.encode(text).tolist()
        assert theirs.convert_ids_to_tokens(prompt["input_ids"][0]) == [
            huggingface.to_hf_tokenizer(tokenizer).id_to_token(i) for i in ids
        ]
        answer = other.generate(**prompt, do_sample=False, max_new_tokens=10, suppress_tokens=left_out)
        ours = generate(model, ids, 10, temperature=0, stop_tokens=[tokenizer.eos_id])
        answer = theirs.decode(answer[0, len(ids) :], skip_special_tokens=True)
        assert answer == tokenizer.decode(list(ours))
    first = model(torch.tensor([[tokenizer.bos_id]]))[0, 0, tokenizer.eos_id]
    assert first.item() == pytest.approx(other(torch.tensor([[0]])).logits[0, 0, 1].item(), abs=1e-4)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_tokenizer_is_the_same_wherever_it_is_read_from(name, command, tmp_path):
    """From a Transformers folder, from its tokenizer.json, from a checkpoint, and from Nano's JSON."""
    ours, rows = read_foreign(name)
    (tmp_path / "theirs").mkdir()
    foreign(name).save(str(tmp_path / "theirs" / "tokenizer.json"))
    ours.save(tmp_path / "ours.json")
    paths = [tmp_path / "theirs", tmp_path / "theirs" / "tokenizer.json", tmp_path / "ours.json"]
    paths.append(random_checkpoint(SMALL, ours).save())
    for path in paths:
        assert load_tokenizer(path).fingerprint == ours.fingerprint
    assert load_tokenizer_and_rows(paths[0], dict(bos_token_id=0, eos_token_id=1))[1] == rows
    assert load_tokenizer_and_rows(paths[2], {})[1] == list(range(ours.vocab_size))


def test_a_foreign_model_is_fine_tuned(project, tmp_path):
    """With the commands in doc/elsewhere.md."""
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=foreign("Qwen3"), bos_token="<s>", eos_token="</s>"
    )
    sizes = SIZES | dict(vocab_size=len(theirs), bos_token_id=0, eos_token_id=1, pad_token_id=None)
    torch.manual_seed(0)
    for part in (transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), theirs):
        part.save_pretrained(project.root / "theirs")
    chats = "".join(f'{{"question": "{i} + 1?", "answer": "{i + 1}"}}\n' for i in range(40))
    (project.root / "new.jsonl").write_text(chats)

    def run(*args):
        done = project.run(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("export.py", "--read", "theirs")
    [read] = project.checkpoints().values()
    new = project.root / "new"
    run("data.py", "--sft", project.root / "new.jsonl", "--tokenizer", read, "--out", new)
    pair = json.dumps([[f"{new}/sft_train.bin", f"{new}/sft_val.bin"]])
    settings = {"from_checkpoint": read, "tokenizer_path": "theirs", "dataset_path": pair, "max_steps": 2,
                "batch_size": 4, "warmup_iters": 1, "device": "cpu", "dtype": "float32"}  # fmt: skip
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    run("train.py", "-t", "sft", *sets)
    assert run("inference.py", "-i", "-l", "4", "--prompt", "2 + 1?").strip()


def test_old_keys_of_a_config_mean_the_same(written, command):
    """rope_type was once named "type", and keys with a default may be missing."""
    folder = written(random_checkpoint(SMALL | dict(qk_norm=False, rope_scaling=YARN, norm_eps=1e-6,
                                                    tie_embeddings=False), CHAR))  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    assert command("--read", folder).returncode == 0
    assert newest().model_config == load(max(engine.checkpoint.FOLDER.glob("*_step_7.pt"))).model_config


def test_redundant_tensors_are_accepted(written, command):
    checkpoint = random_checkpoint(SMALL | dict(qk_norm=False), CHAR)
    folder = written(checkpoint)
    other_tensors(
        lm_head__weight=torch.ones(3), model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(3)
    )(folder)
    assert command("--read", folder).returncode == 0
    assert all(torch.equal(newest().model[name], checkpoint.model[name]) for name in checkpoint.model)


def test_half_precision_is_kept(written, command):
    checkpoint = random_checkpoint(*CASES["Qwen3"], task="pretrain")
    checkpoint.model = {name: tensor.bfloat16() for name, tensor in checkpoint.model.items()}
    folder = written(checkpoint)
    assert in_transformers(folder)[0].dtype == torch.bfloat16
    command("--read", folder)
    back = newest()
    assert back.stage == "pretrain"
    assert all(torch.equal(back.model[name], checkpoint.model[name]) for name in back.model)


def test_from_training_to_the_folder_and_back_to_fine_tuning(train, command, monkeypatch, tmp_path):
    """The whole way with the command lines, beginning with the newest model."""
    monkeypatch.setattr(engine.checkpoint, "FOLDER", train.root / "checkpoint")
    assert train("pretrain", max_steps=4).returncode == 0
    (path,) = train.checkpoints().values()
    done = command()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"checkpoint/{path.stem}: Qwen3ForCausalLM, ")
    assert len({file.stat().st_mode for file in path.with_suffix("").iterdir()}) == 1
    path.rename(tmp_path / path.name)
    done = command("--read", path.with_suffix(""))
    assert done.returncode == 0, done.stderr
    assert list(train.checkpoints()) == [0]
    done = train("sft", max_steps=4)
    assert done.returncode == 0 and "starting from the weights of" in done.stdout + done.stderr
    done = command("-i", "--prompt", "1 + 1?", "-l", "12", main=inference.main)
    assert done.returncode == 0 and done.stdout


# ---- the tokenizer -----------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("ours", [CHAR, BPE], ids=["char", "bpe"])
KEPT = {}


def counterpart(ours, name=None):
    """The same tokenizer as Transformers reads it. name: that of a foreign tokenizer."""
    name = name or ours.kind
    if name not in KEPT:
        KEPT[name] = transformers.PreTrainedTokenizerFast(
            tokenizer_object=huggingface.to_hf_tokenizer(ours),
            chat_template=huggingface.CHAT_TEMPLATE,
            clean_up_tokenization_spaces=False,
        )
    return KEPT[name]


@BOTH
@settings(deadline=None)
@given(text=any_text | awkward)
def test_text_has_the_same_ids(ours, text):
    theirs, ids = counterpart(ours), ours.encode(text).tolist()
    assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
    assert theirs.decode(ids) == ours.decode(ids)
    if not any(token in text for token in SPECIAL_TOKENS):
        assert theirs.encode(text) == [ours.bos_id, *ids]


@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("name", FOREIGN)
@given(text=any_text | awkward | st.just(SAMPLE + NUMBERS + " zebra zebras zz"))
def test_a_foreign_tokenizer_has_the_same_ids(name, text):
    """... when it is read, when it is written again, and after it was saved in a checkpoint."""
    theirs, (ours, rows) = foreign(name), read_foreign(name)
    expected = [] if any(token in text for token in ("<s>", "</s>", "<mask>")) else theirs.encode(text).ids
    ids = ours.encode(text).tolist() if expected else []
    assert [rows[i] for i in ids] == expected
    assert theirs.decode(expected) == ours.decode(ids)
    assert counterpart(ours, name).encode(text, split_special_tokens=True, add_special_tokens=False) == (
        ours.encode(text).tolist()
    )
    np.testing.assert_array_equal(from_dict(ours.to_dict()).encode(text), ours.encode(text))


def test_special_tokens_are_special():
    for ours in (CHAR, BPE):
        marked = json.loads(huggingface.to_hf_tokenizer(ours).to_str())["added_tokens"]
        assert [(token["content"], token["id"], token["special"]) for token in marked] == [
            (content, i, True) for i, content in enumerate(SPECIAL_TOKENS)
        ]
        assert counterpart(ours).decode([2, 7, 3], skip_special_tokens=True) == ours.decode([7])


words = any_text.filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))


@BOTH
@settings(deadline=None, max_examples=30)
@given(turns=st.lists(words, min_size=1, max_size=5), system=st.none() | words)
def test_conversations_have_the_same_ids(ours, turns, system):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, text in enumerate(turns):
        messages.append({"role": ("user", "assistant")[number % 2], "content": text})
    for prompted in (False, True):
        theirs = counterpart(ours).apply_chat_template(messages, add_generation_prompt=prompted)
        assert theirs["input_ids"] == render_chat(ours, messages, prompted)[0].tolist()


# ---- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(use_rope=False), "use_rope is false in this model, but a Qwen3ForCausalLM supports only true"),
        (
            dict(is_causal=False),
            "is_causal is false in this model, but a Qwen3ForCausalLM supports only true",
        ),
        (dict(bias=True), "bias is true in this model, but a Qwen3ForCausalLM supports only false"),
        (dict(qk_norm=False, is_causal=False), "is_causal is false in this model, but a LlamaForCausalLM"),
        (
            dict(qk_norm=False, n_embd=26, head_dim=6),
            "a LlamaForCausalLM needs an n_embd divisible by n_head, which this model does not have",
        ),
    ],
)
def test_a_model_without_counterpart(fields, sentence, command, tmp_path):
    path = random_checkpoint(SMALL | fields, CHAR).save()
    assert sentence in told(command("-m", path, "-o", tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


def test_a_mixture_without_counterpart(command):
    for fields, sentence in (
        (dict(n_shared_experts=0), "needs a shared expert"),
        (dict(n_group=8, topk_group=4), "needs groups of at least two experts"),
    ):
        assert sentence in told(command("-m", random_checkpoint(MIXTURE | fields, CHAR).save()))


def test_an_existing_folder_is_never_overwritten(command, tmp_path):
    path = random_checkpoint(*CASES["Qwen3"]).save()
    (tmp_path / "there").mkdir()
    assert told(command("-m", path, "-o", "there")) == (
        "there already exists; remove it, or choose another name with --output"
    )
    assert not list((tmp_path / "there").iterdir())


def test_a_word_spelled_like_a_special_token(command, tmp_path):
    letters = [*"<|bos|>"]
    merges = [["".join(letters[:n]), letters[n]] for n in range(1, len(letters))]
    path = random_checkpoint(SMALL, BPETokenizer(merges)).save()
    assert "spelled like one of its special tokens" in told(command("-m", path))


def change(file, **values):
    """Damage: set keys of a JSON file; None removes one."""

    def damage(folder):
        content = json.loads((folder / file).read_text("utf-8")) | values
        content = {key: value for key, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(content), "utf-8")

    return damage


def missing(file):
    return lambda folder: (folder / file).unlink()


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def replaced(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def other_tensors(**tensors):
    """Damage: replace tensors of the file (__ stands for a dot); None removes one."""
    from safetensors.torch import load_file, save_file

    def damage(folder):
        found = load_file(folder / "model.safetensors")
        found |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        found = {name: tensor for name, tensor in found.items() if tensor is not None}
        save_file(found, folder / "model.safetensors")

    return damage


def index(**weight_map):
    content = json.dumps({"weight_map": {"model.norm.weight": "model.safetensors", **weight_map}}).encode()
    return replaced("model.safetensors.index.json", content)


DEEP = b"[" * 10**5 + b"]" * 10**5


def foreign_tokenizer(folder):
    from tokenizers import ByteLevelBPETokenizer

    ByteLevelBPETokenizer(add_prefix_space=True).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (missing("config.json"), "config.json does not exist"),
        (missing("tokenizer.json"), "tokenizer.json could not be read"),
        (missing("model.safetensors"), "; only weights in .safetensors are read"),
        (replaced("config.json", b"{"), "config.json: broken JSON at line 1"),
        (replaced("config.json", b"[]"), "a JSON object {...} is needed"),
        (replaced("tokenizer.json", b"{}"), "tokenizer.json could not be read"),
        (replaced("model.safetensors", b"no weights"), "is damaged, or not a safetensors file"),
        (replaced("model.safetensors", b""), "is damaged, or not a safetensors file"),
        (cut, "model.safetensors is damaged, or not a safetensors file"),
        (change("config.json", model_type="gpt2"), 'its model_type is "gpt2"; Nano reads qwen3, llama, nano'),
        (change("config.json", model_type=["llama"]), 'its model_type is ["llama"]; Nano reads qwen3'),
        (change("config.json", model_type=None), "its model_type is null"),
        (change("config.json", hidden_act="gelu"), 'hidden_act is "gelu"; Nano has only "silu"'),
        (change("config.json", hidden_size=None), "hidden_size is missing"),
        (replaced("config.json", b'{"model_type": "llama", "vocab_size": null}'), "vocab_size is missing"),
        (replaced("config.json", b'{"a": ' + DEEP + b"}"), "config.json: maximum recursion depth exceeded"),
        (replaced("tokenizer.json", DEEP), "tokenizer.json could not be read (maximum recursion depth"),
        (change("config.json", hidden_act="x" * 10**6), 'hidden_act is "xxxxxxx'),
        (change("config.json", num_hidden_layers=1024), "weights lack model.layers.1023.self_attn.o_proj.we"),
        (change("config.json", hidden_size="24"), 'key "n_embd": found "24"; needs an integer >= 1'),
        (change("config.json", hidden_size=32), "weight has shape [50, 24]; by config.json it is [50, 32]"),
        (change("config.json", num_hidden_layers=10**9), 'key "n_layer": found 1000000000'),
        (change("config.json", num_hidden_layers=3), "weights lack model.layers.2.self_attn.o_proj.weight"),
        (change("config.json", num_hidden_layers=1), "weights contain model.layers.1.input_layernorm"),
        (change("config.json", vocab_size=40), "the tokenizer has 50 tokens, but the model only 40"),
        (change("config.json", attention_bias=True), "mlp_bias contradicts another key; Nano has one"),
        (change("config.json", rope_scaling=[1]), "its rope_parameters is not a JSON object"),
        (change("config.json", rope_scaling={"rope_type": "linear", "factor": 2.0}), 'key "rope_scaling"'),
        (change("config.json", rope_scaling=YARN | {"mscale": 0.7}), 'its key "mscale"'),
        (change("config.json", partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; Nano has only 1.0"),
        (
            other_tensors(model__norm__weight=torch.ones(24, 1)),
            "has shape [24, 1]; by config.json it is [24]",
        ),
        (other_tensors(model__norm__weight=torch.ones(24).int()), "is torch.int32; only float32, bfloat16"),
        (other_tensors(model__norm__weight=None), "the weights lack model.norm.weight"),
        (other_tensors(more=torch.ones(1)), "weights contain more, which config.json does not account"),
        (index(a="../model.safetensors"), "its weight_map contains something other than file names"),
        (index(a=[1]), "its weight_map contains something other than file names"),
        (index(a="model-2.safetensors"), "there is no "),
        (foreign_tokenizer, "tokenizer.json splits text in a way that"),
        (change("tokenizer.json", normalizer={"type": "NFC"}), "tokenizer.json splits text in a way that"),
    ],
)
def test_a_damaged_folder(damage, sentence, written, command):
    folder = written(random_checkpoint(SMALL | dict(qk_norm=False, tie_embeddings=False), CHAR))
    before = set(engine.checkpoint.FOLDER.iterdir())
    damage(folder)
    assert sentence in told(command("--read", folder))
    assert set(engine.checkpoint.FOLDER.iterdir()) == before


def splits(*patterns):
    """A change to a tokenizer.json: these patterns split the text, too."""
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps = [split | {"pattern": {"Regex": pattern}} for pattern in patterns]

    def change(content):
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, content["pre_tokenizer"]]}

    return change


def wordless(content):
    """A merge of a token that is not the result of a merge."""
    content["model"]["merges"].insert(0, ["zebra", "s"])
    content["model"]["vocab"] |= {"zebra": 500, "zebras": 501}


def panicking(content):
    content["model"] |= {"continuing_subword_prefix": "x" * 5000, "merges": [["a", "b"]]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (splits("(a+)+$"), "could not be read (one of its patterns would take years on some texts: (a+)+"),
        (splits(r"\p{L}" * 100_000), "(one of its patterns is too long: all of them together may have 10"),
        (splits(*["a"] * 100, "("), "could not be read (one of its patterns is not a regular expression: ()"),
        (wordless, "this is not a sound Nano tokenizer: one of its merges is not a pair of known tokens"),
        (panicking, "could not be read ("),
        (lambda content: content.update(normalizer={"type": "Replace", "pattern": {"Regex": r"(.*)*\d"},
                                                    "content": ""}), "would take years on some texts"),
    ],
)  # fmt: skip
def test_a_hostile_tokenizer(change, sentence, written, command):
    folder = written(random_checkpoint(SMALL, BPE))
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    assert sentence in told(command("--read", folder))


def test_unknown_keys_are_reported(written, command):
    folder = written(random_checkpoint(SMALL | dict(qk_norm=False), CHAR))
    assert "does not know" not in command("--read", folder).stdout
    change("config.json", logit_scale=0.25, attention_sinks=4, parallel=False)(folder)
    done = command("--read", folder)
    assert done.returncode == 0
    assert "Nano does not know attention_sinks, logit_scale, and ignores that.\n" in done.stdout


def test_an_unknown_tensor_is_refused(command, monkeypatch):
    """... if the network was changed without a key in its configuration."""

    class Changed(GPT):
        def make_modules(self):
            super().make_modules()
            self.gain = torch.nn.Parameter(torch.ones(3))

    monkeypatch.setattr("model.GPT", Changed)
    path = random_checkpoint(SMALL | dict(qk_norm=False), CHAR).save()
    for name in ("huggingface", "gguf", "llama2c"):
        wrong = told(command("-m", path, "--format", name))
        assert wrong == "a LlamaForCausalLM has no place for gain, a part of this model"


# ---- arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["-t", "sft"], "--task and --tokenizer need --read"),
        (["--tokenizer", "x.json"], "--task and --tokenizer need --read"),
        (["--read", ".", "-o", "x"], "it takes neither --model nor --output"),
        (["--read", "nowhere"], "there is no folder nowhere"),
        (["-m", "nowhere.pt"], "there is no file nowhere.pt"),
        (["--read", ".", "--tokenizer", "nowhere.json"], "there is no file nowhere.json"),
        (["-t", "rl"], "argument -t/--task: invalid choice: 'rl'"),
        ([], "there is no model in checkpoint/ yet"),
    ],
)
def test_wrong_arguments(args, sentence, command, tmp_path):
    done = command(*args)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr


def test_arguments_are_checked_before_torch_is_imported(shared_project):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import export; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, shared_project.root], capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "pydantic", "tokenizers"} & set(done.stdout.split())
    help = shared_project.run("export.py", "--help")
    assert help.returncode == 0 and "python export.py --read folder" in help.stdout
    assert "there is no file x.pt" in told(shared_project.run("export.py", "-m", "x.pt"))
