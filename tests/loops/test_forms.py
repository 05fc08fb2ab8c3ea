"""One transformer, its layers in a Python loop, in `nn.scan` and in `nnx.scan`, in every mode."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant
from experiments.models import transformer, transformer_nnx
from experiments.models.transformer import Transformer
from tests.loops import measure

LAYERS = 2
SETTINGS = {"vocabulary": 16, "layers": LAYERS, "width": 8, "heads": 2, "hidden": 12, "length": 5}
IDS = jnp.asarray(np.random.default_rng(1).integers(0, 16, (4, 5)), jnp.int32)
LOOP_OF = {"nn.scan": "linen loop", "nnx.scan": "nnx loop"}


class Form(NamedTuple):
    params: Any
    apply_fn: Callable[[Any, jax.Array], jax.Array]


@functools.cache
def form(name: str) -> Form:
    model = Transformer(**SETTINGS)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    scanned = name in LOOP_OF
    if not scanned:
        model, params = model.clone(scanned=False), transformer.unstack(params)
    if "nnx" in name:
        module = transformer_nnx.from_linen(params, **SETTINGS, scanned=scanned)
        graph, state = nnx.split(module)
        return Form(state, lambda state, ids: nnx.merge(graph, state)(ids))
    return Form(params, lambda params, ids: model.apply({"params": params}, ids))


def static(params, apply_fn, **config):
    """With ranges that are found in float: the scan's are the loop's to the last bit."""
    return jaxquant.quant_post(params, apply_fn, [IDS], algo="abs_max", recover=(), **config)


def without_data(quantize, params, apply_fn, **config):
    """Without values, which would be compared in float and in int8."""
    return quantize(params, apply_fn, measure.shapes(IDS), **config)


MODES: dict[str, Callable[..., Any]] = {
    "static": static,
    "dynamic": functools.partial(without_data, jaxquant.quant_dynamic),
    "8 bits": functools.partial(without_data, jaxquant.quant_weights),
    "4 bits": functools.partial(without_data, jaxquant.quant_weights, weight_bits=4, group_size=4),
}
FULL = functools.partial(static, is_full_quantize=True)


@functools.cache
def quantized(name: str, mode: str) -> Any:
    return (FULL if mode == "full" else MODES[mode])(*form(name), progress=False)


def sites_of(name: str, mode: str) -> set[str]:
    _, qapply = quantized(name, mode)
    return {row["name"] for row in qapply.report().rows if row["status"] == "int8"}


@pytest.mark.parametrize("name", LOOP_OF)
@pytest.mark.parametrize("mode", MODES)
def test_the_numbers_of_the_layers_are_those_of_the_loop(name, mode):
    qparams, qapply = quantized(name, mode)
    expected, unrolled = quantized(LOOP_OF[name], mode)
    found = measure.flat(qparams)
    # Each layer has its own: where a model has no loop they are part of its program.
    zero_points = {path for path in found if path.endswith("/input/zero_point")}
    assert bool(zero_points) == (mode == "static")
    measure.assert_same_numbers(
        {path: array for path, array in found.items() if path not in zero_points},
        measure.stacked(expected),
    )
    told, wanted = qapply.report().summary, unrolled.report().summary
    extra = sum(found[path].nbytes for path in zero_points)
    assert told["bytes_after"] == wanted["bytes_after"] + extra


@pytest.mark.parametrize("name", LOOP_OF)
@pytest.mark.parametrize("mode", MODES)
def test_every_site_of_a_layer_is_quantized_as_in_the_loop(name, mode):
    sites, wanted = sites_of(name, mode), sites_of(LOOP_OF[name], mode)
    assert sites == {measure.LAYER.sub("layers", site) for site in wanted}
    inside = {site for site in sites if site.startswith("layers/")}
    assert len(inside) == 6
    assert len(wanted) == len(sites) + (LAYERS - 1) * len(inside)


@functools.cache
def output(name: str, mode: str) -> jax.Array:
    qparams, qapply = quantized(name, mode)
    return jax.jit(qapply)(qparams, IDS)


def reference() -> jax.Array:
    params, apply_fn = form("linen loop")
    return jax.jit(apply_fn)(params, IDS)


@pytest.mark.parametrize("mode", MODES)
def test_the_outputs_are_those_of_the_loop(mode):
    expected = output("linen loop", mode)
    assert 8 < measure.sqnr(reference(), expected) < 60
    for name in LOOP_OF:
        np.testing.assert_allclose(output(name, mode), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_in_full_int8_a_scan_is_as_accurate_as_the_loop():
    """Its carry is float32 from layer to layer, where the loop hands int8 on: not the same bits."""
    expected = measure.sqnr(reference(), output("linen loop", "full"))
    for name in LOOP_OF:
        assert measure.sqnr(reference(), output(name, "full")) > expected - 1
