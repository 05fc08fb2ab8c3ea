"""What the float model gives at the sites whose rounding is learned: rows of every layer's outputs.

A site that loops or choices repeat shows what it reads too, in any of its steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.backends import int8
from jaxquant.graph import evaluate, ir
from jaxquant.graph.model import Model
from jaxquant.recover.activation import Activation
from jaxquant.recover.looks import Look, Real, States, is_replaced, look_at
from jaxquant.recover.product import SiteProduct
from jaxquant.recover.repeats import is_repeated
from jaxquant.run.layers import Layer


class Wanted(NamedTuple):
    """What the float model shows of one site in one layer, at R output positions.

    Attributes:
      rows: float32 [R, C], its output, before its epilogue.
      scalars: the parameters of the activation behind it; None where one is no number.
      inputs: float32 [R, G, K], the integers of what it reads, of a repeated site; else None.
    """

    rows: Any
    scalars: dict[ir.Var, Any] | None
    inputs: Any


class InputGrid(NamedTuple):
    """What the input of a site is quantized with: arrays of the layers."""

    inv_scale: Any
    zero_point: Any


class _State(NamedTuple):
    """What a look keeps of a site, with an axis for each scan over stacked weights around it.

    Attributes:
      wanted: what was seen so far; None before the only evaluation of a site that is not repeated.
      places: the output positions of the rows, int32 [R].
      steps: how many evaluations of the graph there were, int32 [].
      step: of which of these each row is, int32 [R].
      grid: of the input of a repeated site; else None.
    """

    wanted: Wanted | None
    places: Any
    steps: Any
    step: Any
    grid: InputGrid | None


@dataclasses.dataclass(frozen=True)
class Learnable:
    """A site whose rounding is learned, in all layers of its graph.

    Attributes:
      model: of the graph that it is in.
      product: the site.
      activation: what is behind it.
      places: layer -> the output positions that it is learned at, ascending.
      grid: of its input, for all layers, where it is repeated; else None.
    """

    model: Model
    product: SiteProduct
    activation: Activation
    places: Mapping[Layer, np.ndarray]
    grid: InputGrid | None

    @property
    def look(self) -> Look:
        scalars = self.activation.parameters(self.product.graph) or []
        return Look((self.product.output, self._operand, *scalars), self._update)

    @property
    def _operand(self) -> ir.Var:
        return self.product.site.operands[0]

    def start(self) -> _State:
        """The state before any evaluation."""
        graph, scans = self.product.graph, self.model.scans
        places = np.stack([self.places[layer] for layer in np.ndindex(scans)])
        rows = places.shape[-1]
        places = places.reshape(*scans, rows).astype(np.int32)
        wanted = None
        # A loop over shared weights keeps the inputs that it drew, since no step is seen again.
        if self.grid is not None:
            groups, sums, channels = self.product.matrix_shape
            scalars = self.activation.parameters(graph)
            wanted = Wanted(
                np.zeros((*scans, rows, groups * channels), np.float32),
                None if scalars is None else {v: np.zeros(scans, graph.dtype(v)) for v in scalars},
                np.zeros((*scans, rows, groups, sums), np.float32),
            )
        steps, step = np.zeros(scans, np.int32), np.zeros((*scans, rows), np.int32)
        return _State(wanted, places, steps, step, self.grid)

    def _update(self, state: _State, env: evaluate.Environment, real: Real) -> _State:
        y = env.read(self.product.output).astype(jnp.float32)
        rows = self.product.outputs(y, state.places)
        # With grids the inputs are kept as well: trials round weights against them.
        scalars, inputs, step = self.activation.scalars(env), None, state.step
        if state.grid is not None:
            assert state.wanted is not None
            x = int8.quantize(env.wide(self._operand), *state.grid)
            inputs = self.product.inputs(x, state.grid.zero_point, state.places)
            # Samples are replaced by a draw: each place keeps the step that it holds.
            is_new = is_replaced(state.steps, len(rows))
            rows = jnp.where(is_new[:, None], rows, state.wanted.rows)
            inputs = jnp.where(is_new[:, None, None], inputs, state.wanted.inputs)
            step = jnp.where(is_new, state.steps, step)
        wanted = Wanted(rows, scalars, inputs)
        return _State(wanted, state.places, state.steps + 1, step, state.grid)


def find_wanted(
    model: Model, params: Any, flat: Sequence[Any], sites: Sequence[Learnable]
) -> dict[str, dict[Layer, Wanted]]:
    """Site name -> layer -> what the float model shows, without layers that it does not come to.

    Rows of a repeated site are those that were drawn, each once, the last samples last.
    """
    looks: dict[Model, dict[str, Look]] = {}
    for each in sites:
        looks.setdefault(each.model, {})[each.product.site.name] = each.look
    start = {each.product.site.name: each.start() for each in sites}

    @jax.jit
    def run(params: Any, flat: Sequence[Any], states: States) -> States:
        return look_at(looks, model, jax.tree.leaves(params), flat, states)

    states = run(params, flat, start)
    found: dict[str, dict[Layer, Wanted]] = {}
    for each in sites:
        state = states[each.product.site.name]
        layers = found[each.product.site.name] = {}
        for layer in np.ndindex(each.model.scans):
            # A layer that no step came to has nothing to learn from.
            if not np.asarray(state.steps)[layer]:
                continue
            wanted = jax.tree.map(lambda x, layer=layer: x[layer], state.wanted)
            if is_repeated(each.model):
                # Draws of several steps may be of the same place; each row counts once.
                pairs = np.stack([np.asarray(state.places)[layer], np.asarray(state.step)[layer]])
                _, rows = np.unique(pairs, axis=1, return_index=True)
                wanted = wanted._replace(rows=wanted.rows[rows], inputs=wanted.inputs[rows])
            layers[layer] = wanted
    return found
