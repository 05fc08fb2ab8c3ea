"""Under full quantization, networks stay int8 from end to end: in StableHLO and when compiled."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from experiments.benchmarks import int8_coverage
from tests import networks
from tests.plan import full

pytestmark = pytest.mark.optimized

BATCH, SIZE = 2, 16
X = networks.images(0, (BATCH, SIZE, SIZE, 3))
SMALLEST = BATCH * 4 * 4  # of an activation: N * H * W where the images are smallest

Conv = functools.partial(nn.Conv, padding="SAME", use_bias=False)
Norm = functools.partial(nn.BatchNorm, use_running_average=True)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(Norm()(Conv(8, (7, 7), 2)(x)))
        x = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        for features, stride in ((8, 1), (16, 2)):
            y = nn.relu(Norm()(Conv(features, (3, 3), stride)(x)))
            y = Norm()(Conv(features, (3, 3))(y))
            if y.shape != x.shape:
                x = Norm()(Conv(features, (1, 1), stride)(x))
            x = nn.relu(x + y)
        return nn.Dense(5)(x.mean((1, 2)))


class MobileNetV2(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jax.nn.relu6(Norm()(Conv(8, (3, 3), 2)(x)))
        for features, stride in ((8, 1), (12, 2)):
            y = jax.nn.relu6(Norm()(Conv(24, (1, 1))(x)))
            y = jax.nn.relu6(Norm()(Conv(24, (3, 3), stride, feature_group_count=24)(y)))
            y = Norm()(Conv(features, (1, 1))(y))
            x = x + y if y.shape == x.shape else y
        x = jax.nn.relu6(Norm()(Conv(16, (1, 1))(x)))
        return nn.Dense(5)(x.mean((1, 2), keepdims=True)).reshape(-1, 5)


class GoogLeNet(nn.Module):
    """Local response normalisation, ceil-mode pools, branches that are concatenated."""

    @nn.compact
    def __call__(self, x):
        x = self.pool(nn.relu(nn.Conv(8, (3, 3))(x)))
        with jax.named_scope("lrn"):
            window, ones = (1, 1, 1, 5), (1, 1, 1, 1)
            squares = lax.reduce_window(x * x, 0.0, lax.add, window, ones, "SAME")
            x = x / (1.0 + 2e-5 * squares) ** 0.75
        for _ in range(2):
            branches = [
                nn.relu(nn.Conv(4, (1, 1))(x)),
                nn.relu(nn.Conv(6, (3, 3))(nn.relu(nn.Conv(4, (1, 1))(x)))),
                nn.relu(nn.Conv(4, (1, 1))(nn.max_pool(x, (3, 3), (1, 1), "SAME"))),
            ]
            x = jnp.concatenate(branches, -1)
        x = self.pool(x)
        return nn.Dense(5)(x.mean((1, 2)))

    def pool(self, x):
        return nn.max_pool(x, (3, 3), (2, 2), ((0, 1), (0, 1)))


NETWORKS = {"ResNet": ResNet, "MobileNetV2": MobileNetV2, "GoogLeNet": GoogLeNet}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    module = NETWORKS[request.param]()
    params = networks.random_params(lambda: module.init(jax.random.key(0), X))
    if "batch_stats" in params:  # variances are positive
        params["batch_stats"] = jax.tree.map(lambda v: 1 + abs(v), params["batch_stats"])
    model = full.quantize(module.apply, params, X)
    lowered = jax.jit(model.qapply.with_backend("xla")).lower(model.qparams, X)
    return request.param, module, params, model, lowered


def test_the_plan_is_int8_throughout(network):
    _, _, _, model, _ = network
    assert {site.reason for site in model.plan.sites} <= {"", "between float operations"}


def test_stablehlo_multiplies_int8_and_pools_int8(network):
    name, *_, lowered = network
    lines = lowered.as_text().splitlines()
    products = [s for s in lines if "stablehlo.dot_general" in s or "stablehlo.convolution" in s]
    assert len(products) >= 5
    for line in products:
        assert re.search(r": \(tensor<\S+xi8>, tensor<\S+xi8>\) -> tensor<\S+xi32>", line), line
    moved = [s for s in lines if re.search(r"stablehlo\.(concatenate|pad|transpose)\b", s)]
    windows = windows_of(lines)
    if name == "GoogLeNet":
        assert sum("concatenate" in s for s in moved) == 2
        assert not [w for w in windows if "xi8>" in w]  # maxima of shifted slices instead
        maxima = [s for s in lines if "stablehlo.maximum" in s and "xi8>" in s]
        assert len(maxima) == 4 * (3 * 3 - 1)  # four pools of 3x3
        assert len([w for w in windows if "xf32>" in w]) == 1  # of the normalisation
    else:
        assert all("xf32>" not in w for w in windows)
    assert not [s for s in moved if "xf32>" in s]


def windows_of(lines):
    """The types of all window reductions; they stand behind the reduction's body."""
    found, inside = [], False
    for line in lines:
        inside |= "stablehlo.reduce_window" in line
        if inside and "}) : (" in line:
            found.append(line.partition("}) : (")[2])
            inside = False
    return found


@pytest.fixture(scope="module")
def buffers(network):
    return int8_coverage.intermediate_buffers(network[-1].compile().as_text())


def test_no_float_tensor_lies_between_int8_sites_in_the_compiled_program(network, buffers):
    name = network[0]
    floats = [b for b in buffers if b.dtype == "f32" and b.size >= SMALLEST]
    between = [b for b in floats if "lrn" not in b.source]
    assert not between
    assert bool(floats) == (name == "GoogLeNet")
    assert len([b for b in buffers if b.dtype == "s8" and b.size >= SMALLEST]) >= 5


def test_the_float_model_has_float_buffers_alone(network):
    """The counterpart: what is counted above is there to be found."""
    _, module, params, *_ = network
    found = int8_coverage.totals(
        int8_coverage.intermediate_buffers(int8_coverage.compiled_text(module.apply, params, X))
    )
    assert found["s8"] == found["s32"] == (0, 0)
    assert found["f32"][0] >= 5
