"""Where int8 starts and stops, and which tensors share a scale."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.plan.plan import VERSION, Plan
from tests import networks
from tests.plan import full

C = 4
X = jnp.ones((2, 6, 6, C))
PARAMS = {name: {"w": jnp.ones((C, C))} for name in "abcd"}


def dot(p, name, x):
    return x @ p[name]["w"]


def plan_of(apply_fn, *inputs, params=PARAMS, **config) -> Plan:
    return full.plan_of(apply_fn, params, *(inputs or (X,)), **config)


def groups(plan: Plan) -> dict[str, str]:
    """Quantized tensor -> its scale group."""
    return {tensor.name: tensor.family for tensor in plan.tensors}


def sites(plan: Plan) -> dict[str, tuple[str, str]]:
    return {site.name: (site.status, site.reason) for site in plan.sites}


def test_the_members_of_a_concatenation_share_one_scale():
    def apply_fn(p, x):
        branches = [jnp.sin(dot(p, name, x)) for name in "abc"]
        return dot(p, "d", jnp.concatenate(branches, -1)[..., :C])

    found = groups(plan_of(apply_fn))
    assert found == {
        "a/input": "a/input",
        "concat/input": "concat/input",
        "concat/input_1": "concat/input",
        "concat/input_2": "concat/input",
    }


def test_a_group_takes_the_threshold_of_all_its_members():
    def apply_fn(p, x):
        return jnp.concatenate([x, x * 4.0], -1) @ p["w"]

    x = networks.whole_numbers((3, C))
    model = full.quantize(apply_fn, {"w": 127 * jnp.eye(2 * C)}, x)
    assert set(model.scale.values()) == {4.0}
    rounded = np.rint(x / 4) * 4  # what the product by a scalar, an elementwise operation, reads
    scaled = np.clip(rounded * 4, -508, 508)
    np.testing.assert_array_equal(model(x), 127 * np.concatenate([rounded, scaled], -1))


def test_a_relu_of_a_tensor_that_is_int8_by_selection_keeps_its_scale():
    def apply_fn(p, x):
        y = jnp.concatenate([dot(p, "a", x), dot(p, "b", x)], -1)
        return jax.nn.relu(y) @ jnp.concatenate([p["a"]["w"], p["b"]["w"]], 0)

    plan = plan_of(apply_fn)
    assert {t.name for t in plan.tensors} == {"a/input", "concat/input", "concat/input_1"}
    assert len({t.family for t in plan.tensors}) == 2


def test_a_skipped_rearrangement_hands_no_int8_through():
    def apply_fn(p, x):
        y = dot(p, "a", x)
        return dot(p, "b", y.transpose(1, 0, 2, 3)), dot(p, "a", y)

    assert set(groups(plan_of(apply_fn))) == {"a/input", "b/input"}
    plan = plan_of(apply_fn, skip=("kind:transpose",))
    assert sites(plan)["transpose"] == ("float", "skip='kind:transpose'")
    assert set(groups(plan)) == {"a/input", "b/input", "b/input:moved"}


def test_concatenations_that_share_a_member_are_one_group():
    def apply_fn(p, x):
        a, b, c = (jnp.sin(dot(p, name, x)) for name in "abc")
        return jnp.concatenate([a, b], 1) @ p["d"]["w"], jnp.concatenate([b, c], 0) @ p["d"]["w"]

    found = groups(plan_of(apply_fn))
    assert len({found[f"concat{n}"] for n in ("/input", "/input_1", ":1/input_1")}) == 1


def test_max_pooling_and_a_chain_of_layout_operations_keep_the_scale():
    def apply_fn(p, x):
        y = jax.nn.relu(dot(p, "a", x))
        y = nn.max_pool(y, (2, 2), (2, 2))
        y = jnp.pad(y.transpose(0, 2, 1, 3), ((0, 0), (1, 0), (0, 0), (0, 0)))[:, 1:, ::-1]
        y = jax.image.resize(y, (2, 6, 6, C), "nearest").reshape(2, 36, C)[:, jnp.array([0, 5])]
        return dot(p, "b", jnp.squeeze(y[:, :1], 1))

    plan = plan_of(apply_fn)
    assert groups(plan) == {"a/input": "a/input", "pool2d/input": "pool2d/input"}
    assert {status for status, _ in sites(plan).values()} == {"int8"}
    kinds = {site.kind for site in plan.sites}
    assert kinds >= {"pool2d", "transpose", "pad", "slice", "nearest_interp", "reshape", "gather"}
    (last,) = (site for site in plan.sites if site.name == "b")
    assert last.inputs == ("pool2d/input",)


def test_two_int8_consumers_read_one_quantized_tensor():
    def apply_fn(p, x):
        y = jnp.sin(dot(p, "a", x))
        return dot(p, "b", y), dot(p, "c", y), y.max((1, 2)), jnp.argmax(y, -1)

    plan = plan_of(apply_fn)
    assert groups(plan) == {"a/input": "a/input", "b/input": "b/input"}
    assert {site.inputs for site in plan.sites[1:]} == {("b/input",)}


def test_an_addition_is_fused_with_the_convolution_before_it():
    """The convolution's own output is never int8; the branch around it is, once."""

    def apply_fn(p, x):
        y = jax.nn.relu(dot(p, "a", x))
        branch = dot(p, "c", jax.nn.relu(dot(p, "b", y)))
        return dot(p, "d", jax.nn.relu(y + branch))

    plan = plan_of(apply_fn)
    assert set(groups(plan)) == {"a/input", "b/input", "c/input", "d/input"}
    (add,) = (site for site in plan.sites if site.kind == "elementwise_add")
    assert add.inputs == ("b/input",)
    binding = full.binding_of(apply_fn, PARAMS, X)
    (site,) = (s for s in binding.sites if s.site.name == "c")
    assert site.epilogue.output not in binding.forms.int8


