"""Small networks in every style that users write them, and shortcuts to quantize them."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxquant
from jaxquant.calibration.observations import Observations, TensorStats
from jaxquant.graph import evaluate, sites
from jaxquant.graph.kinds import DOT_KINDS
from jaxquant.graph.model import trace_model
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.observed import observed_tensors

IMAGE = (4, 8, 8, 3)


def observe(params, apply_fn, *inputs) -> Observations:
    """What `jaxquant.calibrate` gives for one batch, ranges alone, with one small compilation."""
    model = trace_model(apply_fn, params, inputs)
    observed = observed_tensors(model, QuantConfig())
    graph, tensors = model.graph, observed.tensors
    if len(observed.names) > len(tensors):  # of a loop only the sweep itself sees the inside
        return jaxquant.calibrate(params, apply_fn, [inputs], progress=False)

    @jax.jit
    def run(params, inputs):
        leaves = dict(zip(graph.leaves, jax.tree.leaves(params)))
        env = evaluate.evaluate(graph, leaves, jax.tree.leaves(inputs))
        return {name: env.read(var) for name, var in tensors.items()}

    values = jax.tree.map(np.asarray, run(params, inputs))
    return Observations(
        {n: _stats(v.astype(np.float32)) for n, v in values.items()}, 1, 1, (inputs,)
    )


def _stats(x: np.ndarray) -> TensorStats:
    low, high = float(x.min()), float(x.max())
    return TensorStats(np.zeros(2048, np.uint64), 1.0, low, high, max(-low, high), x.size)


# The grids that `reference` tells.
OPTIONS = {"algo": "abs_max", "activation_quantize_type": "symmetric", "recover": ()}


# The grids that `reference` tells.
OPTIONS: dict[str, Any] = {
    "algo": "abs_max",
    "activation_quantize_type": "symmetric",
    "recover": (),
}


def quantize(params, apply_fn, *inputs, **config):
    """`jaxquant.quantize` with the ranges of one batch; quicker than a calibration sweep."""
    return jaxquant.quantize(
        params, apply_fn, observe(params, apply_fn, *inputs), **{**OPTIONS, **config}
    )


def site_names(apply_fn, params, *inputs) -> list[str]:
    return [site.name for site in find(apply_fn, params, *inputs)]


def find(apply_fn, params, *inputs) -> tuple[sites.Site, ...]:
    """The convolutions and dots of a function."""
    found = trace_model(apply_fn, params, inputs).sites
    return tuple(site for site in found if site.kind in DOT_KINDS)


def rows(qapply) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in qapply.report().rows}


def whole_numbers(shape, seed=0) -> jax.Array:
    """Float32 whole numbers up to 127, which int8 with scale 1 holds exactly."""
    x = np.random.default_rng(seed).integers(-126, 127, shape).astype(np.float32)
    x.flat[0] = 127
    return jnp.asarray(x)


def exact_weight(shape, seed=0) -> jax.Array:
    """-127, 0 or 127, so that every channel's scale is 1, whichever axis the channels are on."""
    signs = np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], shape, p=[0.4, 0.2, 0.4])
    return jnp.asarray(127 * signs, jnp.float32)


def exact_params(init) -> Any:
    """Parameters like those of `init()`, shapes alone, with exact weights and whole biases."""
    shapes = jax.eval_shape(init)
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [exact_weight(s.shape, i) for i, s in enumerate(leaves)])


def random_params(init) -> Any:
    """Normally distributed parameters like those of `init()`, shapes alone."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(init))
    return jax.tree.unflatten(tree, [images(i, s.shape) * 0.4 for i, s in enumerate(leaves)])


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=(2, 2), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = nn.swish(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.Conv(12, (1, 1), name="point")(x)
        return nn.Dense(5, name="head")(jax.nn.relu6(x).mean((1, 2)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=(2, 2), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.point = nnx.Conv(8, 12, (1, 1), rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.swish(self.depthwise(x))
        return self.head(nnx.relu6(self.point(x)).mean((1, 2)))


def plain_net(p, x):
    x = conv(x, p["stem"], strides=(2, 2))
    norm = p["norm"]
    x = (x - norm["mean"]) * (jax.lax.rsqrt(norm["var"] + 1e-5) * norm["scale"]) + norm["bias"]
    x = jax.nn.swish(conv(jax.nn.relu(x), p["depthwise"], groups=8))
    x = jax.nn.relu6(conv(x, p["point"])).mean((1, 2))
    return x @ p["head"]["kernel"] + p["head"]["bias"]


def conv(x, p, strides=(1, 1), groups=1):
    y = jax.lax.conv_general_dilated(
        x,
        p["kernel"],
        strides,
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + p["bias"] if "bias" in p else y


def plain_params(seed=0) -> dict[str, dict[str, jax.Array]]:
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=0.4):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    return {
        "stem": {"kernel": normal(3, 3, 3, 8)},
        "norm": {
            "scale": 1 + normal(8, scale=0.1),
            "bias": normal(8),
            "mean": normal(8),
            "var": 1 + normal(8) ** 2,
        },
        "depthwise": {"kernel": normal(3, 3, 1, 8), "bias": normal(8)},
        "point": {"kernel": normal(1, 1, 8, 12), "bias": normal(12)},
        "head": {"kernel": normal(12, 5), "bias": normal(5)},
    }


def linen_variables(p) -> dict[str, Any]:
    """The parameters of `plain_net` as those of `LinenNet`."""
    norm = p["norm"]
    affine = {k: norm[k] for k in ("scale", "bias")}
    stats = {k: norm[k] for k in ("mean", "var")}
    return {"params": {**p, "norm": affine}, "batch_stats": {"norm": stats}}


def nnx_model(p) -> NnxNet:
    """`NnxNet` with the parameters of `plain_net`."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0))))
    paths, tree = jax.tree_util.tree_flatten_with_path(state)
    leaves = [p[path[0].key][path[1].key] for path, _ in paths]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def images(seed=0, shape=IMAGE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A pytree whose leaves are attributes, as the modules of Equinox are."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return self.weight @ x + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Mlp:
    layers: list[Layer]

    def __call__(self, x):
        return self.layers[1](jax.nn.relu(self.layers[0](x)))


def shared_heads(params, x, mask):
    """Two heads share keys and values; a bias and two masks are beside the scores."""
    q, k, v = (x @ params[name] for name in "qkv")
    q = q.reshape(3, 12, 2, 2, 4)
    k, v = (part.reshape(3, 12, 2, 4) for part in (k, v))
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) * 0.5 + params["bias"]
    scores = jnp.where(mask[:, None, None, None], scores, -1e9)
    scores = jnp.where(np.tri(12, dtype=bool), scores, -1e9)
    mixed = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v)
    return mixed.reshape(3, 12, 16) @ params["out"]
