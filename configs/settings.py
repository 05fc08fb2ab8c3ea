"""Settings with what they mean: one table makes the config and its description."""

from collections.abc import Mapping
from typing import TypeAlias

from ml_collections import ConfigDict

Value: TypeAlias = bool | int | float | str | tuple[str, ...] | tuple[dict, ...]

# name -> (default, meaning)
Settings: TypeAlias = Mapping[str, tuple[Value, str]]


def make(settings: Settings) -> ConfigDict:
    """The config of a table of settings, each with its default."""
    return ConfigDict({name: default for name, (default, _) in settings.items()})


def describe(settings: Settings) -> str:
    """A line for each setting, as `--help` shows them.

    >>> print(describe({"steps": (3, "of the optimizer"), "skip": (("a", "b"), "stays float")}))
    --config.steps=3: of the optimizer
    --config.skip=('a', 'b'): stays float
    """
    return "\n".join(
        f"--config.{name}={default!r}: {meaning}" for name, (default, meaning) in settings.items()
    )
