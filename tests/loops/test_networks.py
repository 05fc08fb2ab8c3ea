"""Further networks of equal layers: quantized as a scan they are what they are as a Python loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from experiments.models import transformer
from experiments.models.llama import Llama
from experiments.models.vit import Vit
from tests.loops import measure

LLAMA = Llama(vocabulary=16, layers=2, width=8, heads=2, groups=1, hidden=12)
VIT = Vit(num_classes=5, patch=2, layers=2, width=8, heads=2, hidden=12)
IMAGES = jnp.asarray(np.random.default_rng(2).normal(size=(4, 4, 4, 3)), jnp.float32)
IDS = jnp.asarray(np.random.default_rng(1).integers(0, 16, (4, 5)), jnp.int32)


class Network(NamedTuple):
    """A network that has an attribute `scanned`, what it reads, and its sites in one layer."""

    module: nn.Module
    x: jax.Array
    sites: int


NETWORKS = {"llama": Network(LLAMA, IDS, 7), "vit": Network(VIT, IMAGES, 6)}


def static(params: Any, apply_fn: Callable[..., Any], x: jax.Array) -> Any:
    config = {"algo": "abs_max", "recover": (), "progress": False}
    return jaxquant.quant_post(params, apply_fn, [x], **config)


def without_data(
    quantize: Callable[..., Any],
    params: Any,
    apply_fn: Callable[..., Any],
    x: jax.Array,
    **config: Any,
) -> Any:
    return quantize(params, apply_fn, measure.shapes(x), progress=False, **config)


MODES: dict[str, Callable[..., Any]] = {
    "static": static,
    "dynamic": functools.partial(without_data, jaxquant.quant_dynamic),
    "4 bits": functools.partial(without_data, jaxquant.quant_weights, weight_bits=4, group_size=4),
}


FURTHER = {("llama", "dynamic"), ("vit", "4 bits")}  # which the others nearly cover


@functools.cache
def make_params(name: str) -> Any:
    module, x, _ = NETWORKS[name]
    return jax.jit(module.init)(jax.random.key(0), x)["params"]


CASES = [
    pytest.param(name, mode, marks=[pytest.mark.slow] if (name, mode) in FURTHER else [])
    for name in NETWORKS
    for mode in MODES
]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_scan_is_quantized_as_the_loop(name, mode):
    module, x, inside = NETWORKS[name]
    params = make_params(name)

    def apply_fn(params, x, scanned):
        return module.clone(scanned=scanned).apply({"params": params}, x)

    forms = {True: params, False: transformer.unstack(params)}
    outputs, sites = {}, {}
    for scanned, given in forms.items():
        qparams, qapply = MODES[mode](given, functools.partial(apply_fn, scanned=scanned), x)
        outputs[scanned] = jax.jit(qapply)(qparams, x)
        rows = qapply.report().rows
        sites[scanned] = {row["name"] for row in rows if row["status"] == "int8"}
    assert sites[True] == {measure.LAYER.sub("layers", site) for site in sites[False]}
    assert len(sites[False]) - len(sites[True]) == inside  # all dots with weights
    np.testing.assert_allclose(outputs[True], outputs[False], rtol=0, atol=1e-5)
    assert 8 < measure.sqnr(apply_fn(params, x, True), outputs[True]) < 60
