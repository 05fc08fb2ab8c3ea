"""`qapply` under JAX's transformations, on every input that the model takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests import networks
from tests.networks import plain_net

pytestmark = pytest.mark.optimized

X = networks.images()


@pytest.fixture(scope="module")
def net():
    p = networks.plain_params()
    qparams, qapply = networks.quantize(p, plain_net, X)
    return p, qparams, qapply, np.asarray(qapply(qparams, X))


@pytest.fixture(scope="module")
def exact():
    """A dot whose int8 result is the float result, bit for bit."""
    params = {"w": networks.exact_weight((6, 5)), "b": networks.whole_numbers((5,))}
    x = networks.whole_numbers((4, 6))
    return networks.quantize(params, dot, x), params, x


def dot(p, x):
    return jax.nn.relu(x @ p["w"] + p["b"])


def assert_same(actual, expected):
    """The same up to float rounding, which may differ between programs and flip an int8 step."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.01)


def sqnr(reference, value):
    reference, value = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    return 10 * np.log10((reference**2).sum() / ((reference - value) ** 2).sum())


def test_other_batch_sizes_give_the_same_values(net):
    _, qparams, qapply, whole = net
    assert_same(qapply(qparams, X[:1]), whole[:1])
    assert_same(qapply(qparams, jnp.concatenate([X, X[:3]]))[:4], whole)


def test_another_image_size(net):
    p, qparams, qapply, _ = net
    x = networks.images(1, (2, 12, 9, 3))
    assert sqnr(plain_net(p, x), qapply(qparams, x)) > 20


def test_jit_nested_jit_and_donation(net):
    _, qparams, qapply, expected = net
    assert_same(jax.jit(qapply)(qparams, X), expected)
    inner = jax.jit(lambda q, x: jax.jit(qapply)(q, x * 1))
    assert_same(jax.jit(inner)(qparams, X), expected)
    donating = jax.jit(lambda q, x: (qapply(q, x), x + 1), donate_argnums=1)
    assert_same(donating(qparams, jnp.array(X))[0], expected)


def test_vmap_over_inputs(net):
    _, qparams, qapply, expected = net
    each = jax.jit(jax.vmap(lambda x: qapply(qparams, x[None])[0]))(X)
    assert_same(each, expected)


def test_vmap_over_qparams(exact):
    (qparams, qapply), params, x = exact
    stacked = jax.tree.map(lambda *v: jnp.stack(v), qparams, qparams)
    out = jax.vmap(qapply, (0, None))(stacked, x)
    np.testing.assert_array_equal(out, np.stack([dot(params, x)] * 2))


def test_eval_shape(net):
    _, qparams, qapply, expected = net
    out = jax.eval_shape(qapply, qparams, jax.ShapeDtypeStruct((9, 8, 8, 3), jnp.float32))
    assert (out.shape, out.dtype) == ((9, 5), expected.dtype)
    structs = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), qparams)
    assert jax.eval_shape(qapply, structs, X).shape == expected.shape


def test_no_float_dot_or_convolution_is_left(net):
    """The whole model is int8: so is every convolution and dot of the program."""
    _, qparams, qapply, _ = net
    text = jax.jit(qapply.with_backend("xla")).lower(qparams, X).as_text()
    lines = [s for s in text.splitlines() if "dot_general" in s or "stablehlo.convolution" in s]
    assert len(lines) >= 3  # a small depthwise convolution runs as multiply-adds
    for line in lines:
        types = line[line.rindex(":") :]
        assert types.count("xi8>") == 2, line
        assert types.rindex("xi32>") > types.rindex("xi8>"), line


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


def test_inputs_that_are_sharded_over_devices(net, mesh):
    _, qparams, qapply, expected = net
    sharded = jax.device_put(X, NamedSharding(mesh, P("data")))
    weights = jax.device_put(qparams, NamedSharding(mesh, P()))
    out = qapply(weights, sharded)
    assert_same(out, expected)
    assert len(out.sharding.device_set) == 4


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(net, mesh, check_vma):
    _, qparams, qapply, expected = net
    mapped = jax.shard_map(
        qapply, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma
    )
    assert_same(jax.jit(mapped)(qparams, X), expected)


@pytest.mark.parametrize(
    "check_vma",
    [
        pytest.param(
            True,
            marks=pytest.mark.xfail(
                raises=(ValueError, TypeError),
                reason="a recorded loop body has no varying axes; JAX's error says what to pass",
            ),
        ),
        False,
    ],
)
def test_shard_map_over_a_model_with_control_flow(mesh, check_vma):
    def apply_fn(p, x):
        y = jax.lax.scan(lambda c, w: (c + w, None), x @ p["w"], p["steps"])[0]
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * 2), (0, y))[1]

    params = {"w": networks.exact_weight((6, 5)), "steps": jnp.array([1.0, 2.0])}
    x = networks.whole_numbers((4, 6))
    qparams, qapply = networks.quantize(params, apply_fn, x)
    mapped = jax.shard_map(
        qapply, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma
    )
    np.testing.assert_array_equal(jax.jit(mapped)(qparams, x), apply_fn(params, x))


