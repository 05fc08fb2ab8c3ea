"""`quant_post` end to end: every style of model, every form of convolution and dot."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import jaxquant
from jaxquant.graph.kinds import WEIGHTED_KINDS
from tests import networks
from tests.networks import exact_weight, rows, whole_numbers

X = whole_numbers((4, 6))


def assert_exact(params, apply_fn, *inputs, **config):
    """Whole numbers, which int8 holds: the int8 model gives the float model's bits."""
    qparams, qapply = networks.quantize(params, apply_fn, *inputs, **config)
    actual, expected = qapply(qparams, *inputs), apply_fn(params, *inputs)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    return qparams, qapply


def sqnr(reference, value):
    reference, value = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    return 10 * np.log10((reference**2).sum() / ((reference - value) ** 2).sum())


def test_linen_nnx_and_plain_functions_give_the_same_bits():
    p, x = networks.plain_params(), networks.images()
    graphdef, state = nnx.split(networks.nnx_model(p))
    styles = [
        (networks.plain_net, p),
        (networks.LinenNet().apply, networks.linen_variables(p)),
        (lambda s, v: nnx.merge(graphdef, s)(v), state),
    ]
    results, reports = [], []
    for apply_fn, params in styles:
        qparams, qapply = networks.quantize(params, apply_fn, x)
        results.append(np.asarray(qapply(qparams, x)))
        reports.append([(r["name"], r["kind"], r["status"]) for r in qapply.report().rows])
    assert reports[0] == [
        ("stem", "conv2d", "int8"),
        ("depthwise", "depthwise_conv2d", "int8"),
        ("point", "conv2d", "int8"),
        ("head", "mul", "int8"),
    ]
    assert reports[1] == reports[2] == reports[0]
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
    assert sqnr(networks.plain_net(p, x), results[0]) > 25


def test_quant_post_is_calibrate_then_quantize():
    params, batches = {"w": networks.plain_params()["head"]["kernel"]}, networks.images(0, (8, 12))
    apply_fn = lambda p, x: jax.nn.relu(x @ p["w"])  # noqa: E731
    samples = {"image": batches, "label": np.arange(8)}
    config = {"algo": "KL", "weight_quantize_type": "abs_max"}
    feed = {"batch_size": 4, "select": "image", "progress": False}
    qparams, qapply = jaxquant.quant_post(params, apply_fn, samples, **feed, **config)
    observations = jaxquant.calibrate(params, apply_fn, samples, **feed)
    again, _ = jaxquant.quantize(params, apply_fn, observations, **config)
    jax.tree.map(np.testing.assert_array_equal, qparams, again)
    assert qparams["params"]["w"]["scale"].shape == ()
    assert qapply.plan.algo == "KL"
    assert sqnr(apply_fn(params, batches), qapply(qparams, batches)) > 25


STYLES = {
    "FrozenDict": (FrozenDict({"fc": {"w": exact_weight((6, 5))}}),
                   lambda p, x: x @ p["fc"]["w"], ("fc", "w")),
    "list of tuples": ([(exact_weight((6, 5)), whole_numbers(5))],
                       lambda p, x: x @ p[0][0] + p[0][1], ("0", "0")),
    "one array": (exact_weight((6, 5)), lambda p, x: x @ p, ("param",)),
    "haiku": ({"mlp/~/linear": {"w": exact_weight((6, 5))}},
              lambda p, x: x @ p["mlp/~/linear"]["w"], ("mlp/~/linear", "w")),
    "dataclass": (networks.Layer(exact_weight((5, 6)), whole_numbers(5)),
                  lambda p, x: jax.vmap(p)(x), ("weight",)),
    "numpy": ({"w": np.asarray(exact_weight((6, 5)))}, lambda p, x: x @ p["w"], ("w",)),
}  # fmt: skip


@pytest.mark.parametrize(("params", "apply_fn", "path"), STYLES.values(), ids=STYLES)
def test_qparams_keep_the_paths_of_every_pytree(params, apply_fn, path):
    qparams, _ = assert_exact(params, apply_fn, X)
    leaf = qparams["params"]
    for key in path:
        leaf = leaf[key]
    assert leaf["int8"].dtype == jnp.int8
    assert type(qparams) is dict