def test_of_two_accumulators_in_one_addition_the_earlier_is_int8():
    def apply_fn(p, x):
        return dot(p, "d", dot(p, "a", x) + dot(p, "b", jnp.sin(x)))

    plan = plan_of(apply_fn)
    added = set(groups(plan)) - {"a/input", "b/input", "d/input"}
    assert len(added) == 1
    binding = full.binding_of(apply_fn, PARAMS, X)
    outputs = {s.site.name: s.epilogue.output for s in binding.sites}
    assert outputs["a"] in binding.forms.int8
    assert outputs["b"] not in binding.forms.int8


def test_an_accumulator_that_others_read_too_is_int8():
    def apply_fn(p, x):
        y = dot(p, "b", x)
        return dot(p, "c", y + jnp.sin(dot(p, "a", x))), y.max((1, 2))

    binding = full.binding_of(apply_fn, PARAMS, X)
    outputs = {s.site.name: s.epilogue.output for s in binding.sites}
    assert outputs["b"] in binding.forms.int8


def test_without_elementwise_kinds_an_addition_reads_floats():
    def apply_fn(p, x):
        return dot(p, "b", x + jnp.sin(dot(p, "a", x)))

    kinds = ("mul", "pool2d")
    plan = plan_of(apply_fn, is_full_quantize=False, quantizable_op_type=kinds)
    assert set(groups(plan)) == {"a/input", "b/input"}
    assert all("elementwise_add" not in site.kind for site in plan.sites)


def local_response_normalisation(x):
    squares = lax.reduce_window(x * x, 0.0, lax.add, (1, 1, 1, 3), (1, 1, 1, 1), "SAME")
    return x / (1.0 + 1e-4 * squares) ** 0.75


def response_normalisation_by_slices(x):
    padded = jnp.pad(x * x, ((0, 0),) * (x.ndim - 1) + ((1, 1),))
    squares = sum(padded[..., k : k + x.shape[-1]] for k in range(3))
    return x / (1.0 + 1e-4 * squares) ** 0.75


NORMALISATIONS = {
    "LayerNorm": lambda x: nn.LayerNorm().apply(
        {"params": {"scale": jnp.ones(C), "bias": jnp.ones(C)}}, x
    ),
    "by hand": lambda x: (
        (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    ),
    "RMSNorm": lambda x: x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6),
    "LRN": local_response_normalisation,
    "LRN by slices": response_normalisation_by_slices,
    "two LRNs": lambda x: response_normalisation_by_slices(response_normalisation_by_slices(x)),
    "instance norm": lambda x: (x - x.mean((1, 2), keepdims=True)) * 2.0,
}


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_a_normalisation_has_no_int8_form_and_its_neighbours_have(name):
    def apply_fn(p, x):
        return dot(p, "b", NORMALISATIONS[name](jax.nn.relu(dot(p, "a", x))))

    plan = plan_of(apply_fn)
    assert set(groups(plan)) == {"a/input", "b/input"}
    assert sites(plan)["a"] == sites(plan)["b"] == ("int8", "")
    assert not any(s.kind in ("mean", "pool2d") and s.status == "int8" for s in plan.sites)


