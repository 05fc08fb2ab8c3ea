"""Three newcomers' paths, each in an environment made from nothing, with the documents' own lines.

The lines are read out of the documents, so what runs is what a reader copies.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.docs.test_examples import ROOT, pieces

MOST_SECONDS = 1200
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)
CELLS = 11  # of the notebook: up to the report


def shell(page: str, wanted: str) -> str:
    """The command of a document that has a text, with the lines that it goes on in."""
    text = (ROOT / page).read_text()
    blocks = "".join(SHELL.findall(text)).replace("\\\n", "")
    found = [line for line in blocks.splitlines() if wanted in line]
    assert found, f"{page} has no line with {wanted!r}"
    return re.sub(r"\s+#.*", "", found[0])


def examples(page: str) -> str:
    """The Python examples of a document, one behind the other, with what runs unseen."""
    return "\n".join(code for _, code in pieces((ROOT / page).read_text()))


def readme_example() -> str:
    """The first example of README.md."""
    return pieces((ROOT / "README.md").read_text())[0][1]


def samples_folder() -> str:
    """What makes PaddleSlim's folder, by the page on moving over, without its stand-in weights."""
    setup = pieces((ROOT / "docs/from_paddleslim.md").read_text())[0][1]
    return setup.partition("load, zoo.load")[0]


class Newcomer(NamedTuple):
    """A way in.

    Attributes:
      install: the commands that make the environment ready, in order.
      steps: what is run then: a command, or Python.
    """

    install: Callable[[], list[str]]
    steps: Callable[[], list[str]]


def python(code: str) -> str:
    """A command of the environment's own Python."""
    return "python - <<'END OF PYTHON'\n" + code + "\nEND OF PYTHON"


def notebook() -> str:
    """Runs the notebook's first cells outside of a clone, which the first one fetches."""
    return f"""
import json, nbclient, nbformat, re
book = nbformat.read({str(ROOT / "notebooks/quantize.ipynb")!r}, 4)
book.cells = book.cells[:{CELLS}]
first = book.cells[1]
first.source = re.sub('REPOSITORY = ".*?"', 'REPOSITORY = "../clone"', first.source)
nbclient.NotebookClient(book, timeout={MOST_SECONDS}).execute()
outputs = [json.dumps(output) for cell in book.cells[2:] for output in cell.get("outputs", ())]
assert any("int8" in output for output in outputs)
"""


NEWCOMERS = {
    "colab": Newcomer(
        # Colab has JAX and a kernel; our cell installs the rest.
        install=lambda: ["pip install --quiet ipykernel nbclient nbformat"],
        steps=lambda: ["mkdir ../content", f"cd ../content && {python(notebook())}"],
    ),
    "researcher": Newcomer(
        install=lambda: [shell("README.md", 'pip install "')],
        steps=lambda: [python(readme_example()), python(examples("docs/getting_started.md"))],
    ),
    "paddleslim": Newcomer(
        install=lambda: [shell("README.md", "experiments/quant_post.py").split(" && ")[1]],
        steps=lambda: [
            python(samples_folder()),
            shell("docs/from_paddleslim.md", "experiments/quant_post.py"),
            "test -s mobilenet_v1_int8.safetensors",
        ],
    ),
}


@pytest.mark.parametrize("name", NEWCOMERS)
def test_the_lines_are_those_of_the_documents(name):
    newcomer = NEWCOMERS[name]
    commands = newcomer.install() + newcomer.steps()
    assert all(commands)
    checked = subprocess.run(["bash", "-n"], input="\n".join(commands), text=True, check=False)
    assert checked.returncode == 0


def test_the_documents_install_alike():
    lines = {shell(page, 'pip install "') for page in ("README.md", "docs/getting_started.md")}
    assert lines == {'pip install ".[progress]" flax'}


def test_the_notebooks_first_cells_end_with_the_report():
    cells = json.loads((ROOT / "notebooks/quantize.ipynb").read_text())["cells"][:CELLS]
    assert "REPOSITORY = " in "".join(cells[1]["source"])
    assert cells[-1]["source"] == ["qapply.report()"]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", NEWCOMERS)
def test_a_newcomer_gets_there(name, tmp_path):
    clone = tmp_path / "clone"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs a clone, of which a copy is made")
    for file in map(Path, tracked.stdout.splitlines()):
        (clone / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, clone / file)
    named = "-c user.name=test -c user.email=test@localhost"
    in_clone(clone, f"git init -q && git add -A && git {named} commit -qm 'what is there'")
    started = time.monotonic()
    in_clone(clone, f"{sys.executable} -m venv .venv")
    for command in NEWCOMERS[name].install():
        in_clone(clone, f". .venv/bin/activate && {command}")
    installed = time.monotonic()
    for command in NEWCOMERS[name].steps():
        in_clone(clone, f". .venv/bin/activate && {command}")
    total = time.monotonic() - started
    print(
        f"{name}: installed in {installed - started:.0f} s, there in {total:.0f} s (-rP shows it)"
    )


def in_clone(clone: Path, command: str) -> None:
    """Runs a command as in a terminal that was just opened there."""
    environment = {
        "HOME": str(Path.home()),  # packages that were fetched before are kept
        "JAXQUANT_CACHE_DIR": str(clone / ".kernels"),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
