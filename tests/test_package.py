"""The package as it is installed."""

import importlib.metadata
import subprocess
import sys

import jaxquant


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
