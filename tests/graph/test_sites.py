import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxquant.graph.model import trace_model
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.observed import observed_tensors
from tests import networks
from tests.networks import find, site_names

X = jnp.ones((4, 6))


def kinds(apply_fn, params, *inputs):
    return [site.kind for site in find(apply_fn, params, *inputs)]


def linen_sites(module, *inputs, **kwargs):
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return find(lambda p, *xs: module.apply(p, *xs, **kwargs), params, *inputs)


@pytest.mark.parametrize(
    ("dot", "weight"),
    [
        (lambda x, w: x @ w, (6, 5)),
        (jnp.matmul, (6, 5)),
        (jnp.dot, (6, 5)),
        (jnp.dot, (6,)),
        (lambda x, w: jnp.tensordot(x, w, 1), (6, 2, 3)),
        (lambda x, w: jnp.einsum("bi,oi->bo", x, w), (5, 6)),
        (lambda x, w: jnp.einsum("bi,hik->bhk", x, w), (2, 6, 3)),
        (lambda x, w: jnp.einsum("oi,bi->ob", w, x), (5, 6)),
        (lambda x, w: jnp.inner(x, w), (5, 6)),
        (lambda x, w: jnp.vdot(x, w), (4, 6)),
        (lambda x, w: x @ (w * 2).T.astype(jnp.float32), (5, 6)),
        (jax.vmap(jnp.dot, (0, None)), (6, 5)),
        (jax.vmap(jnp.dot), (4, 6)),
    ],
)
def test_a_dot_with_a_weight_is_a_mul(dot, weight):
    (site,) = find(lambda p, x: dot(x, p["fc"]["w"]), {"fc": {"w": jnp.ones(weight)}}, X)
    assert (site.kind, site.name, site.weight_path, site.inside) == ("mul", "fc", "fc/w", ())
    assert site.weight is not None


def test_a_dot_of_two_activations_is_a_matmul():
    (site,) = find(lambda p, x: (x * p) @ x.T, jnp.ones(6), X)
    assert (site.kind, site.name, site.weight) == ("matmul", "matmul", None)


def test_a_dot_of_parameters_alone_is_no_site():
    (site,) = find(lambda p, x: x @ (p["a"] @ p["b"]), {k: jnp.ones((6, 6)) for k in "ab"}, X)
    assert site.name == "a"  # named after the largest of the parameters behind the weight


@pytest.mark.parametrize(
    ("module", "shape", "kind"),
    [
        (nn.Conv(4, (3,)), (2, 9, 6), "conv2d"),
        (nn.Conv(4, (3, 3)), (2, 9, 9, 6), "conv2d"),
        (nn.Conv(4, (3, 3, 3)), (2, 5, 5, 5, 6), "conv2d"),
        (nn.Conv(4, (3, 3)), (9, 9, 6), "conv2d"),
        (nn.Conv(4, (3, 3), padding="CIRCULAR"), (2, 9, 9, 6), "conv2d"),
        (nn.Conv(4, (3,), padding="CAUSAL", kernel_dilation=2), (2, 9, 6), "conv2d"),
        (nn.Conv(4, (3, 3), feature_group_count=2), (2, 9, 9, 6), "conv2d"),
        (nn.Conv(12, (3, 3), feature_group_count=6), (2, 9, 9, 6), "depthwise_conv2d"),
        (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), (2, 5, 5, 6), "conv2d_transpose"),
        (nn.Dense(4), (2, 6), "mul"),
        (nn.DenseGeneral((2, 3)), (2, 6), "mul"),
        (nn.DenseGeneral(4, axis=(-2, -1)), (2, 3, 6), "mul"),
        (nn.DenseGeneral(4, batch_dims=(0,)), (2, 3, 6), "mul"),
        (nn.Einsum((6, 4), "bi,io->bo"), (2, 6), "mul"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_linen_modules(module, shape, kind):
    (site,) = linen_sites(module, jnp.ones(shape))
    assert (site.kind, site.name) == (kind, "kernel")  # the module is the whole model


def test_a_convolution_that_only_gathers_patches_is_a_site_too():
    """`nn.ConvLocal` gathers its patches with a convolution by a constant, then uses a dot."""
    found = linen_sites(nn.ConvLocal(4, (3,)), jnp.ones((2, 9, 6)))
    assert [s.kind for s in found] == ["depthwise_conv2d", "mul"]
    assert found[1].weight_path == "params/kernel"


def test_embed_attend_is_a_mul_with_the_embedding():
    module = nn.Embed(10, 6)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2,), jnp.int32))
    apply_fn = lambda p, x: module.apply(p, x, method="attend")  # noqa: E731
    (site,) = find(apply_fn, params, X)
    assert (site.kind, site.weight_path) == ("mul", "params/embedding")


def test_attention_projections_are_muls_and_products_are_matmuls():
    module = nn.MultiHeadDotProductAttention(num_heads=2, name=None)
    found = linen_sites(module, jnp.ones((2, 5, 8)))
    assert {s.name: s.kind for s in found if s.weight_path} == dict.fromkeys(
        ["query", "key", "value", "out"], "mul"
    )
    products = [s for s in found if not s.weight_path]
    assert [s.kind for s in products] == ["matmul", "matmul"]
    assert len({s.name for s in products}) == 2


