"""A layer of experts in float32 and in int8: by the kernels with prepared weights, and by XLA.

    python -m experiments.benchmarks.experts --tokens 16 512

Each token goes to two of eight experts of two dense layers: sorted by expert through
`lax.ragged_dot`; by capacity through `einsum("gecd,edh->gech")`; or every token through all of
them, as `nn.vmap` over an expert does.  There are twice as many places in a group as fall to an
expert in the mean, so that the second form multiplies twice as much as the first, the third four
times.  Two minutes for both numbers of tokens.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxquant
from experiments.benchmarks.interleave import print_table, time_in_turn

EXPERTS, CHOSEN, WIDTH, HIDDEN = 8, 2, 512, 2048


class Expert(nn.Module):
    """Two dense layers, [..., WIDTH] -> [..., WIDTH]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(WIDTH, name="down")(nn.relu(nn.Dense(HIDDEN, name="up")(x)))


EVERY = nn.vmap(
    Expert, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=0,
    axis_size=EXPERTS,
)  # fmt: skip


def ragged(p: Any, x: jax.Array, chosen: jax.Array) -> jax.Array:
    """Tokens [T, D] by the experts [T, 2] that each chose: [T, 2, D]."""
    by_expert = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS)
    rows = x[by_expert // CHOSEN]
    hidden = nn.relu(jax.lax.ragged_dot(rows, p["up"]["kernel"], sizes))
    given = jax.lax.ragged_dot(hidden, p["down"]["kernel"], sizes)
    return given[jnp.argsort(by_expert)].reshape(*chosen.shape, WIDTH)


def by_capacity(p: Any, x: jax.Array) -> jax.Array:
    """Tokens that are dispatched already, [G, E, C, D]."""
    hidden = nn.relu(jnp.einsum("gecd,edh->gech", x, p["up"]["kernel"]))
    return jnp.einsum("gech,ehd->gecd", hidden, p["down"]["kernel"])


def every(p: Any, x: jax.Array) -> jax.Array:
    """Tokens [T, D] by all experts: [E, T, D]."""
    given: jax.Array = EVERY().apply({"params": p}, x)
    return given


def forms(tokens: int) -> dict[str, tuple[Callable[..., jax.Array], tuple[Any, ...]]]:
    """The forms by name, with what each is given beside the parameters."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(tokens, WIDTH)), jnp.float32)
    order = np.argsort(rng.random((tokens, EXPERTS)), axis=1)
    places = max(2 * CHOSEN * tokens // EXPERTS, 1)
    dispatched = jnp.asarray(rng.normal(size=(1, EXPERTS, places, WIDTH)), jnp.float32)
    return {
        "ragged dot": (ragged, (x, jnp.asarray(order[:, :CHOSEN], jnp.int32))),
        "einsum by capacity": (by_capacity, (dispatched,)),
        "nn.vmap, all experts": (every, (x,)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 512])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    params = EVERY().init(jax.random.key(0), jnp.zeros((1, WIDTH)))["params"]
    for tokens in given.tokens:
        for name, (function, inputs) in forms(tokens).items():
            quiet = {"progress": False, "recover": ()}
            qparams, qapply = jaxquant.quant_post(params, function, [inputs], **quiet)
            by_xla = qapply.with_backend("xla")
            programs: dict[str, tuple[Any, Any]] = {
                "float32": (params, function),
                f"int8, {qapply.backend.name}": (qapply.prepare(qparams), qapply),
                "int8, xla": (qparams, by_xla),
            }
            compiled = {
                form: functools.partial(jax.jit(run).lower(p, *inputs).compile(), p, *inputs)
                for form, (p, run) in programs.items()
            }
            sites = qapply.report().summary
            print(f"int8 sites: {sites['sites_int8']}, float: {sites['sites_float']}")
            print_table(f"{name}, {tokens} tokens", time_in_turn(compiled, given.rounds))


if __name__ == "__main__":
    main()
