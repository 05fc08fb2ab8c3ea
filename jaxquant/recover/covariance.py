"""How the inputs of sites vary together: sums of x xᵀ and of x over calibration data, streamed.

A site is a product of matrices (`jaxquant.recover.product`): each output position reads G vectors x
[K], one for each group of features (one, but for grouped convolutions).  Of a convolution x is the
patch that its window holds.  The sums [G, K, K] are those of the float model, in float32 within a
batch and in float64 on the host across batches; sites that read one tensor alike share them.

Few positions may give outputs that are much larger than all others: the first token of a
transformer, in one channel.  Squares would be of little else, and a normalisation behind makes of
their error what it makes of any other's: so none counts for more than a few ordinary ones do.

The last quarter of the positions of every batch, its last samples, is summed apart: it is held out
from what is made of the rest.  Where there are fewer than four (single tokens, steps of a loop),
every fourth evaluation is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibration.padding import Padding, real_in
from jaxquant.graph import evaluate, ir
from jaxquant.graph.model import FloatModel, Model
from jaxquant.graph.sites import Site
from jaxquant.jax_shim import compilation
from jaxquant.plan.bind import bind
from jaxquant.plan.plan import Plan
from jaxquant.recover.looks import Look, Real, States, look_at
from jaxquant.recover.product import SiteProduct
from jaxquant.run.layers import Layer

LARGEST_ENERGY = 4  # times the median: what the outputs of a position count for, at most
POSITIONS = 16384  # of a site's output that are summed of each batch, at most
HELD_OUT = 4  # one position of so many
KEPT, APART = 0, 1  # the parts of the sums


class Sums(NamedTuple):
    """What was summed of the vectors that a site reads, in its two parts.

    Attributes:
      products: [2, G, K, K], Σ x xᵀ.
      totals: [2, G, K], Σ x.
      weights: [2], of how many positions, each counted as far as it is in the sums.
      counts: [2], of how many.
      evaluations: [], of the graph, how many there were.
    """

    products: Any
    totals: Any
    weights: Any
    counts: Any
    evaluations: Any


# Site -> layer -> its sums; sites that read one tensor alike have the same arrays.
Found: TypeAlias = Mapping[str, Mapping[Layer, Sums]]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A site whose inputs are summed.

    Attributes:
      model: of the graph that it is in.
      product: the site.
    """

    model: Model
    product: SiteProduct

    @property
    def site(self) -> Site:
        return self.product.site

    @property
    def shared(self) -> Any:
        """Equal for sites of one graph that read the same vectors."""
        site, weight = self.site, self.site.weight
        assert weight is not None
        # A window of another size reads other patches of the same tensor.
        kernel = tuple(self.product.graph.shape(weight)[a] for a in site.weight_axes.window)
        return self.model, site.operands[0], site.input_axes, site.as_contraction.window, kernel

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its sums of products, whose first axes are of the scans around it."""
        groups, sums, _ = self.product.matrix_shape
        return (*self.model.scans, 2, groups, sums, sums)

    @property
    def bytes(self) -> int:
        """What its sums of products take on the host, in float64."""
        return 8 * math.prod(self.shape)

    def look(self, together: Sequence[Reader]) -> Look:
        """Adds what one evaluation of its graph shows.

        Args:
          together: the sites that share the sums.
        """
        outputs = [reader.product.output for reader in together]
        update = functools.partial(self._add, together)
        return Look((self.site.operands[0], *outputs), update)

    def start(self, evaluations: Any) -> Sums:
        """No sums yet, behind so many evaluations in other batches."""
        scans = self.model.scans
        evaluations = jnp.broadcast_to(jnp.asarray(evaluations, jnp.int32), scans)
        counts = jnp.zeros((*scans, 2), jnp.int32)
        products, totals = (
            jnp.zeros(shape, jnp.float32) for shape in (self.shape, self.shape[:-1])
        )
        return Sums(products, totals, counts.astype(jnp.float32), counts, evaluations)

    def _add(
        self, together: Sequence[Reader], state: Sums, env: evaluate.Environment, real: Real
    ) -> Sums:
        x, positions = env.read(self.site.operands[0]), self.product.positions
        index = np.arange(positions)
        # Neighbours in an image tell nearly the same: so many positions of a sample are enough.
        if positions > POSITIONS:
            drawn = np.random.default_rng(0).choice(positions, POSITIONS, replace=False)
            # Ascending: neighbours in memory stay neighbours.
            index = np.sort(drawn)
        rows, is_real = self.product.inputs(x, 0, index), self.product.real(real, index)
        if is_real is None:
            is_real = jnp.ones(len(index), bool)
        else:
            # Zeros add nothing to a sum of products, and need no other shape.
            rows = jnp.where(is_real[:, None, None], rows, 0)
        outputs = (env.read(reader.product.output) for reader in together)
        pairs = zip(together, outputs, strict=True)
        energies = [_energy(reader.product.outputs(y, index)) for reader, y in pairs]
        weights = _counted(jnp.sum(jnp.stack(energies), axis=0), is_real)
        count = len(index)
        # Too few rows to hold some of each apart: then every so manieth evaluation is.
        if count < HELD_OUT:
            is_apart = state.evaluations % HELD_OUT == HELD_OUT - 1
            part_of = jnp.broadcast_to(jnp.stack([~is_apart, is_apart])[:, None], (2, count))
        else:
            is_kept = np.arange(count) < count - count // HELD_OUT
            part_of = jnp.asarray(np.stack([is_kept, ~is_kept]))
        parts = [_sums(rows, jnp.where(own, weights, 0)) for own in part_of]
        products, totals, numbers = (jnp.stack(each) for each in zip(*parts, strict=True))
        counts = (part_of & is_real).astype(jnp.int32).sum(axis=1)
        return Sums(
            state.products + products,
            state.totals + totals,
            state.weights + numbers,
            state.counts + counts,
            state.evaluations + 1,
        )


def _energy(outputs: jax.Array) -> jax.Array:
    """[R], the squares of the outputs [R, C] of each position."""
    return jnp.sum(jnp.square(outputs.astype(jnp.float32)), axis=1)


def _counted(energy: jax.Array, is_real: jax.Array) -> jax.Array:
    """[R], 1 for a position; less where its outputs are far larger than others', 0 for padding."""
    # The median of those that give anything: behind a ReLU most may be zero.
    median = jnp.nanmedian(jnp.where(is_real & (energy > 0), energy, jnp.nan))
    most = LARGEST_ENERGY * median
    return jnp.where(is_real, jnp.where(energy > most, most / energy, 1), 0)


