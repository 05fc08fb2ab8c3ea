"""The model with any of its int8 sites in float: one compiled program, the choice an argument.

Where the int8 model's biases are corrected, those of every mixture are corrected for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.calibration.padding import Padding, real_in
from jaxquant.graph import evaluate
from jaxquant.graph.model import FloatModel
from jaxquant.graph.positions import RealIn
from jaxquant.plan import layout
from jaxquant.plan.bind import bind
from jaxquant.plan.plan import Plan
from jaxquant.recover.added import find_added
from jaxquant.recover.bias_correction import with_shifts
from jaxquant.recover.repeats import programs_of
from jaxquant.recover.shift import Shift
from jaxquant.run.float_forms import evaluate_float
from jaxquant.run.program import Program, program_by_site
from jaxquant.tune.biases import has_bias, is_corrected, shift_at, without_correction
from jaxquant.tune.evaluation import Here, Outcome, Value, evaluate_parts
from jaxquant.tune.parts import Part, Parts, find_parts
from jaxquant.tune.switchable import find_switchable

_CHOSEN = "chosen"  # what is int8, beside `qparams`: by site, bool with an axis for each scan


class Switch:
    """Runs any mixture of the float and the int8 model; compiled once per input shape.

    Args:
      source: the float model.
      qparams, plan: the int8 model.
      examples: batches of the model's inputs, on which biases are corrected.
      single_layers: whether layers of a scan are chosen one by one, where it can be cut there.
      padding: which positions of the examples count for nothing; None for none.

    Attributes:
      switchable: what can be chosen, by name: sites, and layers of sites.
    """

    def __init__(
        self,
        source: FloatModel,
        qparams: Mapping[str, Any],
        plan: Plan,
        examples: Sequence[tuple[Any, ...]],
        single_layers: bool = False,
        padding: Padding | None = None,
    ):
        params = source.params
        program = program_by_site(bind(source.trace(examples[0]), plan), params)
        self.switchable = find_switchable(program.model, find_parts(program).names, single_layers)
        self._params = params
        # Biases are corrected for what is int8 before them, which differs by mixture.
        self._qparams = without_correction(program, params, qparams)
        self._plan = plan
        self._examples = examples

        def start(inputs: Any) -> tuple[Parts, list[Any]]:
            program = program_by_site(bind(source.trace(inputs), plan), params)
            return find_parts(program), jax.tree.leaves(inputs)

        # Which sites are int8 is an argument (`rest`): one compilation serves all combinations.
        def mixed(params: Any, qparams: Any, rest: Any, *inputs: Any) -> Any:
            parts, flat = start(inputs)

            def choose(here: Here, part: Part, as_float: Value, as_int8: Value) -> Outcome:
                return Outcome(_pick(_is_int8(here, part, rest), as_float, as_int8))

            own = _with_biases(parts.program, params, qparams)
            return evaluate.outputs(evaluate_parts(parts, own, qparams, flat, choose)[0])

        def shifts(params: Any, qparams: Any, rest: Any, inputs: Any) -> dict[str, Shift]:
            parts, flat = start(inputs)
            real = real_in(padding, parts.program.model, inputs)
            return _shifts(parts, flat, params, qparams, rest, real)

        self._mixed, self._shifts = jax.jit(mixed), jax.jit(shifts)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what can be chosen, in the order that they have in Python loops."""
        return tuple(self.switchable)

    def model(self, int8: Collection[str]) -> Callable[..., Any]:
        """The model `(*inputs) -> outputs` in which these are int8 and the others float."""
        unknown = set(int8) - set(self.names)
        if unknown:
            raise ValueError(f"no int8 site is named {', '.join(sorted(unknown))}")
        chosen: dict[str, np.ndarray] = {}
        for name, each in self.switchable.items():
            # Layers of one site are chosen one by one, in one array.
            before = chosen.get(each.site, False)
            chosen[each.site] = before | each.choices(name in int8)
        rest = np.bool_(2 * len(set(int8)) > len(self.names))  # what is no site
        qparams = {**self._qparams, _CHOSEN: chosen}
        # A correction is of one mixture: what another made up for is not there.
        if is_corrected(self._plan) and int8:
            run = functools.partial(self._shifts, self._params, qparams, rest)
            qparams = with_shifts(self._plan, qparams, map(run, self._examples))
        return functools.partial(self._mixed, self._params, qparams, rest)


def _shifts(
    parts: Parts, flat: list[Any], params: Any, qparams: Any, rest: Any, real: RealIn
) -> dict[str, Shift]:
    """The shift of each int8 site of a mixture, behind the corrected ones before it."""

    def choose(here: Here, part: Part, as_float: Value, as_int8: Value) -> Outcome:
        on = _is_int8(here, part, rest)
        values = _pick(on, as_float, as_int8)
        if not has_bias(here.program, part):
            return Outcome(values)
        own = functools.partial(real, here.program.model)
        shift, corrected = shift_at(part, here.in_float, values[0], own)
        # Zeros where the site is float: sums over batches are then of nothing.
        values = [jnp.where(on, corrected, values[0])]
        return Outcome(values, Shift(*(jnp.where(on, sums, 0) for sums in shift)))

    reference = evaluate_float(parts.program.graph, params, flat)
    return evaluate_parts(parts, params, qparams, flat, choose, reference)[1].of


def _with_biases(program: Program, params: Any, qparams: Any) -> list[Any]:
    """The leaves of the float model, with the biases of the sites that are int8.

    A bias that takes the mean error of a rounded weight away is wrong behind the float one.
    """
    leaves = dict(zip(program.graph.leaves, jax.tree.leaves(params), strict=True))
    if program.mode.integer:
        return list(leaves.values())  # those of int8 sites are beside their integers
    for inner in programs_of(program):
        for site in (each.site for each in inner.binding.sites if each.site.name in inner.slots):
            added = None if site.is_lookup else find_added(inner.model, site)
            if added is None or site.name not in qparams[_CHOSEN]:
                continue
            rounded = layout.get(qparams["params"], program.float_paths[added.leaf])
            on = qparams[_CHOSEN][site.name]
            on = jnp.reshape(on, (*on.shape, *(1,) * (rounded.ndim - on.ndim)))
            leaves[added.leaf] = jnp.where(on, rounded, leaves[added.leaf])
    return list(leaves.values())


def _is_int8(here: Here, part: Part, rest: Any) -> Any:
    """Whether a part is int8 here, in the layer of a step; bool []."""
    return here.qparams[_CHOSEN][part.name] if part.name else rest


def _pick(is_int8: Any, as_float: Value, as_int8: Value) -> Any:
    """One of the two, and the other is not computed."""
    # By shapes: neither is run to know them.
    kinds = [(x.shape, x.dtype) for x in jax.eval_shape(lambda: list(map(jnp.asarray, as_int8())))]

    def widened() -> list[Any]:
        # A branch may compute in wider floats: both have to agree.
        return [jnp.asarray(x).astype(dtype) for x, (_, dtype) in zip(as_float(), kinds)]

    return lax.cond(is_int8, lambda: list(map(jnp.asarray, as_int8())), lambda: widened())
