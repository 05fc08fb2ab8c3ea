"""`quant_dynamic` and `quant_weights` as users call them: names, skips, report, errors."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant
from jaxquant.plan.plan import Plan
from tests import networks
from tests.networks import rows

SHAPE = jax.ShapeDtypeStruct(networks.IMAGE, jnp.float32)
FUNCTIONS = {"dynamic": jaxquant.quant_dynamic, "weights": jaxquant.quant_weights}
both = pytest.mark.parametrize("quantize", FUNCTIONS.values(), ids=FUNCTIONS)
X = networks.images(0, (4, 12))
DENSE = {n: {"w": networks.images(i, s)} for i, (n, s) in
         enumerate({"a": (12, 6), "b": (6, 6), "c": (6, 3)}.items())}  # fmt: skip


def dense(p, x):
    x = jax.nn.relu(x @ p["a"]["w"])
    with jax.named_scope("skip_quant"):
        x = jax.nn.relu(x @ p["b"]["w"])
    return x @ p["c"]["w"]


@both
def test_linen_nnx_and_plain_functions_get_the_same_names(quantize):
    p = networks.plain_params()
    graphdef, state = nnx.split(networks.nnx_model(p))
    styles = [
        (networks.plain_net, p),
        (networks.LinenNet().apply, networks.linen_variables(p)),
        (lambda s, v: nnx.merge(graphdef, s)(v), state),
    ]
    found = [quantize(params, fn, SHAPE)[1].report().rows for fn, params in styles]
    assert [row["name"] for row in found[0]] == ["stem", "depthwise", "point", "head"]
    keys = ("name", "kind", "mode", "weight_scale_min", "weight_scale_max")
    first, *others = ([[row[k] for k in keys] for row in r] for r in found)
    assert others == [first, first]
    assert {row["sqnr_db"] for row in found[0]} == {None}


def test_embeddings_of_linen_and_nnx():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(7, 4, name="embed")
            return embed.attend(nn.Dense(4, name="fc")(embed(ids)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 4, rngs=rngs)
            self.fc = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, ids):
            return self.embed.attend(self.fc(self.embed(ids)))

    ids = jnp.array([[1, 2, 6]])
    graphdef, state = nnx.split(Nnx(nnx.Rngs(0)))
    styles = [
        (Linen().apply, Linen().init(jax.random.key(0), ids)),
        (lambda s, i: nnx.merge(graphdef, s)(i), state),
    ]
    for (apply_fn, params), quantize in itertools.product(styles, FUNCTIONS.values()):
        qparams, qapply = quantize(params, apply_fn, ids)
        found = [(row["name"], row["kind"]) for row in qapply.report().rows]
        assert found == [("embed:1", "lookup_table"), ("fc", "mul"), ("embed", "mul")]
        assert all(row["sqnr_db"] > 30 for row in qapply.report().rows)
        tree = qparams["params"].get("params", qparams["params"])
        assert set(tree["embed"]["embedding"]) == {"int8", "scale"}


@both
def test_skips(quantize):
    _, qapply = quantize(DENSE, dense, X, skip=("a",))
    found = rows(qapply)
    assert [found[n]["status"] for n in "abc"] == ["float", "float", "int8"]
    assert [found[n]["mode"] for n in "ab"] == ["float", "float"]
    assert found["a"]["reason"] == "skip='a'"
    assert "skip_quant" in found["b"]["reason"]
    with pytest.raises(ValueError, match="no site is left"):
        quantize(DENSE, dense, X, skip_first_last=True)
    with pytest.raises(ValueError, match="'nothing' matches no site"):
        quantize(DENSE, dense, X, skip=("nothing",))


@both
def test_float_sites_keep_their_weights(quantize):
    qparams, qapply = quantize(DENSE, dense, X)
    np.testing.assert_array_equal(qparams["params"]["b"]["w"], DENSE["b"]["w"])
    report = qapply.report()
    assert report.summary["sites_int8"] == 2
    assert report.summary["output_sqnr_db"] > 35
    assert Plan.from_json(qapply.plan.to_json()) == qapply.plan
    mode = rows(qapply)["a"]["mode"]
    assert f"2 sites {mode}, 1 float" in str(report)
    assert mode in report._repr_html_()


def test_report_of_tensors():
    dynamic = jaxquant.quant_dynamic(DENSE, dense, X)[1].report()
    assert [t["name"] for t in dynamic.tensors if t["status"] == "int8"] == ["a/input", "c/input"]
    weights = jaxquant.quant_weights(DENSE, dense, X, weight_bits=4, group_size=4)[1].report()
    assert {t["status"] for t in weights.tensors} == {"float"}
    assert weights.tensors[0]["reason"] == "read by a: its weight alone is quantized"
    assert "Tensors" not in str(weights)
    assert "in groups of 4." in str(weights)
    assert weights.summary["group_size"] == 4


EXAMPLES = {
    "array": X,
    "list of batches": [X, X[:1]],
    "generator": (x for x in [X]),
    "callable": lambda: iter([X]),
    "shape": jax.ShapeDtypeStruct((1, 12), jnp.float32),
    "tuple of shapes": (jax.ShapeDtypeStruct((1, 12), jnp.float32),),
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_examples(example):
    params, apply_fn = DENSE["a"], lambda p, x: x @ p["w"]
    qparams, qapply = jaxquant.quant_dynamic(params, apply_fn, example)
    expected = apply_fn(params, X)
    np.testing.assert_allclose(qapply(qparams, X), expected, atol=0.15)
    measured = qapply.report().rows[0]["sqnr_db"]
    assert measured is None if "shape" in str(example).lower() else measured > 35


def test_several_arguments_and_select():
    apply_fn = lambda p, x, y: (x + y) @ p["w"]  # noqa: E731
    for example in ((X, X), (SHAPE12, SHAPE12)):
        _, qapply = jaxquant.quant_weights(DENSE["a"], apply_fn, example)
        assert qapply.report().summary["sites_int8"] == 1
    item = {"image": X, "label": np.arange(4)}
    _, qapply = jaxquant.quant_dynamic(DENSE["a"], lambda p, x: x @ p["w"], item, select="image")
    assert qapply.report().rows[0]["sqnr_db"] > 35
    with pytest.raises(ValueError, match="select picks from"):
        jaxquant.quant_dynamic(DENSE["a"], apply_fn, (SHAPE12, SHAPE12), select=0)


SHAPE12 = jax.ShapeDtypeStruct((1, 12), jnp.float32)


@pytest.mark.parametrize(
    ("quantize", "options", "match"),
    [
        (jaxquant.quant_weights, {"weight_bits": 3}, "weight_bits is 8 or 4, got 3"),
        (jaxquant.quant_weights, {"weight_bits": True}, "weight_bits is 8 or 4"),
        (jaxquant.quant_weights, {"group_size": 0}, "group_size .* got 0"),
        (jaxquant.quant_weights, {"group_size": 2.5}, "group_size .* got 2.5"),
        (jaxquant.quant_weights, {"quantizable_op_type": ("matmul",)}, "'matmul' is not known"),
        (jaxquant.quant_dynamic, {"quantizable_op_type": ("softmax",)}, "'softmax' is not known"),
        (jaxquant.quant_dynamic, {"quantizable_op_type": ()}, "quantizable_op_type is empty"),
    ],
)
def test_options_that_are_not_valid(quantize, options, match):
    with pytest.raises(ValueError, match=match):
        quantize(DENSE, dense, SHAPE12, **options)


@both
def test_bad_params_and_examples(quantize):
    apply_fn = lambda p, x: x @ p["w"]  # noqa: E731
    with pytest.raises(ValueError, match="NaN or infinity in 1 of"):
        quantize({"w": DENSE["a"]["w"].at[0, 0].set(jnp.inf)}, apply_fn, SHAPE12)
    with pytest.raises(ValueError, match="nothing to quantize"):
        quantize({"w": X}, lambda p, x: x + p["w"], X)
    with pytest.raises(ValueError, match="empty"):
        quantize(DENSE["a"], apply_fn, [])
    with pytest.raises(TypeError, match="not an array"):
        quantize({"w": "text"}, apply_fn, SHAPE12)


def test_sites_without_a_weight_of_their_own_stay_float():
    def apply_fn(p, x):
        computed = x @ jnp.cos(jnp.arange(24.0)).reshape(12, 2)
        return x @ x.T, computed, x @ p["w"]

    _, qapply = jaxquant.quant_weights(DENSE["a"], apply_fn, SHAPE12)
    reasons = {row["kind"] + row["status"]: row["reason"] for row in qapply.report().rows}
    assert reasons == {
        "matmulfloat": "'matmul' is not in quantizable_op_type",
        "mulfloat": "its weight is computed from no parameter",
        "mulint8": "",
    }


def test_groups_make_four_bits_better():
    scaled = {"w": networks.images(0, (64, 8)) * jnp.logspace(-1, 0, 64)[:, None]}
    x = networks.images(1, (16, 64))
    sqnr = [
        jaxquant.quant_weights(
            scaled, lambda p, x: x @ p["w"], x, weight_bits=bits, group_size=size
        )[1]
        .report()
        .summary["output_sqnr_db"]
        for bits, size in ((4, None), (4, 8), (8, None))
    ]
    assert 10 < sqnr[0] < sqnr[1] - 2 < sqnr[2] - 10


def test_a_poor_model_warns_with_advice_for_the_mode():
    weight = np.zeros((64, 4), np.float32)
    weight[0], weight[1:] = 100.0, 0.5
    x = np.ones((2, 64), np.float32)
    x[:, 0] = 0
    with pytest.warns(UserWarning, match="on the first batch.*a smaller group_size"):
        jaxquant.quant_weights({"w": weight}, lambda p, x: x @ p["w"], x, weight_bits=4)


def test_stacked_weights_inside_a_scan_are_int8():
    def apply_fn(p, x):
        y, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["stack"])
        return y @ p["w"]

    params = {"stack": networks.images(0, (2, 12, 12)), "w": DENSE["a"]["w"]}
    qparams, qapply = jaxquant.quant_dynamic(params, apply_fn, SHAPE12)
    found = rows(qapply)
    assert found["stack"]["mode"] == "int8 (dynamic)"
    assert qparams["params"]["stack"]["int8"].shape == (2, 12, 12)
    assert found["w"]["mode"] == "int8 (dynamic)"


@both
def test_saved_and_loaded(quantize, tmp_path):
    qparams, qapply = quantize(DENSE, dense, X)
    expected = qapply(qparams, X[:3])
    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    loaded, load_apply = jaxquant.load_quantized_model(tmp_path / "model")
    np.testing.assert_allclose(load_apply(loaded, X[:3]), expected, rtol=0, atol=1e-5)
    assert load_apply.plan == qapply.plan


def test_keys_of_scanned_layers_are_parameters_like_others():
    """As nnx has them where its layers have a dropout that is off."""
    params = {"w": jnp.ones((2, 8, 8)), "keys": jax.random.split(jax.random.key(0), 2)}

    def apply_fn(p, x):
        def layer(x, given):
            noise = jax.random.normal(given["keys"], x.shape[-1:])
            return jnp.tanh(x @ given["w"]) + 0.0 * noise, None

        return jax.lax.scan(layer, x, p)[0]

    x = jax.random.normal(jax.random.key(1), (4, 8))
    qparams, qapply = jaxquant.quant_dynamic(params, apply_fn, x, progress=False)
    np.testing.assert_allclose(qapply(qparams, x), apply_fn(params, x), atol=0.05)
