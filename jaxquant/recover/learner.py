"""Learns the rounding of a model's sites, one after the other, on what reaches them."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph.layer_names import layer_suffix
from jaxquant.graph.model import Model
from jaxquant.graph.positions import RealIn, all_entries
from jaxquant.graph.sites import Site
from jaxquant.plan import layout
from jaxquant.plan.binding import Int8Site
from jaxquant.progress import Stage
from jaxquant.recover import adaround
from jaxquant.recover.activation import Activation, RowFunction, find_activation
from jaxquant.recover.product import SiteProduct
from jaxquant.recover.repeats import is_repeated, most_steps, programs_of, unrolled
from jaxquant.recover.roundings import Rounding, Roundings, digest
from jaxquant.recover.stepwise import run_stepwise
from jaxquant.recover.wanted import InputGrid, Learnable, Wanted, find_wanted
from jaxquant.run.layers import GraphLayer, Layer
from jaxquant.run.program import Program
from jaxquant.weights.epilogue import whole_steps
from jaxquant.weights.fold import fold
from jaxquant.weights.integers import along_channels
from jaxquant.weights.sites import Divisors, undivided

POSITIONS = 4096  # of a site's output, at most
_FEWEST = 8  # positions to learn from
_WHOLE = 2.0**-15  # of a step: what is as near to an integer is one


class Learner:
    """Learns the rounding of one model.

    Args:
      program: the int8 model, for all samples in one batch.
      params: the float model's parameters.
      qparams: the int8 model's arrays.
      divisors: what the channels of tensors are divided by.
      real: gives which entries of a tensor belong to no padding: others are not learned from.

    Attributes:
      outcomes: what became of each site, by its name with its layer: "learned", or why not.
    """

    def __init__(
        self,
        program: Program,
        params: Any,
        qparams: Any,
        divisors: Divisors,
        real: RealIn = all_entries,
    ) -> None:
        self._program = program
        self._divisors = divisors
        asked = program.whole_plan.recovered_by("adaround")
        # Sites with both steps learn with the shift taken away.
        self._corrected = program.whole_plan.recovered_by("bias_correction")
        programs = list(programs_of(program))
        stored = {
            each.model: [s for s in each.binding.sites if _has_sums(program, s.site)]
            for each in programs
        }
        reasons = _reasons(program, stored, asked)
        counted = _counted(stored, reasons, real)
        self.outcomes: dict[str, str] = {}
        places: dict[str, dict[Layer, np.ndarray]] = {}
        # Rows are drawn by a site's number in the model without scans, so that the same ones come.
        ordered = {
            model: [(each.site.equation, (model, each.site)) for each in sites]
            for model, sites in stored.items()
        }
        for number, ((model, site), layer) in enumerate(unrolled(program.model, ordered)):
            self.outcomes[_named(site, layer)] = reasons[site.name]
            if reasons[site.name]:
                continue
            drawn = _draw(counted[site.name], number, most_steps(model))
            places.setdefault(site.name, {})[layer] = drawn
        self._sites = {
            each.site.name: Learnable(
                inner.model,
                SiteProduct(inner.graph, each.site),
                find_activation(inner.graph, each.epilogue.output),
                places[each.site.name],
                _input_grid(inner, each.site, qparams) if is_repeated(inner.model) else None,
            )
            for inner in programs
            for each in stored[inner.model]
            if not reasons[each.site.name]
        }
        # In NumPy, since each site's arrays change while the model runs.
        self._whole = GraphLayer(program, program.binding, _writable(qparams, self._sites), params)
        self._folded: dict[tuple[Model, Layer], Mapping[int, np.ndarray]] = {}

    def learn(self, flat: Sequence[Any], roundings: Roundings, stage: Stage) -> Any:
        """The arrays with the roundings.

        Args:
          flat: the flattened inputs, all samples in one batch.
          roundings: those that are known already, and where new ones are kept.
          stage: shows the sites.
        """
        sites = list(self._sites.values())
        wanted = find_wanted(self._program.model, self._whole.params, flat, sites)

        # Called where the int8 model comes to a site: earlier sites have their learned roundings.
        def visit(here: GraphLayer, int8_site: Int8Site, x: jax.Array) -> None:
            site = int8_site.site
            if site.name in self._sites:
                zero_point = here.binding.zero_points[site.operands[0]]
                learnable = self._sites[site.name]
                inputs = learnable.product.inputs(x, zero_point, learnable.places[here.layer])
                # What reaches the site now: earlier sites are rounded as they learned to be.
                found = wanted[site.name][here.layer]._replace(inputs=inputs)
                self._learn(here, learnable, found, roundings)
            stage.step()

        # A loop whose steps share weights shows its sites all steps at once, before it runs.
        def enter(here: GraphLayer, index: int) -> None:
            for inner in (each for body in here.inside(index) for each in body.walk()):
                sites = (each.site for each in inner.binding.sites)
                for name in (site.name for site in sites if _has_sums(self._program, site)):
                    if name in self._sites:
                        found = wanted[name].get(inner.layer)
                        self._learn_repeated(inner, self._sites[name], found, roundings)
                    stage.step()

        run_stepwise(self._whole, [jnp.asarray(x) for x in flat], visit, enter)
        return self._whole.qparams

    def _learn_repeated(
        self, here: GraphLayer, learnable: Learnable, wanted: Wanted | None, roundings: Roundings
    ) -> None:
        """Learn a site in a loop or choice, where enough of the samples come there."""
        count = 0 if wanted is None else len(wanted.rows)
        if wanted is None or count < _FEWEST:
            name = _named(learnable.product.site, here.layer)
            self.outcomes[name] = f"{count} output positions are too few"
            return
        self._learn(here, learnable, wanted, roundings)

    def _learn(
        self, here: GraphLayer, learnable: Learnable, wanted: Wanted, roundings: Roundings
    ) -> None:
        """Learn the rounding of a site in one layer, and put it into the arrays there."""
        product, site, qparams = learnable.product, learnable.product.site, here.qparams
        assert site.weight is not None
        slot, arrays = here.program.slots[site.name], qparams["sites"][site.name]
        int8 = layout.get(qparams["params"], slot.int8)
        multiplier = np.asarray(arrays["multiplier"], np.float64)
        weight, scale = self._scaled_weight(here, site, layout.get(qparams["params"], slot.scale))

        # The zero point's part of the bias goes with the weights: out here, and in again below.
        before = product.matrix(np.asarray(int8, np.float64))
        zero_point = here.binding.zero_points[site.operands[0]]
        bias = np.asarray(arrays["bias"], np.float64)
        # Without the zero point's part the bias is that of float inputs.
        bias = bias + zero_point * multiplier * _column_sums(before)

        # What is wanted is in the units of the problem: the int8 model's multiplier for its own.
        step = _input_scale(here, site) * scale
        ratio = product.matrix(weight)
        # Clipped as integers are: a weight at the end has nowhere to go.
        down = np.clip(np.floor(ratio), -127, 127)
        problem = adaround.Problem(
            inputs=np.asarray(wanted.inputs),
            wanted=np.asarray(wanted.rows * jnp.asarray(multiplier / step, jnp.float32)
                              + jnp.asarray(bias, jnp.float32)),
            down=down.astype(np.float32),
            fraction=np.clip(ratio - down, 0, 1).astype(np.float32),
            nearest=before > down,
            multiplier=multiplier.astype(np.float32),
            bias=bias.astype(np.float32),
            activation=_of_rows(here.program, learnable.activation, wanted),
            correct=site.name in self._corrected,
        )  # fmt: skip

        name = _named(site, here.layer)
        rounding = _rounding(name, problem, roundings)

        # The integers are those of this layer's view, so the program reads them at once.
        after = down + rounding.up
        int8[...] = product.weight(after, here.program.graph.shape(site.weight)).astype(np.int8)
        bias = bias + adaround.shift(problem, rounding.up)
        bias = bias - zero_point * multiplier * _column_sums(after)
        arrays["bias"][...] = whole_steps(bias, multiplier)
        self.outcomes[name] = (
            "learned" if rounding.learned < rounding.nearest else "nearest rounding is no worse"
        )

    def _scaled_weight(
        self, here: GraphLayer, site: Site, scale: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """The float64 weight in units of its scale [C] or [], which comes too in float64."""
        weight = undivided(here.binding, site, self._weight(here, site), self._divisors)
        scale = np.asarray(scale, np.float64)
        ratio = weight / along_channels(scale, site.channel_axes, weight.shape)
        # So near an integer the weight is one, and has nothing to decide.
        near = np.rint(ratio)  # the scale is float32: what it was made of is 127 but for that
        return np.where(np.abs(ratio - near) < _WHOLE, near, ratio), scale

    def _weight(self, here: GraphLayer, site: Site) -> np.ndarray:
        """The float weight of a site; those of one graph are there at a time."""
        place = here.program.model, here.layer
        if place not in self._folded:
            # All weights of the graph at once: folding one by one would evaluate the graph each
            # time.
            own = (x for x in self._sites.values() if x.model is here.program.model)
            weights = [x.product.site.weight for x in own if x.product.site.weight is not None]
            self._folded = {place: fold(here.program.graph, here.params, weights, [])[0]}
        assert site.weight is not None
        return self._folded[place][site.weight]


def _has_sums(program: Program, site: Site) -> bool:
    """True for a convolution or dot with a stored weight."""
    return site.name in program.slots and not site.is_lookup


def _reasons(
    program: Program, stored: Mapping[Model, Sequence[Int8Site]], asked: Collection[str]
) -> dict[str, str]:
    """Site name -> why its rounding is not learned; "" where it is.

    Args:
      program: of the whole model.
      stored: the sites of each graph that have a stored weight.
      asked: the sites that have the step.
    """
    sites = [(model, each) for model, some in stored.items() for each in some]
    # What two readers share would be learned twice, each for its own inputs.
    uses = collections.Counter(program.slots.values())
    found = {}
    for model, int8_site in sites:
        site = int8_site.site
        product = SiteProduct(model.graph, site)
        assert site.weight is not None
        # The first reason is told: the user's own choice before what the site is like.
        reason = product.reason
        if site.name not in asked:
            reason = "not asked for"
        elif int8_site.dynamic:
            reason = "what it reads is scaled in each call"
        elif uses[program.slots[site.name]] > 1:
            reason = "it shares its weight with another site"
        elif not all(model.varies_by_layer(site.weight)):
            reason = "its layers share their weight"
        found[site.name] = reason
    return found


def _rounding(name: str, problem: adaround.Problem, roundings: Roundings) -> Rounding:
    """The rounding that the file has, or one that is learned and put there."""
    known = digest(problem.inputs, problem.wanted, problem.down, problem.fraction,
                   np.array([adaround.STEPS, problem.correct], np.int64))  # fmt: skip
    shape = problem.down.shape
    if (found := roundings.get(name, known, shape)) is not None:
        return found
    rounding = Rounding(*adaround.learn(problem))
    roundings.put(name, known, rounding)
    return rounding


def _input_grid(program: Program, site: Site, qparams: Any) -> InputGrid:
    """What the input of a site is quantized with, in all layers."""
    name = program.binding.scales[site.operands[0]]
    tensor = qparams["tensors"][name]
    zero_point = tensor.get("zero_point", program.binding.zero_points[site.operands[0]])
    return InputGrid(tensor["inv_scale"], np.asarray(zero_point, np.int32))


def _input_scale(here: GraphLayer, site: Site) -> float:
    name = here.binding.scales[site.operands[0]]
    return next(t.scale for t in here.binding.plan.tensors if t.name == name)


def _of_rows(
    program: Program, activation: Activation, wanted: Wanted
) -> Callable[[jax.Array], jax.Array]:
    """An activation as a function of rows, where it is one."""
    if wanted.scalars is None or not activation.equations:
        return _identity
    return RowFunction(program.graph, activation, jax.device_get(wanted.scalars))


def _identity(value: jax.Array) -> jax.Array:
    return value


def _counted(
    stored: Mapping[Model, Sequence[Int8Site]], reasons: dict[str, str], real: RealIn
) -> dict[str, np.ndarray]:
    """The output positions of each site that is learned that belong to no padding, ascending.

    Args:
      stored: the sites of each graph that have a stored weight.
      reasons: why a site is not learned; those with too few such positions are put there.
      real: gives which entries of a tensor belong to no padding.
    """
    found = {}
    for model, sites in stored.items():
        for site in (each.site for each in sites if not reasons[each.site.name]):
            product = SiteProduct(model.graph, site)
            every = np.arange(product.positions)
            rows = product.real(functools.partial(real, model), every)
            found[site.name] = every if rows is None else np.flatnonzero(jax.device_get(rows))
            count = len(found[site.name])
            if count < (1 if is_repeated(model) else _FEWEST):
                reasons[site.name] = f"{count} output positions are too few"
    return found


def _draw(positions: np.ndarray, seed: int, steps: int | None) -> np.ndarray:
    """Ascending output positions of one site.

    Args:
      positions: those that count in one evaluation of its graph.
      seed: of the draw.
      steps: how many evaluations there are at most; None for an unknown number.
    """
    if len(positions) > POSITIONS:
        rng = np.random.default_rng(seed)
        return np.sort(rng.choice(positions, POSITIONS, replace=False))
    count = POSITIONS if steps is None else min(len(positions) * steps, POSITIONS)
    return np.sort(np.resize(positions, count))


def _column_sums(matrix: np.ndarray) -> np.ndarray:
    """[C] of [G, K, C/G]."""
    return matrix.sum(axis=1).reshape(-1)


def _named(site: Site, layer: Layer) -> str:
    return site.name + layer_suffix(layer)


def _writable(qparams: Mapping[str, Any], sites: Collection[str]) -> dict[str, Any]:
    """The arrays in NumPy, with a bias at each of some sites."""
    found: dict[str, Any] = jax.tree.map(np.array, jax.device_get(dict(qparams)))
    for name in sites:
        arrays = found["sites"][name]
        arrays.setdefault("bias", np.zeros_like(arrays["multiplier"]))
    return found
