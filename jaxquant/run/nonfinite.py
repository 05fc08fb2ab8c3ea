"""NaN and infinity go past the int8 network, which cannot hold them, to its outputs.

What is quantized from a float that could hold one leaves a mark: zero times its sum, which is NaN
where there is one and costs a part of quantizing it.  There are few such floats: the model's inputs
and what comes of them in float, and what a logarithm, a quotient or the like gives.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.graph import ir, jax_shim
from jaxquant.plan.bind import Binding

# Of finite operands these may give others.
_MAKE_THEM = """
    acos acosh asin atanh cosh cumprod div exp exp2 expm1 log log1p pow reduce_prod rem rsqrt sinh
    sqrt tan
"""
_MAKES_THEM = frozenset(_MAKE_THEM.split())


def unsafe_tensors(graph: ir.Graph, binding: Binding) -> frozenset[ir.Var]:
    """The tensors of a graph that may hold NaN or infinity though its parameters hold none.

    Those with an int8 form that is handed over, and what an int8 site gives, do not.
    """
    entries = binding.names.keys()
    safe = {site.epilogue.output for site in binding.sites} | (binding.forms.int8 - entries)
    unsafe = {var for var in graph.inputs if _is_float(graph, var)}
    for eqn in graph.equations:
        made = (
            eqn.name in _MAKES_THEM
            or (eqn.name == "gather" and "FILL" in str(eqn.params.get("mode")))
            or bool(jax_shim.sub_bodies(dict(eqn.params)))
        )
        if made or any(var in unsafe for var in eqn.input_vars):
            unsafe |= {
                var
                for var in eqn.outputs
                if var not in safe and not graph.static[var] and _is_float(graph, var)
            }
    return frozenset(unsafe)


def mark(value: jax.Array) -> jax.Array:
    """[N] for `value` [N, ..., C]: NaN where one of its entries is NaN or infinite, else 0.

    [1] for a vector, which is one sample.
    NaN too where the entries are finite and their sum is not, in float32: from about 1e33 on.
    """
    value = value.astype(jnp.float32)
    value = value if value.ndim > 1 else value.reshape(1, -1)
    # Not of value * 0, which is safe but no sum that XLA knows a fast form of on CPU.
    return value.sum(axis=tuple(range(1, value.ndim))) * jnp.float32(0)


def with_marks(outputs: Any, marks: list[jax.Array]) -> Any:
    """The outputs, with NaN in the entries along the first axis that are marked.

    A mark of another length than an output's first axis holds for all of it.
    """
    by_length: dict[int, jax.Array] = {}
    for each in marks:
        length = each.shape[0]
        by_length[length] = by_length[length] + each if length in by_length else each

    def marked(output: jax.Array) -> jax.Array:
        if not jnp.issubdtype(output.dtype, jnp.floating):
            return output
        for length, each in by_length.items():
            alike = output.ndim > 0 and output.shape[0] == length
            bad = jnp.isnan(each if alike else each.sum())
            bad = bad.reshape(bad.shape + (1,) * (output.ndim - bad.ndim))
            output = jnp.where(bad, jnp.asarray(jnp.nan, output.dtype), output)
        return output

    return jax.tree.map(marked, outputs)


def _is_float(graph: ir.Graph, var: ir.Var) -> bool:
    return bool(jax.dtypes.issubdtype(graph.dtype(var), jnp.floating))
