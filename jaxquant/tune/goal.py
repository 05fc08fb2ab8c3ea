"""What accuracy control is to reach."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxquant.tune.scores import Metric

MAX_DROP = 0.005
ALGOS = ("KL", "mse", "hist", "auto", "abs_max")
RECOVERY = ("equalization", "adaround")


@dataclasses.dataclass(frozen=True)
class Goal:
    """What accuracy control is to reach, and what it may try for that.

    Attributes:
      metric, max_drop, time_budget: see `jaxquant.quant_post`.
      algos: of the thresholds, in the order of trial.
      recovery: the recovery steps, likewise.
    """

    metric: Metric
    max_drop: float = MAX_DROP
    time_budget: float | None = None
    algos: Sequence[str] = ALGOS
    recovery: Sequence[str] = RECOVERY

    def __post_init__(self) -> None:
        if not callable(self.metric):
            raise TypeError(f"metric is a function of a model, got {type(self.metric).__name__}")
        _check_amount("max_drop", self.max_drop)
        if self.time_budget is not None:
            _check_amount("time_budget", self.time_budget)


def make_goal(metric: Metric | None, max_drop: float, time_budget: float | None) -> Goal | None:
    """The goal; None without a metric.

    Raises:
      ValueError: an amount is not valid, or is given without a metric.
      TypeError: the metric is not a function.
    """
    if metric is not None:
        return Goal(metric, max_drop, time_budget)
    # Defaults that nobody gave would pass; what was given means that a metric was forgotten.
    if max_drop != MAX_DROP or time_budget is not None:
        raise ValueError("max_drop and time_budget are of a metric: give metric= as well")
    return None


def _check_amount(name: str, value: Any) -> None:
    # True is a number to Python.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is a finite number that is not negative, got {value!r}")