def _sums(rows: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Σ w x xᵀ [G, K, K], Σ w x [G, K] and Σ w [] of float32 rows [R, G, K] that count w [R]."""
    weighted = rows * weights[:, None, None]
    # At the highest precision: bfloat16 passes would lose what feedback lives on.
    products = jnp.einsum("rgk,rgl->gkl", weighted, rows, precision="highest")
    return products, weighted.sum(axis=0), weights.sum()


def readers_of(
    source: FloatModel, plan: Plan, inputs: tuple[Any, ...], names: Iterable[str]
) -> list[Reader]:
    """The sites of these names, in the model for inputs of these shapes."""
    wanted = frozenset(names)
    return [
        Reader(part.model, SiteProduct(part.graph, each.site))
        for part in bind(source.trace(inputs), plan).all_graphs()
        for each in part.sites
        if each.site.name in wanted
    ]


def sum_products(
    source: FloatModel,
    plan: Plan,
    batches: Iterable[tuple[Any, ...]],
    names: Sequence[str],
    padding: Padding | None = None,
) -> Found:
    """Run the float model over all batches, compiled once for each of their shapes.

    Args:
      source: the float model.
      plan: has the sites.
      batches: the data.
      names: the sites whose inputs are summed.
      padding: which positions are left out; None for none.

    Raises:
      ValueError: what a site reads is NaN or infinite, or too large for its square.
    """
    programs: dict[Any, _OfShape] = {}
    found: dict[str, Sums] = {}
    for number, inputs in enumerate(batches):
        shapes = jax.tree.structure(inputs), tuple(map(_shape, jax.tree.leaves(inputs)))
        if shapes not in programs:
            readers = readers_of(source, plan, inputs, names)
            programs[shapes] = _OfShape(source, readers, padding)
        # Which part a sample belongs to goes by how many came before it, in other shapes too.
        before = {name: sums.evaluations for name, sums in found.items()}
        for name, sums in programs[shapes](inputs, before).items():
            _check_finite(name, sums, number)
            found[name] = _joined(found.get(name), sums)

    # All programs have the same sites; their shapes alone differ.
    every = next(iter(programs.values()))
    return {
        name: {layer: Sums(*(array[layer] for array in found[first]))
               for layer in np.ndindex(scans)}
        for name, first, scans in every.members()
    }  # fmt: skip


def _joined(before: Sums | None, more: Sums) -> Sums:
    """The sums of one more batch with those before it."""
    # float64 on the host: a sum over thousands of batches in float32 would stop to grow.
    sums = [np.asarray(x, np.float64) for x in (more.products, more.totals, more.weights)]
    counts = np.asarray(more.counts, np.int64)
    if before is not None:
        own = (before.products, before.totals, before.weights)
        sums = [x + y for x, y in zip(own, sums, strict=True)]
        counts = before.counts + counts
    products, totals, weights = sums
    return Sums(products, totals, weights, counts, np.asarray(more.evaluations))


class _OfShape:
    """The sums of the batches of one shape; what sites read alike is summed once."""

    def __init__(self, source: FloatModel, readers: Sequence[Reader], padding: Padding | None):
        self._readers = readers
        self._padding = padding
        self._model = readers[0].model.whole
        self._params = source.params
        together: dict[Any, list[Reader]] = {}
        for reader in readers:
            together.setdefault(reader.shared, []).append(reader)
        # The first reader of a tensor sums for all who read it alike.
        self._firsts = {shared: some[0] for shared, some in together.items()}
        self._looks: dict[Model, dict[str, Look]] = {}
        for some in together.values():
            first = some[0]
            self._looks.setdefault(first.model, {})[first.site.name] = first.look(some)
        quick = compilation.quick_compilation()
        self._step = jax.jit(self._sum, compiler_options=quick)

    def __call__(self, inputs: tuple[Any, ...], evaluations: Mapping[str, Any]) -> dict[str, Sums]:
        """The sums of one batch, by the first site that reads each tensor.

        Args:
          inputs: the batch.
          evaluations: how many there were in earlier batches, by the same names.
        """
        before = {
            reader.site.name: evaluations.get(reader.site.name, np.int32(0))
            for reader in self._firsts.values()
        }
        found: dict[str, Sums] = self._step(self._params, inputs, before)
        return found

    def members(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Each site, that whose sums it shares, and the layers around it."""
        for reader in self._readers:
            yield reader.site.name, self._firsts[reader.shared].site.name, reader.model.scans

    def _sum(self, params: Any, inputs: tuple[Any, ...], evaluations: Mapping[str, Any]) -> States:
        start = {
            reader.site.name: reader.start(evaluations[reader.site.name])
            for reader in self._firsts.values()
        }
        real, flat = real_in(self._padding, self._model, inputs), jax.tree.leaves(inputs)
        return look_at(self._looks, self._model, jax.tree.leaves(params), flat, start, real)


def _shape(x: Any) -> tuple[tuple[int, ...], Any]:
    struct = ir.struct(x)
    return struct.shape, struct.dtype


def _check_finite(name: str, sums: Sums, batch: int) -> None:
    """Raise ValueError where a batch gave NaN or infinity."""
    # The diagonal tells of all: an infinite entry of x is infinite in its own square.
    diagonal = np.einsum("...kk->...k", np.asarray(sums.products))
    if not np.isfinite(diagonal).all():
        raise ValueError(
            f"the input of site {name!r} holds NaN or infinity in batch {batch}, or values whose "
            "squares are beyond float32; check that batch and the float model on it, or leave the "
            f"site's weight rounded to nearest with Rule('site:{name}', recover=())"
        )
