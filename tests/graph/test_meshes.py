"""`shard_map` inside a model: what its devices compute beside each other, in int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant
from jaxquant.graph import meshes
from tests import networks

X = jax.random.normal(jax.random.key(0), (8, 12))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "up": {"w": jax.random.normal(keys[0], (12, 32)) / 4, "b": jnp.linspace(-1.0, 1.0, 32)},
        "down": {"w": jax.random.normal(keys[1], (32, 12)) / 6, "b": jnp.linspace(0.0, 1.0, 12)},
    }


def plain(p, x):
    return jax.nn.relu(x @ p["up"]["w"] + p["up"]["b"]) @ p["down"]["w"] + p["down"]["b"]


def over(mesh, check_vma=True):
    """The same with its channels split over the mesh, and the batch too."""

    def body(x, w, b, v):
        return jax.lax.psum(jax.nn.relu(x @ w + b) @ v, "model")

    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(P("data"), P(None, "model"), P("model"), P("model")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    return lambda p, x: mapped(x, p["up"]["w"], p["up"]["b"], p["down"]["w"]) + p["down"]["b"]


def every_collective(x, w, v):
    here = jax.lax.axis_index("model")
    hidden = jnp.tanh(x @ w + here.astype(x.dtype))
    hidden, _ = jax.lax.scan(
        lambda c, s: (jnp.sin(c * s) + jax.lax.pmean(c, "model"), None), hidden, jnp.ones(2)
    )
    y = jax.lax.psum((hidden @ v).T, ("model",)).T
    y += jax.lax.all_gather(x, "model", tiled=True)[: x.shape[0], :1]
    y += jax.lax.ppermute(y, "data", [(0, 1), (1, 0)]) - jax.lax.pmax(hidden.max(), "data")
    y += jax.lax.psum_scatter(hidden, "model", scatter_dimension=1, tiled=True)[:, :1]
    y += jax.lax.all_to_all(hidden, "model", 1, 1, tiled=True)[:, :1]
    y = jax.lax.cond(here > 0, lambda y: y + 1, lambda y: y - 1, y)
    return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * 2), (0, y))[1]


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_devices_beside_each_other_compute_what_they_compute_apart(mesh, params, check_vma):
    mapped = jax.shard_map(
        every_collective,
        mesh=mesh,
        in_specs=(P("data"), P(None, "model"), P("model")),
        out_specs=P(("data", "model")),
        check_vma=check_vma,
    )
    args = X, params["up"]["w"], params["down"]["w"]
    (eqn,) = jax.make_jaxpr(mapped)(*args).eqns
    (beside,) = jaxpr_as_fun(meshes.as_batches(eqn))(*args)
    np.testing.assert_allclose(np.asarray(beside), np.asarray(mapped(*args)), rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2)])
def test_integers_and_scales_are_those_of_one_device(params, sizes):
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    wanted, apart = networks.quantize(params, plain, X)
    qparams, qapply = networks.quantize(params, over(mesh), X)
    assert [(s.name, s.status) for s in qapply.plan.sites] == [("up", "int8"), ("down", "int8")]
    assert qapply.plan.tensors == apart.plan.tensors
    up, down = (qparams["params"][name]["w"]["int8"] for name in ("up", "down"))
    assert up.shape == (sizes[1], 12, 32 // sizes[1])
    np.testing.assert_array_equal(
        up.transpose(1, 0, 2).reshape(12, 32), wanted["params"]["up"]["w"]["int8"]
    )
    np.testing.assert_array_equal(down.reshape(32, 12), wanted["params"]["down"]["w"]["int8"])
    np.testing.assert_array_equal(qapply(qparams, X), apart(wanted, X))


@pytest.mark.parametrize(
    "quantize",
    [
        lambda p, f: jaxquant.quant_dynamic(p, f, X, progress=False),
        lambda p, f: jaxquant.quant_weights(p, f, X, progress=False),
    ],
)
def test_other_modes_give_what_one_device_gives(mesh, params, quantize):
    (wanted, apart), (qparams, qapply) = quantize(params, plain), quantize(params, over(mesh))
    np.testing.assert_allclose(
        np.asarray(qapply(qparams, X)), np.asarray(apart(wanted, X)), rtol=1e-5, atol=1e-5
    )
    assert {site.status for site in qapply.plan.sites} == {"int8"}


def test_where_arrays_are_spread_each_device_multiplies_its_part(mesh, params):
    qparams, qapply = networks.quantize(params, over(mesh, check_vma=False), X)
    qapply = qapply.with_backend("xla")

    def place(value, *spec):
        return jax.device_put(value, NamedSharding(mesh, P(*spec)))

    spread = jax.tree.map(place, qparams)
    for name in ("up", "down"):
        entry = spread["params"][name]["w"]
        entry["int8"] = place(entry["int8"], "model")
    compiled = jax.jit(qapply).lower(spread, place(X, "data")).compile()
    np.testing.assert_array_equal(compiled(spread, place(X, "data")), qapply(qparams, X))
    text = compiled.as_text()
    assert "s32[1,4,12]" in next(line for line in text.splitlines() if " all-reduce(" in line)
    assert "all-gather(s8" not in text


def test_inside_and_around_a_scan(mesh, params):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x / 2]), params)

    def layer(x, w, b, v):
        return x + jax.lax.psum(jax.nn.relu(x @ w + b) @ v, "model")

    def deep(x, w, b, v):
        return jax.lax.scan(lambda x, each: (layer(x, *each), None), x, (w, b, v))[0]

    def mapped(function, *lead):
        specs = (P(*lead, None, "model"), P(*lead, "model"), P(*lead, "model"))
        return jax.shard_map(function, mesh=mesh, in_specs=(P("data"), *specs), out_specs=P("data"))

    def weights(p):
        return p["up"]["w"], p["up"]["b"], p["down"]["w"]

    def around(p, x):
        return jax.lax.scan(lambda x, each: (mapped(layer)(x, *each), None), x, weights(p))[0]

    def within(p, x):
        return mapped(deep, None)(x, *weights(p))

    found = [networks.quantize(stacked, function, X) for function in (around, within)]
    (one, _), (other, qapply) = found
    assert [site.name for site in qapply.plan.sites] == ["up", "down"]
    assert one["params"]["up"]["w"]["int8"].shape == (2, 2, 12, 16)
    jax.tree.map(np.testing.assert_array_equal, one["params"], other["params"])
    np.testing.assert_array_equal(*(qapply(qparams, X) for qparams, qapply in found))


def test_what_has_no_such_form_is_said_by_name(mesh, params):
    def groups(x, w):
        return jax.lax.psum(x @ w, "model", axis_index_groups=[[0], [1]])

    mapped = jax.shard_map(
        groups,
        mesh=mesh,
        in_specs=(P("data"), P(None, "model")),
        out_specs=P("data", "model"),
        check_vma=False,
    )
    _, qapply = networks.quantize(params, lambda p, x: mapped(x, p["up"]["w"]) @ p["down"]["w"], X)
    up, down = qapply.plan.sites
    assert up.reason.startswith(
        "inside shard_map, which runs in float: psum with axis_index_groups"
    )
    assert down.status == "int8"


def test_a_saved_model_needs_no_mesh(mesh, params, tmp_path):
    qparams, qapply = networks.quantize(params, over(mesh), X)
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"Give shapes=\.\.\. .* such as \"2\*b, \.\.\.\""):
        jaxquant.save_quantized_model(path, qparams, qapply, progress=False)
    jaxquant.save_quantized_model(path, qparams, qapply, shapes="2*b, ...", progress=False)
    loaded, apply = jaxquant.load_quantized_model(path)
    np.testing.assert_array_equal(apply(loaded, X[:6]), qapply(qparams, X[:6]))
