"""The calibration sweep: run the model over the data and fold its activations into statistics.

One jit-compiled step per input shape runs the model in float, observes every tensor that a site
reads and updates the streaming state; activations never leave the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibration import histogram
from jaxquant.calibration.observations import Observations, TensorStats
from jaxquant.calibration.observers import Observer
from jaxquant.graph import evaluate, ir, sites
from jaxquant.graph.checks import check_no_randomness, check_weights
from jaxquant.graph.trace import trace

_KEPT_SAMPLES = 64  # of the inputs, for comparisons of both models
State = histogram.Histogram  # of all tensors, stacked along a leading axis


def sweep(
    params: Any,
    apply_fn: Callable[..., Any],
    batches: Iterable[tuple[Any, ...]],
    tensors_of: Callable[[ir.Graph], Mapping[str, ir.Var]],
    observer: Observer | None = None,
) -> Observations:
    """Run the float model over `batches` once and observe the tensors that `tensors_of` names.

    Args:
      params: the parameters.
      apply_fn: the model.
      batches: tuples of the inputs after `params`.
      tensors_of: graph -> tensor name -> tensor; gives the same names for every input shape.
      observer: what keeps statistics of its own beside those that are kept always.

    Raises:
      ValueError: a batch does not fit `apply_fn` or gives another graph, or an activation is NaN
        or infinite.
    """
    state = Sweep(params, apply_fn, tensors_of, observer)
    for inputs in batches:
        state.add(inputs)
    return state.finish()


class Sweep:
    """One pass over the data: the jitted step, its state, and the checks between batches."""

    def __init__(
        self,
        params: Any,
        apply_fn: Callable[..., Any],
        tensors_of: Callable[[ir.Graph], Mapping[str, ir.Var]],
        observer: Observer | None = None,
    ):
        self._params = params
        self._structs = jax.tree.map(ir.struct, params)
        self._apply_fn = apply_fn
        self._tensors_of = tensors_of
        self._observer = observer
        self._names: tuple[str, ...] = ()
        self._step = jax.jit(self._observe, donate_argnums=0)
        self.state: Any = None
        self._own: Any = ()  # the observer's state of each tensor
        self._bad: Any = None  # of the previous batch: reading it does not hold up this one
        self._batches = self._samples = 0
        self._examples: list[tuple[Any, ...]] = []

    def add(self, inputs: tuple[Any, ...]) -> None:
        if not self._batches:
            self._start(inputs)
        else:
            self._keep(inputs)
        self.state, self._own, bad = self._step(
            self.state, self._own, self._params, np.int32(self._batches), *inputs
        )
        self._check_finite()
        self._bad = bad
        self._batches += 1
        self._samples += _batch_length(inputs)

    def finish(self) -> Observations:
        self._check_finite()
        state = jax.tree.map(np.asarray, self.state)
        stats = {
            name: _stats(jax.tree.map(lambda x, k=k: x[k], state))
            for k, name in enumerate(self._names)
        }
        unseen = [name for name, s in stats.items() if s.count == 0]
        if unseen:
            raise ValueError(
                f"the tensors {', '.join(unseen[:5])} saw no data: every batch was empty there"
            )
        own = jax.tree.map(np.asarray, self._own)
        return Observations(
            tensors=stats,
            batches=self._batches,
            samples=self._samples,
            examples=tuple(self._examples),
            observer=self._observer,
            states=dict(zip(self._names, own, strict=True)) if self._observer else {},
        )

    def _start(self, inputs: tuple[Any, ...]) -> None:
        try:
            graph = trace(self._apply_fn, self._structs, inputs)
        except Exception as error:
            error.add_note(
                f"calibration called apply_fn(params, *inputs) with inputs of {_shapes(inputs)}; "
                "if an item of ds holds more than the model takes (labels, say), use select="
            )
            raise
        found = sites.find_sites(graph)
        check_no_randomness(graph)
        check_weights(graph, found, self._params)
        self._names = tuple(self._tensors_of(graph))
        self.state = _stack([histogram.init()] * len(self._names))
        if self._observer is not None:
            self._own = tuple(self._observer.init() for _ in self._names)
        self._examples = [inputs]

    def _keep(self, inputs: tuple[Any, ...]) -> None:
        kept = sum(map(_batch_length, self._examples))
        fits = kept + _batch_length(inputs) <= _KEPT_SAMPLES
        if fits and _shapes(inputs) == _shapes(self._examples[0]):
            self._examples.append(inputs)

    def _observe(
        self, state: State, own: Any, params: Any, batch: Any, *inputs: Any
    ) -> tuple[State, Any, jax.Array]:
        graph = trace(self._apply_fn, self._structs, inputs)
        tensors = self._tensors_of(graph)
        if tuple(tensors) != self._names:
            raise ValueError(
                f"batch {self._batches} gives another graph than batch 0: its inputs are of "
                f"{_shapes(inputs)}"
            )
        leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
        needed = list(ir.walk_back(graph, list(tensors.values())))
        env = evaluate.evaluate(graph, leaves, jax.tree.leaves(inputs), equations=needed)
        seen = _stack([histogram.observe(env.read(var), batch) for var in tensors.values()])
        state = jax.vmap(histogram.merge)(state, seen)  # one merge to compile, not one a tensor
        if self._observer is not None:
            values = [env.read(var) for var in tensors.values()]
            own = tuple(map(self._observer.update, own, values))
        return state, own, state.first_bad + 0  # not donated with the state

    def _check_finite(self) -> None:
        if self._bad is None:
            return
        for name, batch in zip(self._names, np.asarray(self._bad), strict=True):
            if batch >= 0:
                site = name.partition("/input")[0]
                raise ValueError(
                    f"the input of site {site!r} holds NaN or infinity in batch {batch}; check "
                    "that batch and the float model on it, or leave the site out of the data path"
                )


def _stack(states: Sequence[histogram.Histogram]) -> State:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *states)


def _stats(state: histogram.Histogram) -> TensorStats:
    counts, bin_width = histogram.to_numpy(state)
    return TensorStats(
        counts=counts,
        bin_width=float(bin_width),
        min=float(state.min),
        max=float(state.max),
        abs_max=float(state.abs_max),
        count=int(counts.sum()),
    )


def _batch_length(inputs: tuple[Any, ...]) -> int:
    leaves = jax.tree.leaves(inputs)
    return int(np.shape(leaves[0])[0]) if leaves and np.ndim(leaves[0]) else 1


def _shapes(inputs: tuple[Any, ...]) -> str:
    return str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", inputs))
