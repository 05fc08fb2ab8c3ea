"""Which products of models the kernels run: of attention and of experts, in loops too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxquant
from jaxquant.backends.native import has
from jaxquant.backends.platforms import PLATFORMS
from jaxquant.graph.model import trace_model
from jaxquant.plan.make import make_plan
from jaxquant.run.program import Program

EXPERTS, WIDTH, HEADS = 3, 8, 2
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, WIDTH)), jnp.float32)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(x), None


Layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
Experts = nn.vmap(
    nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0
)


@nnx.vmap(in_axes=0)
def make_linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(WIDTH, 6, rngs=rngs)


def in_nnx() -> tuple[Any, Any]:
    """Parameters and functions of an attention and of experts."""
    attention = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
    )
    experts = nnx.eval_shape(lambda: make_linear(nnx.Rngs(1).split(EXPERTS)))
    (one, own), (other, others) = nnx.split(attention), nnx.split(experts)
    each = nnx.vmap(lambda linear, x: linear(x), in_axes=(0, 0))
    params = {"attention": nnx.to_pure_dict(own), "experts": nnx.to_pure_dict(others)}
    return drawn(params), {
        "attention": lambda p, x: nnx.merge(one, nnx.State(p))(x),
        "experts": lambda p, x: each(nnx.merge(other, nnx.State(p)), x),
    }


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def drawn(shapes: Any) -> Any:
    """Parameters of these shapes."""
    return jax.tree.map(lambda leaf: normal(5, *leaf.shape), shapes)


def model() -> tuple[Any, Any]:
    """(parameters, a function of many products)."""
    by_expert = jnp.stack([X[0]] * EXPERTS)
    params, functions = in_nnx()
    layers, experts = Layers(), Experts(6)
    params = {
        **params,
        "layers": drawn(jax.eval_shape(layers.init, jax.random.key(0), X, None)["params"]),
        "dense": drawn(jax.eval_shape(experts.init, jax.random.key(1), by_expert)["params"]),
        "dispatched": {"kernel": normal(2, EXPERTS, WIDTH, 6)},
        "heads_first": {"kernel": normal(3, HEADS, WIDTH, 4)},
        "sums_apart": {"kernel": normal(4, WIDTH, 6, 5)},
    }

    def apply_fn(p: Any, x: jax.Array) -> dict[str, jax.Array]:
        spread = jnp.stack([x] * EXPERTS) * jnp.arange(1.0, 4.0)[:, None, None, None]
        rows = spread.reshape(EXPERTS, -1, WIDTH)
        return {
            "layers": layers.apply({"params": p["layers"]}, x, None)[0],
            "attention": functions["attention"](p["attention"], x),
            "dense": experts.apply({"params": p["dense"]}, rows),
            "experts": functions["experts"](p["experts"], rows),
            "dispatched": nn.relu(
                jnp.einsum("gecd,edh->gech", spread.swapaxes(0, 1), p["dispatched"]["kernel"])
            ),
            "heads_first": jnp.einsum("btd,hdk->bhtk", x, p["heads_first"]["kernel"]),
            "sums_apart": jnp.einsum("btd,dot->bo", x, p["sums_apart"]["kernel"]),
        }

    return params, apply_fn


def calls(program: Program) -> Iterator[tuple[str, Any]]:
    yield from ((name, each.call) for name, each in program.calls.items())
    for body in (body for bodies in program.bodies.values() for body in bodies):
        yield from calls(body)


def test_products_of_attention_and_experts_have_kernels() -> None:
    params, apply_fn = model()
    observations = jaxquant.calibrate(params, apply_fn, [X], progress=False)
    binding = make_plan(trace_model(apply_fn, params, (X,)), observations, jaxquant.QuantConfig())
    weighted = [site for site in binding.whole_plan.sites if site.kind == "mul"]
    assert {site.status for site in weighted} == {"int8"}
    found = dict(calls(Program(binding, params, PLATFORMS)))
    assert found.keys() == {site.name for site in weighted}
    assert not [name for name, call in found.items() if not has(call)]
    for name in ("dense", "experts", "dispatched"):
        assert found[name].channels.sizes == (EXPERTS, 6)
