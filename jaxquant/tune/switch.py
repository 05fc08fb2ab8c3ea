"""The model with any of its int8 sites in float: one compiled program, the choice an argument.

Where the int8 model's biases are corrected, those of every mixture are corrected for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.graph import evaluate
from jaxquant.graph.model import FloatModel
from jaxquant.plan.bind import bind
from jaxquant.plan.plan import Plan
from jaxquant.recover.bias_correction import with_shifts
from jaxquant.recover.shift import Shift
from jaxquant.run.float_forms import evaluate_float
from jaxquant.run.program import program_by_site
from jaxquant.tune.biases import has_bias, is_corrected, shift_at, without_correction
from jaxquant.tune.parts import Here, Outcome, Part, Parts, Value, evaluate_parts, find_parts

Chosen: TypeAlias = Mapping[str, Any]
_REST = ""  # the name of the parts that are no sites


class Switch:
    """Runs any mixture of the float and the int8 model; compiled once per input shape.

    Args:
      source: the float model.
      qparams, plan: the int8 model.
      examples: batches of the model's inputs, on which biases are corrected.

    Attributes:
      names: the sites that can be chosen, in evaluation order.
    """

    def __init__(
        self,
        source: FloatModel,
        qparams: Mapping[str, Any],
        plan: Plan,
        examples: Sequence[tuple[Any, ...]],
    ):
        params = source.params
        program = program_by_site(bind(source.trace(examples[0]), plan), params)
        self.names = find_parts(program).names
        self._params = params
        self._qparams = without_correction(program, params, qparams)
        self._plan = plan
        self._examples = examples

        def start(inputs: Any) -> tuple[Parts, list[Any]]:
            program = program_by_site(bind(source.trace(inputs), plan), params)
            return find_parts(program), jax.tree.leaves(inputs)

        def mixed(params: Any, qparams: Any, chosen: Chosen, *inputs: Any) -> Any:
            parts, flat = start(inputs)

            def choose(here: Here, part: Part, as_float: Value, as_int8: Value) -> Outcome:
                return Outcome(_pick(chosen, part, as_float, as_int8))

            return evaluate.outputs(evaluate_parts(parts, params, qparams, flat, choose)[0])

        def shifts(params: Any, qparams: Any, chosen: Chosen, inputs: Any) -> dict[str, Shift]:
            return _shifts(*start(inputs), params, qparams, chosen)

        self._mixed, self._shifts = jax.jit(mixed), jax.jit(shifts)

    def model(self, int8: Collection[str]) -> Callable[..., Any]:
        """The model `(*inputs) -> outputs` in which these sites are int8 and the others float."""
        unknown = set(int8) - set(self.names)
        if unknown:
            raise ValueError(f"no int8 site is named {', '.join(sorted(unknown))}")
        chosen = {name: np.bool_(name in int8) for name in self.names}
        chosen[_REST] = np.bool_(2 * len(set(int8)) > len(self.names))
        qparams = self._qparams
        if is_corrected(self._plan) and int8:
            run = functools.partial(self._shifts, self._params, qparams, chosen)
            qparams = with_shifts(self._plan, qparams, map(run, self._examples))
        return functools.partial(self._mixed, self._params, qparams, chosen)


def _shifts(
    parts: Parts, flat: list[Any], params: Any, qparams: Any, chosen: Chosen
) -> dict[str, Shift]:
    """The shift of each int8 site of a mixture, behind the corrected ones before it."""

    def choose(here: Here, part: Part, as_float: Value, as_int8: Value) -> Outcome:
        values = _pick(chosen, part, as_float, as_int8)
        if not has_bias(here.program, part):
            return Outcome(values)
        shift, corrected = shift_at(part, here.in_float, values[0])
        on = chosen[part.name]
        values = [jnp.where(on, corrected, values[0])]
        return Outcome(values, Shift(*(jnp.where(on, sums, 0) for sums in shift)))

    reference = evaluate_float(parts.program.graph, params, flat)
    return evaluate_parts(parts, params, qparams, flat, choose, reference)[1].of


def _pick(chosen: Chosen, part: Part, as_float: Value, as_int8: Value) -> Any:
    """One of the two, and the other is not computed."""
    kinds = [(x.shape, x.dtype) for x in jax.eval_shape(lambda: list(map(jnp.asarray, as_int8())))]

    def widened() -> list[Any]:
        return [jnp.asarray(x).astype(dtype) for x, (_, dtype) in zip(as_float(), kinds)]

    return lax.cond(chosen[part.name], lambda: list(map(jnp.asarray, as_int8())), lambda: widened())