@pytest.mark.usefixtures("numbers_as_they_are")
def test_every_form_of_dot_is_int8_and_exact():
    names = ["matmul", "at", "dot", "tensordot", "einsum", "weight_first", "vector", "scaled"]
    shapes = [(6, 5), (6, 5), (6,), (6, 2, 3), (2, 6, 3), (5, 6), (6,), (5, 6)]
    params = {n: {"w": exact_weight(s, i)} for i, (n, s) in enumerate(zip(names, shapes))}
    linen = {
        "dense": nn.Dense(5),
        "general": nn.DenseGeneral((2, 3)),
        "einsum_module": nn.Einsum((6, 4), "bi,io->bo"),
    }
    for name, module in linen.items():
        init = lambda m=module: m.init(jax.random.key(0), X)["params"]  # noqa: E731
        params[name] = networks.exact_params(init)
    embed = nn.Embed(10, 6)
    params["embed"] = {"embedding": exact_weight((10, 6))}

    def apply_fn(p, x):
        w = {name: p[name]["w"] for name in names}
        out = {name: m.apply({"params": p[name]}, x) for name, m in linen.items()}
        attend = embed.apply({"params": p["embed"]}, x, method="attend")
        return out | {
            "attend": attend,
            "matmul": jnp.matmul(x, w["matmul"]),
            "at": jax.nn.relu(x.reshape(2, 2, 6) @ w["at"]),
            "dot": jnp.dot(x, w["dot"]),
            "tensordot": jnp.tensordot(x, w["tensordot"], 1),
            "einsum": jnp.einsum("bi,hik->hbk", x, w["einsum"]) + 1,
            "weight_first": w["weight_first"] @ x.T,
            "vector": jax.vmap(lambda row: row @ w["vector"])(x),
            "scaled": x @ (w["scaled"].T * 2).astype(jnp.float32) - 3,
        }

    _, qapply = assert_exact(params, apply_fn, X)
    found = rows(qapply)
    assert set(found) == {*names, *linen, "embed"}
    assert {(r["kind"], r["status"]) for r in found.values()} == {("mul", "int8")}
    assert {r["sqnr_db"] for r in found.values()} == {float("inf")}


class Convs(nn.Module):
    @nn.compact
    def __call__(self, line, image, volume):
        return (
            nn.Conv(4, (3,), padding="CAUSAL", kernel_dilation=2, name="line")(line),
            nn.relu(nn.Conv(4, (3, 3), strides=(2, 1), name="image")(image)),
            nn.Conv(4, (3, 3), padding="CIRCULAR", name="circular")(image),
            nn.Conv(6, (3, 3), padding="VALID", feature_group_count=2, name="groups")(image),
            nn.Conv(12, (5, 3), feature_group_count=6, name="depthwise")(image),
            nn.Conv(4, (2, 2, 2), name="volume")(volume),
            nn.ConvTranspose(4, (3, 3), strides=(2, 2), name="up")(image),
        )


@pytest.fixture(scope="module")
def convs():
    shapes = [(2, 9, 6), (2, 7, 8, 6), (2, 4, 4, 4, 6)]
    inputs = [whole_numbers(shape, seed) for seed, shape in enumerate(shapes)]
    params = networks.exact_params(lambda: Convs().init(jax.random.key(0), *inputs))
    return params, inputs


def test_every_form_of_convolution_is_int8_and_exact(convs):
    params, inputs = convs
    _, qapply = assert_exact(params, Convs().apply, *inputs)
    found = rows(qapply)
    up = found.pop("up")
    assert (up["kind"], up["status"]) == ("conv2d_transpose", "float")
    assert up["reason"] == "'conv2d_transpose' is not in quantizable_op_type"
    kinds = {name: row["kind"] for name, row in found.items()}
    assert kinds.pop("depthwise") == "depthwise_conv2d"
    assert set(kinds.values()) == {"conv2d"}
    assert set(kinds) == {"line", "image", "circular", "groups", "volume"}
    assert {row["status"] for row in found.values()} == {"int8"}


def test_a_transposed_convolution_is_int8_when_it_is_listed(convs):
    params, inputs = convs
    _, qapply = assert_exact(params, Convs().apply, *inputs, quantizable_op_type=WEIGHTED_KINDS)
    assert {row["status"] for row in rows(qapply).values()} == {"int8"}


def test_attention_projections_are_int8_and_products_float():
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    x = networks.images(0, (2, 5, 8))
    params = networks.random_params(lambda: module.init(jax.random.key(0), x))
    qparams, qapply = networks.quantize(params, module.apply, x)
    found = rows(qapply)
    projections = {n: found.pop(n)["status"] for n in ("query", "key", "value", "out")}
    assert set(projections.values()) == {"int8"}
    assert len(found) == 2
    for row in found.values():
        assert (row["kind"], row["status"]) == ("matmul", "float")
        assert row["reason"] == "'matmul' is not in quantizable_op_type"
    assert sqnr(module.apply(params, x), qapply(qparams, x)) > 25


def loops(p, x):
    x = jax.nn.relu(x @ p["first"])
    x = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["scan"])[0]
    x = jax.lax.fori_loop(0, 2, lambda _, c: c @ p["fori"], x)
    x = jax.lax.cond(x.sum() > 0, lambda c: c @ p["cond"], lambda c: c * 2, x)
    x = jax.lax.while_loop(lambda c: jnp.abs(c).max() > 0.002, lambda c: c @ p["while"], x)
    x = jax.checkpoint(lambda c: jnp.tanh(c @ p["remat"]))(x)
    return x @ p["last"]


