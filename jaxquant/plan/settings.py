"""The keywords of the public functions that stand for a `jaxquant.QuantConfig`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypedDict, TypeVar

from jaxquant.calibration.observers import Observer
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.modes import STATIC
from jaxquant.plan.rules import Rule

P = ParamSpec("P")
T = TypeVar("T")


class Settings(TypedDict, total=False):
    """The keywords that stand for a `QuantConfig`; their defaults and meaning are there."""

    algo: str | Observer
    hist_percent: float
    quantizable_op_type: Sequence[str]
    is_full_quantize: bool
    weight_quantize_type: str
    activation_quantize_type: str
    recover: Sequence[str]
    skip: Sequence[str]
    skip_first_last: bool
    optimize_for: str
    target: str
    rules: Sequence[Rule]


def config_of(config: QuantConfig | None, settings: Settings) -> QuantConfig:
    """The configuration that a public function was given, as such or by keywords.

    Raises:
      TypeError: `config` is none, as a dict of another library is.
      ValueError: both were given, or it is of another mode.
    """
    if config is None:
        return QuantConfig(**settings)
    if not isinstance(config, QuantConfig):
        raise TypeError(
            f"config is a jaxquant.QuantConfig, got {type(config).__name__}; its fields may be "
            "given as keywords too"
        )
    # Two places for one setting would leave open which of them counts.
    if settings:
        raise ValueError(
            f"config= and {', '.join(settings)} were given: put what differs into it with "
            "dataclasses.replace(config, ...)"
        )
    if config.mode != STATIC:
        # Other modes have functions of their own, with fewer settings.
        raise ValueError(
            f"config.mode is {config.mode!r}: such a model is made by jaxquant.quant_dynamic or "
            "jaxquant.quant_weights, by their own keywords"
        )
    return config


def spelled_out(function: Callable[P, T]) -> Callable[P, T]:
    """The function, its signature with the keywords of `Settings` one by one: for `help`."""
    signature = inspect.signature(function)
    # `**settings` tells a reader nothing; a type checker reads `Unpack[Settings]` instead.
    *own, _ = signature.parameters.values()
    fields = {field.name: field for field in dataclasses.fields(QuantConfig)}
    keywords = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=fields[name].default,
            annotation=fields[name].type,
        )
        for name in Settings.__annotations__
    ]  # fmt: skip
    spelled = signature.replace(parameters=[*own, *keywords])
    function.__signature__ = spelled  # type: ignore[attr-defined]
    return function
