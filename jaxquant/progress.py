"""What a call shows while it works: a line for each of its stages, or a bar where one can be drawn.

In a terminal and in a notebook each stage has a bar of `tqdm` (the extra `progress`), which stays
when the stage is done.  Elsewhere, and without tqdm, each stage has a line as it begins, a stage
that takes long a line every half minute, and the call a last line with the times.  The lines are
records of the logger "jaxquant", of level INFO, wherever logging is set up to show those, beside
the bars too; where it is not, they go to stderr.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

LOGGER = logging.getLogger("jaxquant")
TICK = 1.0  # seconds between two looks at the clock
SILENCE = 30.0  # seconds without a line, after which one says how far a stage is
_TOLD = 2  # levels of stages that have lines and times; what is deeper stands beside the bar alone


class Progress:
    """The stages of one call; a context manager, whose end tells the times.

    It is made by the public function and handed to whatever has stages.  A stage may be opened
    within a stage: the bar is that of the outermost one, with the inner ones' names behind it.
    Stages are opened by one thread; any thread may count their steps.  An error or an interrupt
    ends the bar before it goes on its way.

    Args:
      call: the public function's name.
      shown: False for a call that shows nothing.

    >>> with Progress("calibrate", shown=False) as progress:
    ...     with progress.stage("calibrating", total=2, noun="batch") as stage:
    ...         print(sum(stage.each([1, 2])))
    3
    """

    def __init__(self, call: str, shown: bool):
        if not isinstance(shown, bool):
            raise ValueError(f"progress is True or False, got {shown!r}")
        self._call = call
        self._shown = shown
        self._tqdm = _find_tqdm() if shown and is_on_screen() else None
        self._lock = threading.RLock()
        self._open: list[Stage] = []
        self._bar: Any = None
        self._seconds: dict[tuple[str, ...], float] = {}  # by the names from the outermost stage on
        self._started = self._told = time.monotonic()
        self._ended = threading.Event()
        self._clock: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if self._shown:
            # A bar's own clock stands while XLA compiles: nothing calls it then.
            # A daemon: a call that hangs must not keep the process.
            self._clock = threading.Thread(target=self._keep_time, name="jaxquant", daemon=True)
            self._clock.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._clock is None:
            return
        self._ended.set()

        # Joined before the bar is closed, or the thread might draw it again.
        self._clock.join()
        self._open.clear()  # an interrupt may have come while one was being opened
        self._close_bar()
        if error is None:
            self._say(f"{self._call} took {_spell(time.monotonic() - self._started)}{self._times}")

    def stage(self, name: str, total: int | None = None, noun: str = "") -> Stage:
        """A stage, to be opened by `with`.

        Args:
          name: what is being done, "calibrating".
          total: how many steps it has; None where that is not known.
          noun: what a step is called; empty for a stage that has no steps.
        """
        return Stage(self, name, total, noun)

    def _begin(self, stage: Stage) -> None:
        if not self._shown:
            return
        # The clock's thread reads what is changed here.
        with self._lock:
            self._open.append(stage)
            path = self._path
            if len(path) <= _TOLD:
                self._seconds.setdefault(path, 0.0)
                self._say(": ".join(path))
            # One bar for all: the stages within the outermost one are named behind it.
            if len(path) == 1 and self._tqdm is not None:
                self._bar = _draw(self._tqdm, stage, leave=not _is_logged())
            self._note_inner(refresh=len(path) > 1)

    def _finish(self, stage: Stage) -> None:
        if not self._shown:
            return
        with self._lock:
            if self._path in self._seconds:
                # Added up: a stage of the same name may be opened many times.
                self._seconds[self._path] += time.monotonic() - stage.started
            if stage in self._open:
                self._open.remove(stage)
            if self._open:
                self._note_inner(refresh=True)
            else:
                self._close_bar()

    def _count(self, stage: Stage) -> None:
        with self._lock:
            stage.done += 1
            # Inner stages count for themselves and are told beside the bar.
            if self._bar is not None and self._open[:1] == [stage]:
                self._bar.update()
            self._note_inner(refresh=False)

    @property
    def _path(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self._open)

    @property
    def _times(self) -> str:
        """Behind the whole time that of each stage, and in brackets those of the stages in it."""

        def spelled(path: tuple[str, ...]) -> str:
            inner = [p for p in self._seconds if len(p) == len(path) + 1 and p[:-1] == path]
            behind = f" ({', '.join(map(spelled, inner))})" if inner else ""
            return f"{path[-1]} {_spell(self._seconds[path])}{behind}"

        outermost = [spelled(path) for path in self._seconds if len(path) == 1]
        return f": {', '.join(outermost)}" if outermost else ""

    def _note_inner(self, refresh: bool) -> None:
        """Put the stages within the outermost one behind its bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(": ".join(map(str, self._open[1:])), refresh=refresh)

    def _close_bar(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.set_postfix_str("", refresh=False)
            bar.close()

    def _keep_time(self) -> None:
        """Move the clock of the bar; without one, break a long silence."""
        while not self._ended.wait(TICK):
            # With the lock, since a stage may end meanwhile.
            with self._lock:
                if self._bar is not None:
                    self._bar.refresh()
                elif self._open and time.monotonic() - self._told >= SILENCE:
                    taken = _spell(time.monotonic() - self._open[0].started)
                    self._say(f"{': '.join(map(str, self._open))}, {taken} so far")

    def _say(self, text: str) -> None:
        self._told = time.monotonic()
        if _is_logged():
            with self._bar_aside():
                LOGGER.info(text)
        elif self._tqdm is None:
            print(f"jaxquant: {text}", file=sys.stderr, flush=True)

    def _bar_aside(self) -> contextlib.AbstractContextManager[None]:
        """Take the bar off the screen, so that what is written has a line of its own."""
        if self._bar is None:
            return contextlib.nullcontext()
        return self._bar.external_write_mode(file=sys.stderr)


class Stage:
    """A part of a call's work; made by `Progress.stage` and opened by `with`.

    Attributes:
      name, total, noun: as there.
      done: the steps so far.
      started: by `time.monotonic()`.
    """

    def __init__(self, progress: Progress, name: str, total: int | None, noun: str):
        self._progress = progress
        self.name = name
        self.total = total
        self.noun = noun
        self.done = 0
        self.started = 0.0

    def __enter__(self) -> Stage:
        self.started = time.monotonic()
        self._progress._begin(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress._finish(self)

    def __str__(self) -> str:
        """The name, and how many steps are done."""
        of = "" if self.total is None else f" of {self.total}"
        return f"{self.name}, {self.noun} {self.done}{of}" if self.noun else self.name

    def step(self) -> None:
        """Count a step as done."""
        self._progress._count(self)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items; one is done when the next one is asked for."""
        for item in items:
            yield item
            self.step()


SILENT = Progress("", shown=False)  # for what is called without a call that shows its stages


def _find_tqdm() -> Callable[..., Any] | None:
    """The bar that fits the screen; None where tqdm is not installed."""
    with warnings.catch_warnings():
        # In a notebook without ipywidgets tqdm falls back to a text bar, and warns that it does.
        warnings.simplefilter("ignore")
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return None
    return tqdm


def is_on_screen() -> bool:
    """True in a notebook and in a terminal; elsewhere a bar would fill a file with its states."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None and "IPKernelApp" in shell.config:
        return True
    try:
        # A terminal that does not know its width, as some containers give, has no room for a bar.
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):  # no stderr, no terminal, or it is closed
        return False


def _is_logged() -> bool:
    """True where logging is set up to show the lines."""
    return LOGGER.isEnabledFor(logging.INFO) and LOGGER.hasHandlers()


def _draw(tqdm: Callable[..., Any], stage: Stage, leave: bool) -> Any:
    if stage.noun:
        form = {"total": stage.total, "unit": stage.noun}
    else:
        form = {"bar_format": "{desc}: {elapsed}{postfix}"}
    return tqdm(desc=stage.name, dynamic_ncols=True, leave=leave, **form)


def _spell(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
