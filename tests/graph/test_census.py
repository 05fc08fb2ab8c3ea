"""Every primitive that JAX has is known here: covered, or left in float for a reason by name.

A new JAX with a new primitive fails this: see what it computes, and put it where it belongs.  One
that multiplies goes to `kinds.PRODUCTS`, or gets an int8 form.
"""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.deploy.onnx import export
from jaxquant.graph import kinds, primitives
from jaxquant.jax_shim import jaxprs
from tests.networks import images

_COLLECT = """
import importlib, json, pkgutil, sys, warnings
warnings.simplefilter("ignore")
import jax
from jax.extend import core
found = {}
for module in pkgutil.walk_packages(jax.__path__, "jax.", onerror=lambda name: None):
    if any(part in module.name for part in ("test", "tools")):
        continue
    try:
        loaded = importlib.import_module(module.name)
    except BaseException:  # of an optional package, of a device that is not there
        continue
    for value in vars(loaded).values():
        if isinstance(value, core.Primitive):
            found.setdefault(value.name, set()).add(module.name)
json.dump({name: sorted(modules) for name, modules in found.items()}, sys.stdout)
"""


@functools.cache
def every_primitive() -> dict[str, list[str]]:
    """The names of all primitives in JAX's modules, and the modules that have them."""
    run = subprocess.run([sys.executable, "-c", _COLLECT], capture_output=True, check=True)
    return json.loads(run.stdout.decode().splitlines()[-1])


# Float in every mode, each for the reason that it stands under; none multiplies but elementwise.
FLOAT = {
    "an order or an index of values": """
        approx_top_k sort top_k unique
    """,
    "a selection or sum at places that the values say": """
        dynamic_update_slice scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub
        select_and_gather_add select_and_scatter select_and_scatter_add unstack stack tile
    """,
    "a reduction that is not a sum, maximum or minimum, or not to one value": """
        cumlogsumexp cummax cummin cumprod cumsum reduce reduce_and reduce_or reduce_prod reduce_xor
        reduce_window
    """,
    "an elementwise function that int8 gains nothing for": """
        bessel_i0e bessel_i1e clz digamma eq_to igamma igamma_grad_a igammac le_to lgamma lt_to
        mulhi name polygamma population_count regularized_incomplete_beta shift_left
        shift_right_arithmetic shift_right_logical zeta
    """,
    "bits, and numbers that are no floats": """
        bitcast_convert_type complex conj from_edtype imag real to_edtype
    """,
    "made of nothing but a shape": """
        dim_as_value dimension_size empty empty2 iota iota_2x32_shape platform_index zeros_like
    """,
    "random": """
        philox2x32 philox4x32 random_bits random_clone random_fold_in random_gamma random_seed
        random_split random_unwrap random_wrap rng_bit_generator rng_uniform threefry2x32
        threefry4x32
    """,
    "values as they are: an order, a place, a name, a device": """
        add_dependency after_all create_token dce_sink device_put inspect_sharding layout_constraint
        optimization_barrier reduced_vary_cast reduced_vary_cast_p relayout reshard shard_alike
        sharding_constraint tie with_memory_space_constraint xla_metadata_value
    """,
    "a permutation of whole numbers": "lu_pivots_to_permutation",
}
# Not in a model's trace, or only in that of a model that the library refuses.
ELSEWHERE = {
    "between devices: a model is traced for one": """
        all_gather all_gather_done all_gather_invariant all_gather_reduced all_gather_reduced_start
        all_gather_start all_to_all all_to_all_done all_to_all_start axis_index
        global_array_to_host_local_array host_local_array_to_global_array pbroadcast pbroadcast_done
        pbroadcast_dynamic pbroadcast_start pmax pmin ppermute ppermute_done ppermute_start precv
        preduced psend psum psum_done psum_invariant psum_invariant_start psum_start pvary
        ragged_all_to_all reduce_scatter reduce_scatter_done reduce_scatter_start unreduced_pmax
        unreduced_pmin unreduced_psum unreduced_psum_start unreduced_reduce_scatter
        unreduced_reduce_scatter_start vary_unreduced_cast vary_unreduced_cast_p
    """,
    "mutable references: a pure function has none when it is traced": """
        accum_grad_in_ref addupdate box_get box_set broadcast_to create_linear empty_ref free_ref
        freeze get log_extend log_read new_box new_log new_ref pin stage swap unpin
    """,
    "of derivatives and of their checks": """
        assert_consumed_value check consume custom_jvp_call_jaxpr custom_lin unreachable
    """,
    "prints": "debug_callback debug_print",
    "of `jax.export`'s checks": "shape_assertion",
}
# Their bodies are searched for convolutions and dots.
BODIES = """
    composite compute_on cond custom_linear_solve custom_partitioning custom_vmap_call eval_jaxpr
    linear_call program_order remat_opt run_state scan shard_map while xla_metadata_call
"""
# All primitives of these modules stand inside a kernel, which is one site as a whole, or turn a
# sparse matrix into another form.
FAMILIES = (
    "jax._src.pallas.",
    "jax._src.thunky.",
    "jax.experimental.pallas.",
    "jax.experimental.sparse.",
    "jax.experimental.thunky.",
)


