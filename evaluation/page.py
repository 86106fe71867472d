"""A page of numbers, tables and charts, as HTML in one file or as Markdown.

Texts in it may come from strangers' checkpoints, or from a model that has read anything: both escape them.
report.html is the template.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Text:
    text: str
    is_note: bool = False  # of what is missing


@dataclass
class Facts:
    """A few large numbers."""

    facts: list[tuple[str, str]]


@dataclass
class Table:
    """The first cell of each row is its heading. is_text: its cells are texts, not numbers."""

    name: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    is_text: bool = False
    is_folded: bool = False


@dataclass
class Chart:
    name: str
    caption: str
    alt: str
    svg: bytes

    @property
    def data(self) -> str:
        return base64.b64encode(self.svg).decode()


@dataclass
class Commands:
    lines: list[str]


Block = Text | Facts | Table | Chart | Commands


@dataclass
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)


def clean(text: object) -> str:
    """The text without control characters and other invisible ones, such as those that reverse a line.

    Line ends, wide spaces, and what joins the parts of an emoji stay.
    """
    return "".join(c if c.isprintable() or c in "\n\u3000\xa0\u200c\u200d" else "\ufffd" for c in str(text))


def to_html(title: str, sections: Sequence[Section]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, finalize=lambda value: clean(value) if type(value) is str else value,
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["clean"] = clean  # for texts that `finalize` does not see any more
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    named = [(s.title, [(type(block).__name__, block) for block in s.blocks]) for s in sections]
    return str(environment.from_string(template).render(title=title, sections=named))


def escaped(text: str) -> str:
    """The text for Markdown, where it means nothing but itself, in one line."""
    text = re.sub(r"([\\`*_<>\[\]|#&~$!])", r"\\\1", clean(text))
    return text.replace("\n", "<br>")


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {escaped(title)}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += [*_block_lines(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def _block_lines(block: Block) -> Iterable[str]:
    if isinstance(block, Text):
        yield escaped(block.text)
    elif isinstance(block, Facts):
        yield from (f"- {escaped(name)}: **{escaped(value)}**" for name, value in block.facts)
    elif isinstance(block, Chart):
        yield f"![{escaped(block.alt)}]({block.name})"
    elif isinstance(block, Commands):
        text = clean("\n".join(block.lines))
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        yield from (f"{fence}sh", text, fence)
    else:
        right = "---" if block.is_text else "---:"
        yield from (f"<details><summary>{escaped(block.name)}</summary>", "") if block.is_folded else ()
        rows = [block.columns, ["---", *[right] * (len(block.columns) - 1)], *block.rows]
        for number, row in enumerate(rows):
            yield f"| {' | '.join(row if number == 1 else map(escaped, row))} |"
        yield from ("", escaped(block.note)) if block.note else ()
        yield from ("", "</details>") if block.is_folded else ()