def test_scanned_layers_are_sites_inside_scan():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(6, name="fc")(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return nn.Dense(2, name="head")(layers(name="layers")(x, None)[0])

    found = {s.name: (s.kind, s.inside) for s in linen_sites(Net(), X)}
    assert found == {"layers/fc": ("mul", ("scan",)), "head": ("mul", ())}


def _scan(w, x):
    return jax.lax.scan(lambda c, _: (c @ w, None), x, length=2)[0]


def _while(w, x):
    return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x)


def _while_cond(w, x):
    return jax.lax.while_loop(lambda c: (c @ w).sum() < 9, lambda c: c * 2, x)


def _fori(w, x):
    return jax.lax.fori_loop(0, 3, lambda _, c: c @ w, x)


def _cond(w, x):
    return jax.lax.cond(x.sum() > 0, lambda c: c @ w, lambda c: c, x)


def _switch(w, x):
    return jax.lax.switch(x.astype(jnp.int32)[0, 0], [lambda c: c @ w, lambda c: c], x)


def _nested(w, x):
    return jax.lax.scan(lambda c, _: (_cond(w, c), None), x, length=2)[0]


def _map(w, x):
    return jax.lax.map(lambda row: row @ w, x)


@pytest.mark.parametrize(
    ("loop", "inside"),
    [
        (_scan, ("scan",)),
        (_while, ("while",)),
        (_fori, ("scan",)),
        (_cond, ("cond",)),
        (_switch, ("cond",)),
        (_nested, ("scan", "cond")),
        (_map, ("scan",)),
    ],
)
def test_sites_inside_control_flow_are_found_with_their_weight(loop, inside):
    (site,) = find(lambda p, x: loop(p["fc"]["w"], x), {"fc": {"w": jnp.ones((6, 6))}}, X)
    assert (site.kind, site.name, site.inside) == ("mul", "fc", inside)
    assert site.output is None


def test_sites_in_the_test_of_a_loop_stand_before_it_and_in_its_body():
    found = find(lambda p, x: _while_cond(p["fc"]["w"], x), {"fc": {"w": jnp.ones((6, 6))}}, X)
    assert [(site.name, site.inside) for site in found] == [("fc", ()), ("fc:1", ("while",))]


def test_sites_inside_a_shard_map_are_found():
    mesh = jax.make_mesh((2,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def apply_fn(p, x):
        return jax.shard_map(jnp.dot, mesh=mesh, in_specs=(spec("b"), spec()), out_specs=spec("b"))(
            x, p["w"]
        )

    (site,) = find(apply_fn, {"w": jnp.ones((6, 3))}, X)
    assert (site.kind, site.name, site.inside) == ("mul", "w", ())


def test_a_body_that_is_traced_twice_for_custom_derivatives_counts_once():
    @jax.custom_vjp
    def dense(x, w):
        return x @ w

    dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    jvp = jax.custom_jvp(lambda x, w: x @ w)
    jvp.defjvp(lambda p, t: (jvp(*p), t[0] @ p[1]))
    names = site_names(
        lambda p, x: jvp(dense(x, p["a"]), p["b"]), {k: jnp.ones((6, 6)) for k in "ab"}, X
    )
    assert names == ["a", "b"]


def tensors(apply_fn, params, *inputs):
    return observed_tensors(trace_model(apply_fn, params, inputs), QuantConfig()).tensors


def test_tensors_that_cannot_be_quantized_are_not_observed():
    def apply_fn(p, x, ids):
        one_hot = jax.nn.one_hot(ids, 6, dtype=jnp.int32) @ p["ids"]  # not float
        products = (x @ x.T).sum()
        looped = jax.lax.fori_loop(0, 2, lambda _, c: c @ p["w"], x)
        return one_hot, products, looped @ p["head"]["w"]

    params = {
        "ids": jnp.ones((6, 2), jnp.int32),
        "w": jnp.ones((6, 6)),
        "head": {"w": jnp.ones((6, 2))},
    }
    assert list(tensors(apply_fn, params, X, jnp.arange(4))) == ["head/input"]


def test_unused_results_are_still_sites():
    """They are in the report; whether they run is another matter."""

    def apply_fn(p, x):
        x @ p["unused"]
        return x @ p["used"]

    params = {"used": jnp.ones((6, 2)), "unused": jnp.ones((6, 2))}
    assert site_names(apply_fn, params, X) == ["unused", "used"]


def test_kinds_of_a_convolution_whose_kernel_depends_on_the_inputs():
    def apply_fn(p, x, kernel):
        return networks.conv(x, {"kernel": kernel * p})

    (site,) = find(apply_fn, jnp.ones(()), jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4)))
    assert (site.kind, site.weight) == ("conv2d", None)


def test_readers_of_one_tensor_share_its_name():
    params = {k: {"w": jnp.ones((6, 6))} for k in ("q", "k", "v")}

    def apply_fn(p, x):
        return x @ p["q"]["w"], x.reshape(2, 2, 6) @ p["k"]["w"], p["v"]["w"] @ x.T

    assert list(tensors(apply_fn, params, X)) == ["q/input"]
