"""data.py and preparation/: token files hold exactly what the text held,
and the batch of step N is a pure function of N."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import preparation.token_file
from common.errors import UserError
from common.permutation import random_keys, shuffled
from config.stages import STAGES, Stage
from data import TokenBatches, TokenFile
from preparation import data_command
from preparation.corpus import conversation_of, prepare
from preparation.split import Split, cut_in_two
from tokenizer import CharTokenizer, load

ROOT = Path(__file__).resolve().parent.parent

QA = [{"question": f"问{i}?", "answer": f"答{i}。" * (1 + i % 3)} for i in range(40)]


def write_jsonl(path, values):
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), "utf-8")
    return path


def run(*args, cwd=ROOT):
    return subprocess.run(
        [sys.executable, ROOT / "data.py", *map(str, args)], capture_output=True, text=True, cwd=cwd
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with 60 documents and 40 conversations, prepared with small chunks."""
    folder = tmp_path_factory.mktemp("某 folder")
    texts = [f"文{i}:" + "".join(f"\r\n 数 {i * j * 7919 % 10007}" for j in range(i)) for i in range(60)]
    (folder / "in.txt").write_bytes("".join(f"<|bos|>{text}<|eos|>\n" for text in texts).encode())
    write_jsonl(folder / "sft.jsonl", QA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sources.reading.CHUNK", 200)
        patch.setattr("sources.text.LONG", 100)
        prepare(inputs_of(folder), folder / "out", val_fraction=0.2)
    return folder / "out", texts


def inputs_of(folder):
    return {"pretrain": [folder / "in.txt"], "sft": [folder / "sft.jsonl"]}


def documents_of(file, tokenizer):
    return [tokenizer.decode(file.tokens[a:b]) for a, b in zip(file.starts, file.starts[1:], strict=False)]


# ---- preparing -------------------------------------------------------------------------------------


def test_every_document_is_unchanged_and_in_one_split(prepared):
    folder, texts = prepared
    tokenizer = load(folder / "tokenizer.json")
    files = [TokenFile(folder / f"pretrain_{split}.bin", tokenizer.fingerprint) for split in ("train", "val")]
    train, val = (documents_of(file, tokenizer) for file in files)
    assert sorted(train + val) == sorted(f"<|bos|>{text}<|eos|>" for text in texts)
    assert not set(train) & set(val) and 3 < len(val) < 25
    order = [f"<|bos|>{text}<|eos|>" for text in texts]
    assert train == [text for text in order if text not in val]
    for file, documents in zip(files, (train, val), strict=True):
        meta = file.meta
        assert meta["n_tokens"] == len(file.tokens) == meta["n_loss_tokens"]
        assert meta["n_documents"] == len(documents)
        n_marks = len("<|bos|><|eos|>") * len(documents)
        assert meta["n_bytes"] == sum(len(document.encode()) for document in documents) - n_marks
        assert meta["n_unknown"] == 0 and file.mask is None and file.tokens.dtype == np.uint16
    assert not list(folder.glob("*.tmp"))


def test_the_mask_covers_exactly_the_answers(prepared):
    folder, _ = prepared
    tokenizer = load(folder / "tokenizer.json")
    seen = []
    for split in ("train", "val"):
        file = TokenFile(folder / f"sft_{split}.bin")
        for a, b in zip(file.starts, file.starts[1:], strict=False):
            text = tokenizer.decode(file.tokens[a:b])
            answer = tokenizer.decode(file.tokens[a:b][file.mask[a:b] == 1])
            question = text.removeprefix("<|instruct_mark|>").removesuffix(f"<|response_mark|>{answer}")
            assert answer.endswith("<|eos|>")
            seen.append({"question": question, "answer": answer.removesuffix("<|eos|>")})
        assert file.meta["n_loss_tokens"] == file.mask.sum()
    assert sorted(map(str, seen)) == sorted(map(str, QA))


def test_preparation_does_not_depend_on_chunks(prepared, tmp_path):
    folder, _ = prepared
    prepare(inputs_of(folder.parent), tmp_path, val_fraction=0.2)
    assert contents(folder) == contents(tmp_path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


BAD = [b"\xff", b"\xe4\xb8", b"\0"]
text_pieces = st.sampled_from(
    [*BAD, b"\n", b"\n", b"\r\n", b" ", b"a", b"ab ab\nabc\n", "狐狸\ufeff".encode(), b"<|eos|>\n<|bos|>"]
)
good_lines = st.sampled_from(
    [{"text": "one"}, {"text": "ab" * 20, "id": 7}, {"text": "狐\ufeff狸"}, {"text": "a\nb"}]
).map(lambda record: json.dumps(record, ensure_ascii=False).encode())
bad_lines = st.sampled_from([*BAD, b"", b" ", b"[]", b"{", b'{"text": ""}', b'{"text": 3}'])


@given(
    content=st.one_of(
        st.lists(text_pieces, min_size=1, max_size=40).map(b"".join),
        st.lists(good_lines | bad_lines, min_size=1, max_size=15).map(b"\n".join),
    ),
    kind=st.sampled_from(["char", "bpe"]),
    chunk=st.integers(1, 80),
)
@settings(max_examples=60, deadline=None)
def test_any_chunks_give_the_same_bytes(content, kind, chunk, tmp_path_factory):
    """Whatever the text holds: the same token files, or the same error."""
    folder = tmp_path_factory.mktemp("any")
    is_text = not content.startswith((b"{", b"["))
    path = folder / ("x.txt" if is_text else "x.jsonl")
    begin = b"some text, " * 30 + b"\nand more\n" if is_text else b'{"text": "some"}\n' * 2
    path.write_bytes(begin + content)
    results = []
    for size in (chunk, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sources.reading.CHUNK", size)
            patch.setattr("sources.text.LONG", 20)
            patch.setattr("sources.kinds.HEAD", 300)
            out = folder / str(size)
            try:
                _, _, [corpus] = prepare(
                    {"pretrain": [path]}, out, kind=kind, vocab_size=270, skip_bad_lines=True
                )
            except UserError as error:
                results.append(str(error))
            else:
                results.append((contents(out), vars(corpus.report)))
    assert results[0] == results[1]


@settings(deadline=None)  # other processes may be using the CPU
@given(st.integers(2, 3000), st.floats(1e-9, 1 - 1e-9), st.integers(0, 2**63 - 1))
def test_training_and_validation_both_get_documents(n, fraction, seed):
    held_out = Split(n, fraction, seed).held_out(0, n)
    assert 0 < held_out.sum() < n
    parts = [Split(n, fraction, seed).held_out(start, min(7, n - start)) for start in range(0, n, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), held_out)


def test_the_split_has_the_requested_size_and_depends_on_the_seed():
    one, two = (Split(10**5, 0.05, seed).held_out(0, 10**5) for seed in (1, 2))
    assert abs(one.mean() - 0.05) < 0.003 and abs((one & two).mean() - 0.0025) < 0.001


@pytest.mark.parametrize("text", ["0123456789\n" * 100, "x" * 1000 + "\n", "t\n" + "x" * 999, "ab", "é" * 9])
@pytest.mark.parametrize("part", [1, 7, 5000])
def test_a_single_document_is_cut_near_its_end(text, part):
    pieces = [text[i : i + part] for i in range(0, len(text), part)]
    batches = [([piece], i < len(pieces) - 1) for i, piece in enumerate(pieces)]
    two, was_open = [], False
    for [piece], is_open in cut_in_two(batches, len(text), 0.1):
        two[-1:] = [two[-1] + piece] if was_open else [*two[-1:], piece]
        was_open = is_open
    assert len(two) == 2 and "".join(two) == text and all(two)
    assert len(two[1]) <= max(1, round(0.2 * len(text)))
    if part > len(text) and text.count("\n") > 1:
        assert two[0].endswith("\n")


def test_bpe_and_a_given_tokenizer(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("to be or not to be\n" * 200)
    metas, bpe, _ = prepare({"pretrain": [path]}, tmp_path / "bpe", kind="bpe", vocab_size=270)
    assert bpe.kind == "bpe" and load(tmp_path / "bpe" / "tokenizer.json").vocab_size == 270
    file = TokenFile(tmp_path / "bpe" / "pretrain_val.bin")
    assert set(bpe.decode(file.tokens[1:-1]).split("\n")) == {"to be or not to be", ""}
    (tmp_path / "new.txt").write_text("to be é or not to be\n" * 50)
    metas, _, _ = prepare({"pretrain": [tmp_path / "new.txt"]}, tmp_path / "same", tokenizer=bpe)
    assert all(meta["n_unknown"] == 0 for meta in metas.values())
    char = CharTokenizer.train([path.read_text()])
    char.save(tmp_path / "char.json")
    done = run("--pretrain", "new.txt", "--tokenizer", "char.json", "--out", "c", cwd=tmp_path)
    assert done.returncode == 0 and "50 characters are not in" in done.stdout


def test_what_the_chat_template_requires_of_a_conversation():
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "extra": [1]}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert conversation_of({"messages": [user, assistant]})[0] == turns
    assert conversation_of({"messages": [assistant, user, assistant]})[0] == [turns[1], *turns]
    messages, notes = conversation_of({"messages": [user, user, user, assistant, assistant]})
    assert [message["content"] for message in messages] == ["a\na\na", "b\nb"]
    assert notes.count(("joined", "")) == 3
    for bad in (
        [],
        {},
        {"question": "a"},
        {"question": 1, "answer": "b"},
        {"question": "a", "answer": None},
        {"question": "a", "answer": " \n"},
        {"question": "a", "answer": "\ud800"},
        {"messages": {}},
        {"messages": []},
        {"messages": [user]},
        {"messages": [user, assistant, user]},
        {"messages": [assistant]},
        {"messages": [{"role": "system", "content": "a"}, assistant]},
        {"messages": [user, {"role": "system", "content": "a"}, assistant]},
        {"messages": [{"role": "tool", "content": "x"}, user, assistant]},
        {"conversations": [{"role": "user", "content": 3}]},
    ):
        with pytest.raises(UserError):
            conversation_of(bad)


# ---- bad input, through the command line -----------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("a.txt", b"good\nb\xffad\ngood\n", 2),
        ("a.jsonl", b'{"text": "good"}\n\n{"text": "b\xffd"}\n', 3),
        ("a.jsonl", b'{"text": "good"}\n{"text": 3}\n', 2),
        ("a.jsonl", b'{"text": "good"}\n{"text": ""}\n', 2),
        ("a.jsonl", b'{"text": "\\ud800"}\n{"text": "good"}\n', 1),
        ("a.jsonl", b"[" * 100000, 1),
        ("s.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "q"}\n', 2),
        ("s.jsonl", b'{"question": "q", "answer": "a"}\nnonsense\n', 2),
        ("s.jsonl", b'{"messages": [{"role": "robot", "content": "x"}]}', 1),
        ("s.jsonl", b'["question", "answer"]', 1),
    ],
)
def test_bad_lines_are_named(tmp_path, name, content, line):
    path = tmp_path / name
    path.write_bytes(content)
    arguments = ["--sft" if name[0] == "s" else "--pretrain", path, "--out", tmp_path / "out"]
    done = run(*arguments)
    assert done.returncode == 2 and f"{name}, line {line}: " in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_lines_can_be_left_out(tmp_path):
    lines = [json.dumps(qa) for qa in QA]
    lines[3], lines[20] = "{", '{"question": 1}'
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\ntwo\n" * 30)
    done = run("--sft", "s.jsonl", "--pretrain", "a.txt", "--out", "out", "--skip-bad-lines", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "s.jsonl").stat().st_size
    assert f"2 bad lines of sft left out: 18 of {size:,} bytes" in done.stderr and "line 21" in done.stderr
    assert "30 bad lines of pretrain left out: 60 of 300 bytes" in done.stderr
    files = [TokenFile(tmp_path / "out" / f"sft_{split}.bin") for split in ("train", "val")]
    assert sum(file.meta["n_documents"] for file in files) == 38


def test_what_was_read_and_what_was_not_is_reported(tmp_path):
    alpaca = [{"id": i, "instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(12)]
    gpt = [{"conversations": [{"from": who, "value": who} for who in ("human", "human", "gpt")]}]
    write_jsonl(tmp_path / "S.JSONL", alpaca + gpt)
    write_jsonl(tmp_path / "no suffix", [{"text": "\ufeffwords", "url": "x"}, {"text": "more words"}])
    (tmp_path / "a.txt").write_text("\ufeffmarked\n\ufefftwice\n", "utf-8")
    paths = ["--pretrain", "no suffix", "a.txt", "--sft", "S.JSONL"]
    done = run(*paths, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "2 files for pretrain: 2 JSON lines with text; not read: url (1); byte-order marks left out: 2\n"
        "S.JSONL: 12 conversations in Alpaca's shape, 1 conversations in ShareGPT's shape; not read: "
        "id (12); messages joined with the one before, of the same role: 1\n"
    ) in done.stdout
    assert "\ufeff" not in load(tmp_path / "out" / "tokenizer.json").characters


def test_system_and_history_are_trained_on(tmp_path):
    record = {"system": "S", "history": [["h", "i"]], "question": "q", "answer": "a"}
    write_jsonl(tmp_path / "s.jsonl", [record] * 2)
    _, tokenizer, _ = prepare({"sft": [tmp_path / "s.jsonl"]}, tmp_path)
    file = TokenFile(tmp_path / "sft_train.bin")
    text = "<|system_mark|>S<|instruct_mark|>h<|response_mark|>i<|eos|>"
    text += "<|instruct_mark|>q<|response_mark|>a<|eos|>"
    assert tokenizer.decode(file.tokens) == text
    assert tokenizer.decode(file.tokens[file.mask == 1]) == "i<|eos|>a<|eos|>"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", b'[{"text":"a"},\n {"text":"b"}]\n', "a.json is a JSON array, which is not read"),
        ("a.csv", b'id,text\n1,"a"\n', "a.csv is a table, which is not read"),
        ("a.txt", "天地玄黄，宇宙洪荒。日月".encode("gb18030"), "is not in UTF-8, it looks like GB18030"),
        ("a.txt", "text".encode("utf-16"), "a.txt is not in UTF-8, it looks like UTF-16; convert it: iconv"),
    ],
)
def test_other_files_are_never_trained_as_text(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    for script, *options in (
        ("data.py", "--pretrain", name), ("data.py", "--pretrain", name, "--skip-bad-lines"),
        ("data.py", "--sft", name), ("tokenizer.py", "train", name),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, ROOT / script, *options], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2 and sentence in done.stderr, (script, options)
        assert done.stderr.count("\n") == 1 and sorted(tmp_path.iterdir()) == [tmp_path / name]


def test_a_file_that_changes_between_the_passes_is_noticed(tmp_path):
    text, chats = tmp_path / "x.txt", write_jsonl(tmp_path / "s.jsonl", QA)
    whole = "some words in a text\n" * 50
    text.write_text(whole)
    before = text.stat()
    prepare({"pretrain": [text], "sft": [chats]}, tmp_path / "out")
    kept = contents(tmp_path / "out")
    line = chats.read_text().splitlines(keepends=True)
    changes = {
        "longer": lambda: text.write_text(whole + "more\n"),
        "shorter": lambda: text.write_text(whole[:-1]),
        "as long": lambda: text.write_text(whole.replace("text", "test", 1)),
        "no UTF-8": lambda: text.write_bytes(whole[:-2].encode() + b"\xff\n"),
        "another order": lambda: chats.write_text("".join(line[1:2] + line[:1] + line[2:])),
        "a bad line": lambda: chats.write_text("".join(line).replace('"question"', '"questiom"', 1)),
        "gone": text.unlink,
    }
    for name, change in changes.items():
        text.write_text(whole)
        chats.write_text("".join(line))

        def meanwhile(what, total, change=change):
            if what == "encoding":
                change()
                if text.exists():
                    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
            return lambda n_bytes: None

        with pytest.raises((UserError, OSError), match="has changed while it was read|No such file"):
            prepare({"pretrain": [text], "sft": [chats]}, tmp_path / "out", progress=meanwhile)
        assert contents(tmp_path / "out") == kept, name


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pretrain", "missing.txt"],
        ["--pretrain", "empty.txt"],
        ["--pretrain", "blank.txt"],
        ["--pretrain", "blank.txt", "--skip-bad-lines"],
        ["--pretrain", "tiny.txt"],
        ["--pretrain", "."],
        ["--sft", "one.jsonl"],
        ["--sft", "bad.jsonl", "--skip-bad-lines"],
        ["--pretrain", "good.txt", "--val_fraction", "1"],
        ["--pretrain", "good.txt", "--val_fraction", "nan"],
        ["--pretrain", "good.txt", "--seed", "-1"],
        ["--pretrain", "good.txt", "--vocab_size", "300"],
        ["--pretrain", "good.txt", "--kind", "bpe", "--vocab_size", "3"],
        ["--pretrain", "good.txt", "--tokenizer", "good.txt"],
        ["--pretrain", "good.txt", "--tokenizer", "x.json", "--kind", "char"],
        ["--pretrain", "good.txt", "--out", "good.txt"],
    ],
)
def test_mistakes_end_with_one_sentence_and_exit_code_2(tmp_path, arguments):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n<|bos|>\n")
    (tmp_path / "tiny.txt").write_text("x")
    (tmp_path / "good.txt").write_text("good text\n" * 10)
    write_jsonl(tmp_path / "one.jsonl", QA[:1])
    (tmp_path / "bad.jsonl").write_text("bad\nbad\n")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(("error: ", "usage: "))
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_disk_full_leaves_the_old_files(prepared, tmp_path, monkeypatch):
    folder, _ = prepared
    prepare(inputs_of(folder.parent), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = iter(range(100))

    def full(descriptor):
        if next(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        prepare(inputs_of(folder.parent), tmp_path, seed=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- stages ----------------------------------------------------------------------------------------


def main_in(folder, monkeypatch, *arguments):
    """`python data.py` in this process, with `folder` as dataset/."""
    monkeypatch.setattr("preparation.data_command.DATASET", folder)
    monkeypatch.setattr("preparation.DATASET", folder)
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    data_command.main()


def test_a_stage_in_the_table_gets_its_option_and_its_files(tmp_path, monkeypatch, capsys):
    for stage in (
        Stage("midtrain", "mid-training"),
        Stage("dialogue", "dialogue", documents="chats"),
        Stage("choose", "preferences", documents="preferences"),  # not prepared by data.py
    ):
        monkeypatch.setitem(STAGES, stage.name, stage)
    (tmp_path / "a.txt").write_text("some text\n" * 99)
    write_jsonl(tmp_path / "dialogue.jsonl", QA)
    write_jsonl(tmp_path / "midtrain.jsonl", [{"text": f"text {i}"} for i in range(40)])
    with pytest.raises(SystemExit):
        main_in(tmp_path, monkeypatch, "--choose", tmp_path / "a.txt")
    assert "unrecognized arguments: --choose" in capsys.readouterr().err

    out = tmp_path / "named"
    named = ["--midtrain", tmp_path / "a.txt", "--dialogue", tmp_path / "dialogue.jsonl", "--out", out]
    main_in(tmp_path, monkeypatch, *named)
    assert sorted(path.name for path in out.glob("*.bin")) == [
        f"{stage}_{split}.bin" for stage in ("dialogue", "midtrain") for split in ("train", "val")
    ]
    chats, text = TokenFile(out / "dialogue_train.bin"), TokenFile(out / "midtrain_train.bin")
    assert (chats.kind, chats.documents, text.kind, text.documents) == (
        "dialogue", "chats", "midtrain", "text"
    )  # fmt: skip
    assert text.mask is None and len(TokenBatches([text, chats], 32, 4)(0)["x"]) == 4

    # What is in the folder is prepared; of what is not, only the stages that everyone expects are mentioned.
    capsys.readouterr()
    (tmp_path / "pretrain.txt").write_text("some text\n" * 99)
    main_in(tmp_path, monkeypatch)
    assert len(list((tmp_path / "prepared").glob("*.bin"))) == 6
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("nothing is prepared for") == 1 and "for fine-tuning" in told
    for name in ("midtrain.jsonl", "dialogue.jsonl"):
        (tmp_path / name).unlink()
    main_in(tmp_path, monkeypatch)
    assert capsys.readouterr().out.count("nothing is prepared for") == 1

    monkeypatch.delitem(STAGES, "midtrain")
    with pytest.raises(UserError, match=r"midtrain_train\.json is damaged"):
        TokenFile(out / "midtrain_train.bin")


# ---- token files -----------------------------------------------------------------------------------


def test_another_tokenizer_is_refused(prepared):
    folder, _ = prepared
    with pytest.raises(UserError, match="another tokenizer"):
        TokenFile(folder / "sft_val.bin", "0" * 64)
    with pytest.raises(UserError, match="does not exist"):
        TokenFile(folder / "nothing.bin")
    with pytest.raises(UserError, match=r"\.bin"):
        TokenFile(folder / "sft_val.json")


def test_damaged_files_are_refused(prepared, tmp_path):
    folder, _ = prepared
    parts = ["bin", "starts", "mask", "json"]
    whole = {part: (folder / f"sft_train.{part}").read_bytes() for part in parts}
    for part in parts:
        (tmp_path / f"x.{part}").write_bytes(whole[part])
    sound = TokenFile(tmp_path / "x.bin")
    random = np.random.default_rng(0)
    for number in range(200):
        part = parts[number % 4]
        damaged = bytearray(whole[part])
        match random.integers(5):
            case 0:
                del damaged[random.integers(len(damaged)) :]
            case 1:
                damaged += random.bytes(random.integers(1, 9))
            case 2:
                damaged[:] = random.bytes(len(damaged))
            case _:
                damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
        (tmp_path / f"x.{part}").write_bytes(damaged)
        try:
            file = TokenFile(tmp_path / "x.bin")
            assert part == "json" and file.meta == sound.meta  # the damage was in white space
        except UserError as error:
            assert str(tmp_path / "x.") in str(error)
        (tmp_path / f"x.{part}").write_bytes(whole[part])
    for part in parts:
        (tmp_path / f"x.{part}").unlink()
        with pytest.raises(UserError, match="does not exist"):
            TokenFile(tmp_path / "x.bin")
        (tmp_path / f"x.{part}").write_bytes(whole[part])


@pytest.mark.parametrize(
    "change",
    [{"n_tokens": 10**30}, {"dtype": "object"}, {"kind": []}, {"vocab_size": 8}, {"n_documents": -1},
     {"n_bytes": 10**400}, {"n_loss_bytes": 1 << 62}, {"more": "x" * 100_000}],
)  # fmt: skip
def test_hostile_descriptions_are_refused(prepared, tmp_path, change):
    folder, _ = prepared
    for part in ("bin", "starts", "mask", "json"):
        (tmp_path / f"x.{part}").write_bytes((folder / f"sft_train.{part}").read_bytes())
    meta = {**json.loads((tmp_path / "x.json").read_text()), **change}
    del meta["checksum"]
    meta["checksum"] = preparation.token_file.meta_checksum(meta)
    (tmp_path / "x.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"x\."):
        TokenFile(tmp_path / "x.bin")


# ---- batches ---------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_shuffled_is_a_permutation(n, seed):
    order = shuffled(np.arange(n), n, random_keys(8, seed))
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    place = seed % n
    assert shuffled(np.array([place]), n, random_keys(8, seed))[0] == order[place]


@given(st.lists(st.tuples(st.integers(1, 10**12), st.integers(0, 2**40)), min_size=1, max_size=9))
def test_each_index_may_be_of_a_list_of_its_own(lists):
    sizes, keys = np.array([n for n, _ in lists]), [random_keys(8, seed) for _, seed in lists]
    places = np.array([seed % n for n, seed in lists])
    alone = [shuffled(places[i : i + 1], n, keys[i])[0] for i, (n, _) in enumerate(lists)]
    np.testing.assert_array_equal(shuffled(places, sizes, np.stack(keys, 1)), alone)
    assert all(0 <= place < n for place, n in zip(alone, sizes, strict=True))


def test_shuffled_looks_random():
    n = 5000
    orders = [shuffled(np.arange(n), n, random_keys(8, seed)) for seed in range(40)]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.08
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.08
        steps = np.diff(order)
        assert np.bincount(steps + n).max() < 20  # neighbours do not stay at one distance
    firsts = np.array([shuffled(np.arange(1), 5, random_keys(8, seed))[0] for seed in range(2000)])
    assert np.bincount(firsts, minlength=5).min() > 320
    where = np.array([order[:100] for order in orders]).ravel()
    assert np.histogram(where, 10, (0, n))[0].min() > 330


@pytest.fixture(scope="module")
def files(prepared):
    folder, _ = prepared
    names = ("pretrain_train", "pretrain_val", "sft_train")
    return {name: TokenFile(folder / f"{name}.bin") for name in names}


def pairs(batches, steps):
    """How often each (x, y) is predicted, as a sorted list."""
    found = []
    for step in steps:
        x, y, mask = batches(step).values()
        found += zip(x[mask > 0].tolist(), y[mask > 0].tolist(), strict=True)
    return sorted(found)


@pytest.mark.parametrize("block_size", [8, 13, 64, 100_000])
def test_an_epoch_predicts_every_token_once(files, block_size):
    file = files["pretrain_train"]
    ring = file.tokens.tolist() + file.tokens[:1].tolist()
    everything = list(zip(ring, ring[1:], strict=False))
    batches = TokenBatches([file], block_size, 1, seed=3)
    n = batches.sequences_per_epoch
    assert batches.tokens_per_epoch == len(file.tokens) - 1
    for epoch in (0, 1):
        found = pairs(batches, range(epoch * n, (epoch + 1) * n))
        assert len(found) == len(everything) - 1
        assert Counter(found) <= Counter(everything)
    x, y, mask = batches(0).values()
    assert x.shape == y.shape == mask.shape and x.shape[1] <= block_size
    np.testing.assert_array_equal(x[0, 1:][mask[0, 1:] > 0], y[0, :-1][mask[0, 1:] > 0])


def test_an_epoch_shows_every_block_once_and_the_next_in_another_order(files):
    file = files["pretrain_train"]
    batches = TokenBatches([file], 16, 4, seed=5)
    n = batches.sequences_per_epoch
    rows = np.concatenate([batches(first)["x"] for first in range(0, 2 * n, 4)])[: 2 * n]
    stream = np.concatenate([file.tokens, file.tokens[:17]])
    starts = {stream[i : i + 16].tobytes(): i for i in range(len(file.tokens))}
    found = [starts.get(row.astype(np.uint16).tobytes()) for row in rows]
    first, second = found[:n], found[n:]
    assert sum(start is None for start in first) <= 1  # the one that is padded
    whole = [start for start in first if start is not None]
    assert len(set(whole)) == len(whole) > 20
    assert first != second and set(first) != set(second)


def test_conversations_once_an_epoch_masked_and_padded(files):
    file = files["sft_train"]
    batches = TokenBatches([file], 512, 3, seed=1)
    n = batches.sequences_per_epoch
    assert n == file.meta["n_documents"] and batches.n_truncated == 0
    seen = []
    for first in range(0, 3 * n, 3):
        x, y, mask = batches(first).values()
        assert x.dtype == y.dtype == np.int64 and mask.dtype == np.float32
        assert x.shape == y.shape == mask.shape and x.shape[1] % 8 == 0
        longest = 0
        for row in range(3):
            end = y[row].tolist().index(3) + 1
            longest = max(longest, end)
            begin = x[row].tolist().index(5)
            assert mask[row].tolist() == [0] * begin + [1] * (end - begin) + [0] * (len(x[row]) - end)
            assert not y[row, end:].any() and not x[row, end + 1 :].any()
            seen.append((*x[row, :1], *y[row, :end]))
        assert longest > x.shape[1] - 8
    documents = [tuple(file.tokens[a:b]) for a, b in zip(file.starts, file.starts[1:], strict=False)]
    assert sorted(seen) == sorted(documents * 3)


def test_long_conversations_are_cut(files):
    file = files["sft_train"]
    lengths = np.diff(file.starts)
    batches = TokenBatches([file], 9, 4)
    assert batches.n_truncated == (lengths > 10).sum() > 0
    assert batches.tokens_per_epoch == np.minimum(lengths - 1, 9).sum()
    assert all(batches(step)["x"].shape == (4, 9) for step in range(20))


def test_a_conversation_counts_if_a_token_of_its_answer_is_in_the_block(files):
    file = files["sft_train"]
    documents = list(zip(file.starts.tolist(), file.starts.tolist()[1:], strict=False))
    needs = [next(i for i in range(1, end - start) if file.mask[start + i]) for start, end in documents]
    assert file.min_block_sizes.tolist() == needs
    for block_size in range(min(needs), max(needs) + 2):
        batches = TokenBatches([file], block_size, 1)
        assert batches.sequences_per_epoch == sum(need <= block_size for need in needs)
        assert batches.n_left_out == len(needs) - batches.sequences_per_epoch
        rows = [batches(first) for first in range(batches.sequences_per_epoch)]
        assert all(row["mask"].any() for row in rows)
        x = rows[0]["x"]
        kept = [file.tokens[start : start + x.shape[1]] for start, _ in documents]
        assert any(np.array_equal(x[0, :3], ids[:3]) for ids in kept)
    with pytest.raises(UserError, match=f"the first answer needs a model whose block_size is {min(needs)} "):
        TokenBatches([file], min(needs) - 1, 1)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_where_answers_begin_does_not_depend_on_chunks(files, chunk, monkeypatch):
    expected = files["sft_train"].min_block_sizes
    monkeypatch.setattr(preparation.token_file, "CHUNK", chunk)
    np.testing.assert_array_equal(TokenFile(files["sft_train"].path).min_block_sizes, expected)


def test_a_curriculum_in_order(files):
    first, second = files["pretrain_val"], files["sft_train"]
    batches = TokenBatches([first, second], 16, 1)
    n, m = (TokenBatches([file], 16, 1).sequences_per_epoch for file in (first, second))
    assert batches.sequences_per_epoch == n + m
    assert batches.position(0) == (0, 0, 0) and batches.position(n) == (0, 1, 0)
    assert batches.position(n + m - 1) == (0, 1, m - 1) and batches.position(n + m) == (1, 0, 0)
    stage = [int(batches(step)["x"][0, 0] == 4) for step in range(2 * (n + m))]
    assert stage[n : n + m] == [1] * m and sum(stage[:n]) == 0
    # A batch may reach over stages and epochs, and its rows are those of smaller batches.
    whole = TokenBatches([first, second], 16, 3 * (n + m))(0).values()
    singles = [batches(step).values() for step in range(3 * (n + m))]
    for row, (x, y, mask) in enumerate(singles):
        width = x.shape[1]
        for big, small in zip(whole, (x, y, mask), strict=True):
            np.testing.assert_array_equal(big[row, :width], small[0])


def test_a_file_shorter_than_a_block(tmp_path):
    (tmp_path / "x.txt").write_text("ab")
    prepare({"pretrain": [tmp_path / "x.txt"]}, tmp_path)
    x, y, mask = TokenBatches([TokenFile(tmp_path / "pretrain_val.bin")], 256, 4)(7).values()
    assert x.shape == y.shape == (4, 8) and mask.sum(1).tolist() == [2] * 4


CODE = """
import hashlib, sys
sys.path.insert(0, sys.argv[2])
from data import TokenBatches, TokenFile
files = [TokenFile(f"{sys.argv[1]}/{name}.bin") for name in ("pretrain_train", "sft_train")]
batch = TokenBatches(files, 32, 8, seed=9)(12345)
print(hashlib.sha256(b"".join(a.tobytes() for a in batch.values())).hexdigest())
"""


def test_a_batch_is_a_pure_function_of_data_seed_and_step(prepared, files):
    folder, _ = prepared
    arguments = [sys.executable, "-c", CODE, str(folder), str(ROOT)]
    fresh = subprocess.run(arguments, capture_output=True, text=True).stdout.strip()
    make = lambda seed: TokenBatches([files["pretrain_train"], files["sft_train"]], 32, 8, seed)  # noqa: E731
    batches = make(9)
    for step in (3, 10**9, 12344, 0):
        batches(step)
    here = [
        hashlib.sha256(b"".join(a.tobytes() for a in make(s)(12345).values())).hexdigest() for s in (9, 10)
    ]
    again = hashlib.sha256(b"".join(a.tobytes() for a in batches(12345).values())).hexdigest()
    assert fresh == again == here[0] != here[1]


def test_nothing_grows_over_an_epoch(files):
    batches = TokenBatches([files["pretrain_train"], files["sft_train"]], 16, 2)
    for step in range(20):
        batches(step)
    tracemalloc.start()
    batches(0)
    before = tracemalloc.get_traced_memory()[0]
    for step in range(batches.sequences_per_epoch):
        batches(step)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 10_000


def test_help_does_not_import_slow_libraries(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "data.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "examples" in done.stdout
    assert not any(f"| {name}" in done.stderr.replace("  ", "") for name in ("torch", "tokenizers", "rich"))
