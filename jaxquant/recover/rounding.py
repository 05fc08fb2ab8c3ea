"""Learned rounding of a whole model: one pass of the int8 program that learns at each site.

The samples go through the program equation by equation; where they reach a site, its rounding is
learned on what arrived, and they go on with what it gives then.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.model import FloatModel
from jaxquant.plan import layout
from jaxquant.plan.bind import Int8Site, bind
from jaxquant.plan.plan import Plan
from jaxquant.progress import Stage
from jaxquant.recover import adaround
from jaxquant.recover.activation import Activation, RowFunction, find_activation
from jaxquant.recover.product import Product
from jaxquant.recover.roundings import Rounding, Roundings, digest, make_source
from jaxquant.recover.step import Draft, Step, Task
from jaxquant.recover.stepwise import run_stepwise
from jaxquant.run.float_forms import evaluate_float
from jaxquant.run.program import Program
from jaxquant.weights.fold import fold
from jaxquant.weights.quantize import (
    Divisors,
    along_channels,
    undivided,
    whole_steps,
)

POSITIONS = 4096  # of a site's output, at most
_FEWEST = 8  # positions to learn from
_WHOLE = 2.0**-15  # of a step: what is as near to an integer is one


class Wanted(NamedTuple):
    """What the float model gives at a site: rows of its output, and its activation's scalars."""

    rows: jax.Array
    scalars: dict[ir.Var, jax.Array] | None


def learn_roundings(task: Task, draft: Draft) -> Draft:
    """Learn the rounding of every weight that an int8 site with this step has for itself.

    At sites that have "bias_correction" too, the mean error of every channel is taken away on the
    way.  Where the samples cannot be joined the first batch alone is learned from.  `task.file`
    keeps the sites that are done; a later call with the same model, parameters and samples goes on
    from there.

    Args:
      task: the float model and the samples.
      draft: the int8 model, with nearest rounding and no corrected biases.

    Raises:
      ImportError: optax is not installed.
      FileError: the file is damaged, or of another model, other parameters or other samples.
    """
    adaround.check_optax()
    source, plan, examples = task.source, draft.program.whole_plan, task.alike
    with task.progress.stage("tracing"):
        inputs, program = _joined(source, plan, examples)
    roundings = Roundings(task.file, lambda: make_source(program.graph, source.params, examples))
    with task.progress.stage("adaround", len(program.slots), "site") as stage:
        learner = _Learner(program, plan, source.params, draft.divisors, roundings, stage)
        qparams, outcomes = learner.learn(draft.qparams, jax.tree.leaves(inputs))
    return draft.replaced("adaround", _summary(outcomes), qparams=qparams)


STEP = Step(names=("adaround",), run=learn_roundings, check=adaround.check_optax, keeps_file=True)


def _summary(outcomes: Mapping[str, str]) -> str:
    """How many sites were learned, and why the others were not."""
    learned = sum(outcome == "learned" for outcome in outcomes.values())
    text = f"{learned} of {len(outcomes)} sites"
    others: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        if outcome != "learned":
            others.setdefault(outcome, []).append(name)
    reasons = [f"{_names(names)}: {reason}" for reason, names in others.items()]
    return f"{text} ({'; '.join(reasons)})" if reasons else text


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} sites"


def _joined(
    source: FloatModel, plan: Plan, examples: Sequence[tuple[Any, ...]]
) -> tuple[Any, Program]:
    """All examples as one batch, and the program for it."""

    def program(inputs: Any) -> Program:
        return Program(bind(source.trace(inputs), plan), source.params)

    lengths = {np.shape(x)[:1] for inputs in examples for x in jax.tree.leaves(inputs)}
    if len(examples) > 1 and len(lengths) == 1 and lengths != {()}:
        inputs = jax.tree.map(lambda *xs: np.concatenate(xs), *examples)
        try:
            return inputs, program(inputs)
        except ValueError:  # the model takes this batch size alone
            pass
    return examples[0], program(examples[0])


