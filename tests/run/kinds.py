"""Cases of full quantization: what each does with floats, and with the integers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests import networks, reference

C = 4
X = networks.whole_numbers((2, 6, 6, C))


def pool(y, init, function, size, strides, padding):
    spread = ((0, 0), *padding, (0, 0))
    return lax.reduce_window(y, init, function, (1, *size, 1), (1, *strides, 1), spread)


CEIL = ((0, 1), (0, 1))  # as frameworks with a ceil mode pad 3x3 windows with stride 2
SAME = ((1, 1), (1, 1))
NONE = ((0, 0), (0, 0))


def counts_inside(shape, size, strides, padding):
    return reference.window(np.ones(shape), size, strides, padding, np.sum, 0)


# The result holds the operand's integers: (kind, model, reference on integers).
MOVES = {
    "max pool": (
        "pool2d",
        lambda y: pool(y, -jnp.inf, lax.max, (2, 2), (2, 2), NONE),
        lambda q: reference.window(q, (2, 2), (2, 2), NONE, np.max, -128),
    ),
    "max pool, ceil mode": (
        "pool2d",
        lambda y: pool(y, -jnp.inf, lax.max, (3, 3), (2, 2), CEIL),
        lambda q: reference.window(q, (3, 3), (2, 2), CEIL, np.max, -128),
    ),
    "min pool": (
        "pool2d",
        lambda y: pool(y, jnp.inf, lax.min, (2, 3), (2, 1), SAME),
        lambda q: reference.window(q, (2, 3), (2, 1), SAME, np.min, 128),
    ),
    "global max": ("pool2d", lambda y: y.max((1, 2)), lambda q: q.max((1, 2))),
    "global min": ("pool2d", lambda y: y.min((1, 2)), lambda q: q.min((1, 2))),
    "concat 2": (
        "concat",
        lambda y: jnp.concatenate([y[:, :2], y[:, 1:]], 1),
        lambda q: np.concatenate([q[:, :2], q[:, 1:]], 1),
    ),
    "concat 3": (
        "concat",
        lambda y: jnp.concatenate([y[:, :, :2], y[:, :, 3:4], y[:, :, 1:]], 2),
        lambda q: np.concatenate([q[:, :, :2], q[:, :, 3:4], q[:, :, 1:]], 2),
    ),
    "concat batch": (
        "concat",
        lambda y: jnp.concatenate([y[:1], y[1:], y], 0),
        lambda q: np.concatenate([q[:1], q[1:], q], 0),
    ),
    "stack": (
        "concat",
        lambda y: jnp.stack([y[:, 1:], y[:, :5]], 3),
        lambda q: np.stack([q[:, 1:], q[:, :5]], 3),
    ),
    "tile": ("reshape", lambda y: jnp.tile(y, (1, 2, 3, 1)), lambda q: np.tile(q, (1, 2, 3, 1))),
    "repeat": ("reshape", lambda y: jnp.repeat(y, 2, 1), lambda q: np.repeat(q, 2, 1)),
    "transpose": (
        "transpose",
        lambda y: y.transpose(0, 2, 1, 3),
        lambda q: q.transpose(0, 2, 1, 3),
    ),
    "reshape": ("reshape", lambda y: y.reshape(2, 36, C), lambda q: q.reshape(2, 36, C)),
    "new axis": ("reshape", lambda y: y[:, None], lambda q: q[:, None]),
    "squeeze": ("squeeze", lambda y: jnp.squeeze(y[:, 2:3], 1), lambda q: q[:, 2]),
    "slice": ("slice", lambda y: y[:, 1:5:2], lambda q: q[:, 1:5:2]),
    "dynamic slice": (
        "slice",
        lambda y: lax.dynamic_slice(y, (0, 2, 9, 0), (2, 3, 3, C)),  # 9: moved inside
        lambda q: q[:, 2:5, 3:6],
    ),
    "split": ("slice", lambda y: jnp.split(y, 3, 1)[1], lambda q: q[:, 2:4]),
    "reversed": ("slice", lambda y: y[:, ::-1], lambda q: q[:, ::-1]),
    "take": ("gather", lambda y: jnp.take(y, jnp.array([4, 0, 0]), 1), lambda q: q[:, [4, 0, 0]]),
    "indexed": ("gather", lambda y: y[:, jnp.array([5, 2])], lambda q: q[:, [5, 2]]),
    "pad": (
        "pad",
        lambda y: jnp.pad(y, ((0, 0), (1, 2), (0, 1), (0, 0))),
        lambda q: np.pad(q, ((0, 0), (1, 2), (0, 1), (0, 0))),
    ),
    "pad, dilated": (
        "pad",
        lambda y: lax.pad(y, jnp.float32(0), ((0, 0, 0), (-1, 1, 1), (0, 0, 0), (0, 0, 0))),
        lambda q: np.insert(q[:, 1:], [0, 1, 2, 3, 4, 5], 0, 1),
    ),
    "nearest up": (
        "nearest_interp",
        lambda y: jax.image.resize(y, (2, 12, 15, C), "nearest"),
        lambda q: q[:, reference.nearest(6, 12)][:, :, reference.nearest(6, 15)],
    ),
    "nearest down": (
        "nearest_interp",
        lambda y: jax.image.resize(y, (2, 3, 4, C), "nearest"),
        lambda q: q[:, reference.nearest(6, 3)][:, :, reference.nearest(6, 4)],
    ),
}
# The result is computed from the integers: (kind, model, reference in the operand's units).
SUMS = {
    "average pool": (
        "pool2d",
        lambda y: pool(y, 0.0, lax.add, (2, 2), (2, 2), NONE) / 4.0,
        lambda q: reference.window(q, (2, 2), (2, 2), NONE, np.mean, 0),
    ),
    "average pool with its padding": (
        "pool2d",
        lambda y: pool(y, 0.0, lax.add, (3, 3), (2, 2), SAME) / 9.0,
        lambda q: reference.window(q, (3, 3), (2, 2), SAME, np.mean, 0),
    ),
    "average pool, ceil mode": (
        "pool2d",
        lambda y: pool(y, 0.0, lax.add, (3, 3), (2, 2), CEIL) * (1 / 9),
        lambda q: reference.window(q, (3, 3), (2, 2), CEIL, np.mean, 0),
    ),
    "average pool without its padding": (
        "pool2d",
        lambda y: nn.avg_pool(y, (3, 3), (1, 2), SAME, count_include_pad=False),
        lambda q: (
            reference.window(q, (3, 3), (1, 2), SAME, np.sum, 0)
            / counts_inside(q.shape, (3, 3), (1, 2), SAME)
        ),
    ),
    "global average": ("pool2d", lambda y: y.mean((1, 2)), lambda q: q.mean((1, 2))),
    "global average, axes kept": (
        "pool2d",
        lambda y: y.mean((1, 2), keepdims=True),
        lambda q: q.mean((1, 2), keepdims=True),
    ),
    "mean": ("mean", lambda y: y.mean(1), lambda q: q.mean(1)),
    "sum": ("mean", lambda y: y.sum(2), lambda q: q.sum(2)),
}
# Two tensors with scales of their own; the reference has their dequantized values.
PAIRS = {
    "elementwise_add": (lambda a, b: a + b, lambda a, b: a + b),
    "elementwise_sub": (lambda a, b: a - b, lambda a, b: a - b),
    "elementwise_mul": (lambda a, b: a * b, lambda a, b: a * b),
    "elementwise_div": (lambda a, b: a / (b * b + 0.25), lambda a, b: a / (b * b + 0.25)),
}
COMPARISONS = {
    "equal": (lambda a, b: a == b, np.equal),
    "not_equal": (lambda a, b: a != b, np.not_equal),
    "greater_equal": (lambda a, b: a >= b, np.greater_equal),
    "greater_than": (lambda a, b: a > b, np.greater),
    "less_equal": (lambda a, b: a <= b, np.less_equal),
    "less_than": (lambda a, b: a < b, np.less),
}
INDICES = {"argmax": (jnp.argmax, np.argmax), "argmin": (jnp.argmin, np.argmin)}


def quantize(values, scale):
    return reference.quantize(np.float32(values), 1 / scale)
