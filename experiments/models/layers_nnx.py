"""What the networks of equal layers share in nnx: the layers, and the parameters of linen twins."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


def make_layers(
    make: Callable[[nnx.Rngs], nnx.Module], count: int, scanned: bool, rngs: nnx.Rngs
) -> Any:
    """The layers for `run`.

    Args:
      make: one layer.
      count: L.
      scanned: True: one layer, whose parameters are stacked, [L, ...]; False: a list of L layers.
      rngs: of the parameters.
    """
    if not scanned:
        return nnx.List(make(rngs) for _ in range(count))
    return nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)


def run(x: jax.Array, layers: Any, given: Any) -> jax.Array:
    """One layer after the other: each is called with (x, what all layers read alike)."""
    if not isinstance(layers, nnx.List):
        return _scan(x, layers, given)
    for layer in layers:
        x = layer(x, given)
    return x


@nnx.scan(in_axes=(nnx.Carry, 0, None), out_axes=nnx.Carry)
def _scan(x: jax.Array, layer: Any, given: Any) -> jax.Array:
    return layer(x, given)


def with_parameters(make: Callable[[nnx.Rngs], Model], params: dict[str, Any]) -> Model:
    """The network with the parameters of its linen twin.

    Args:
      make: the network.
      params: of linen's scan where the network has one, else of its Python loop.
    """
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = {
        path: variable.replace(jnp.asarray(_leaf(params, path)))
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat.items()))


def _leaf(params: dict[str, Any], path: tuple[str | int, ...]) -> jax.Array:
    """The leaf of linen's parameters for a path of nnx's, where a layer has a number."""
    if path[0] == "layers" and isinstance(path[1], int):
        path = (f"layers_{path[1]}", *path[2:])
    leaf: Any = params
    for key in path:
        leaf = leaf[key]
    return leaf