def test_a_layout_operation_between_float_operations_stays_float():
    def apply_fn(p, x):
        y = jnp.sin(dot(p, "a", x)).transpose(0, 2, 1, 3)
        return jnp.cumsum(y, 1)

    plan = plan_of(apply_fn)
    assert sites(plan)["transpose"] == ("float", "between float operations")
    assert set(groups(plan)) == {"a/input"}


def test_a_float_consumer_does_not_make_its_int8_siblings_float():
    """A cumulative sum has no int8 form; it reads the float tensor beside the int8 dot."""

    def apply_fn(p, x):
        y = jnp.sin(dot(p, "a", x))
        return dot(p, "b", y), jnp.cumsum(y, 1), y.transpose(0, 2, 1, 3), y.max((1, 2))

    plan = plan_of(apply_fn)
    assert {name for name, s in sites(plan).items() if s[0] == "int8"} == {"a", "b", "pool2d"}
    assert sites(plan)["transpose"] == ("float", "between float operations")
    assert groups(plan) == {"a/input": "a/input", "b/input": "b/input"}


def test_a_layout_operation_is_int8_where_an_elementwise_one_reads_it():
    def apply_fn(p, x):
        y = jnp.sin(dot(p, "a", x))
        return dot(p, "b", y[:, 1:]), y[:, :5] + x[:, 1:]

    plan = plan_of(apply_fn)
    assert {name for name, s in sites(plan).items() if s[0] == "int8"} >= {"slice", "slice:1"}


def test_inputs_that_are_read_as_they_are_and_outputs_that_are_int8_tensors():
    def apply_fn(p, x, other):
        pooled = nn.max_pool(x, (2, 2), (2, 2))
        return pooled, dot(p, "a", pooled), x, other + x, jnp.concatenate([x, other], -1)

    inputs = networks.whole_numbers((2, 6, 6, C)), 2 * networks.whole_numbers((2, 6, 6, C), 1)
    model = full.quantize(apply_fn, {"a": {"w": 127 * jnp.eye(C)}}, *inputs)
    assert len(set(groups(model.plan).values())) == 2  # no int8 site reads the concatenation
    pooled, product, same, total, joined = model(*inputs)
    x, other = np.asarray(inputs[0]), np.asarray(inputs[1])
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(total, x + other)
    np.testing.assert_array_equal(joined, np.concatenate([x, other], -1))
    expected = x.reshape(2, 3, 2, 3, 2, C).max((2, 4))
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_array_equal(product, 127 * expected)


def average(x):
    return (
        lax.reduce_window(x, np.zeros((), x.dtype), lax.add, (1, 3, 3, 1), (1,) * 4, "SAME") / 9.0
    )


def residual_net(p, x):
    y = nn.max_pool(jax.nn.relu(networks.conv(x, p["stem"])), (3, 3), (2, 2), "SAME")
    z = networks.conv(jax.nn.relu(networks.conv(y, p["one"])), p["two"])
    y = jnp.concatenate([jax.nn.relu(y + z), average(y)], -1)
    return y.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


def residual_params():
    shapes = {"stem": (3, 3, 3, 8), "one": (1, 1, 8, 8), "two": (3, 3, 8, 8), "head": (16, 5)}
    return {
        name: {"kernel": networks.images(n, shape) * 0.3, "bias": networks.images(n, shape[-1:])}
        for n, (name, shape) in enumerate(shapes.items())
    }


def test_the_plan_survives_json_and_is_hashable():
    params = residual_params()
    plan = full.plan_of(residual_net, params, networks.images())
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert {plan: 1}[again] == 1
    other = full.plan_of(residual_net, params, networks.images(), skip=("stem",))
    assert other != plan
    with pytest.raises(ValueError, match="plan version 0; this release reads"):
        Plan.from_json(plan.to_json().replace(f'"version": {VERSION}', '"version": 0'))