def test_sites_inside_loops_and_choices_are_int8():
    rng = np.random.default_rng(0)
    names = ["first", "scan", "fori", "cond", "while", "remat", "last"]
    params = {
        name: jnp.asarray(rng.normal(size=(2, 6, 6) if name == "scan" else (6, 6)) / 4, jnp.float32)
        for name in names
    }
    x = networks.images(0, (4, 6))
    qparams, qapply = jaxquant.quant_post(params, loops, [x], progress=False)
    found = rows(qapply)
    assert list(found) == names
    int8 = [name for name, row in found.items() if row["status"] == "int8"]
    assert int8 == names
    assert qparams["params"]["scan"]["int8"].shape == (2, 6, 6)
    assert qparams["params"]["scan"]["scale"].shape == (2, 6)
    assert qparams["params"]["fori"]["int8"].shape == (6, 6)
    assert qparams["sites"]["scan"]["multiplier"].shape == (2, 6)
    assert qparams["tensors"]["scan/input"]["scale"].shape == (2,)
    assert qparams["tensors"]["while/input"]["scale"].shape == ()
    assert sqnr(loops(params, x), qapply(qparams, x)) > 20


def test_a_branch_that_calibration_never_chose_stays_float():
    def apply_fn(p, x):
        x = x @ p["first"]
        return jax.lax.cond(x.sum() > 1e6, lambda c: c @ p["rare"], lambda c: c @ p["often"], x)

    params = {name: networks.images(k, (6, 6)) for k, name in enumerate(["first", "rare", "often"])}
    x = networks.images(0, (4, 6))
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], progress=False)
    found = rows(qapply)
    assert found["often"]["status"] == "int8"
    assert "no calibration batch chose its branch" in found["rare"]["reason"]
    np.testing.assert_array_equal(qparams["params"]["rare"], params["rare"])


def test_functions_with_their_own_derivatives_are_quantized():
    dense = jax.custom_vjp(lambda x, w: x @ w)
    dense.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, g))
    linear = jax.custom_jvp(lambda x, w: x @ w)
    linear.defjvp(lambda p, t: (linear(*p), t[0] @ p[1]))
    params = {"vjp": exact_weight((6, 5)), "jvp": exact_weight((6, 5), 1)}
    _, qapply = assert_exact(params, lambda p, x: (dense(x, p["vjp"]), linear(x, p["jvp"])), X)
    assert {name: row["status"] for name, row in rows(qapply).items()} == {
        "vjp": "int8",
        "jvp": "int8",
    }


def test_a_weight_of_two_sites_is_stored_once():
    params = {"w": exact_weight((6, 6))}
    qparams, qapply = assert_exact(params, lambda p, x: (x @ p["w"], (x * 1) @ p["w"]), X)
    assert set(rows(qapply)) == {"w", "w:1"}
    assert set(qparams["params"]["w"]) == {"int8", "scale"}


def test_a_weight_that_is_read_in_float_too_is_stored_once():
    params = {"w": exact_weight((6, 5))}
    qparams, _ = assert_exact(params, lambda p, x: (x @ p["w"], x[0, 0] + p["w"]), X)
    assert set(qparams["params"]["w"]) == {"int8", "scale"}


def test_what_is_skipped_runs_in_float_and_says_why():
    def apply_fn(p, x):
        a = jnp.tanh(x @ p["block"]["a"]["w"]) @ p["block"]["b"]["w"]
        with jax.named_scope("skip_quant"):
            b = x @ p["c"]["w"]
        return a + b + x @ p["d"]["w"]

    w = networks.images(0, (6, 6))
    params = {"block": {"a": {"w": w}, "b": {"w": w}}, "c": {"w": w}, "d": {"w": w}}
    _, qapply = networks.quantize(params, apply_fn, X, skip=("block/*",))
    found = {name: (row["status"], row["reason"]) for name, row in rows(qapply).items()}
    assert found == {
        "block/a": ("float", "skip='block/*'"),
        "block/b": ("float", "skip='block/*'"),
        "c": ("float", "inside jax.named_scope('skip_quant')"),
        "d": ("int8", ""),
    }


def test_a_tensor_that_is_all_zero_is_safe():
    params = {"w": exact_weight((6, 5))}
    assert_exact(params, lambda p, x: (x * 0) @ p["w"] + 1 + x @ p["w"], X)


def test_the_same_inputs_give_the_same_bits():
    p, x = {"w": networks.images(1, (6, 5))}, networks.images(0, (4, 6))
    apply_fn = lambda p, x: jax.nn.gelu(x @ p["w"])  # noqa: E731
    (one, qapply), (two, again) = (networks.quantize(p, apply_fn, x) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    np.testing.assert_array_equal(qapply(one, x), again(two, x))
