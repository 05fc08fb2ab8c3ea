"""Every Python example of the documentation runs, block by block, in one namespace a page.

`<!-- setup ... -->` holds lines that run unseen; `<!-- not run: REASON -->` stands before a block
that cannot run here.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
PIECE = re.compile(
    r"<!-- setup\n(?P<setup>.*?)-->"
    r"|(?P<skip><!-- not run: [^\n]+ -->\n)?```python\n(?P<block>.*?)```",
    re.DOTALL,
)


def pieces(text: str) -> list[tuple[int, str]]:
    """(line, code) of what is to run."""
    found = []
    for match in PIECE.finditer(text):
        name = "setup" if match["setup"] is not None else "block"
        if match["skip"] is None:
            found.append((text.count("\n", 0, match.start(name)), match[name]))
    return found


WITH_EXAMPLES = [page for page in PAGES if pieces(page.read_text())]


@pytest.mark.filterwarnings("ignore:the quantized model's outputs")
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for line, code in pieces(page.read_text()):
        # As many empty lines as stand before the block, so that an error names the page's line.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_every_fenced_python_block_is_found():
    for page in PAGES:
        text = page.read_text()
        skipped = text.count("<!-- not run: ")
        hidden = text.count("<!-- setup\n")
        assert len(pieces(text)) == text.count("```python") - skipped + hidden


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(f"- {page.name}\n" in navigation for page in PAGES)
