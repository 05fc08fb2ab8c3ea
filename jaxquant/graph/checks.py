"""Checks of the parameters, at the boundary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.masks import DRAWS
from jaxquant.graph.sites import Site
from jaxquant.graph.trace import path_name
from jaxquant.jax_shim import prng


def check_model(params: Any, apply_fn: Any) -> None:
    """Raise where `params` are no arrays or `apply_fn` is no function of them.

    Raises:
      TypeError: they are swapped, a whole module, a training state, ...; the message says what to
        pass instead.
      ValueError: there is no parameter, or one has been deleted.
    """
    if callable(params) and not callable(apply_fn):
        raise TypeError(
            "params and apply_fn are swapped: pass the parameters first, then the function"
        )
    if not callable(apply_fn):
        raise TypeError(
            f"apply_fn is a function apply_fn(params, *inputs), got {type(apply_fn).__name__}; the "
            "order is the parameters, the function, the data"
        )
    # Mistakes that are often made, by what the objects look like, before anything is traced.
    if hasattr(params, "params") and hasattr(params, "opt_state"):
        raise TypeError(
            f"params is a {type(params).__name__}, which holds the optimizer too: pass its "
            "`.params` (for linen {'params': state.params}, with the other collections), and "
            "`lambda p, x: model.apply(p, x)`"
        )
    # A module in place of the function is told what to pass, by the kind of the module.
    if advice := _advice(apply_fn):
        raise TypeError(f"apply_fn is a {type(apply_fn).__name__}: {advice}")
    check_params(params)


_NO_MODULE = (
    "for an nnx module pass the state of nnx.split(model), for linen the variables of model.init"
)
# What to pass in place of a module, by the package and the name of its class.
_MODULES = {
    ("jaxquant", "QuantizedApply"): (
        "that model is quantized already; pass the parameters and the function of the float one"
    ),
    ("flax.linen", "Module"): (
        "pass the variables of `model.init`, trained, and `lambda p, x: model.apply(p, x)`"
    ),
    ("flax.nnx", "Module"): (
        "call `model.eval()`, then `graphdef, state = nnx.split(model)`, and pass the state of "
        "nnx.split and `lambda state, x: nnx.merge(graphdef, state)(x)`"
    ),
    ("equinox", "Module"): (
        "`arrays, rest = eqx.partition(eqx.nn.inference_mode(model), eqx.is_array)`, then pass the "
        "arrays and `lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x)`"
    ),
}


def _advice(module: Any) -> str:
    """What to pass in place of a module; "" for what is none."""
    for cls in type(module).__mro__:
        for (package, name), advice in _MODULES.items():
            if cls.__name__ == name and cls.__module__.startswith(package):
                return advice
    return ""


def check_params(params: Any) -> None:
    """Raise where a parameter is not a concrete array of numbers.

    Raises:
      TypeError: a leaf is not an array of numbers; the message names its path.
      ValueError: there is no parameter.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    if not leaves:
        raise ValueError(
            "params holds no array: those are quantized that apply_fn takes as its first argument, "
            "not those that it closes over"
        )
    for path, leaf in leaves:
        name = path_name(path)
        # Modules and functions among the parameters are the likeliest mistake.
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise TypeError(
                f"params[{name!r}] is {type(leaf).__name__}, not an array; "
                + (_advice(params) or _advice(leaf) or _NO_MODULE)
            )
        # A tracer is an array to Python, but holds no value.
        if isinstance(leaf, jax.core.Tracer):
            raise TypeError(
                f"params[{name!r}] is being traced: calibration and quantization run outside jit "
                "(qapply itself may be jitted)"
            )
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ValueError(
                f"params[{name!r}] has been deleted: it was donated to a jitted function "
                "(donate_argnums) or deleted by hand. Pass the parameters that this function "
                "returned, or a copy that was made before"
            )
        # Texts, objects and dates are in trees by accident; PRNG keys are there on purpose.
        if not prng.is_key_dtype(leaf.dtype) and leaf.dtype.kind in "OSUMm":
            raise TypeError(f"params[{name!r}] has dtype {leaf.dtype}, not numbers")
        if isinstance(leaf, np.ndarray) and not leaf.dtype.isnative:
            raise TypeError(
                f"params[{name!r}] has its bytes in the order of another processor (dtype "
                f"{leaf.dtype.str!r}), which JAX does not take: pass .astype({leaf.dtype.name!r})"
            )


