import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import FrozenDict

from tests import networks
from tests.networks import find, site_names

X = jnp.ones((4, 6))


def linen_sites(module, *inputs, **kwargs):
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return find(lambda p, *xs: module.apply(p, *xs, **kwargs), params, *inputs)


def attention(p, x):
    q, k, v = (jnp.einsum("bsd,dhe->bshe", x, p[name]) for name in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ p["out"]


def attention_params(lead=()):
    shapes = dict.fromkeys(("query", "key", "value"), (8, 2, 4)) | {"out": (8, 8)}
    return {name: jnp.ones((*lead, *shape)) for name, shape in shapes.items()}


def blocks(p, x):
    for block in p["params"]["blocks"]:
        x = attention(block["attention"], x)
    return x


def scanned_blocks(p, x):
    step = lambda x, block: (attention(block, x), None)  # noqa: E731
    return jax.lax.scan(step, x, p["blocks"]["attention"])[0]


def test_products_in_plain_functions_are_named_after_the_layer_they_are_in():
    params = {"params": {"blocks": [{"attention": attention_params()}] * 2}}
    products = [s for s in find(blocks, params, jnp.ones((2, 5, 8))) if s.kind == "matmul"]
    assert [site.name for site in products] == [
        f"blocks/{number}/attention/{scope}/matmul"
        for number in range(2)
        for scope in ("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd")
    ]
    scanned = {"blocks": {"attention": attention_params((3,))}}
    products = [s for s in find(scanned_blocks, scanned, jnp.ones((2, 5, 8))) if not s.weight_path]
    assert products[0].name == "blocks/attention/bqhd,bkhd->bhqk/matmul"


def test_products_of_a_cache_in_a_loop_are_named_after_what_fills_it():
    def decode(p, x):
        def step(carry, row):
            query, key = row @ p["params"]["block"]["query"], row @ p["params"]["block"]["key"]
            cache = jnp.concatenate([carry[1:], key[None]])
            return cache, jax.nn.softmax(cache @ query)

        return jax.lax.scan(step, jnp.zeros((4, 8)), x)[1]

    params = {"params": {"block": {name: jnp.ones((8, 8)) for name in ("query", "key")}}}
    (product,) = (s for s in find(decode, params, jnp.ones((5, 8))) if s.kind == "matmul")
    assert product.name == "block/matmul"


def test_products_of_nnx_are_in_their_modules():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attend = nnx.MultiHeadAttention(2, 8, 8, 8, decode=False, rngs=rngs)

        def __call__(self, x):
            return self.attend(x)

    graphdef, params = nnx.split(Block(nnx.Rngs(0)))
    found = find(lambda p, x: nnx.merge(graphdef, p)(x), params, jnp.ones((2, 5, 8)))
    products = [site for site in found if site.kind == "matmul"]
    assert all(site.name.startswith("attend/") for site in products)
    assert products[0].modules == ("Block", "MultiHeadAttention")


@pytest.mark.parametrize("wrap", [nn.Dense, nn.remat(nn.Dense)], ids=["plain", "remat"])
def test_nested_linen_names_are_parameter_paths(wrap):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return wrap(6, name="fc")(x) + x

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return wrap(3, name="head")(Block(name="b2")(Block(name="b1")(x)))

    assert [s.name for s in linen_sites(Net(), X)] == ["b1/fc", "b2/fc", "head"]


PYTREES = {
    "dict": ({"a": {"w": jnp.ones((6, 6))}, "b": {"w": jnp.ones((6, 3))}},
             lambda p: (p["a"]["w"], p["b"]["w"]), ["a", "b"]),
    "FrozenDict": (FrozenDict({"a": {"w": jnp.ones((6, 6))}, "b": {"w": jnp.ones((6, 3))}}),
                   lambda p: (p["a"]["w"], p["b"]["w"]), ["a", "b"]),
    "haiku": ({"mlp/~/a": {"w": jnp.ones((6, 6))}, "mlp/~/b": {"w": jnp.ones((6, 3))}},
              lambda p: tuple(v["w"] for v in p.values()), ["mlp/~/a", "mlp/~/b"]),
    "flat dict": ({"w1": jnp.ones((6, 6)), "w2": jnp.ones((6, 3))}, lambda p: (p["w1"], p["w2"]),
                  ["w1", "w2"]),
    "two weights in one module": ({"ffn": {"up": jnp.ones((6, 6)), "down": jnp.ones((6, 3))}},
                                  lambda p: (p["ffn"]["up"], p["ffn"]["down"]),
                                  ["ffn/up", "ffn/down"]),
    "list of tuples": ([(jnp.ones((6, 6)), jnp.ones(6)), (jnp.ones((6, 3)), jnp.ones(3))],
                       lambda p: (p[0][0], p[1][0]), ["0", "1"]),
    "tuple": ((jnp.ones((6, 6)), jnp.ones((6, 3))), lambda p: p, ["0", "1"]),
    "one array": (jnp.ones((6, 6)), lambda p: (p, p[:, :3]), ["param", "param:1"]),
    "dataclasses": (networks.Mlp([networks.Layer(jnp.ones((6, 6)), jnp.ones(6)),
                                  networks.Layer(jnp.ones((6, 3)), jnp.ones(3))]),
                    lambda p: tuple(layer.weight for layer in p.layers), ["layers/0", "layers/1"]),
}  # fmt: skip


@pytest.mark.parametrize(("params", "weights", "expected"), PYTREES.values(), ids=PYTREES)
def test_names_for_every_pytree_of_parameters(params, weights, expected):
    def apply_fn(p, x):
        for w in weights(p):
            x = x @ w
        return x

    assert site_names(apply_fn, params, X) == expected


def test_linen_nnx_and_plain_functions_name_a_network_alike():
    p, x = networks.plain_params(), networks.images()
    expected = ["stem", "depthwise", "point", "head"]
    graphdef, state = nnx.split(networks.nnx_model(p))
    assert site_names(networks.plain_net, p, x) == expected
    assert site_names(networks.LinenNet().apply, networks.linen_variables(p), x) == expected
    assert site_names(lambda s, v: nnx.merge(graphdef, s)(v), state, x) == expected


def test_a_weight_that_is_used_again_gets_a_number():
    params = {"fc": {"w": jnp.ones((6, 6))}}
    assert site_names(lambda p, x: x @ p["fc"]["w"] @ p["fc"]["w"].T, params, X) == ["fc", "fc:1"]


def test_a_closed_over_weight_is_a_constant():
    w = jax.random.normal(jax.random.key(0), (6, 3))
    (site,) = find(lambda p, x: (x * p) @ w, jnp.ones(6), X)
    assert (site.kind, site.weight_path) == ("mul", "constant_0")


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (7, 8, 8, 3), (2, 16, 12, 3)])
def test_names_and_kinds_do_not_depend_on_the_batch_or_image_size(shape):
    p = networks.plain_params()
    found = [(s.name, s.kind) for s in find(networks.plain_net, p, jnp.zeros(shape))]
    assert found == [(s.name, s.kind) for s in find(networks.plain_net, p, networks.images())]


def test_named_scopes_are_in_the_sites_scope():
    def apply_fn(p, x):
        with jax.named_scope("skip_quant"):
            return x @ p

    (site,) = find(apply_fn, jnp.ones((6, 3)), X)
    assert "skip_quant" in site.scope.split("/")
