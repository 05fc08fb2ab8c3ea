"""Single dots whose rows are scaled in the call, beside others on grids of the plan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks, reference


def chain(p, x):
    """Two dots behind each other, and a third that reads what the second reads."""
    h = jax.nn.gelu(x @ p["first"])
    return (h @ p["second"]) @ p["last"] + h @ p["aside"]


CHAIN = {
    "first": networks.images(0, (6, 8)) / 4,
    "second": networks.images(1, (8, 5)) / 4,
    "last": networks.images(2, (5, 3)) / 4,
    "aside": networks.images(3, (8, 3)) / 4,
}
ROWS = networks.images(4, (32, 6)) * np.geomspace(0.1, 10, 32, dtype=np.float32)[:, None]


def quantized_chain(patterns, **settings):
    rules = [jaxquant.Rule(pattern, dynamic=True) for pattern in patterns]
    return jaxquant.quant_post(CHAIN, chain, [ROWS], rules=rules, progress=False, **settings)


def test_a_rule_for_all_dots_is_the_dynamic_mode():
    qparams, qapply = quantized_chain(["*"], recover=())
    wanted, dynamic = jaxquant.quant_dynamic(CHAIN, chain, ROWS, progress=False)
    np.testing.assert_array_equal(qapply(qparams, ROWS), dynamic(wanted, ROWS))
    assert qparams["tensors"] == {}
    assert {row["mode"] for row in qapply.report().rows} == {"int8 (dynamic)"}
    assert qapply.report().tensors == dynamic.report().tensors


def test_all_but_some_dots_are_dynamic_by_the_configuration():
    qparams, qapply = quantized_chain([], activation_quantize_type="dynamic", recover=())
    by_rule, other = quantized_chain(["*"], recover=())
    np.testing.assert_array_equal(qapply(qparams, ROWS), other(by_rule, ROWS))
    _, qapply = jaxquant.quant_post(
        CHAIN, chain, [ROWS], activation_quantize_type="dynamic", progress=False,
        rules=[jaxquant.Rule("last", dynamic=False)],
    )  # fmt: skip
    modes = {row["name"]: row["mode"] for row in qapply.report().rows}
    assert modes.pop("last") == "int8"
    assert set(modes.values()) == {"int8 (dynamic)"}
    with pytest.raises(ValueError, match=r"of jaxquant\.quant_post"):
        jaxquant.quant_dynamic(CHAIN, chain, ROWS, activation_quantize_type="dynamic")


@pytest.mark.parametrize("recover", [(), ("equalization",)])
def test_a_rule_for_one_dot_leaves_the_others_on_grids_of_the_plan(recover):
    """`aside` reads the tensor that `second` reads, each in its own way."""
    qparams, qapply = quantized_chain(["second"], recover=recover, algo="abs_max")
    rows = {row["name"]: row for row in qapply.report().rows}
    modes = {name: row["mode"] for name, row in rows.items()}
    assert modes == {
        "first": "int8",
        "second": "int8 (dynamic)",
        "last": "int8",
        "aside": "int8",
    }
    assert rows["second"]["inputs"] == []
    stored = {
        name: np.asarray(leaf["int8"]) * np.asarray(leaf["scale"], np.float64)
        for name, leaf in qparams["params"].items()
    }
    grids = {name: grid["scale"] for name, grid in qparams["tensors"].items()}
    zero_points = {tensor.name: tensor.zero_point for tensor in qapply.plan.tensors}

    def on_grid(name, x):
        (entry,) = rows[name]["inputs"]
        scale = np.asarray(grids[entry], np.float64)
        steps = np.clip(np.rint(x / scale) + zero_points[entry], -128, 127) - zero_points[entry]
        return steps * scale  # what it is divided by is in the weight

    h = np.asarray(jax.nn.gelu(jnp.float32(on_grid("first", ROWS) @ stored["first"])))
    second = reference.fake_lopsided_rows(h, (1,)) @ stored["second"]
    factors = np.asarray(grids[rows["aside"]["inputs"][0]], np.float64)
    tensor = next(t for t in qapply.plan.tensors if t.name == rows["aside"]["inputs"][0])
    aside = (on_grid("aside", h) / (factors / tensor.scale)) @ stored["aside"]
    expected = on_grid("last", second) @ stored["last"] + aside
    np.testing.assert_allclose(qapply(qparams, ROWS), expected, rtol=0, atol=2e-4)


def test_single_dynamic_dots_do_not_hang_on_the_batch():
    qparams, qapply = quantized_chain(["second", "last"])
    whole = qapply(qparams, ROWS)
    np.testing.assert_allclose(qapply(qparams, ROWS[3:8]), whole[3:8], rtol=0, atol=1e-5)
    each = jax.vmap(lambda row: qapply(qparams, row[None])[0])(ROWS)
    np.testing.assert_allclose(each, whole, rtol=0, atol=1e-5)
    assert qapply(qparams, ROWS[:0]).shape == (0, 3)


def test_not_a_number_goes_through_a_dynamic_dot_into_a_static_one():
    qparams, qapply = quantized_chain(["first", "second"])
    found = np.asarray(qapply(qparams, jnp.asarray(ROWS).at[2, 1].set(jnp.nan)))
    assert np.isnan(found[2]).all()
    assert np.isfinite(np.delete(found, 2, axis=0)).all()


def test_a_weight_that_a_dynamic_dot_shares_is_not_equalized():
    def tied(p, x):
        return jax.nn.gelu(x @ p["w"]) @ p["w"] + x @ p["v"]

    params = {"w": networks.images(0, (6, 6)) / 4, "v": networks.images(1, (6, 6)) / 4}
    x = ROWS * np.geomspace(0.05, 5, 6, dtype=np.float32)
    qparams, qapply = jaxquant.quant_post(
        params, tied, [x], recover=("equalization",), progress=False,
        rules=[jaxquant.Rule("w", dynamic=True)],
    )  # fmt: skip
    reference = np.asarray(tied(params, x))
    noise = np.square(reference - qapply(qparams, x)).sum()
    assert 10 * np.log10(np.square(reference).sum() / noise) > 25


def test_dynamic_dots_inside_a_scan_are_those_of_a_python_loop():
    layers = [networks.images(seed, (6, 6)) / 3 for seed in range(3)]

    def layer(x, w):
        return x + jax.nn.gelu(x) @ w, None

    def scanned(p, x):
        return jax.lax.scan(layer, x, p["w"])[0]

    def unrolled(p, x):
        for w in p:
            x, _ = layer(x, w)
        return x

    settings = {"rules": [jaxquant.Rule("*", dynamic=True)], "recover": (), "progress": False}
    ours = jaxquant.quant_post({"w": np.stack(layers)}, scanned, [ROWS], **settings)
    theirs = jaxquant.quant_post(layers, unrolled, [ROWS], **settings)
    np.testing.assert_allclose(ours[1](ours[0], ROWS), theirs[1](theirs[0], ROWS), rtol=1e-6)
    assert [row["mode"] for row in ours[1].report().rows] == ["int8 (dynamic)"]


def test_a_model_with_single_dynamic_dots_is_saved(tmp_path):
    qparams, qapply = quantized_chain(["second"])
    jaxquant.save_quantized_model(tmp_path / "model.jaxquant", qparams, qapply, progress=False)
    loaded, reloaded = jaxquant.load_quantized_model(tmp_path / "model.jaxquant")
    np.testing.assert_array_equal(reloaded(loaded, ROWS), qapply(qparams, ROWS))
    assert "int8 (dynamic)" in {row["mode"] for row in reloaded.report().rows}


def test_what_neither_a_dot_nor_a_convolution_reads_is_not_scaled_in_the_call():
    def net(p, x):
        return jax.nn.softmax(x @ p["k"])

    rule = jaxquant.Rule("kind:softmax", dynamic=True)
    settings = {"rules": [rule], "is_full_quantize": True, "progress": False}
    params, x = {"k": networks.images(0, (2, 4))}, networks.images(1, (5, 2))
    with pytest.raises(ValueError, match=r"'kind:softmax' sets dynamic, which is of .* softmax"):
        jaxquant.quant_post(params, net, [x], **settings)
    with pytest.raises(ValueError, match="dynamic is True or False, got 'yes'"):
        jaxquant.Rule("k", dynamic="yes")


def test_adaround_leaves_what_is_scaled_in_the_call():
    qparams, qapply = quantized_chain(["*"], recover=("adaround",))
    plain, _ = quantized_chain(["*"], recover=())
    jax.tree.map(np.testing.assert_array_equal, qparams["params"], plain["params"])
    assert qapply.report().summary["recovery"]["adaround"].startswith("0 of 4 sites")


@pytest.mark.parametrize("patterns", [["a"], ["h"], ["a", "h"]])
def test_single_dynamic_dots_of_a_full_model_whose_input_is_added_too(patterns):
    def residual(p, x):
        return jax.nn.relu(x @ p["a"] + x) @ p["h"]

    params = {"a": networks.images(0, (6, 6)) / 4, "h": networks.images(1, (6, 3)) / 4}
    rules = [jaxquant.Rule(pattern, dynamic=True) for pattern in patterns]
    qparams, qapply = jaxquant.quant_post(
        params, residual, [ROWS], is_full_quantize=True, rules=rules, progress=False
    )
    modes = {row["name"]: row["mode"] for row in qapply.report().rows}
    assert {modes[pattern] for pattern in patterns} == {"int8 (dynamic)"}
    reference = np.asarray(residual(params, ROWS))
    noise = np.square(reference - np.asarray(qapply(qparams, ROWS))).sum()
    assert 10 * np.log10(np.square(reference).sum() / noise) > 25
