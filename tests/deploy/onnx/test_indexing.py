"""Picking and placing by index, in ONNX Runtime against qapply, for another batch.

Values are whole numbers that int8 holds exactly, so that no element may differ.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests.deploy.onnx.runtime import agrees, behind_dot, ops, run, weights
from tests.networks import images, quantize, whole_numbers

SHAPE = (3, 5, 4)
RARE = jnp.array([[0, 1], [4, 3], [2, 2]])


def argmax_of(x):
    """[B], indices that depend on the input."""
    return jnp.argmax(x[..., 0], 1)


GATHERS = {
    "take, first axis": lambda x: jnp.take(x.swapaxes(0, 1), jnp.array([3, 0, 3]), axis=0),
    "take, middle axis": lambda x: jnp.take(x, jnp.array([[3, 0], [1, 1]]), axis=1),
    "take, last axis": lambda x: jnp.take(x, jnp.array([3, -1]), axis=-1),
    "take one": lambda x: jnp.take(x, jnp.argmax(x[0, :, 0]), axis=1),
    "clipped": lambda x: jnp.take(x, argmax_of(x) * 3 - 3, axis=1, mode="clip"),
    "filled": lambda x: jnp.take(x, argmax_of(x) * 3 - 8, axis=1, fill_value=7.0),
    "filled, known": lambda x: jnp.take(x, jnp.array([1, 9]), axis=1, fill_value=-3.0),
    "wrapped": lambda x: jnp.take(x, argmax_of(x) + 4, axis=1, mode="wrap"),
    "of each sample": lambda x: x[jnp.arange(x.shape[0]), argmax_of(x)],
    "two axes": lambda x: x[:, jnp.array([1, 4]), jnp.array([0, 3])],
    "two axes apart": lambda x: x[:, None].swapaxes(1, 2)[:, jnp.array([1, 4]), :, jnp.array([2])],
    "rows of columns": lambda x: x[:, jnp.array([[1], [4]]), jnp.array([[0, 3]])],
    "along": lambda x: jnp.take_along_axis(x, jnp.argsort(x, 1), 1),
    "along, last": lambda x: jnp.take_along_axis(x, jnp.argsort(x, -1)[..., :2], -1),
    "along, spread": lambda x: jnp.take_along_axis(x, argmax_of(x)[:, None, None], 1),
    "nearest, larger": lambda x: jax.image.resize(x, (x.shape[0], 12, 8), "nearest"),
    "nearest, uneven": lambda x: jax.image.resize(x, (x.shape[0], 3, 7), "nearest"),
    "windows": lambda x: jax.vmap(lambda y, i: lax.dynamic_slice_in_dim(y, i, 2))(x, argmax_of(x)),
    "transposed": lambda x: x.transpose(2, 0, 1)[jnp.array([2, 0])].transpose(1, 2, 0),
}
SLICES = {
    "at an input": lambda x: lax.dynamic_slice_in_dim(x, jnp.argmax(x[0, :, 0]), 2, 1),
    "over the end": lambda x: lax.dynamic_slice(x, (0, jnp.argmax(x[0, :, 0]) + 3, -1), (1, 4, 2)),
    "index": lambda x: x[:, jnp.argmax(x[0, :, 0])],
    "written": lambda x: lax.dynamic_update_slice(x, -x[:, :2], (0, jnp.argmax(x[0, :, 0]), 0)),
    "written, known": lambda x: lax.dynamic_update_slice(x, x[:, :1, :2], (0, 3, 1)),
    "written whole": lambda x: lax.dynamic_update_slice(x, -x, (0, 0, 0)),
}
SCATTERS = {
    "set": lambda x: x.at[:, 1].set(5.0),
    "set many": lambda x: x.at[:, jnp.array([4, 0])].set(x[:, 1:3]),
    "set a window": lambda x: x.at[:, 1:3, 2:].set(-x[:, :2, :2]),
    "set strided": lambda x: x.at[:, ::2].set(0.0),
    "set of each sample": lambda x: x.at[jnp.arange(x.shape[0]), argmax_of(x)].set(1.0),
    "set, last axis": lambda x: x.at[..., jnp.array([3, 0])].set(x[..., :2]),
    "add": lambda x: x.at[:, jnp.array([0, 2, 2])].add(x[:, :3]),
    "add of each sample": lambda x: x.at[jnp.arange(x.shape[0]), argmax_of(x)].add(1.0),
    "dropped": lambda x: x.at[:, argmax_of(x) + 3].add(1.0),
    "dropped, set": lambda x: x.at[:, argmax_of(x)[:1] * 3].set(9.0),
    "dropped, known": lambda x: x.at[:, jnp.array([1, 7])].set(2.0),
    "subtract, multiply": lambda x: x.at[:, 2].subtract(3.0).at[:, 1].multiply(2.0),
    "pairs": lambda x: x.at[:, RARE[:, 0], RARE[:, 1]].add(1.0),
    "segments": lambda x: jax.vmap(lambda y: jax.ops.segment_sum(y, jnp.array([0, 1, 0, 1, 2]), 3))(
        x
    ),
    "mode clip": lambda x: x.at[:, argmax_of(x) + 3].set(4.0, mode="clip"),
}
OTHERS = {
    "stack": lambda x: jnp.stack([x, -x, x * 2], 1),
    "stack last": lambda x: jnp.stack([x, x], -1),
    "stack transposed": lambda x: jnp.stack([x.transpose(0, 2, 1), -x.transpose(0, 2, 1)], 2),
    "tile": lambda x: jnp.tile(x, (1, 3, 2)),
    "tile more axes": lambda x: jnp.tile(x, (2, 1, 1, 3)),
    "tile transposed": lambda x: jnp.tile(x.transpose(0, 2, 1), (1, 3, 1)),
    "repeat": lambda x: jnp.repeat(x, 3, 2),
    "unstack": lambda x: sum(jnp.unstack(x, axis=1)),
    "roll": lambda x: jnp.roll(x, (1, 2), (1, 2)),
    "accumulated": lambda x: (
        jnp.cumprod(jnp.sign(x), 1) + lax.cummax(x, 1) - lax.cummin(x, 2, reverse=True)
    ),
    "reflected": lambda x: jnp.pad(x, ((0, 0), (2, 1), (0, 0)), mode="reflect"),
    "counted": lambda x: x + jnp.arange(5.0)[:, None],
    "counted samples": lambda x: x + jnp.arange(x.shape[0], dtype=jnp.float32)[:, None, None],
    "by the batch": lambda x: x / jnp.asarray(x.shape[0], jnp.float32),
    "of truth values": lambda x: jnp.take(x > 0, argmax_of(x) + 2, axis=1),
    "choice of truth values": lambda x: jnp.where(x > 0, x[:, ::-1] > 0, x < -50),
    "any, all": lambda x: jnp.any(x > 100, 1) & ~jnp.all(x > -120, 1),
}
GROUPS = {"gathers": GATHERS, "slices": SLICES, "scatters": SCATTERS, "others": OTHERS}


@pytest.mark.parametrize("group", GROUPS)
def test_every_element_is_the_right_one(group, tmp_path):
    functions = {
        name: (lambda x, function=function: function(x).astype(jnp.float32))
        for name, function in GROUPS[group].items()
    }
    x = whole_numbers(SHAPE)
    agrees(tmp_path, {"a": 127 * jnp.eye(4)}, behind_dot(functions, False), x, at_least=120)


INT8 = {
    "stack": lambda x: jnp.stack([x, -x], 1),
    "tile": lambda x: jnp.tile(x, (1, 3, 1)),
    "take": lambda x: jnp.take(x, jnp.array([3, 0]), axis=1),
    "along": lambda x: jnp.take_along_axis(x, argmax_of(x)[:, None, None], 1),
    "filled": lambda x: jnp.take(x, argmax_of(x) * 3 - 3, axis=1, fill_value=0.0),
    "at an input": lambda x: lax.dynamic_slice_in_dim(x, jnp.argmax(x[0, :, 0]), 2, 1),
}


def test_between_int8_sites(tmp_path):
    params = {"a": weights(4, 6), "b": weights(12, 5)}
    agrees(tmp_path, params, behind_dot(INT8), images(0, SHAPE), full=True, at_least=33)


def test_known_rows_and_columns_are_one_gather(tmp_path):
    def apply_fn(p, x):
        return jnp.take(x @ p["w"], jnp.array([3, 0]), axis=1)

    model = agrees(tmp_path, {"w": weights(4, 4)}, apply_fn, images(0, SHAPE))
    assert ops(model).count("Gather") == 1
    assert not {"Where", "Min", "GatherND"} & set(ops(model))


def test_sizes_that_are_computed_of_others(tmp_path):
    """Products and halves of sizes with names, as shapes and as numbers."""

    def apply_fn(p, x):
        b, s, _ = x.shape
        y = (x @ p["w"]).reshape(b * s, 2, 2).swapaxes(0, 1)
        half = x[:, : s // 2] @ p["w"]
        rolled = jnp.roll(x @ p["w"], 1, 1)
        return y, half.reshape(-1, 4), rolled + jnp.arange(s)[:, None] / (b + 3 * s)

    qparams, qapply = quantize({"w": weights(4, 4)}, apply_fn, images(0, (2, 6, 4)))
    jaxquant.export_onnx(
        tmp_path / "m.onnx", qparams, qapply, shapes="b, s, 4", constraints=("s >= 2",)
    )
    for batch, length in ((1, 7), (3, 2)):
        x = images(1, (batch, length, 4))
        for a, b in zip(qapply(qparams, x), run(tmp_path / "m.onnx", x), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_sizes_of_which_inputs_have_multiples_and_sums(tmp_path):
    """Free axes of both sides of a dot, and an axis that is one longer than another."""

    def apply_fn(p, x):
        y = jnp.concatenate([x[:, :1], x], 1) @ p["w"]
        return jnp.einsum("blhc,bmhc->blmh", *[y.reshape(*y.shape[:2], 2, 2)] * 2).sum(2)

    qparams, qapply = quantize({"w": weights(4, 4)}, apply_fn, images(0, (2, 6, 4)))
    jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, shapes="b, 2*s, 4")
    x = images(1, (3, 4, 4))
    np.testing.assert_allclose(qapply(qparams, x), run(tmp_path / "m.onnx", x)[0], atol=1e-4)
    pairs = lambda p, x: jnp.einsum("bihc,bjhc->bij", x @ p["w"], x @ p["w"])  # noqa: E731
    qparams, qapply = quantize({"w": weights(4, 4)}, pairs, images(0, (2, 3, 2, 4)))
    jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, shapes="b, s, t, 4")
    x = images(1, (3, 5, 2, 4))
    np.testing.assert_allclose(qapply(qparams, x), run(tmp_path / "m.onnx", x)[0], atol=1e-4)


def test_a_scatter_before_the_opset_that_has_it_is_an_error(tmp_path):
    def apply_fn(p, x):
        return (x @ p["w"]).at[:, jnp.array([0, 0])].add(1.0)

    qparams, qapply = quantize({"w": weights(4, 4)}, apply_fn, images(0, SHAPE))
    with pytest.raises(ValueError, match="'scatter-add' before opset 16"):
        jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, opset=15)
