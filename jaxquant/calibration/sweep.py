"""The calibration sweep: run the model over the data and fold its activations into statistics.

One jit-compiled step per input shape runs the model in float and counts every tensor that a site
reads; another, the same for all models, adds that to the streaming state.  Activations never leave
the device.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibration import counting, histogram
from jaxquant.calibration.alive import Alive
from jaxquant.calibration.dependence import check_independence
from jaxquant.calibration.examples import batch_length, with_example
from jaxquant.calibration.fingerprint import make_origin
from jaxquant.calibration.inside import Watch, observe
from jaxquant.calibration.observations import Observations, Origin, TensorStats
from jaxquant.calibration.observed import Observed
from jaxquant.calibration.observers import Observer
from jaxquant.calibration.padding import Padding, real_in, warn_of_counted
from jaxquant.calibration.processes import reduce_processes
from jaxquant.calibration.refused import explain
from jaxquant.graph import ir
from jaxquant.graph.calls import shapes_text
from jaxquant.graph.checks import check_no_randomness, check_weights
from jaxquant.graph.evaluate import Forms, no_forms
from jaxquant.graph.model import FloatModel, Model
from jaxquant.graph.static_values import static_values
from jaxquant.jax_shim import compilation
from jaxquant.progress import SILENT, Progress

_MANY_SHAPES = 16  # of which each is compiled
State = histogram.Histogram  # of all tensors, stacked along a leading axis


def run_sweep(sweep: Sweep, batches: Iterable[tuple[Any, ...]]) -> Observations:
    """Run the float model over `batches`, tuples of the inputs after the parameters.

    Raises:
      ValueError: a batch does not fit the model or gives another graph, an activation is NaN or
        infinite, or all batches hold one value.

    Warns:
      UserWarning: the batches have many shapes.
    """
    for inputs in batches:
        sweep.add(inputs)
    return sweep.finish()


class _Done(NamedTuple):
    """What the batches so far gave; replaced as a whole, so that an interrupt finds no half."""

    state: Any
    own: Any  # the observer's state of each tensor
    batches: int = 0
    samples: int = 0
    examples: tuple[tuple[Any, ...], ...] = ()


class Sweep:
    """One pass over the data: the jitted step, its state, and the checks between batches.

    Args:
      source: the float model.
      tensors_of: model -> what is observed of it; gives the same names for every input shape.
      observer: what keeps statistics of its own beside those that are kept always.
      options: what the observations record of the arguments; see `Origin`.
      count: how tensors are counted.
      forms: those of the float model's equations that run faster here.
      allow_batch_dependence: take a model whose result for a sample depends on its batch.
      padding: which positions of the inputs are not counted; None for none.
      progress: shows that the model is traced and compiled.
    """

    def __init__(
        self,
        source: FloatModel,
        tensors_of: Callable[[Model], Observed],
        observer: Observer | None = None,
        options: Mapping[str, Any] | None = None,
        count: counting.Counter = counting.portable_counts,
        forms: Forms = no_forms,
        allow_batch_dependence: bool = False,
        padding: Padding | None = None,
        progress: Progress = SILENT,
    ):
        self._source = source
        self._params = source.params
        self._tensors_of = tensors_of
        self._observer = observer
        self._options = options or {}
        self._count = count
        self._forms = forms
        self._allow_batch_dependence = allow_batch_dependence
        self._padding = padding
        self._progress = progress
        self._names: tuple[str, ...] = ()
        self._outside: tuple[str, ...] = ()  # those of the model's own graph
        self._known: dict[str, Any] = {}
        quick = compilation.quick_compilation()
        self._step = jax.jit(self._observe, compiler_options=quick)
        self._origin: Origin | None = None
        self._done = _Done((), ())
        self._alive = Alive()
        self._bad: Any = None  # of the previous batch: reading it does not hold up this one

    @property
    def batches(self) -> int:
        return self._done.batches

    @property
    def state(self) -> State:
        """What has been seen of the tensors, stacked."""
        return self._done.state

    def add(self, inputs: tuple[Any, ...]) -> None:
        # Before anything is traced: an input on other processes has no values here.
        _check_addressable(inputs)
        self._alive.see(inputs)
        if not self._done.batches:
            self.start(inputs)
        done = self._done
        if self._padding is not None:
            self._padding.check(inputs, done.batches)
        # A shape that is new compiles, which is worth a line to whoever waits.
        is_new = shapes_text(jax.tree.map(ir.struct, inputs)) not in self._known
        with self._progress.stage("compiling") if is_new else contextlib.nullcontext():
            if is_new:
                self._trace(inputs)
            known = self._known_of(inputs)
            # The model's step is compiled for each shape; adding to the state is one program for
            # all.
            # The state is donated to it, so that it takes no memory twice.
            seen, own = self._step(done.own, self._params, known, *inputs)
            state, bad = counting.fold(done.state, seen, np.int32(done.batches))
        self._done = _Done(
            state,
            own,
            done.batches + 1,
            done.samples + batch_length(inputs),
            with_example(done.examples, inputs),
        )
        # That of the batch before, which the device has finished by now.
        self._check_finite()
        self._bad = bad

    def finish(self) -> Observations:
        self._check_finite()
        self._alive.check()
        observations = self.observations()
        # A branch may never be chosen, and a tensor be empty whatever the batch (a part of an
        # associative scan): what reads them stays float then.
        unseen = [name for name in self._outside if observations.tensors[name].count == 0]
        if unseen and len(unseen) == len(self._outside):
            raise ValueError(
                f"the tensors {', '.join(unseen[:5])} saw no data: every batch was empty there"
            )
        return reduce_processes(observations)

    def is_sound(self) -> bool:
        """True where the state can be read and every batch in it was finite.

        An interrupt at the wrong moment takes the state away: it is donated to the next one.
        """
        leaves = jax.tree.leaves((self._done.state, self._done.own))
        # A donated array that an interrupt kept from being replaced is gone.
        if not self._done.batches or any(x.is_deleted() for x in leaves):
            return False
        return bool(np.all(np.asarray(self._done.state.first_bad) < 0))

    def observations(self) -> Observations:
        """What has been seen so far."""
        done = self._done
        # To the host once, and then by tensor.
        state, own = jax.tree.map(np.asarray, (done.state, done.own))
        return Observations(
            tensors={
                name: stats_of(jax.tree.map(lambda x, k=k: x[k], state))
                for k, name in enumerate(self._names)
            },
            batches=done.batches,
            samples=done.samples,
            examples=done.examples,
            observer=self._observer,
            states=dict(zip(self._names, own, strict=True)) if self._observer else {},
            origin=self._origin,
            padding=self._padding,
        )

    def start(self, inputs: tuple[Any, ...]) -> tuple[Origin, tuple[str, ...]]:
        """Trace the model for a first batch.  Returns the origin and the tensors' names."""
        with self._progress.stage("tracing"):
            return self._start(inputs)

    def _start(self, inputs: tuple[Any, ...]) -> tuple[Origin, tuple[str, ...]]:
        model = self._trace(inputs)
        # What is wrong with the model is said before the first batch is run.
        check_no_randomness(model.graph)
        check_weights(model.graph, model.sites, self._params)
        if not self._allow_batch_dependence:
            check_independence(self._source, inputs, self._forms)
        observed = self._tensors_of(model)
        self._names, self._outside = observed.names, tuple(observed.tensors)
        if self._padding is not None:
            warn_of_counted(self._padding, observed, inputs)
        self._origin = make_origin(
            model.graph, self._params, observed.any_tensor, self._observer, self._options
        )
        # An observer of one's own begins with each tensor by itself.
        own = tuple(self._observer.init() for _ in self._names) if self._observer else ()
        self._done = _Done(stacked([histogram.init()] * len(self._names)), own)
        return self._origin, self._names

    def _trace(self, inputs: tuple[Any, ...]) -> Model:
        """The model for a batch of sizes that were not seen before."""
        try:
            model = self._source.trace(inputs)
        except Exception as error:
            error.add_note(explain(error, inputs, self._options.get("batch_size")))
            if self._known:
                error.add_note(
                    f"That is batch {self._done.batches}; batch 0, which the model took, has "
                    f"inputs of {shapes_text(jax.tree.map(ir.struct, self._done.examples[0]))}"
                )
            raise

        # Once, when there is one too many, and not for each further one.
        if len(self._known) == _MANY_SHAPES:
            warnings.warn(
                f"ds has had batches of more than {_MANY_SHAPES} shapes, and the model is compiled "
                "for each; pad or cut the samples to a few lengths",
                stacklevel=2,
            )
        return model

    def restore(self, seen: Observations) -> None:
        """Go on, after `start`, from what `observations` gave, of the same tensors and observer."""
        # Values that differed before need not differ again.
        self._alive.resume(seen.examples, seen.batches)
        stats = [seen.tensors[name] for name in self._names]
        state = [
            histogram.from_numpy(s.counts, s.bin_width, s.min, s.max, s.abs_max) for s in stats
        ]
        own = (
            tuple(jax.tree.map(jnp.asarray, seen.states[n]) for n in self._names)
            if (self._observer)
            else ()
        )
        self._done = _Done(stacked(state), own, seen.batches, seen.samples, seen.examples)

    def _known_of(self, inputs: tuple[Any, ...]) -> dict[ir.Var, np.ndarray]:
        """What the model computes of its parameters alone."""
        shapes = shapes_text(jax.tree.map(ir.struct, inputs))
        # By shapes: parameters do not change in a sweep.
        if shapes not in self._known:
            self._known[shapes] = static_values(self._source.trace(inputs).graph, self._params)
        return self._known[shapes]

    def _observe(
        self, own: Any, params: Any, known: Any, *inputs: Any
    ) -> tuple[counting.Counts, Any]:
        observed = self._tensors_of(self._source.trace(inputs))
        if differing := {*observed.names} ^ {*self._names}:
            sites = {name.partition("/input")[0] for name in differing}
            raise ValueError(
                f"batch {self._done.batches} gives another graph than batch 0: its inputs are of "
                f"{shapes_text(inputs)}, and the sites {', '.join(sorted(sites)[:5])} differ. "
                "Batches may have several shapes where the model computes the same with each; "
                "quantize what else it computes by itself"
            )
        # Batches of another shape may come by the tensors in another order.
        theirs = dict(zip(self._names, own, strict=False))
        there = [theirs[name] for name in observed.names] if own else ()
        real = real_in(self._padding, observed.model, inputs)
        watch = Watch(self._count, self._observer, self._forms, real)
        seen = observe(observed, params, jax.tree.leaves(inputs), there, watch, known)
        # Statistics are stacked in the order of the first batch.
        order = [observed.names.index(name) for name in self._names]
        if order == list(range(len(order))):
            return seen.counts, seen.own
        counts = jax.tree.map(lambda x: x[jnp.asarray(order)], seen.counts)
        return counts, tuple(seen.own[place] for place in order) if own else ()

    def _check_finite(self) -> None:
        # Nothing was added yet.
        if self._bad is None:
            return
        for name, batch in zip(self._names, np.asarray(self._bad), strict=True):
            if batch >= 0:
                site = name.partition("/input")[0]
                raise ValueError(
                    f"the input of site {site!r} holds NaN or infinity in batch {batch}; check "
                    "that batch and the float model on it, or leave the site out of the data path"
                )


def stacked(states: Sequence[histogram.Histogram]) -> State:
    """The states of several tensors along a leading axis; in NumPy, so nothing is compiled."""
    return jax.tree.map(lambda *xs: jax.device_put(np.stack(xs)), *states)


def stats_of(state: histogram.Histogram) -> TensorStats:
    """The state of one tensor as plain host data."""
    counts, bin_width = histogram.to_numpy(state)
    return TensorStats(
        counts=counts,
        bin_width=float(bin_width),
        min=float(state.min),
        max=float(state.max),
        abs_max=float(state.abs_max),
        count=int(counts.sum()),
    )


def _check_addressable(inputs: tuple[Any, ...]) -> None:
    for x in jax.tree.leaves(inputs):
        if not getattr(x, "is_fully_addressable", True):
            raise ValueError(
                "a batch is spread over several processes; give every process its own part of the "
                "data instead, on its own devices: what they observe is reduced across processes"
            )
