"""An experiment as a program: its flags, its errors in one line, its work folder."""

import ast
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from configs.settings import Settings, describe
from experiments.errors import ExperimentError, SettingsError

flags.disclaim_key_flags()  # those that are defined here are the program's

NOISY = ("jax._src.xla_bridge", "absl")  # platforms tried; each step of Orbax


def define_config(settings: Settings, default: str | None = None) -> None:
    """Defines `--config`, whose help lists the settings.

    Only where a file is the program: another one that imports it has flags of its own.
    """
    text = f"The file of settings; each is then --config.NAME=VALUE:\n{describe(settings)}"
    with _refusing_flags():  # a config that has a default reads its settings here
        config_flags.DEFINE_config_file("config", default, text, lock_config=True)
    if default is None:
        flags.mark_flag_as_required("config")


def config() -> ConfigDict:
    """The settings that the program was given."""
    return flags.FLAGS.config


def start(main: Callable[[], None]) -> None:
    """Reads the flags and runs the program; an error of what was given is its last line."""

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(
                f"unknown arguments {argv[1:]}; settings are given as --config.NAME="
            )
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            main()
        except ExperimentError as error:
            sys.exit(f"error: {error}")

    app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    """The arguments that are no flags; a flag that is refused ends the program."""
    with _refusing_flags():
        others = flags.FLAGS(argv)
        flags.FLAGS.config.keys()  # a file that does not load fails at its first use
    return others


@contextlib.contextmanager
def _refusing_flags() -> Iterator[None]:
    """Ends the program where a flag is refused."""
    try:
        yield
    # A config raises what it likes: for a file that is not there, a setting that it lacks, a value
    # of another type.
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {_in_one_line(error)} (--help lists the settings)")


def _in_one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, KeyError | AttributeError) and text[:1] in "'\"":  # the repr of a text
        text = str(ast.literal_eval(text))
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    # Of a file that fails, absl shows the whole traceback; its last line says why.
    is_told_last = "Traceback" in text or isinstance(error, OSError)
    return lines[-1] if is_told_last else ". ".join(lines)


def check_workdir(workdir: Path, settings: dict[str, Any]) -> None:
    """Refuses a work folder that holds the results of other settings: they are not overwritten.

    Args:
      workdir: the folder, which need not exist.
      settings: those of the run that is to come, as `ConfigDict.to_dict` gives them.

    Raises:
      SettingsError: naming the settings that differ.
    """
    file = workdir / "config.json"
    if not file.is_file():
        return
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{file} is no JSON ({error}); give another --workdir") from error
    given = json.loads(json.dumps(settings))  # tuples as JSON has them
    differing = [
        f"{name}: {saved.get(name)!r} there, {given.get(name)!r} given"
        for name in sorted(given.keys() | saved.keys())
        if saved.get(name) != given.get(name)
    ]
    if differing:
        raise SettingsError(
            f"{workdir} has the results of a run with other settings, which are kept: give another "
            "--workdir, or remove it\n  " + "\n  ".join(differing)
        )
