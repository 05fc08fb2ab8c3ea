"""Texts that are on every machine with Python: its language reference and its own source.

A text is an array of ids, one a character: 0 is the end of a line, 1 to 95 the printable characters
of ASCII; what is none of these is read as "?".
"""

import ast
import functools
import io
import json
import keyword
import re
import string
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

VOCABULARY = 96
TAGS = ("space", "name", "keyword", "number", "string", "operator", "comment")
HELD_OUT = 10  # one character in so many, at the end of the text, is for evaluation

_MODULES = (ast, functools, io, json, string, textwrap, tokenize)
_PLAIN = {tokenize.NUMBER: "number", tokenize.OP: "operator", tokenize.COMMENT: "comment"}


class Labelled(NamedTuple):
    """A text and what a network is to say at each character.

    Attributes:
      ids: int32[N].
      labels: int32[N].
      num_classes: the labels are below it.
    """

    ids: np.ndarray
    labels: np.ndarray
    num_classes: int

    def split(self) -> tuple["Labelled", "Labelled"]:
        """What to train on, and what to evaluate on."""
        cut = len(self.ids) - len(self.ids) // HELD_OUT
        return (
            Labelled(self.ids[:cut], self.labels[:cut], self.num_classes),
            Labelled(self.ids[cut:], self.labels[cut:], self.num_classes),
        )

    def windows(self, length: int) -> "Labelled":
        """Texts of that length beside each other: ids and labels int32[N // length, length]."""
        count = len(self.ids) // length
        ids, labels = (x[: count * length].reshape(count, length) for x in self[:2])
        return Labelled(ids, labels, self.num_classes)


def encode(text: str) -> np.ndarray:
    """The ids of a text: int32[len(text)]."""
    codes = np.array([ord(character) for character in text], np.int32)
    known = (codes >= 32) & (codes < 127)
    return np.where(codes == 10, 0, np.where(known, codes, ord("?")) - 31).astype(np.int32)


def decode(ids: np.ndarray) -> str:
    """The text of ids."""
    return "".join("\n" if number == 0 else chr(number + 31) for number in ids.tolist())


def language_reference() -> Labelled:
    """The reference of Python's `help`; the label of a character is the one that follows it."""
    ids = encode("\n".join(topics.values()))
    return Labelled(ids[:-1], ids[1:], VOCABULARY)


def python_source() -> Labelled:
    """Modules of Python's library; the label of a character says which kind of token it is in."""
    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in _MODULES]
    ids = np.concatenate([encode(text) for text in texts])
    return Labelled(ids, np.concatenate([tags(text) for text in texts]), len(TAGS))


def tags(source: str) -> np.ndarray:
    """The number in `TAGS` of the tag of each character of a program: int32[len(source)]."""
    lines = source.splitlines(keepends=True)
    starts = np.concatenate([[0], np.cumsum([len(line) for line in lines])])
    found = np.full(len(source), TAGS.index("space"), np.int32)
    for tag, start, end in _tokens(source):
        (row, column), (last_row, last_column) = start, end
        found[starts[row - 1] + column : starts[last_row - 1] + last_column] = TAGS.index(tag)
    return found


def _tokens(source: str) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        if name == "NAME":
            yield "keyword" if keyword.iskeyword(token.string) else "name", token.start, token.end
        elif "STRING" in name:  # those of Python 3.12 and later come in parts
            yield "string", token.start, token.end
        elif token.type in _PLAIN:
            yield _PLAIN[token.type], token.start, token.end


def sentences() -> list[str]:
    """The sentences of the language reference, of 5 to 40 words, in its order, each once."""
    found: dict[str, None] = {}
    for topic in topics.values():
        for paragraph in re.split(r"\n\s*\n", topic):
            if paragraph.startswith(" ") or set(paragraph) & set("|=+") or "::" in paragraph:
                continue  # code, a table, a grammar or a heading
            plain = " ".join(re.sub(r"[*“”\"]", " ", paragraph).split())
            for sentence in re.split(r"(?<=[.?!]) (?=[A-Z])", plain):
                if 5 <= len(sentence.split()) <= 40 and sentence.endswith("."):
                    found[sentence] = None
    return list(found)