def test_weights_that_are_sharded_by_output_channel(exact, mesh):
    (qparams, qapply), _, x = exact
    params = {"w": networks.exact_weight((6, 8)), "b": networks.whole_numbers((8,))}
    qparams, qapply = networks.quantize(params, dot, x)
    qparams["params"]["w"]["int8"] = jax.device_put(
        qparams["params"]["w"]["int8"], NamedSharding(mesh, P(None, "data"))
    )
    np.testing.assert_array_equal(qapply(qparams, x), dot(params, x))


def test_inside_scan(exact):
    (qparams, qapply), params, x = exact
    out = jax.lax.scan(lambda c, row: (c, qapply(qparams, row[None])[0]), 0, x)[1]
    np.testing.assert_array_equal(out, dot(params, x))


def test_without_jit(net, exact):
    """Loops too, which JAX writes step by step there: another graph."""
    _, qparams, qapply, expected = net
    params = {"w": networks.exact_weight((6, 6))}

    def apply_fn(p, x):
        return jax.lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ p["w"]), x)

    with jax.disable_jit():
        assert_same(qapply(qparams, X), expected)
        looped, loop = networks.quantize(params, apply_fn, exact[2])
    with jax.disable_jit():
        assert_same(loop(looped, exact[2]), apply_fn(params, exact[2]))


def test_one_trace_and_one_compilation_per_input_shape(caplog):
    traces = []

    def apply_fn(p, x):
        traces.append(x.shape)
        return x @ p["w"]

    params, x = {"w": networks.exact_weight((6, 5))}, np.asarray(networks.whole_numbers((4, 6)))
    qparams, qapply = networks.quantize(params, apply_fn, x)
    traces.clear()
    for batch in (x, x[:2]):
        qapply(qparams, batch)
    with jax.log_compiles():
        for batch in (x + 1, x[:2], x):
            qapply(qparams, batch)
        assert not caplog.messages
        qapply(qparams, x[:3])
    assert any("compil" in message.lower() for message in caplog.messages)
    assert len(traces) <= 3


def test_integer_and_bool_inputs_beside_float_ones():
    def apply_fn(p, ids, mask, x):
        hidden = jnp.where(mask[:, None], p["embed"]["table"][ids] + x, 0.0)
        return {"scores": hidden @ p["fc"]["w"], "ids": ids, "mask": mask}

    params = {
        "embed": {"table": networks.exact_weight((9, 6))},
        "fc": {"w": networks.exact_weight((6, 3))},
    }
    ids = jnp.array([0, 3, 8, 3])  # each row holds 127, and its sum with x does not pass it
    mask, x = jnp.array([True, True, False, True]), jnp.zeros((4, 6))
    qparams, qapply = networks.quantize(params, apply_fn, ids, mask, x)
    jax.tree.map(
        np.testing.assert_array_equal, qapply(qparams, ids, mask, x), apply_fn(params, ids, mask, x)
    )
    stored = qparams["params"]["embed"]["table"]["int8"]
    np.testing.assert_array_equal(stored, params["embed"]["table"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_models(dtype):
    """The epilogue is float32; the output has the model's dtype."""
    params = {"w": networks.exact_weight((6, 5)), "b": networks.whole_numbers((5,))}
    params = jax.tree.map(lambda v: (v / 64).astype(dtype), params)
    x = networks.whole_numbers((4, 6)).astype(dtype)
    qparams, qapply = networks.quantize(params, dot, x)
    out = qapply(qparams, x)
    assert out.dtype == dtype
    assert {v.dtype.name for v in jax.tree.leaves(qparams)} == {"int8", "float32"}
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (params, x))
    np.testing.assert_array_equal(out, dot(*wide).astype(dtype))


def test_numpy_inputs_and_pytree_inputs():
    params, x = {"w": networks.exact_weight((6, 5))}, networks.whole_numbers((4, 6))

    def apply_fn(p, batch):
        return batch["x"] @ p["w"] + batch["shift"][0]

    inputs = {"x": x, "shift": (jnp.float32(2), None)}
    qparams, qapply = networks.quantize(params, apply_fn, inputs)
    out = qapply(qparams, jax.tree.map(np.asarray, inputs))
    np.testing.assert_array_equal(out, apply_fn(params, inputs))


def test_qparams_pass_through_numpy(exact):
    (qparams, qapply), params, x = exact
    np.testing.assert_array_equal(qapply(jax.tree.map(np.asarray, qparams), x), dot(params, x))


@pytest.mark.parametrize("what", ["dot", "model"])
def test_export_with_a_symbolic_batch(exact, net, what):
    if what == "dot":
        (qparams, qapply), params, x = exact
        expected = dot(params, x)
    else:
        _, qparams, qapply, expected = net
        x = X
    batch = jax.export.symbolic_shape("b, ...", like=x.shape)
    exported = jax.export.export(jax.jit(qapply))(
        jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), qparams),
        jax.ShapeDtypeStruct(batch, x.dtype),
    )
    assert_same(exported.call(qparams, x), expected)
    assert_same(exported.call(qparams, x[:2]), expected[:2])


def test_an_export_round_trips_through_bytes(exact):
    pytest.importorskip("flatbuffers")
    (qparams, qapply), params, x = exact
    exported = jax.export.export(jax.jit(qapply))(qparams, x)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(qparams, x), dot(params, x))