class _Learner:
    def __init__(
        self,
        program: Program,
        plan: Plan,
        params: Any,
        divisors: Divisors,
        roundings: Roundings,
        stage: Stage,
    ):
        self._program = program
        self._plan = plan
        self._params = params
        self._corrected = plan.recovered_by("bias_correction")
        self._divisors = divisors
        self._roundings = roundings
        self._stage = stage
        graph = program.graph
        stored = [s for s in program.binding.sites if s.site.name in program.slots]
        uses = collections.Counter(program.slots.values())
        self._products: dict[str, Product] = {}
        self.outcomes: dict[str, str] = {}
        self._index: dict[str, np.ndarray] = {}
        self._activations: dict[str, Activation] = {}
        asked = plan.recovered_by("adaround")
        chosen = []
        for number, int8_site in enumerate(stored):
            site, product = int8_site.site, Product(graph, int8_site.site)
            reason = product.reason
            if site.name not in asked:
                reason = "not asked for"
            elif uses[program.slots[site.name]] > 1:
                reason = "it shares its weight with another site"
            elif not reason and product.positions < _FEWEST:
                reason = f"{product.positions} output positions are too few"
            self.outcomes[site.name] = reason
            if reason:
                continue
            chosen.append(site)
            self._products[site.name] = product
            self._index[site.name] = _draw(product.positions, number)
            self._activations[site.name] = find_activation(graph, int8_site.epilogue.output)
        weights = [site.weight for site in chosen if site.weight is not None]
        self._weights = fold(graph, params, weights, [])[0]

    def learn(self, qparams: Any, flat: list[Any]) -> tuple[Any, dict[str, str]]:
        qparams = {**qparams, "params": _copy(qparams["params"]), "sites": dict(qparams["sites"])}
        wanted = jax.jit(self._reference)(self._params, flat)

        def weigh(int8_site: Int8Site, x: jax.Array, zero: int) -> None:
            name = int8_site.site.name
            if not self.outcomes[name]:
                self._learn_site(int8_site, x, zero, wanted[name], qparams)
            self._stage.step()

        run_stepwise(self._program, qparams, [jnp.asarray(x) for x in flat], weigh)
        return qparams, self.outcomes

    def _reference(self, params: Any, flat: list[Any]) -> dict[str, Wanted]:
        graph = self._program.graph
        env = evaluate_float(graph, params, flat)
        found = {}
        for name, product in self._products.items():
            y = env.read(product.output).astype(jnp.float32)
            rows = product.outputs(y, self._index[name])
            found[name] = Wanted(rows, self._activations[name].scalars(env))
        return found

    def _learn_site(
        self, int8_site: Int8Site, x: jax.Array, zero: int, wanted: Wanted, qparams: Any
    ) -> None:
        site, graph = int8_site.site, self._program.graph
        product = self._products[site.name]
        assert site.weight is not None
        slot, arrays = self._program.slots[site.name], qparams["sites"][site.name]
        multiplier = np.asarray(arrays["multiplier"], np.float64)
        weight, scale = self._scaled_weight(site, layout.get(qparams["params"], slot.scale))
        before = product.matrix(np.asarray(layout.get(qparams["params"], slot.int8), np.float64))
        bias = np.asarray(arrays.get("bias", np.zeros_like(multiplier)), np.float64)
        bias = bias + zero * multiplier * _column_sums(before)
        step = self._input_scale(site) * scale
        ratio = product.matrix(weight)
        down = np.clip(np.floor(ratio), -127, 127)
        problem = adaround.Problem(
            inputs=np.asarray(product.inputs(x, zero, self._index[site.name])),
            wanted=np.asarray(wanted.rows * jnp.asarray(multiplier / step, jnp.float32)
                              + jnp.asarray(bias, jnp.float32)),
            down=down.astype(np.float32),
            part=np.clip(ratio - down, 0, 1).astype(np.float32),
            nearest=before > down,
            multiplier=multiplier.astype(np.float32),
            bias=bias.astype(np.float32),
            activation=self._activation_of(site.name, wanted),
            correct=site.name in self._corrected,
        )  # fmt: skip
        rounding = self._rounding(site.name, problem)
        after = down + rounding.up
        shape = graph.shape(site.weight)
        new = product.weight(after, shape).astype(np.int8)
        layout.put(qparams["params"], slot.int8, jnp.asarray(new))
        bias = bias + adaround.shift(problem, rounding.up)
        bias = bias - zero * multiplier * _column_sums(after)
        if "bias" in arrays or bias.any():
            whole = jnp.asarray(whole_steps(bias, multiplier))
            qparams["sites"][site.name] = {**arrays, "bias": whole}
        self.outcomes[site.name] = (
            "learned" if rounding.learned < rounding.nearest else "nearest rounding is no worse"
        )

    def _rounding(self, name: str, problem: adaround.Problem) -> Rounding:
        """The rounding that the file has, or one that is learned and put there."""
        known = digest(problem.inputs, problem.wanted, problem.down, problem.part,
                       np.array([adaround.STEPS, problem.correct], np.int64))  # fmt: skip
        shape = problem.down.shape
        if (found := self._roundings.get(name, known, shape)) is not None:
            return found
        rounding = Rounding(*adaround.learn(problem))
        self._roundings.put(name, known, rounding)
        return rounding

    def _scaled_weight(self, site: Any, scale: Any) -> tuple[np.ndarray, np.ndarray]:
        """The float64 weight in units of its scale [C] or [], which comes too in float64."""
        binding = self._program.binding
        weight = undivided(binding, site, self._weights[site.weight], self._divisors)
        scale = np.asarray(scale, np.float64)
        ratio = weight / along_channels(scale, site.channel_axes, weight.shape)
        near = np.rint(ratio)  # the scale is float32: what it was made of is 127 but for that
        return np.where(np.abs(ratio - near) < _WHOLE, near, ratio), scale

    def _input_scale(self, site: Any) -> float:
        name = self._program.binding.scales[site.operands[0]]
        return next(t.scale for t in self._plan.tensors if t.name == name)

    def _activation_of(self, name: str, wanted: Wanted) -> Callable[[jax.Array], jax.Array]:
        if wanted.scalars is None:
            return _identity
        activation, graph = self._activations[name], self._program.graph
        if not activation.equations:
            return _identity
        return RowFunction(graph, activation, jax.device_get(wanted.scalars))


def _identity(value: jax.Array) -> jax.Array:
    return value


def _draw(positions: int, seed: int) -> np.ndarray:
    """Ascending output positions of one site."""
    if positions <= POSITIONS:
        return np.arange(positions)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(positions, POSITIONS, replace=False))


def _column_sums(matrix: np.ndarray) -> np.ndarray:
    """[C] of [G, K, C/G]."""
    return matrix.sum(axis=1).reshape(-1)


def _copy(tree: Any) -> Any:
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree
