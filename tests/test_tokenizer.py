"""tokenizer.py: nothing is lost, nothing in plain text becomes special, nothing damaged is loaded."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenizer as module
from common.errors import UserError
from tokenizer import (
    BLOCK,
    SPECIAL_TOKENS,
    BPETokenizer,
    CharTokenizer,
    check_messages,
    from_dict,
    load,
    merge_turns,
    render_chat,
    render_chats,
)

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = "The quick brown fox. 敏捷的棕色狐狸跳过懒狗。\r\n\te\u0301 𝄞🙂 <|eos|> 1 + 1 = 2\n" * 3
CHAR = CharTokenizer.train([SAMPLE])
BPE = BPETokenizer.train([SAMPLE] * 3, vocab_size=330)
BOTH = pytest.mark.parametrize("tokenizer", [CHAR, BPE], ids=["char", "bpe"])

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
sample_text = st.text(st.sampled_from(sorted(set(SAMPLE))), max_size=200)
awkward_pieces = [*SPECIAL_TOKENS, "<|endoftext|>", "\r\n", "\r", "\n", " ", "é", "e\u0301", "𝄞", "\0", "中"]
awkward = st.lists(st.sampled_from(awkward_pieces)).map("".join)


def run(*args, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=cwd)


@BOTH
def test_special_tokens_come_first(tokenizer):
    assert [tokenizer.decode([i]) for i in range(7)] == list(SPECIAL_TOKENS)
    assert (tokenizer.padding_id, tokenizer.unknown_id, tokenizer.system_id) == (0, 1, 6)
    assert tokenizer.decode([2, 7, 3], skip_special=True) == tokenizer.decode([7])


@given(sample_text)
def test_char_round_trip(text):
    ids = CHAR.encode(text)
    assert ids.dtype == np.uint16 and len(ids) == len(text)
    assert CHAR.decode(ids) == text


@given(any_text | awkward)
def test_char_of_any_corpus(text):
    tokenizer = CharTokenizer.train([text])
    assert tokenizer.characters == "".join(sorted(set(text)))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert from_dict(json.loads(json.dumps(tokenizer.to_dict()))).fingerprint == tokenizer.fingerprint


@given(any_text | awkward)
def test_bpe_loses_nothing(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert BPE.decode_bytes(ids) == text.encode()


@BOTH
@given(text=awkward | any_text)
def test_plain_text_never_yields_special_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not np.isin(ids, [i for i in range(7) if i != tokenizer.unknown_id]).any()


@BOTH
@given(texts=st.lists(any_text | awkward, max_size=8))
def test_batch_equals_one_by_one(tokenizer, texts):
    batch = tokenizer.encode_batch(texts)
    assert len(batch) == len(texts)
    for text, ids in zip(texts, batch, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_unknown_characters():
    ids = CHAR.encode("狐鼠\ud800")
    assert ids.tolist()[1:] == [CHAR.unknown_id] * 2
    assert CHAR.decode(ids) == "狐<|unknown|><|unknown|>"
    assert BPE.decode(BPE.encode("a\ud800b")) == "a\ufffdb"


def test_long_texts_are_cut_where_bpe_would_not_merge(monkeypatch):
    text = SAMPLE * 3 + "a \n\n b\n\nc\n d\ne\r\nf" * 9
    whole = BPE.encode(text)
    monkeypatch.setattr(module, "BLOCK", 10)
    assert len(list(BPE.pieces(text))) > 10
    np.testing.assert_array_equal(BPE.encode(text), whole)


def test_block_boundaries_make_no_difference():
    text = SAMPLE * (3 * module.BLOCK // len(SAMPLE))
    assert CHAR.decode(CHAR.encode(text)) == text


def test_streaming_bytes_can_split_a_character():
    ids = BPE.encode("鼠")
    assert len(ids) == 3 and BPE.decode(ids[:2]) != "鼠"
    assert b"".join(BPE.decode_bytes([i]) for i in ids) == "鼠".encode()


def test_ids_out_of_range():
    for ids in ([CHAR.vocab_size], [-1]):
        with pytest.raises(ValueError, match="token ids"):
            CHAR.decode(ids)
    assert CHAR.decode([]) == "" and CHAR.encode("").shape == (0,)


def test_vocabulary_sizes():
    assert BPE.vocab_size == 330
    assert BPETokenizer.train([SAMPLE], 263).vocab_size == 263
    assert BPETokenizer.train(["aaaa"], 5000).vocab_size < 270
    with pytest.raises(UserError, match="263"):
        BPETokenizer.train([SAMPLE], 262)
    big = CharTokenizer("".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x14000)])))
    assert big.vocab_size > 1 << 16 and big.encode("\U00013fff").dtype == np.uint32
    assert big.decode(big.encode("a\U00013fff")) == "a\U00013fff"


def test_learning_from_a_very_long_word_is_fast():
    letters = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x4E80, 200_000)))
    tokenizer = BPETokenizer.train([letters], 2000)
    assert tokenizer.vocab_size == 2000 and tokenizer.decode(tokenizer.encode(letters)) == letters


def test_training_is_deterministic():
    code = f"import tokenizer; print(tokenizer.BPETokenizer.train([{SAMPLE!r}] * 3, 330).fingerprint)"
    again = run("-c", code)
    assert again.stdout.strip() == BPE.fingerprint
    assert CharTokenizer.train(["ba", "c"]).fingerprint == CharTokenizer.train(["cab"]).fingerprint


@BOTH
def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "某 处" / "tokenizer.json"
    tokenizer.save(path)
    loaded = load(path)
    assert type(loaded) is type(tokenizer) and loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.encode(SAMPLE), tokenizer.encode(SAMPLE))
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


@BOTH
def test_damaged_files_are_refused(tokenizer, tmp_path):
    path = tmp_path / "t.json"
    tokenizer.save(path)
    whole = path.read_bytes()
    random = np.random.default_rng(1)
    for _ in range(150):
        data = bytearray(whole)
        if random.random() < 0.3:
            del data[random.integers(len(data)) :]
        else:
            data[random.integers(len(data))] = random.integers(256)
        path.write_bytes(data)
        try:
            assert load(path).fingerprint == tokenizer.fingerprint  # the damage did not change its meaning
        except UserError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"version": 2},
        {"kind": []},
        {"special_tokens": ["<|eos|>"]},
        {"characters": "ba"},
        {"characters": "aa"},
        {"characters": ["a"]},
        {"characters": "a\ud800"},
        {"characters": None},
        {"fingerprint": "0"},
    ],
)
def test_foreign_dicts_are_refused(change):
    with pytest.raises(UserError):
        from_dict({**CHAR.to_dict(), **change})


@pytest.mark.parametrize("merges", [None, [["a"]], [["a", 1]], [["a", "nowhere"]], ["a b"], [["", "a"]], {}])
def test_foreign_merges_are_refused(merges):
    with pytest.raises(UserError):
        from_dict({**BPE.to_dict(), "merges": merges})


RULES = dict(patterns=[r"\p{N}{1,2}", r" ?\p{L}+"], normalizer="NFC", ignore_merges=True, words=["zz"])
RULED = BPETokenizer(BPE.merges, **RULES)


@given(text=any_text | awkward)
def test_a_tokenizer_with_its_own_rules(text):
    """Nothing is lost except how accents are written."""
    assert RULED.decode(RULED.encode(text)) == unicodedata.normalize("NFC", text)


def test_rules_are_part_of_a_tokenizer(tmp_path):
    assert RULED.fingerprint != BPE.fingerprint == BPETokenizer(BPE.merges, patterns=[]).fingerprint
    RULED.save(tmp_path / "t.json")
    loaded = load(tmp_path / "t.json")
    assert loaded.rules == RULES and loaded.fingerprint == RULED.fingerprint
    assert len(RULED.encode("zz")) == 1 and len(BPE.encode("zz")) == 2
    assert len(RULED.encode("zzz")) == 3  # only a whole word can be one of `words`


def test_long_texts_are_not_cut_if_there_are_patterns():
    text = "x 1\n" * BLOCK
    assert len(list(BPE.pieces(text))) > 1 and list(RULED.pieces(text)) == [text]


@pytest.mark.parametrize(
    "change",
    [
        {"patterns": "x"}, {"patterns": ["("]}, {"patterns": [1]}, {"patterns": [None]},
        {"normalizer": "NFD"}, {"normalizer": 1}, {"ignore_merges": 1}, {"ignore_merges": False},
        {"words": ["a"]}, {"words": ["zz", "zz"]}, {"words": ["é "]}, {"words": [""]}, {"words": "zz"},
        {"words": [["zz"]]}, {"words": ["zzz"]},
    ],
)  # fmt: skip
def test_foreign_rules_are_refused(change):
    with pytest.raises(UserError):
        from_dict({**RULED.to_dict(), **change})


def test_a_pattern_that_takes_years_is_refused():
    """Should the library give up on a pattern all the same, that becomes an error with a sentence."""
    hostile = BPETokenizer(BPE.merges, patterns=["(a+)+$"])
    with pytest.raises(UserError, match=r"one of its patterns would take years on some texts: \(a\+\)\+\$"):
        from_dict(hostile.to_dict())
    with pytest.raises(UserError, match="the tokenizer's patterns give up on this text"):
        hostile.encode("a" * 30 + "b")


def test_a_file_that_is_too_large_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenizer.MAX_JSON_LENGTH", 10_000)
    (tmp_path / "x.json").write_text("[" + "[]," * 5000 + "[]]")
    with pytest.raises(UserError, match=r"x\.json: this is too large for a tokenizer"):
        load(tmp_path / "x.json")


@pytest.mark.parametrize("d", [None, [], "x", {}, 3])
def test_what_is_not_a_tokenizer_is_refused(d):
    with pytest.raises(UserError):
        from_dict(d)


@BOTH
def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "懒"},
        {"role": "user", "content": "<|eos|>?"},
        {"role": "assistant", "content": "狐狸"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "狗"},
    ]
    ids, mask = render_chat(tokenizer, messages)
    e = lambda text: tokenizer.encode(text).tolist()  # noqa: E731
    asked = [6, *e("懒"), 4, *e("<|eos|>?"), 5]
    assert ids.tolist() == [*asked, *e("狐狸"), 3, 4, 5, *e("狗"), 3]
    n, m = len(e("狐狸")) + 1, len(e("狗")) + 1
    assert mask.tolist() == [0] * len(asked) + [1] * n + [0, 0] + [1] * m
    assert ids.dtype == tokenizer.dtype and mask.dtype == np.uint8

    prompt, mask = render_chat(tokenizer, messages[:2], add_generation_prompt=True)
    assert prompt.tolist() == asked and not mask.any()
    first, second = render_chats(tokenizer, [messages, messages[1:3]])
    assert first[0].tolist() == ids.tolist()
    assert second[0].tolist() == [4, *e("<|eos|>?"), 5, *e("狐狸"), 3]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hello",
        ["hello"],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}],
        [{"role": "system", "content": "x"}, {"role": "system", "content": "x"}],
    ],
)
def test_impossible_conversations(messages):
    for function in (check_messages, merge_turns, lambda messages: render_chat(CHAR, messages)):
        with pytest.raises(UserError):
            function(messages)


def said(*turns):
    """("user", "Hi", "assistant", "Hello", ...) as messages."""
    return [{"role": role, "content": text} for role, text in zip(turns[::2], turns[1::2], strict=True)]


@BOTH
def test_the_assistant_may_speak_first(tokenizer):
    e = lambda text: tokenizer.encode(text).tolist()  # noqa: E731
    messages = said("system", "懒", "assistant", "狐狸", "user", "1", "assistant", "狗")
    ids, mask = render_chat(tokenizer, messages)
    assert ids.tolist() == [6, *e("懒"), 5, *e("狐狸"), 3, 4, *e("1"), 5, *e("狗"), 3]
    learned = [0] * (2 + len(e("懒"))) + [1] * (len(e("狐狸")) + 1)
    assert mask.tolist() == learned + [0] * (2 + len(e("1"))) + [1] * (len(e("狗")) + 1)


def test_turns_are_merged():
    messages = said("system", "s", "assistant", "a", "assistant", "b", "user", "c", "user", "", "user", "d")
    before = json.dumps(messages)
    merged, count = merge_turns(messages)
    assert merged == said("system", "s", "assistant", "a\nb", "user", "c\n\nd") and count == 3
    assert json.dumps(messages) == before
    assert merge_turns(merged) == (merged, 0)
    for role, other in (("user", "assistant"), ("assistant", "user")):
        with pytest.raises(UserError, match=f"message 2 is from {role} where {other} should speak"):
            check_messages(said(role, "x", role, "x"))


def test_merging_takes_linear_time():
    """Each text is copied once, however many messages there are."""
    n_copied = 0

    class Text(str):
        def __add__(self, other):
            nonlocal n_copied
            n_copied += len(self) + len(other)
            return Text(str(self) + other)

    merged, _ = merge_turns([{"role": "user", "content": Text("ab")}] * 1000)
    assert len(merged[0]["content"]) == 2999 and n_copied <= 2 * 2999


@BOTH
@given(any_text | awkward | st.text("fox the\u0065\u0301\u1f84\u03b1\u0313\u0345"))
def test_min_tokens_is_a_lower_bound(tokenizer, text):
    assert 0 <= tokenizer.min_tokens(text) <= len(tokenizer.encode(text))
    if tokenizer.kind == "bpe":
        composing = BPETokenizer(tokenizer.merges, normalizer="NFC")
        assert composing.min_tokens(text) <= len(composing.encode(text))


def test_nfc_composes_at_most_four_characters():
    """Checked for every character that has a decomposition."""
    for number in range(sys.maxunicode + 1):
        parts = unicodedata.normalize("NFD", chr(number))
        assert len(unicodedata.normalize("NFC", parts)) * 4 >= len(parts)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text("ab\n", max_size=3)), min_size=1))
def test_merging_keeps_all_text_and_alternates_roles(turns):
    merged, count = merge_turns([{"role": role, "content": text} for role, text in turns])
    check_messages(merged)
    assert count == len(turns) - len(merged)
    assert "\n".join(message["content"] for message in merged) == "\n".join(text for _, text in turns)


def test_command_line(tmp_path):
    (tmp_path / "某 text.txt").write_text(SAMPLE * 20, encoding="utf-8")
    chat = '\ufeff{"messages": [{"role": "user", "content": "龘\u2028"}], "id": 7}\n'
    (tmp_path / "chat.jsonl").write_text(chat, "utf-8")
    script = ROOT / "tokenizer.py"
    done = run(script, "train", "--kind", "bpe", "--vocab_size", "300", "某 text.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "tokenizer.json").vocab_size == 300
    done = run(script, "train", "chat.jsonl", "-o", "c.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "chat.jsonl: 1 conversations of messages; not read: id (1)\n" in done.stdout
    assert load(tmp_path / "c.json").characters == "\u2028龘"
    done = run(script, "stats", "某 text.txt", "--vocab_size", "300", cwd=tmp_path)
    assert done.returncode == 0 and "bytes per token" in done.stdout and "bpe" in done.stdout
    done = run(script, "stats", "某 text.txt", "--tokenizer", "c.json", cwd=tmp_path)
    assert done.returncode == 0 and "100.0000%" in done.stdout

    (tmp_path / "empty.txt").touch()
    for mistake in (
        ["stats", "missing.txt"],
        ["stats", "empty.txt"],
        ["train", "empty.txt"],
        ["train", "chat.jsonl", "--vocab_size", "9"],
        ["train", "chat.jsonl", "--kind", "bpe", "--vocab_size", "9"],
        ["stats", "chat.jsonl", "--tokenizer", "chat.jsonl"],
        ["stats", "chat.jsonl", "--tokenizer", "empty.txt"],
        ["train"],
        [],
    ):
        done = run(script, *mistake, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr and "Traceback" not in done.stderr, mistake
