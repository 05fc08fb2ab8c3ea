"""NaN and infinity go past the int8 network, which cannot hold them, to its outputs.

What is quantized from a float that could hold one leaves a mark: zero times its sum, which is NaN
where there is one and costs a part of quantizing it.  There are few such floats: the model's inputs
and what comes of them in float, and what a logarithm, a quotient or the like gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.graph import ir, primitives
from jaxquant.graph.model import Model
from jaxquant.graph.positions import Marks, find_samples
from jaxquant.jax_shim import jaxprs
from jaxquant.plan.binding import Binding

# Of finite operands these may give others.
_MAKE_THEM = """
    acos acosh asin atanh cosh cumprod div exp exp2 expm1 log log1p log2 pow reduce_prod rem rsqrt
    sinh sqrt tan
"""
_MAKES_THEM = frozenset(_MAKE_THEM.split())
_MANY = 2**16  # values of which the plain sum is worth a second branch to compile


def find_origins(graph: ir.Graph, binding: Binding) -> dict[ir.Var, frozenset[ir.Var]]:
    """The tensors that may hold NaN or infinity though the parameters hold none, and from where.

    Those with an int8 form that is handed over, and what an int8 site gives, do not; but for a site
    that scales its operands in the call, whose scales are not finite where those are not.

    What is computed element by element of tensors of its own shape has them only where those have
    them, so a mark of its origins serves it too.  Whatever else is its own origin: a reduction
    takes a NaN to other samples, a quotient makes a new one.

    Returns:
      Tensor -> its origins: itself, the model's inputs, or tensors that are quantized.
    """
    entries = binding.names.keys()
    # An embedding gives NaN for an index out of range, as it does in float.
    sums = [each for each in binding.sites if not (each.dynamic or each.site.is_lookup)]
    static = {each.epilogue.output for each in sums}
    safe = static | (binding.forms.int8 - entries)
    found = {var: frozenset({var}) for var in graph.inputs if _is_float(graph, var)}
    for eqn in graph.equations:
        makes_them = _makes_them(graph, eqn)
        unsafe = [var for var in eqn.input_vars if var in found]
        if not unsafe and not makes_them:
            continue
        for var in eqn.outputs:
            if var in safe or graph.static[var] or not _is_float(graph, var):
                continue
            is_alike = all(graph.shape(x) == graph.shape(var) for x in unsafe)
            if makes_them or not primitives.is_elementwise(eqn) or not is_alike:
                found[var] = frozenset({var})
            else:  # what is quantized has been marked, or needed no mark
                found[var] = frozenset().union(*({x} if x in entries else found[x] for x in unsafe))
    return found


def _makes_them(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True where finite operands may give NaN or infinity."""
    if eqn.name == "convert_element_type" and _is_float(graph, eqn.outputs[0]):
        given = graph.dtype(eqn.inputs[0])
        is_narrowed = jnp.issubdtype(given, jnp.floating) and (
            jnp.finfo(graph.dtype(eqn.outputs[0])).max < jnp.finfo(given).max
        )
        return bool(is_narrowed)
    if eqn.name == "div" and (divisor := primitives.constant_scalar(graph, eqn.inputs[1])):
        return abs(divisor) < 1  # by the number of elements, as a mean does, none is made
    fills = eqn.name == "gather" and "FILL" in str(eqn.params.get("mode"))
    return eqn.name in _MAKES_THEM or fills or bool(jaxprs.sub_bodies(dict(eqn.params)))


def mark(value: jax.Array, is_stored: bool) -> jax.Array:
    """[N] for `value` [N, ..., C]: NaN where one of its entries is NaN or infinite, else 0.

    [1] for a vector, which is one sample.

    Args:
      value: floats.
      is_stored: the value is in memory, as a model's input is, and not computed on the way to its
        rounding, with which a sum is fused.
    """
    value = value.astype(jnp.float32)
    value = value if value.ndim > 1 else value.reshape(1, -1)
    axes = tuple(range(1, value.ndim))

    def scaled(value: jax.Array) -> jax.Array:
        """The sum in units in which no finite entries overflow."""
        return (value * jnp.float32(2.0**-64)).sum(axis=axes)

    def on_cpu(value: jax.Array) -> jax.Array:
        """The plain sum, of which XLA knows a fast form there; the other where it is not finite."""
        total = value.sum(axis=axes)
        return lax.cond(jnp.isfinite(total).all(), lambda _: total, scaled, value)

    # Two forms of the sum are two to compile, which a small tensor does not give back.
    is_small = isinstance(value.size, int) and value.size < _MANY
    if not is_stored or is_small:
        return scaled(value) * jnp.float32(0)
    return lax.platform_dependent(value, cpu=on_cpu, default=scaled) * jnp.float32(0)


class Entries(NamedTuple):
    """What the entries of a tensor along one of its axes are of.

    Attributes:
      axis: it; that of the samples where it is known.
      marks: what runs along it; None where it is not known.
    """

    axis: int
    marks: Marks | None


class Mark(NamedTuple):
    """What `mark` gives of a tensor along an axis, [N], and what its N entries are of."""

    value: jax.Array
    marks: Marks | None

    def is_of(self, entries: Entries, output: jax.Array) -> bool:
        """Whether its entries are those of an output."""
        is_known = self.marks is not None and entries.marks is not None
        if output.ndim == 0 or (is_known and self.marks != entries.marks):
            return False
        return bool(self.value.shape[0] == output.shape[entries.axis])


def entries_in(model: Model) -> Callable[[ir.Atom], Entries]:
    """What the entries are of tensors of a model, or of one of its bodies."""
    found = find_samples(model.whole)
    return lambda atom: Entries(*found.sample_axis(model, atom))


def with_marks(
    outputs: Sequence[jax.Array], entries: Sequence[Entries], marks: Sequence[Mark]
) -> list[jax.Array]:
    """The outputs, with NaN in the samples that are marked.

    A mark of other entries than an output's holds for all of it: positions may be as many as there
    are samples, and are none.
    """
    alike: dict[tuple[Any, Marks | None], jax.Array] = {}
    for value, of in marks:
        key = value.shape[0], of
        alike[key] = alike[key] + value if key in alike else value

    def marked(output: jax.Array, own: Entries) -> jax.Array:
        if not jnp.issubdtype(output.dtype, jnp.floating):
            return output
        for (_, of), value in alike.items():
            if Mark(value, of).is_of(own, output):
                behind = range(1, output.ndim - own.axis)
                bad = jnp.expand_dims(jnp.isnan(value), behind)
            else:
                bad = jnp.isnan(value.sum())
            output = jnp.where(bad, jnp.asarray(jnp.nan, output.dtype), output)
        return output

    return [marked(*each) for each in zip(outputs, entries, strict=True)]


def _is_float(graph: ir.Graph, var: ir.Var) -> bool:
    return bool(jax.dtypes.issubdtype(graph.dtype(var), jnp.floating))
