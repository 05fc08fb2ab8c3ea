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


SENTENCES = "MiniLM-L6, 200 sentences"  # its figures stand on other pages
README = table("README.md", "| network | top-1")
RESULTS, COST = (
    {row["network"]: row for row in table("docs/results.md", header) if row["method"] == METHOD}
    for header in ("| network | method | float32", "| network | method | MB")
)


def numbers(text):
    return [float(number) for number in NUMBER.findall(text)]


@pytest.mark.parametrize(
    "row", [r for r in README if r["network"] != SENTENCES], ids=lambda row: row["network"]
)
def test_the_readme_rounds_the_results(row):
    results = RESULTS[row["network"]]
    top1 = [results[f"{kind} top-1 / top-5"].split(" / ")[0] for kind in ("float32", "int8")]
    given = [" ".join(top1), results["agreement"], results["SQNR"], COST[row["network"]]["MB"]]
    said = [row[name] for name in ("top-1, float32 → int8", "same class", "SQNR", "MB")]
    # The results are rounded themselves, to hundredths.
    assert numbers(" ".join(said)) == pytest.approx(numbers(" ".join(given)), rel=0, abs=0.0551)


def test_the_readme_has_the_figures_of_sentences():
    (row,) = (row for row in README if row["network"] == SENTENCES)
    accuracy = {r[""]: r for r in table("docs/choosing_a_method.md", "| | SQNR | neighbour")}
    ours = accuracy["`quant_post`"]
    given = [ours["neighbour kept"], ours["SQNR"], ours["MB"]]
    said = [row["same class"], row["SQNR"], row["MB"].split("→")[1]]
    assert numbers(" ".join(said)) == numbers(" ".join(given))
    times = {r[""]: r["8 x 128"] for r in table("docs/benchmarks.md", "| | 1 x 16")}
    runtime = times["ONNX Runtime, dynamic / static"].split(" / ")[0]
    given = [times["JAX float32"], times["`quant_post`"], runtime]
    said = [row["JAX float32"], row["jaxquant int8"], row["ONNX Runtime int8"]]
    assert numbers(" ".join(said)) == numbers(" ".join(given))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: path.stem
)
def test_a_config_holds_no_figure_that_could_be_out_of_date(path):
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert not FIGURE.search(said)
