"""The loop over the batches, and how it is stopped."""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np

from experiments.training import TrainingError
from experiments.training.step import Metrics, State, Update

AHEAD = 2  # steps that the device may be behind, so that batches do not pile up on it


class Every(NamedTuple):
    """After how many steps the loop calls what; the last step counts as one for `save`."""

    log: int
    save: int
    evaluate: int


class Events(NamedTuple):
    """What the loop calls; `step` counts the steps that were taken.

    Attributes:
      log: (step, means of the metrics since the last call).
      save: (state).
      evaluate: (step, state); not after the last step.
    """

    log: Callable[[int, dict[str, float]], None]
    save: Callable[[State], None]
    evaluate: Callable[[int, State], None]


def fit(
    state: State,
    update: Update,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    steps: int,
    every: Every,
    events: Events,
    should_stop: Callable[[], bool] = lambda: False,
) -> State:
    """Trains until step `steps`, or saves and returns early when `should_stop()` says so.

    Raises:
      TrainingError: the loss or the gradient is not finite; nothing is saved after that step.
    """
    step = int(state.step)
    window: list[Metrics] = []  # since the last log
    checked = 0  # of the window, found to be finite
    for images, labels in batches:
        state, metrics = update(state, images, labels)
        step += 1
        window.append(metrics)
        if len(window) > AHEAD:
            jax.block_until_ready(window[-1 - AHEAD])
        stop = should_stop()
        last = step == steps
        is_logged = step % every.log == 0 or last
        is_saved = step % every.save == 0 or last or stop
        if is_logged or is_saved:
            _check_finite(window[checked:], step)
            checked = len(window)
        if is_logged:
            events.log(step, {key: float(np.mean([m[key] for m in window])) for key in metrics})
            window, checked = [], 0
        if step % every.evaluate == 0 and not last and not stop:
            events.evaluate(step, state)  # before the save, after which it would not be repeated
        if is_saved:
            events.save(state)
        if stop:
            break
    return state


def _check_finite(metrics: list[Metrics], step: int) -> None:
    for i, values in enumerate(jax.device_get(metrics)):
        wrong = [name for name, value in values.items() if not np.isfinite(value)]
        if wrong:
            raise TrainingError(
                f"step {step - len(metrics) + i + 1}: the {' and '.join(wrong)} is not finite: the "
                "training diverged. Try a lower --config.learning_rate, a longer "
                "--config.warmup_epochs or --config.clip_norm=1; a network without BatchNorm also "
                "needs inputs of unit variance (vgg16_torchvision, not vgg16)"
            )


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a question to ask between steps; a second one ends."""
    asked = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        restore()