def test_other_batch_and_image_sizes():
    params, x = residual_params(), networks.images(0, (4, 8, 8, 3))
    model = full.quantize(residual_net, params, x)
    whole = model(x)
    np.testing.assert_allclose(model(x[:1]), whole[:1], rtol=0, atol=0.05)
    for shape in ((2, 12, 9, 3), (1, 5, 5, 3)):
        other = networks.images(1, shape)
        expected = np.asarray(residual_net(params, other), np.float64)
        noise = model(other) - expected
        assert 10 * np.log10((expected**2).sum() / (noise**2).sum()) > 15


def test_a_graph_that_differs_for_another_shape_is_refused():
    def apply_fn(p, x):
        return dot(p, "a", nn.max_pool(x, (2, 2), (2, 2)) if x.shape[1] == 6 else x)

    model = full.quantize(apply_fn, PARAMS, X)
    with pytest.raises(ValueError, match="another graph than the one that was quantized"):
        model(X[:, :4])


def test_a_half_precision_model_has_the_plan_of_the_float32_one():
    params = residual_params()
    x = networks.images()
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (params, x))
    plan, expected = full.plan_of(residual_net, *half), full.plan_of(residual_net, params, x)
    assert groups(plan) == groups(expected)
    assert sites(plan) == sites(expected)


def test_a_half_precision_model_runs_in_int8():
    def apply_fn(p, x):
        y = nn.max_pool(x, (2, 2), (2, 2))
        return jnp.concatenate([y, y * 0.5], -1) @ p["w"]

    params = {"w": 127 * jnp.eye(2 * C, dtype=jnp.bfloat16)}
    x = networks.whole_numbers((2, 4, 4, C)).astype(jnp.bfloat16)
    model = full.quantize(apply_fn, params, x)
    out = model(x)
    assert out.dtype == jnp.bfloat16
    pooled = np.asarray(x, np.float32).reshape(2, 2, 2, 2, 2, C).max((2, 4))
    expected = 127 * np.concatenate([pooled, np.rint(pooled / 2)], -1)
    np.testing.assert_array_equal(out, jnp.asarray(expected).astype(jnp.bfloat16))
    assert {v.dtype.name for v in jax.tree.leaves(model.qparams)} == {"int8", "float32"}


def test_a_shared_weight_is_stored_once_and_its_uses_have_scales_of_their_own():
    def apply_fn(p, x):
        y = jax.nn.relu(dot(p, "a", x))
        return dot(p, "a", nn.max_pool(y, (2, 2), (2, 2)))

    params = {"a": {"w": networks.exact_weight((C, C))}}
    x = networks.whole_numbers((2, 4, 4, C))
    model = full.quantize(apply_fn, params, x)
    assert set(model.qparams["params"]["a"]["w"]) == {"int8", "scale"}
    assert len(groups(model.plan)) == 2
    scale = model.scale["pool2d/input"]
    y = np.clip(np.rint(np.maximum(np.asarray(x) @ params["a"]["w"], 0) / scale), -127, 127)
    pooled = y.reshape(2, 2, 2, 2, 2, C).max((2, 4))
    np.testing.assert_array_equal(model(x), pooled @ params["a"]["w"] * scale)


@pytest.mark.parametrize("shared", [False, True])
def test_a_divisor_is_not_rounded_to_zero(shared):
    """Not even where it is int8 for a dot beside the division."""

    def apply_fn(p, x, y):
        divided = dot(p, "b", dot(p, "a", x) / y)
        return (divided, dot(p, "c", y)) if shared else (divided, y)

    y = jnp.full((2, C), 0.01).at[0, 0].set(127.0)
    model = full.quantize(apply_fn, PARAMS, jnp.ones((2, C)), y)
    out = model(jnp.ones((2, C)), y)
    assert np.isfinite(out[0]).all()
    expected = np.asarray(apply_fn(PARAMS, jnp.ones((2, C)), y)[0])
    np.testing.assert_allclose(out[0], expected, rtol=0, atol=0.02 * expected.max())
    assert set(groups(model.plan)) == {"a/input", "b/input", *(["c/input"] if shared else [])}