def listed(groups) -> set[str]:
    return {name for names in groups.values() for name in names.split()}


def test_every_primitive_of_jax_is_known():
    known = {"dot_general", "conv_general_dilated", *kinds.PRODUCTS, *kinds.by_primitive()}
    known |= primitives.ELEMENTWISE | primitives.MOVEMENTS | jaxprs.inlined_calls()
    known |= listed(FLOAT) | listed(ELSEWHERE) | set(BODIES.split())
    new = {
        name: modules
        for name, modules in every_primitive().items()
        if name not in known
        and not all(f"{module}.".startswith(FAMILIES) for module in modules)
        and not name.startswith("_copysign")
    }
    assert not new, f"primitives that nothing is known of: {new}"


# What an exported ONNX file cannot hold, of the primitives that models have.
NOT_IN_ONNX = """
    approx_top_k atan2 bessel_i0e bessel_i1e bitcast_convert_type clz complex conj cumlogsumexp
    digamma dimension_size empty empty2 eq_to erf_inv from_edtype igamma igamma_grad_a igammac imag
    iota_2x32_shape le_to lgamma lt_to lu_pivots_to_permutation mulhi name nextafter platform_index
    polygamma population_count real reduce reduce_window reduce_xor
    regularized_incomplete_beta select_and_gather_add select_and_scatter select_and_scatter_add
    shift_left shift_right_arithmetic shift_right_logical to_edtype unique zeros_like zeta
"""


def test_every_primitive_of_models_is_in_onnx_or_refused_by_name():
    """Refused with ValueError; but for what draws or orders effects, which exports do not meet."""
    of_models = primitives.ELEMENTWISE | primitives.MOVEMENTS | set(kinds.by_primitive())
    of_models |= listed(FLOAT) - set(FLOAT["random"].split())
    of_models -= set(FLOAT["values as they are: an order, a place, a name, a device"].split())
    missing = (of_models & set(every_primitive())) - export.covered() - set(NOT_IN_ONNX.split())
    assert not missing
    assert not export.covered() & set(NOT_IN_ONNX.split())


