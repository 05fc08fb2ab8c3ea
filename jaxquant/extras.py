"""How to install what only parts of the package need."""

from __future__ import annotations

# What `pip install` takes: a clone's own folder, until an index has the package ("jaxquant").
PACKAGE = "."


def how_to_install(extra: str) -> str:
    """The command that installs an extra of `pyproject.toml`, for error messages.

    >>> how_to_install("onnx")
    'pip install ".[onnx]" in your clone of jaxquant'
    """
    where = " in your clone of jaxquant" if PACKAGE == "." else ""
    return f'pip install "{PACKAGE}[{extra}]"{where}'
