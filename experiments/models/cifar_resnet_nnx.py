"""The CIFAR-10 ResNet of `cifar_resnet`, in nnx, with the same layer names."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.cifar_resnet import EPSILON, FEATURES, blocks, subsample
from experiments.models.layers import both_sides, global_average
from experiments.weights.tree import Variables


class ConvBN(nnx.Module):
    """3x3 convolution and BatchNorm."""

    def __init__(self, inputs: int, features: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(
            inputs,
            features,
            (3, 3),
            strides=(stride, stride),
            padding=both_sides(1),
            use_bias=False,
            dtype=jnp.float32,
            rngs=rngs,
        )
        self.bn = nnx.BatchNorm(
            features, use_running_average=True, epsilon=EPSILON, dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and the shortcut: [B, H, W, C] -> [B, H', W', features]."""

    def __init__(self, inputs: int, features: int, stride: int, rngs: nnx.Rngs) -> None:
        self.features, self.stride = features, stride
        self.conv1 = ConvBN(inputs, features, stride, rngs)
        self.conv2 = ConvBN(features, features, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = subsample(x, self.features, self.stride)
        x = self.conv2(nnx.relu(self.conv1(x)))
        return nnx.relu(x + shortcut)


class CifarResNet(nnx.Module):
    """Images [B, H, W, 3], float32 -> logits [B, num_classes], in inference mode."""

    def __init__(self, depth: int = 20, num_classes: int = 10, *, rngs: nnx.Rngs) -> None:
        self.depth = depth
        self.stem = ConvBN(3, FEATURES[0], 1, rngs)
        inputs = FEATURES[0]
        for name, features, stride in blocks(depth):
            setattr(self, name, BasicBlock(inputs, features, stride, rngs))
            inputs = features
        self.classifier = nnx.Linear(inputs, num_classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(x))
        for name, _, _ in blocks(self.depth):
            x = getattr(self, name)(x)
        return self.classifier(global_average(x))


def from_linen(variables: Variables, depth: int = 20, num_classes: int = 10) -> CifarResNet:
    """The network with the variables of its linen twin."""
    model = nnx.eval_shape(lambda: CifarResNet(depth, num_classes, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = {
        path: variable.replace(jnp.asarray(_leaf(variables, path)))
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat.items()))


def _leaf(variables: Variables, path: tuple[str, ...]) -> jax.Array:
    collection = "batch_stats" if path[-1] in ("mean", "var") else "params"
    leaf = variables[collection]
    for key in path:
        leaf = leaf[key]
    return leaf