def check_sites(sites: Sequence[Site]) -> None:
    """Raise ValueError where a model has no site."""
    if not sites:
        raise ValueError(
            "there is nothing to quantize: apply_fn holds no convolution and no dot that depends "
            "on its inputs (elementwise multiplication and sums are not dots)"
        )


def check_weights(graph: ir.Graph, sites: Sequence[Site], params: Any) -> None:
    """Raise ValueError where a parameter holds NaN, or a weight of a site infinity.

    A table of embeddings may hold infinities while it stays float.
    """
    leaves = values_of(graph, params)
    checked: set[ir.Var] = set()
    for site in sites:
        if site.weight is not None and 0 in graph.shape(site.weight):
            # An empty weight has no largest value, and so no scale.
            raise ValueError(
                f"the weight of site {site.name!r} has no element: its shape is "
                f"{list(graph.shape(site.weight))}. Leave the layer out of the model, or give it "
                "channels"
            )
        # A table may hold infinities on purpose (masks of tokens); those stay float, see the plan.
        for var in () if site.is_lookup else _weight_sources(graph, site):
            if var in checked:
                continue
            checked.add(var)
            # One count for each parameter, however many sites read it.
            bad = count(leaves[var], lambda x: ~np.isfinite(x))
            if bad:
                raise ValueError(
                    f"the weight of site {site.name!r}, params[{graph.paths[var]!r}], holds NaN or "
                    f"infinity in {bad} of its {np.size(leaves[var])} elements: take the "
                    "parameters of an earlier training step"
                )
    # What no site reads may yet be added to what they give.
    for var in graph.leaves:
        if count(leaves[var], np.isnan):
            raise ValueError(f"params[{graph.paths[var]!r}] holds NaN")


def check_no_randomness(graph: ir.Graph) -> None:
    """Raise ValueError where random numbers are drawn from a key among the parameters.

    An nnx model in training mode does so: its dropout masks would become constants.
    """
    leaves = set(graph.leaves)
    for eqn in graph.equations:
        # A key that comes with the inputs, or that the model makes itself, is its own business.
        if eqn.name not in DRAWS or not all(graph.is_static(x) for x in eqn.inputs):
            continue
        for var in graph.sources(eqn.outputs[0]):
            if var in leaves:
                raise ValueError(
                    f"apply_fn draws random numbers from params[{graph.paths[var]!r}]. "
                    "Quantization runs the model in inference mode: for an nnx model call "
                    "`model.eval()` before `nnx.split`, for linen pass `deterministic=True`. If "
                    "the draw belongs to the model, close over the key instead of keeping it "
                    "among the parameters"
                )


def _weight_sources(graph: ir.Graph, site: Site) -> Sequence[ir.Var]:
    if site.weight is not None:
        return graph.sources(site.weight)
    return [var for var in graph.leaves if graph.paths[var] == site.weight_path]


def values_of(graph: ir.Graph, params: Any) -> dict[ir.Var, Any]:
    """What the leaves and constants of a model's own graph hold."""
    return dict(zip(graph.leaves, jax.tree.leaves(params), strict=True)) | dict(graph.constants)


def count(leaf: Any, bad: Callable[[np.ndarray], np.ndarray]) -> int:
    """How many elements of a parameter are bad; of one that holds no floats, none."""
    # In float32: NumPy has no `isfinite` of bfloat16.
    if prng.is_key_dtype(leaf.dtype) or not jax.numpy.issubdtype(leaf.dtype, np.floating):
        return 0
    return int(bad(np.asarray(leaf).astype(np.float32)).sum())
