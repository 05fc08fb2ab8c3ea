"""The figures stand in docs/results.md; README.md rounds them, and the configs leave them there."""

import ast
import re

import pytest

from tests.docs.test_examples import ROOT

METHOD = "KL"  # the library's default, of which README.md speaks
NUMBER = re.compile(r"\d+(?:\.\d+)?")
FIGURE = re.compile(r"\d\s?(?:%|dB)")


def cells(line):
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


def table(page, header):
    """The rows of the table whose header starts so, by the first cell."""
    lines = (ROOT / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    names = cells(lines[start])
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append(dict(zip(names, cells(line), strict=True)))
    return rows


README = table("README.md", "| network | top-1")
RESULTS, COST = (
    {row["network"]: row for row in table("docs/results.md", header) if row["method"] == METHOD}
    for header in ("| network | method | float32", "| network | method | MB")
)


def numbers(text):
    return [float(number) for number in NUMBER.findall(text)]


@pytest.mark.parametrize("row", README, ids=lambda row: row["network"])
def test_the_readme_rounds_the_results(row):
    results = RESULTS[row["network"]]
    top1 = [results[f"{kind} top-1 / top-5"].split(" / ")[0] for kind in ("float32", "int8")]
    given = [" ".join(top1), results["agreement"], results["SQNR"], COST[row["network"]]["MB"]]
    said = [row[name] for name in ("top-1, float32 → int8", "same class", "SQNR", "MB")]
    # The results are rounded themselves, to hundredths.
    assert numbers(" ".join(said)) == pytest.approx(numbers(" ".join(given)), rel=0, abs=0.0551)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: path.stem
)
def test_a_config_holds_no_figure_that_could_be_out_of_date(path):
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert not FIGURE.search(said)
