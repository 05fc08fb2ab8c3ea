"""The primitives that a stored graph may have.

Each computes arrays from arrays and does nothing else: no callback, no foreign function, no
communication.  Calls are inlined, and kept as "jit" in the bodies of control flow.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as known

from jaxquant.jax_shim import jaxprs

SIZE = "dim_as_value"  # a size that varies, as a number
CALL = "jit"  # a call in the body of control flow

_ALLOWED = """
    abs acos acosh add add_any and approx_top_k argmax argmin asin asinh atan atan2 atanh bessel_i0e
    bessel_i1e bitcast_convert_type broadcast_in_dim cbrt ceil cholesky clamp clz complex
    concatenate cond conj conv_general_dilated convert_element_type copy copy_p cos cosh
    cumlogsumexp cummax cummin cumprod cumsum digamma dim_as_value div dot_general dynamic_slice
    dynamic_update_slice eigh eq eq_to erf erf_inv erfc exp exp2 expm1 fft floor gather ge gt
    householder_product igamma igamma_grad_a igammac imag integer_pow iota is_finite le le_to lgamma
    log log1p log2 logistic lt lt_to lu max min mul mulhi name ne neg nextafter not one_minus_square
    optimization_barrier or pad platform_index polygamma polynomial population_count pow qr
    ragged_dot_general random_bits random_fold_in random_gamma random_seed random_split
    random_unwrap random_wrap real reduce_and reduce_max reduce_min reduce_or reduce_precision
    reduce_prod reduce_sum reduce_window_max reduce_window_min reduce_window_sum reduce_xor
    regularized_incomplete_beta rem reshape rev rng_bit_generator rng_uniform round rsqrt scan
    scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub schur select_and_gather_add
    select_and_scatter_add select_n shift_left shift_right_arithmetic shift_right_logical sign sin
    sinh slice sort split sqrt square squeeze stack stop_gradient sub svd tan tanh threefry2x32 tile
    top_k transpose triangular_solve tridiagonal_solve unstack while xor zeta
"""
_NAMES = frozenset(_ALLOWED.split())


def is_known(name: str) -> bool:
    """True where a stored graph may have the primitive, and this JAX has it."""
    return name in _NAMES and name in _table()


def primitive(name: str) -> jaxprs.Primitive:
    """The primitive of a name.

    Raises:
      ValueError: a stored graph may not have it, or this JAX does not.
    """
    if name not in _NAMES:
        raise ValueError(f"the primitive {name[:60]!r} is not one that a file may ask for")
    if name not in _table():
        raise ValueError(f"jax {jax.__version__} has no primitive {name!r}")
    return _table()[name]


@functools.cache
def _table() -> Mapping[str, jaxprs.Primitive]:
    # Names of primitives are no public list; JAX exports most of their objects.
    found = {
        value.name: value
        for module in (lax, known)
        for attribute, value in vars(module).items()
        if attribute.endswith("_p")
    }
    # Some have no public name; a trace has them.
    for equation in _examples():
        found.setdefault(equation.primitive.name, equation.primitive)
    return MappingProxyType(found)


def _examples() -> list[jaxprs.JaxprEqn]:
    # Traced once, since these primitives have no name by which they could be imported.
    x, sizes = jnp.zeros((2, 2)), jax.ShapeDtypeStruct((2,), jnp.int32)
    (size,) = jax.export.symbolic_shape("n")
    traces: list[Any] = [
        jax.make_jaxpr(lambda data: jax.random.key_data(jax.random.wrap_key_data(data)))(
            jax.ShapeDtypeStruct((2,), jnp.uint32)
        ),
        jax.make_jaxpr(lambda n: lax.ragged_dot(x, jnp.zeros((2, 2, 2)), n))(sizes),
        jax.make_jaxpr(lambda: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos))(),
        jax.make_jaxpr(lambda a: a * a.shape[0])(jax.ShapeDtypeStruct((size,), jnp.float32)),
    ]
    return [eqn for trace in traces for eqn in trace.jaxpr.eqns]


@functools.cache
def key_dtype(implementation: str) -> Any:
    """The dtype of the PRNG keys of a generator.

    Raises:
      ValueError: there is no such generator.
    """
    return _seeding(implementation).outvars[0].aval.dtype  # type: ignore[attr-defined]


def generator(implementation: str) -> Any:
    """A generator, as primitives have it among their parameters."""
    return _seeding(implementation).params["impl"]


@functools.cache
def _seeding(implementation: str) -> jaxprs.JaxprEqn:
    (eqn,) = jax.make_jaxpr(lambda: jax.random.key(0, impl=implementation))().jaxpr.eqns
    return eqn
