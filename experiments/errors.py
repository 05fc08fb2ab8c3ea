"""What an experiment tells a person in one line: an error of theirs, not of the program."""

from collections.abc import Iterator
from contextlib import contextmanager


class ExperimentError(ValueError):
    """Something that was given does not exist, does not fit or cannot be had."""


class SettingsError(ExperimentError):
    """A setting that means nothing."""


@contextmanager
def refusing_settings() -> Iterator[None]:
    """Makes what a block refuses an error of the settings: it is given nothing else.

    Raises:
      SettingsError: in place of a ValueError or TypeError.
    """
    try:
        yield
    except ExperimentError:
        raise
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error
