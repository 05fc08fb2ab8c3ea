"""The notebooks: short, without stored outputs, and run from top to bottom."""

import ast
import re
import shutil
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_CELLS = 60  # of all notebooks together
MOST_SECONDS = 300
OVERWRITTEN = re.compile(r"[^\n\r]*\r(?!\n)")  # the states of a bar that others took the place of


def test_they_are_short_and_hold_no_outputs():
    cells = [cell for path in NOTEBOOKS for cell in nbformat.read(path, 4).cells]
    assert 0 < len(cells) < MOST_CELLS
    for path in NOTEBOOKS:
        nbformat.validate(nbformat.read(path, 4))
    for cell in cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            lines = cell.source.splitlines()
            ast.parse("\n".join(line for line in lines if not line.startswith("%")))


@pytest.mark.network
@pytest.mark.optimized  # as users run them
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    notebook = nbformat.read(copy, 4)
    client = nbclient.NotebookClient(
        notebook, timeout=MOST_SECONDS, resources={"metadata": {"path": str(tmp_path)}}
    )
    started = time.monotonic()
    client.execute()  # raises where a cell does
    assert time.monotonic() - started < MOST_SECONDS
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [OVERWRITTEN.sub("", str(output.get("text", ""))) for output in outputs]
    assert not [text for text in shown if len(text) > 5000]
