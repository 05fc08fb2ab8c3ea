"""Every kind of full quantization against plain NumPy.

The cases are branches of one network that holds every kind.  In front of them are dots with exact
weights, and behind each one a dot with 127 times the identity, so that the integers that the case
hands over come out as they are.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.graph import kinds
from jaxquant.plan import behaviours
from tests import networks, reference
from tests.plan import full
from tests.run.kinds import COMPARISONS, INDICES, MOVES, PAIRS, SAME, SUMS, C, X, quantize

pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("numbers_as_they_are")]

VOLUME = (2, 4, 4, 4, 1)
SHAPED = ("first", "act", "left", "right", "small")  # dots in front of the cases


# Softmax and the functions of one tensor: the model on jnp, the reference on NumPy in float64.
def logistic(v):
    return 1 / (1 + np.exp(-v))


ACTIVATIONS = {
    "clip": (lambda y: jnp.clip(y, -1.5, 2.5), lambda v: np.clip(v, -1.5, 2.5)),
    "relu": (jax.nn.relu, lambda v: np.maximum(v, 0)),
    "relu6": (jax.nn.relu6, lambda v: np.clip(v, 0, 6)),
    "sigmoid": (jax.nn.sigmoid, logistic),
    "hard_sigmoid": (jax.nn.hard_sigmoid, lambda v: np.clip(v + 3, 0, 6) / 6),
    "tanh": (jnp.tanh, np.tanh),
    "swish": (jax.nn.swish, lambda v: v * logistic(v)),
    "hard_swish": (jax.nn.hard_swish, lambda v: v * np.clip(v + 3, 0, 6) / 6),
    "gelu": (
        lambda y: jax.nn.gelu(y, approximate=False),
        lambda v: v / 2 * (1 + np.vectorize(math.erf)(v / math.sqrt(2))),
    ),
    "gelu, by tanh": (
        jax.nn.gelu,
        lambda v: v / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    ),
    "leaky_relu": (jax.nn.leaky_relu, lambda v: np.where(v > 0, v, 0.01 * v)),
    "elu": (jax.nn.elu, lambda v: np.where(v > 0, v, np.expm1(np.minimum(v, 0)))),
}


def apply_fn(p, x):
    out = {}

    def last(name, y):
        out[name] = y @ p["last"][name]["w"] if name in p["last"] else y

    first, act, left, right, small = ((x @ p[n]["w"]) * 2.0**-13 for n in SHAPED)
    for name, (_, op, _) in (MOVES | SUMS).items():
        with jax.named_scope(name):
            last(name, op(first))
    for name, (op, _) in INDICES.items():
        with jax.named_scope(name):
            last(name, op(first, axis=-1))
    for name, (op, _) in ACTIVATIONS.items():
        last(name, op(act))
    with jax.named_scope("softmax"):
        last("softmax", jax.nn.softmax(left, axis=-1))
    for name, (op, _) in PAIRS.items():
        with jax.named_scope(name):
            last(name, op(left, right))
    for name, (op, _) in COMPARISONS.items():
        with jax.named_scope(name):
            last(f"{name}, one scale", op(left[:, :3], left[:, 3:]))
            last(f"{name}, two scales", op(left, right))
    with jax.named_scope("chosen"):
        last("where", jnp.where(left > right, left, right))
    with jax.named_scope("linear"):
        last("linear up", jax.image.resize(first, (2, 12, 9, C), "bilinear"))
    with jax.named_scope("shrunk"):
        last("linear down", jax.image.resize(first, (2, 3, 4, C), "bilinear"))
    with jax.named_scope("volume"):
        volume = first[:, :4, :4, :, None]
        last("trilinear", jax.image.resize(volume, (2, 8, 2, 3, 1), "trilinear"))
    with jax.named_scope("products"):
        last("matmul", jnp.einsum("nhwc,nvwc->nhwv", left, small)[..., :C])
    for name, strides, dilation, groups in CONVOLUTIONS:
        y = lax.conv_general_dilated(
            first, p[name]["w"], strides, SAME, lhs_dilation=dilation,
            feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        last(name, y)
    return out


CONVOLUTIONS = (
    ("conv2d", (2, 2), (1, 1), 1),
    ("depthwise_conv2d", (1, 1), (1, 1), C),
    ("conv2d_transpose", (1, 1), (2, 2), 1),
)
WITH_DOT = (
    *MOVES, *SUMS, *ACTIVATIONS, *PAIRS, "softmax", "where", "linear up", "linear down", "matmul",
    *(name for name, *_ in CONVOLUTIONS),
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    p = {name: {"w": networks.exact_weight((C, C), seed)} for seed, name in enumerate(SHAPED)}
    p["right"]["w"] = p["right"]["w"] / 8  # a scale of its own
    p["last"] = {name: {"w": 127 * jnp.eye(C)} for name in WITH_DOT}
    p["conv2d"] = {"w": networks.exact_weight((3, 3, C, C))}
    p["depthwise_conv2d"] = {"w": networks.exact_weight((3, 3, 1, C))}
    p["conv2d_transpose"] = {"w": networks.exact_weight((2, 3, C, C))}
    return p


@pytest.fixture(scope="module")
def model(params):
    return full.quantize(apply_fn, params, X)


@pytest.fixture(scope="module")
def out(model):
    return model(X)


@pytest.fixture(scope="module")
def values(params):
    """What the dots in front give, exactly."""
    x = np.asarray(X, np.float64)
    return {name: x @ np.float64(params[name]["w"]) * 2.0**-13 for name in SHAPED}


def integers(model, out, name):
    """The integers that the case handed to the dot behind it."""
    found = out[name] / (127 * model.input_scale(f"last/{name}"))
    np.testing.assert_array_equal(found, np.rint(found))
    return found


@pytest.fixture(scope="module")
def first(model, values):
    """The operand of the cases that read int8: integers and scale."""
    scale = model.input_scale("last/transpose")
    return quantize(values["first"], scale), scale


def within_one_step(found, expected, exact=0.95):
    assert np.abs(found - expected).max() <= 1
    assert (found == expected).mean() >= exact


def test_the_network_holds_every_kind(model):
    found = {site.kind for site in model.plan.sites if site.status == "int8"}
    fused = {*kinds.ACTIVATION_KINDS, "reshape2"}  # reshape2 is another name of reshape
    assert found == set(behaviours.BY_KIND) - fused - {kinds.LOOKUP_KIND}  # its inputs are floats
    assert {site.reason for site in model.plan.sites} <= {"", "between float operations"}


@pytest.mark.parametrize("name", MOVES)
def test_moves_and_selections_hand_the_integers_on(model, out, first, name):
    kind, _, expected = MOVES[name]
    assert model.input_scale(f"last/{name}") == first[1]
    assert kind in {s.kind for s in model.plan.sites if s.scope == name and s.status == "int8"}
    np.testing.assert_array_equal(integers(model, out, name), expected(first[0]))


@pytest.mark.parametrize("name", SUMS)
def test_sums_and_averages(model, out, first, name):
    kind, _, expected = SUMS[name]
    assert kind in {s.kind for s in model.plan.sites if s.scope == name and s.status == "int8"}
    scale = model.input_scale(f"last/{name}")
    within_one_step(
        integers(model, out, name),
        quantize(expected(first[0].astype(np.float64)) * first[1], scale),
        exact=1.0 if name in ("average pool", "sum") else 0.95,
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_read_the_accumulator(model, out, values, name):
    expected = quantize(ACTIVATIONS[name][1](values["act"]), model.input_scale(f"last/{name}"))
    within_one_step(integers(model, out, name), expected)


@pytest.fixture(scope="module")
def pair(model, values):
    scales = [model.input_scale("elementwise_add/elementwise_add", k) for k in (0, 1)]
    assert scales[0] != scales[1]
    return [quantize(values[n], s) * s for n, s in zip(("left", "right"), scales)]


@pytest.mark.parametrize("name", PAIRS)
def test_elementwise_operations_of_two_int8_tensors(model, out, pair, name):
    expected = quantize(PAIRS[name][1](*pair), model.input_scale(f"last/{name}"))
    within_one_step(integers(model, out, name), expected)


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(model, out, pair, name):
    compare = COMPARISONS[name][1]
    left, right = pair
    np.testing.assert_array_equal(out[f"{name}, one scale"], compare(left[:, :3], left[:, 3:]))
    np.testing.assert_array_equal(out[f"{name}, two scales"], compare(left, right))
    assert len(model.sites[f"{name}/{name}"].inputs) == 1
    assert len(model.sites[f"{name}/{name}:1"].inputs) == 2


def test_the_result_of_a_comparison_chooses(model, out, pair):
    expected = quantize(np.maximum(*pair), model.input_scale("last/where"))
    np.testing.assert_array_equal(integers(model, out, "where"), expected)


@pytest.mark.parametrize("name", INDICES)
def test_the_index_of_the_largest_and_smallest_integer(out, first, name):
    np.testing.assert_array_equal(out[name], INDICES[name][1](first[0], axis=-1))


def test_softmax(model, out, pair):
    expected = quantize(reference.softmax(pair[0]), model.input_scale("last/softmax"))
    within_one_step(integers(model, out, "softmax"), expected)


@pytest.mark.parametrize(
    ("name", "scope", "sizes"),
    [("linear up", "linear", (12, 9)), ("linear down", "shrunk", (3, 4))],
)
def test_bilinear_interpolation(model, out, first, name, scope, sizes):
    """The dots go from the smallest new axis to the largest."""
    q, scale = first
    within = model.input_scale(f"{scope}/bilinear_interp:1")
    order = sorted((1, 2), key=lambda axis: sizes[axis - 1])
    q = quantize(reference.interpolate(q, order[0], sizes[order[0] - 1]) * scale, within)
    expected = reference.interpolate(q, order[1], sizes[order[1] - 1]) * within
    found = integers(model, out, name)
    within_one_step(found, quantize(expected, model.input_scale(f"last/{name}")))


def test_trilinear_interpolation(model, out, first):
    """The result is a model output, so it is not rounded."""
    q, scale = first
    q = q[:, :4, :4, :, None]
    for axis, size, number in ((2, 2, ":1"), (3, 3, ":2"), (1, 8, "")):
        value = reference.interpolate(q, axis, size) * scale
        if number:
            scale = model.input_scale(f"volume/trilinear_interp{number}")
            q = quantize(value, scale)
    step = model.input_scale("volume/trilinear_interp:2")
    np.testing.assert_allclose(out["trilinear"], value, rtol=0, atol=1.01 * step)
    assert (np.abs(out["trilinear"] - value) < 1e-4).mean() > 0.9


def test_a_dot_of_two_activations(model, out, values):
    (site,) = (s.name for s in model.plan.sites if s.kind == "matmul")
    left, right = (model.input_scale(site, k) for k in (0, 1))
    lhs, rhs = quantize(values["left"], left), quantize(values["small"], right)
    total = np.einsum("nhwc,nvwc->nhwv", lhs, rhs)[..., :C] * left * right
    expected = quantize(total, model.input_scale("last/matmul"))
    np.testing.assert_array_equal(integers(model, out, "matmul"), expected)


@pytest.mark.parametrize(("name", "strides", "dilation", "groups"), CONVOLUTIONS)
def test_convolutions(model, out, first, params, name, strides, dilation, groups):
    kernel = np.asarray(params[name]["w"]).astype(np.int64)
    eqn = jax.make_jaxpr(
        lambda x: lax.conv_general_dilated(
            x, kernel.astype(np.float32), strides, SAME, lhs_dilation=dilation,
            feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    )(X).eqns[-1]  # fmt: skip
    keys = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    settings = {key: eqn.params[key] for key in keys}
    total = reference.conv(first[0], kernel, feature_group_count=groups, **settings) * first[1]
    expected = quantize(total, model.input_scale(f"last/{name}"))
    np.testing.assert_array_equal(integers(model, out, name), expected)
