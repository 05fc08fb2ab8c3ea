"""Whether a device computes the integers of an int8 model that the CPU computes, site by site.

What a compiler makes of an int8 program on a device that nobody has tried is not to be trusted:
XLA has given wrong sums without an error.  Both programs read the same integers at each site, those
that the CPU had, so that a site answers for itself alone, and what floats round to on the way (a
softmax differs in its last bits from device to device) does not count.

A site's sums are recovered from its result, `(y - bias) / multiplier`, which is exact up to some
2^20.  A site that scales its operands in the call, or multiplies floats with a stored weight, has
no such sums: its results may differ by the device's own precision, and are compared by their SQNR,
as are the outputs of the model, behind which the sites inside loops and choices are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant.graph import evaluate, ir
from jaxquant.plan.binding import Int8Site
from jaxquant.run.lowerings import Evaluation, Lowering
from jaxquant.run.program import Program

# The products of a TPU and of a GPU in float32 are of shorter floats by default.
_LEAST_DB = 25.0
# Of a float32 result of so many units, its own rounding is less than half a unit.
_UNITS = 2.0**-21


class Seen(NamedTuple):
    """What one evaluation gave.

    Attributes:
      integers: what the sites read in int8, by the tensor.
      results: of the sites, by their name.
      outputs: of the model, flat.
    """

    integers: dict[ir.Var, Any]
    results: dict[str, Any]
    outputs: list[Any]


class Agreement(NamedTuple):
    """What `qapply.check` compared.

    Attributes:
      device: that was compared with the CPU; None where the CPU itself is the default one.
      sites: how many sites agree.
    """

    device: jax.Device | None
    sites: int

    def __str__(self) -> str:
        if self.device is None:
            return "the inputs fit; nothing to compare, since the default device is the CPU"
        return f"{self.sites} sites and the outputs agree on {self.device.device_kind} and CPU"


class DisagreementError(RuntimeError):
    """A device computes other integers than the CPU."""


def differences(
    program: Program, qparams: Mapping[str, Any], inputs: Sequence[Any], device: jax.Device
) -> dict[str, str]:
    """How the device's results differ from the CPU's, by site; "outputs" of the model's.

    Args:
      program: whose sites each show their result.
      qparams, inputs: its arguments, the inputs flat.
      device: on which it is compared.
    """
    here = jax.devices("cpu")[0]
    wanted = run_on(here, program, qparams, inputs, {})
    # The device gets the CPU's integers at each site, so that one fault is not seen at all others.
    got = run_on(device, program, qparams, inputs, wanted.integers)
    found = {}
    for site in program.binding.sites:
        name = site.site.name
        if name not in wanted.results:
            # What a site inside a loop or an absorbed one gives is seen in the outputs alone.
            continue
        pair = wanted.results[name], got.results[name]
        arrays = qparams["sites"].get(name, {})
        # Integer sums have to be equal; where scales come from floats, near is as good as it gets.
        is_whole = not site.dynamic and program.mode.integer and "multiplier" in arrays
        told = sums_apart(site, arrays, *pair) if is_whole else _far_apart([pair])
        if told:
            found[name] = f"({site.site.kind}) {told}"
    if told := _far_apart(list(zip(wanted.outputs, got.outputs, strict=True))):
        found["outputs"] = told
    return found


def run_on(
    device: jax.Device,
    program: Program,
    qparams: Mapping[str, Any],
    inputs: Sequence[Any],
    given: Mapping[ir.Var, Any],
) -> Seen:
    """What the program gives on a device where its sites read these integers, or their own."""

    def evaluated(
        qparams: Mapping[str, Any], inputs: Sequence[Any], given: Mapping[ir.Var, Any]
    ) -> Seen:
        integers: dict[ir.Var, Any] = {}
        results: dict[str, Any] = {}

        def hook(site: Int8Site, lowering: Lowering) -> Lowering:
            def seen(state: Evaluation) -> evaluate.Values:
                # Read the integers that were given, in place of those that this device would
                # quantize.
                for var in site.with_scales if program.mode.integer else ():
                    if var in given:
                        state.quantized.put(var, given[var], var)
                    integers[var] = state.quantized.int8(var)
                values = lowering(state)
                results[site.site.name] = values[site.epilogue.output]
                return values

            return seen

        outputs = program.hooked(hook).outputs(qparams, inputs)
        return Seen(integers, results, jax.tree.leaves(outputs))

    # Committed arrays say where it runs: jit has no device of its own here.
    arguments = jax.device_put((qparams, list(inputs), dict(given)), device)
    seen = jax.jit(evaluated)(*arguments)
    return jax.tree.map(np.asarray, seen)


def sums_apart(
    site: Int8Site, arrays: Mapping[str, Any], wanted: np.ndarray, got: np.ndarray
) -> str | None:
    """What is told of a site whose sums differ; None of one whose sums are the same."""
    rank, channels = wanted.ndim, site.epilogue.channels
    multiplier = np.asarray(channels.spread(arrays["multiplier"], rank), np.float64)
    bias = np.asarray(channels.spread(arrays["bias"], rank)) if "bias" in arrays else 0.0
    # A multiplier of 0, of a dead channel, leaves no sum to recover: the result itself is compared.
    unit = np.where(multiplier == 0, 1.0, multiplier)
    apart = np.abs(got.astype(np.float64) - wanted) / np.abs(unit)
    # Half a step, and what float32 rounds off when the sum is made a float.
    allowed = 0.5 + _UNITS * (np.abs(wanted - bias) + np.abs(bias)) / np.abs(unit)
    wrong = ~(apart <= allowed) & ~(np.isnan(wanted) & np.isnan(got))
    if not wrong.any():
        return None
    worst = np.nanmax(np.where(wrong, apart, 0))
    return f"{wrong.sum()} of {wrong.size} sums differ, by up to {worst:.0f}"


def _far_apart(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> str | None:
    """What is told of results whose SQNR is below what precision explains; None of others."""
    worst = min((_sqnr(*pair) for pair in pairs), default=np.inf)
    return None if worst >= _LEAST_DB else f"results differ: {worst:.1f} dB"


def _sqnr(wanted: np.ndarray, got: np.ndarray) -> float:
    """The power of an array over that of its difference to another one, in dB."""
    signal, other = (np.asarray(x, np.float64) for x in (wanted, got))
    both = np.isfinite(signal) & np.isfinite(other)
    # NaN on one side alone is as wrong as it can be, and would vanish in the difference.
    if (np.isfinite(signal) != np.isfinite(other)).any():
        return -np.inf
    noise = float(np.sum(np.square(signal - other)[both]))
    power = float(np.sum(np.square(signal)[both]))
    # 1e-300 keeps a silent signal from the logarithm of 0.
    return np.inf if noise == 0 else 10 * np.log10(max(power, 1e-300) / noise)
