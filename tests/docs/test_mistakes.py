"""The table of mistakes in docs/mistakes.md: each is made, and says what stands there."""

import re
from typing import NamedTuple

import pytest

from tests.docs.test_examples import ROOT, pieces

PAGE = ROOT / "docs" / "mistakes.md"
ROW = re.compile(r"^\| (?P<done>.+?): `(?P<code>[^`]+)` \| `` (?P<said>.+) `` \|$", re.M)
FEWEST = 30


class Mistake(NamedTuple):
    """A line of the page.

    Attributes:
      done: what was done, in words.
      code: the same, as Python.
      said: the type of the error, its message and its notes, without what "…" stands for.
    """

    done: str
    code: str
    said: str


MISTAKES = [Mistake(**row.groupdict()) for row in ROW.finditer(PAGE.read_text())]


@pytest.fixture(scope="module")
def page():
    """The names that the page's first example defines."""
    names = {}
    for _, code in pieces(PAGE.read_text()):
        exec(code, names)
    return names


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.done)
def test_a_mistake_says_what_the_page_says(mistake, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as raised:
        exec(mistake.code, dict(page))
    parts = map(re.escape, mistake.said.split("…"))
    assert re.fullmatch(".*".join(parts), _text(raised.value)), _text(raised.value)


def _text(error: Exception) -> str:
    """An error as one line: type, message, and the notes that are not JAX's own."""
    notes = [note for note in getattr(error, "__notes__", ()) if "JAX has removed" not in note]
    return " ".join(" ".join([f"{type(error).__name__}: {error}", *notes]).split())


def test_every_line_of_the_page_is_a_mistake_that_is_made():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    tables = sum(line.startswith("| what was done") for line in lines)
    assert len(MISTAKES) == len(lines) - tables >= FEWEST
