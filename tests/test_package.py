"""The package as it is installed."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import jaxquant
from jaxquant.extras import how_to_install


def test_version_comes_from_one_place():
    assert importlib.metadata.version("jaxquant") == jaxquant.__version__


def test_import_loads_the_core_alone():
    """Extras are imported where they are used: importing the package must not need them."""
    extras = [
        "IPython", "PIL", "absl", "flax", "matplotlib", "ml_collections", "optax", "tensorflow",
        "torch", "tqdm",
    ]  # fmt: skip
    code = f"import sys, jaxquant; print([m for m in {extras} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_extra_that_an_error_names_exists():
    root = pathlib.Path(__file__).parent.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    sources = [*(root / "jaxquant").rglob("*.py"), *(root / "experiments").rglob("*.py")]
    text = "".join(path.read_text() for path in sources)
    named = set(re.findall(r"""how_to_install\(["'](\w+)["']\)""", text))
    assert len(named) >= 6
    assert named <= set(extras)
    assert "pip install 'jaxquant[" not in text, "as no index has it yet"


def test_hints_install_from_a_clone_until_an_index_has_the_package():
    assert how_to_install("plot") == 'pip install ".[plot]" in your clone of jaxquant'
