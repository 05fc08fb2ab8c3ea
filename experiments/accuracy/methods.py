"""The ways of quantizing that the accuracy table compares; a further one is a further line."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jaxquant
from experiments.errors import SettingsError


class Method(NamedTuple):
    """One way of quantizing.

    Attributes:
      name: without commas, since `--methods` separates names by them.
      options: keyword arguments of `jaxquant.quant_post`; the others keep their defaults.
    """

    name: str
    options: dict[str, Any]

    @property
    def calibration(self) -> dict[str, Any]:
        """The options on which it depends what calibration observes.

        Methods that calibrate with the same options share what calibration observed.
        """
        own = ("algo",) if self.options.get("algo") in OWN_STATISTICS else ()
        return {name: value for name, value in self.options.items() if name in (*CALIBRATED, *own)}


CALIBRATED = ("quantizable_op_type", "is_full_quantize", "skip", "skip_first_last")
OWN_STATISTICS = ("avg",)  # the algos that are no search in what every calibration keeps


RECOVERY_STEPS = ("outliers", "equalization", "smoothquant", "adaround", "bias_correction")

METHODS = (
    Method("KL", {"algo": "KL"}),
    Method("KL-full", {"algo": "KL", "is_full_quantize": True}),
    Method("abs_max", {"algo": "abs_max"}),
    Method("abs_max-full", {"algo": "abs_max", "is_full_quantize": True}),
    Method("auto", {"algo": "auto"}),
    Method("mse", {"algo": "mse"}),
    Method("percentile", {"algo": "percentile"}),
    Method("avg", {"algo": "avg"}),
    Method("emd", {"algo": "emd"}),
    Method("ptf", {"algo": "ptf"}),
)


def choose(names: Sequence[str]) -> list[Method]:
    """The methods of these names, in the order of `METHODS`; of no name, all.

    Raises:
      SettingsError: there is no method of a name.
    """
    known = [method.name for method in METHODS]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise SettingsError(f"there is no method {name!r}{hint}; there are {', '.join(known)}")
    return [method for method in METHODS if not names or method.name in names]


def with_recovery(methods: Sequence[Method], recoveries: Sequence[str]) -> list[Method]:
    """Each method with each recovery in place of its own; of no recovery, the methods as they are.

    Args:
      methods: those to vary.
      recoveries: steps of `jaxquant.quant_post`'s `recover` joined by "+", or "none".

    Raises:
      SettingsError: there is no step of a name.
    """
    if not recoveries:
        return list(methods)
    steps = {text: () if text == "none" else tuple(text.split("+")) for text in recoveries}
    for step in (step for chosen in steps.values() for step in chosen):
        if step not in RECOVERY_STEPS:
            near = difflib.get_close_matches(step, RECOVERY_STEPS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise SettingsError(
                f"there is no recovery step {step!r}{hint}; there are {', '.join(RECOVERY_STEPS)}, "
                "joined by '+', and 'none'"
            )
    return [
        Method(f"{method.name} recover={text}", {**method.options, "recover": list(chosen)})
        for method in methods
        for text, chosen in steps.items()
    ]


def check(method: Method) -> None:
    """Raise SettingsError where a method has an option that no step takes."""
    unknown = sorted(set(method.options) - set(inspect.signature(jaxquant.quantize).parameters))
    if unknown:
        raise SettingsError(
            f"method {method.name!r}: no step of jaxquant takes {', '.join(unknown)}"
        )
