"""sources/text.py: no valid text is lost, and it makes no difference where a block of bytes ends."""

import io
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import any_text, awkward

from common.errors import UserError
from sources import BadLine, ReadReport, Source, reading, text
from sources.text import DELIMITER


def batches_of(path, chunk=None, long=None, **options):
    """([(texts, is_open), ...], ReadReport) of a file, read in blocks of `chunk` bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", chunk or reading.CHUNK)
        patch.setattr(text, "LONG", long or text.LONG)
        found = ReadReport(**options)
        return list(Source(path).documents(found)), found


def joined(batches):
    """The documents in batches, and the parts of each."""
    documents, was_open = [], False
    for texts, is_open in batches:
        parts = [[part] for part in texts]
        if was_open:
            documents[-1] += parts.pop(0)
        documents += parts
        was_open = is_open
    assert not was_open
    return ["".join(parts) for parts in documents], documents


def documents_of(written):
    """The documents in a text, found in the simplest way."""
    parts = DELIMITER.split(written.replace("\ufeff", ""))
    return [part for part in parts if part and not part.isspace()]


@given(written=any_text | awkward, chunk=st.integers(1, 40), bom=st.booleans())
@example(written="{", chunk=1, bom=False)
@example(written="[", chunk=1, bom=True)
@settings(max_examples=200, deadline=None)
def test_every_byte_is_kept(written, chunk, bom, tmp_path_factory):
    """Except byte-order marks, delimiters and blank documents."""
    path = tmp_path_factory.mktemp("read") / "x.txt"
    written = written.replace("\0", "")
    path.write_bytes(b"\xef\xbb\xbf" * bom + written.encode())
    expected = documents_of(written)
    if not expected:
        with pytest.raises(UserError, match="there is no text in it"):
            batches_of(path, chunk)
        return
    batches, found = batches_of(path, chunk)
    assert joined(batches)[0] == expected
    assert found.counts["marks", ""] == written.count("\ufeff") - (written.startswith("\ufeff") and not bom)


pieces = st.sampled_from(
    [
        b"a",
        b" ",
        b"\n",
        b"\n",
        b"\r\n",
        b"\xff",
        b"\0",
        b"\xe4\xb8",
        "中".encode(),
        "𝄞".encode(),
        b"<|eos",
        b"|>",
    ]
    + [b"<|eos|>", b"<|endoftext|>", b"<|eos|> \n<|bos|>", b"\xef\xbb\xbf", b"word\nword\n"]
)


@given(content=st.lists(pieces, min_size=1, max_size=60).map(b"".join), chunk=st.integers(1, 70))
@settings(max_examples=300, deadline=None)
def test_blocks_make_no_difference(content, chunk, tmp_path_factory):
    """The same documents, in the same parts, and the same lines left out as when the file is read at once."""
    path = tmp_path_factory.mktemp("x") / "x.txt"
    path.write_bytes(b"text of some length " * 40 + b"\n" + content)  # so that it is recognised as text
    sound, n_bad, n_bad_bytes = "", 0, 0
    for line in io.BytesIO(path.read_bytes()):
        if b"\0" in line or line != line.decode("utf-8", "ignore").encode():
            n_bad += 1
            n_bad_bytes += len(line)
        else:
            sound += line.decode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sources.kinds.HEAD", 800)  # the beginning
        batches, found = batches_of(path, chunk, 20, skip_bad_lines=True)
        whole, found_whole = batches_of(path, 1 << 20, 20, skip_bad_lines=True)
    documents, parts = joined(batches)
    assert documents == documents_of(sound) and parts == joined(whole)[1]
    assert vars(found) == vars(found_whole)
    assert (found.n_bad_lines, found.n_bad_bytes) == (n_bad, n_bad_bytes)
    for document in parts:
        assert all(20 <= len(part) <= 40 for part in document[:-1]) and len(document[-1]) <= 40


def test_a_long_document_is_cut_where_lines_end():
    [*lists, last] = text.in_parts(["a line of text\n" * 100_000])
    assert len(lists) > 3
    for part in [part for [part] in lists]:
        assert part.endswith("\n") and text.LONG <= len(part) < text.LONG + 20
    blank_lines = "a\n\n" * 400_000  # where BPE may take two line ends together
    assert [len(part) for [part] in text.in_parts([blank_lines])[:-1]] == [2 * text.LONG] * 2


BAD = {"a bad byte": b"\xff", "a NUL": b"\0", "half a character": b"\xe4\xb8"}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 3000, 5_000_001, 6_720_000])
def test_a_long_line_is_left_out_whole(bad, place, tmp_path):
    """Whichever block the bad byte is in."""
    path, line = tmp_path / "x.txt", "天地玄黄宇宙洪荒".encode() * 280_000
    line = line[:place] + BAD[bad] + line[place:]
    path.write_bytes(b"first\n" * 20_000 + line + b"\nlast\n")
    batches, found = batches_of(path, skip_bad_lines=True)
    assert joined(batches)[0] == ["first\n" * 20_000 + "last\n"]
    assert (found.n_bad_lines, found.n_bad_bytes) == (1, len(line) + 1)
    what = "holds a NUL byte" if bad == "a NUL" else "not UTF-8"
    with pytest.raises(BadLine, match=rf"x\.txt, line 20001: {what} at its byte {place + 1:,}"):
        batches_of(path)


def test_bad_lines_are_found_and_left_out(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("好\r\n".encode() * 10 + b"a\xffb\n" + "坏\n".encode() + "坏".encode()[:2])
    with pytest.raises(BadLine, match=r"x\.txt, line 11: not UTF-8"):
        batches_of(path)
    [([document], _)], found = batches_of(path, skip_bad_lines=True)
    assert document == "好\r\n" * 10 + "坏\n"
    assert [sentence.split(": ")[0][-7:] for sentence in found.left_out] == ["line 11", "line 13"]


@pytest.mark.parametrize("end", [b"", b"\xff"], ids=["sound", "bad"])
def test_a_line_of_any_length_takes_little_memory(end, tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("天地玄黄宇宙洪荒".encode() * (1 << 20) + end + b"\nend\n")
    source, found = Source(path), ReadReport(skip_bad_lines=True)
    tracemalloc.start()
    n_characters = sum(len(part) for texts, _ in source.documents(found) for part in texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20  # of 25 MB
    assert n_characters == (4 if end else 8 * (1 << 20) + 5)


class Counting:
    """A file that counts the bytes read from it."""

    def __init__(self, file):
        self.file, self.n_read = file, 0

    def __getattr__(self, name):
        return getattr(self.file, name)

    def read(self, *args):
        return self._count(self.file.read(*args))

    def readline(self, *args):
        return self._count(self.file.readline(*args))

    def _count(self, data):
        self.n_read += len(data)
        return data


def test_only_long_lines_are_read_more_than_once(tmp_path):
    path = tmp_path / "x.txt"
    for line, times in ((b"a line\n", 1), (b"a" * 4_000_000 + b"\n", 3)):
        path.write_bytes(line * (1 + 9_000_000 // len(line)))
        with open(path, "rb") as file:
            counting = Counting(file)
            list(text.documents(reading.Reader(counting, path, lambda n: None), None, ReadReport()))
        assert counting.n_read <= times * path.stat().st_size


def test_delimiters_include_the_white_space_between_them():
    delimited = "<|bos|> a<|eos|> \n<|bos|>\nb\n<|endoftext|>\n"
    assert DELIMITER.split(delimited) == ["", " a", "\nb\n", "\n"]