def ragged(p, x):
    """The groups are of what is summed over, so that no weight is chosen."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (0,)), ((), ())),
        lhs_ragged_dimensions=[1],
        rhs_group_dimensions=[],
    )
    sizes = jnp.array([1, 2, 1])
    return jax.lax.ragged_dot_general(x @ p["first"], p["third"], sizes, numbers)


def experts(p, x):
    return jax.lax.ragged_dot(x @ p["first"], p["experts"], jnp.array([1, 2, 1]))


def fourier(p, x):
    return jnp.fft.rfft(x @ p["first"]).real


def solved(p, x):
    y = x @ p["first"]
    return jax.scipy.linalg.solve_triangular(y.T @ y + 8 * jnp.eye(4), y.T)


def called(p, x):
    y = x @ p["first"]
    return jax.pure_callback(lambda v: np.asarray(v), jax.ShapeDtypeStruct(y.shape, y.dtype), y)


def kernel(p, x):
    from jax.experimental import pallas as pl

    def body(left, right, out):
        out[...] = left[...] @ right[...]

    y = x @ p["first"]
    call = pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct((4, 4), y.dtype), interpret=True)
    return call(y, p["second"])


def factors(p, x):
    return jnp.linalg.cholesky((x @ p["first"]).T @ (x @ p["second"]) + 20 * jnp.eye(4))


OF_SUMS = "a ragged dot whose groups are of sums or of batches has no int8 form"
PRODUCTS = {
    "ragged_dot_general": (ragged, "third", OF_SUMS),
    "fft": (fourier, "fft", "a Fourier transform has no int8 form"),
    "triangular_solve": (solved, "triangular_solve", "linear algebra has no int8 form"),
    "pure_callback": (called, "pure_callback", "what it runs is not known here"),
    "pallas_call": (kernel, "second", "what it runs is not known here"),
    "cholesky": (factors, "cholesky", "linear algebra has no int8 form"),
}


@pytest.mark.parametrize(
    "mode", [pytest.param("static", marks=pytest.mark.slow), "full", "weights"]
)
def test_what_multiplies_without_an_int8_form_is_in_the_report(mode):
    """All of them in one model, as float with the reason; the dots before them are int8."""
    params = {"first": images(1, (4, 4)), "experts": images(2, (3, 4, 4))}
    params |= {"second": images(3, (4, 4)), "third": images(4, (4, 4))}

    def apply_fn(p, x):
        return [experts(p, x), *(function(p, x) for function, _, _ in PRODUCTS.values())]

    x = images(0, (4, 4))
    if mode == "weights":
        qparams, qapply = jaxquant.quant_weights(params, apply_fn, x)
    else:
        qparams, qapply = jaxquant.quant_post(
            params, apply_fn, [x], algo="abs_max", is_full_quantize=mode == "full", progress=False
        )
    rows = {row["kind"]: row for row in qapply.report().rows if row["kind"] in kinds.PRODUCTS}
    assert set(rows) == set(PRODUCTS)
    for kind, (_, name, reason) in PRODUCTS.items():
        row = rows[kind]
        assert (row["name"], row["status"], row["reason"]) == (name, "float", reason)
    others = {row["name"]: row for row in qapply.report().rows if row["kind"] == "mul"}
    assert others["first"]["status"] == others["experts"]["status"] == "int8"
    for a, b in zip(qapply(qparams, x), apply_fn(params, x), strict=True):
        assert np.isfinite(np.asarray(a)).all()
        assert a.shape == b.shape


def _with_own_vmap(f):
    called = jax.custom_batching.custom_vmap(f)
    called.def_vmap(lambda size, batched, y: (jax.vmap(f)(y), True))
    return called


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda f: jax.checkpoint(f),
        lambda f: _with_own_vmap(f),
        lambda f: jax.jit(jax.jit(f)),
        lambda f: lambda y: jax.lax.map(f, y),
        lambda f: lambda y: jax.lax.cond(y.sum() > 0, f, lambda y: y, y),
        lambda f: lambda y: jax.lax.while_loop(lambda z: z.sum() > 0, lambda z: f(z) - 1, y),
    ],
    ids=["checkpoint", "custom_vmap", "jit", "map", "cond", "while"],
)
def test_dots_inside_of_calls_are_in_the_report(wrapped):
    params = {"first": images(1, (4, 4)), "second": images(2, (4, 4))}

    def apply_fn(p, x):
        return wrapped(lambda y: jnp.tanh(y @ p["second"]))(x @ p["first"])

    _, qapply = jaxquant.quant_weights(params, apply_fn, images(0, (4, 4)))
    assert {row["name"] for row in qapply.report().rows} == {"first", "second"}
