"""What may vary in the shapes that a saved model takes."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxquant
from tests.deploy.models import SHAPE, quantize, round_trip, same_bits, small
from tests.networks import images


def test_a_loaded_model_is_saved_for_other_shapes(tmp_path):
    qparams, qapply = small()
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    fixed, apply = round_trip(tmp_path / "n", loaded, apply, shapes="1, 8, 8, 3")
    x = images(1, SHAPE)
    assert same_bits(apply(fixed, x[:1]), qapply(qparams, x[:1]))
    with pytest.raises(ValueError, match=r"takes float32\[1, 8, 8, 3\], got float32\[4, 8, 8, 3\]"):
        apply(fixed, x)


def test_shapes_say_what_may_vary(tmp_path):
    class Convolutional(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (1, 1), strides=(2, 2))(x).max((1, 2))

    model = Convolutional()
    variables = model.init(jax.random.key(0), images(0, SHAPE))
    qparams, qapply = quantize(variables, model.apply, images(0, SHAPE))
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply, shapes="b, 2*h, 2*w, 3")
    x = images(1, (2, 12, 6, 3))
    assert same_bits(apply(loaded, x), qapply(qparams, x))
    loaded, apply = round_trip(tmp_path / "n", qparams, qapply, shapes="4, 8, 8, 3")
    with pytest.raises(ValueError, match="hape"):
        apply(loaded, x)
    with pytest.raises(ValueError, match=r"shapes='b, 8'.*does not fit"):
        jaxquant.save_quantized_model(tmp_path / "o", qparams, qapply, shapes="b, 8")


def test_an_input_without_axes_leaves_the_batch_clear(tmp_path):
    params = {"w": jnp.eye(4)}
    qparams, qapply = quantize(
        params, lambda p, x, t: x @ p["w"] * t, jnp.ones((3, 4)), jnp.ones(())
    )
    for options in ({}, {"shapes": ("b, 4", "")}):
        loaded, apply = round_trip(tmp_path / "m", qparams, qapply, **options)
        assert apply(loaded, jnp.ones((5, 4)), jnp.float32(2)).tolist() == [[2.0] * 4] * 5


def test_a_batch_that_is_not_clear_is_an_error(tmp_path):
    params = {"w": jnp.eye(4)}
    qparams, qapply = quantize(
        params, lambda p, x, t: x @ p["w"] * t, jnp.ones((3, 4)), jnp.ones((4,))
    )
    with pytest.raises(ValueError, match=r"which axis is the batch is not clear. Give shapes="):
        jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply, shapes=("b, 4", "4"))
    assert apply(loaded, jnp.ones((5, 4)), jnp.full(4, 2.0)).tolist() == [[2.0] * 4] * 5


def _heads(p, x):
    """A factor behind a reshape that splits the channels: multi-head attention's queries."""
    return (x @ p["w"]).reshape(x.shape[0], 5, 2, 4) * 0.5


def _haiku_linear(p, x):
    y = x @ p["w"]
    return y + jnp.broadcast_to(p["b"], y.shape)


def _merged(p, x):
    y = x.reshape(x.shape[0] * 2, 4) @ p["u"] + p["c"]
    return y.reshape(x.shape[0], 2, 2, 3) @ p["v"]


def _depthwise_and_pool(p, x):
    y = x.reshape(x.shape[0], 2, 2, 2) @ p["e"]
    y = jax.lax.conv_general_dilated(
        y, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
    )
    return jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")


@pytest.mark.parametrize(
    "mode",
    ["full", "weights", *(pytest.param(m, marks=pytest.mark.slow) for m in ("static", "dynamic"))],
)
def test_sizes_with_names_are_compared_by_what_is_known_of_them(mode, tmp_path):
    """Reshapes that split channels, biases spread to a shape: what JAX's libraries write."""
    params = {"w": images(1, (8, 40)), "b": images(2, (40,)), "u": images(3, (4, 6))}
    params |= {"c": images(4, (6,)), "v": images(5, (3, 5)), "e": images(6, (2, 4))}
    params["k"] = images(7, (3, 3, 1, 4))

    def apply_fn(p, x):
        return _heads(p, x), _haiku_linear(p, x), _merged(p, x), _depthwise_and_pool(p, x)

    qparams, qapply = by_mode(mode, params, apply_fn, images(0, (4, 8)))
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    for batch in (1, 3):
        x = images(batch, (batch, 8))
        assert same_bits(apply(loaded, x), qapply.with_backend("xla")(qparams, x))


def by_mode(mode, params, apply_fn, x):
    if mode == "dynamic":
        return jaxquant.quant_dynamic(params, apply_fn, x)
    if mode == "weights":
        return jaxquant.quant_weights(params, apply_fn, x)
    return jaxquant.quant_post(
        params, apply_fn, [x], algo="abs_max", is_full_quantize=mode == "full", progress=False
    )


def test_constraints_say_what_is_known_of_the_sizes(tmp_path):
    """Beyond a table of positions the model does without: that it is long enough has to be said."""
    params = {"positions": images(1, (16, 4)), "w": images(2, (4, 3))}

    def apply_fn(p, x):
        length = x.shape[1]
        return (x + p["positions"][:length] if length <= 16 else x) @ p["w"]

    qparams, qapply = quantize(params, apply_fn, images(0, (2, 5, 4)))
    known = {"shapes": "b, s, 4", "constraints": ("s <= 16",)}
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply, **known)
    for length in (3, 16):
        x = images(3, (3, length, 4))
        assert same_bits(apply(loaded, x), qapply(qparams, x))
    with pytest.raises(ValueError, match="shapes"):
        apply(loaded, images(3, (3, 17, 4)))
    with pytest.raises(ValueError, match=re.escape('constraints=("s <= 16",)')):
        jaxquant.save_quantized_model(tmp_path / "n", qparams, qapply, shapes="b, s, 4")
    with pytest.raises(ValueError, match=r"constraints=\('s < 9',\) does not fit"):
        jaxquant.save_quantized_model(
            tmp_path / "n", qparams, qapply, shapes="b, s, 4", constraints=("s < 9",)
        )
    with pytest.raises(ValueError, match=re.escape("give a tuple: ('s <= 16',)")):
        jaxquant.save_quantized_model(tmp_path / "n", qparams, qapply, constraints="s <= 16")


def test_a_model_that_depends_on_the_batch_size_is_an_error(tmp_path):
    def apply_fn(p, x):
        return x @ p["w"] if x.shape[0] > 2 else x @ p["w"] + 1

    qparams, qapply = quantize({"w": jnp.eye(4)}, apply_fn, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"(?s)something else for some sizes.*batch, 4.*shapes="):
        jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply, shapes="3, 4")
    assert apply(loaded, jnp.ones((3, 4))).shape == (3, 4)
