"""The model with any of its int8 sites in float: one compiled program, the choice an argument."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.analysis.units import Unit, Value, find_units, walk
from jaxquant.graph import evaluate
from jaxquant.graph.trace import trace
from jaxquant.plan.plan import Plan
from jaxquant.run.program import Program

_REST = ""  # the name of the units that are no sites


class Switch:
    """Runs any mixture of the float and the int8 model; compiled once per input shape.

    Args:
      params, apply_fn: the float model.
      qparams, plan: the int8 model.
      example: inputs of the model, or their shapes.

    Attributes:
      names: the sites that can be chosen, in evaluation order.
    """

    def __init__(
        self,
        params: Any,
        apply_fn: Callable[..., Any],
        qparams: Mapping[str, Any],
        plan: Plan,
        example: tuple[Any, ...],
    ):
        self._arrays = (params, qparams)
        program = Program(trace(apply_fn, params, example), plan, params)
        self.names = tuple(unit.name for unit in find_units(program) if unit.name)

        def mixed(arrays: Any, chosen: Mapping[str, jax.Array], *inputs: Any) -> Any:
            params, qparams = arrays
            program = Program(trace(apply_fn, params, inputs), plan, params)
            units = find_units(program)
            pick = functools.partial(_pick, chosen)
            flat = jax.tree.leaves(inputs)
            return evaluate.outputs(walk(program, units, params, qparams, flat, pick))

        self._jitted = jax.jit(mixed)

    def model(self, int8: Collection[str]) -> Callable[..., Any]:
        """The model `(*inputs) -> outputs` in which these sites are int8 and the others float."""
        unknown = set(int8) - set(self.names)
        if unknown:
            raise ValueError(f"no int8 site is named {', '.join(sorted(unknown))}")
        chosen = {name: np.bool_(name in int8) for name in self.names}
        chosen[_REST] = np.bool_(2 * len(set(int8)) > len(self.names))
        return functools.partial(self._jitted, self._arrays, chosen)


def _pick(chosen: Mapping[str, jax.Array], unit: Unit, as_float: Value, as_int8: Value) -> Any:
    """One of the two, and the other is not computed."""
    kinds = [(x.shape, x.dtype) for x in jax.eval_shape(lambda: list(map(jnp.asarray, as_int8())))]

    def widened() -> list[Any]:
        return [jnp.asarray(x).astype(dtype) for x, (_, dtype) in zip(as_float(), kinds)]

    return lax.cond(chosen[unit.name], lambda: list(map(jnp.asarray, as_int8())), lambda: widened())
