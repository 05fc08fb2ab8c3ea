"""Capture the activations of any JAX function by site name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from jaxquant.errors import nearest
from jaxquant.graph import evaluate, ir, loops
from jaxquant.graph.checks import check_sites
from jaxquant.graph.kinds import DOT_KINDS
from jaxquant.graph.model import Model
from jaxquant.graph.patterns import matches_site
from jaxquant.graph.regions import Region
from jaxquant.graph.sites import Site
from jaxquant.graph.trace import trace

Captured = dict[str, jax.Array]


def capture(
    params: Any,
    apply_fn: Callable[..., Any],
    *inputs: Any,
    sites: str | Sequence[str] = "*",
    of: Literal["output", "input"] = "output",
) -> Captured:
    """Run `apply_fn(params, *inputs)` and return the activations at its sites.

    Works on any JAX function, under `jit`, `vmap` and `grad`, through `remat` and `scan`: a site
    inside a `scan` comes back with the loop's steps as a leading axis.  Custom derivative rules
    hold, unless the function that has one holds a site.  Nothing is stored in the model.  Sites
    inside `while` and `cond` run a number of times that is not known beforehand, so they cannot be
    captured.

    Args:
      params: pytree of arrays.
      apply_fn: a pure function `apply_fn(params, *inputs)`.
      *inputs: its inputs.
      sites: pattern or patterns of convolutions and dots: globs on site names (`"*"`,
        `"block1/*"`), kinds (`"kind:matmul"`) or Flax module classes (`"module:SelfAttention"`).
      of: "output", what the convolution or dot gives (before bias and activation function), or
        "input", the activation that it reads.

    Returns:
      Site name -> array, in the order of evaluation.

    Raises:
      ValueError: there is no site, a pattern matches none, or only sites inside `while` or `cond`.

    Example:
      >>> import jax.numpy as jnp, jaxquant
      >>> params = {"a": {"w": jnp.eye(3)}, "b": {"w": jnp.ones((3, 2))}}
      >>> apply_fn = lambda p, x: jnp.tanh(x @ p["a"]["w"]) @ p["b"]["w"]
      >>> seen = jaxquant.capture(params, apply_fn, jnp.ones((4, 3)))
      >>> {name: value.shape for name, value in seen.items()}
      {'a': (4, 3), 'b': (4, 2)}
    """
    if of not in ("output", "input"):
        raise ValueError(f"of is 'output' or 'input', got {of!r}")
    patterns = (sites,) if isinstance(sites, str) else tuple(sites)
    # Differentiable: functions with a derivative rule of their own stay whole.
    model = Model(trace(apply_fn, params, inputs, differentiable=True))
    graph = model.graph
    found = [site for site in model.sites if site.kind in DOT_KINDS]
    check_sites(found)
    wanted = _match(found, patterns)
    leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
    _, captured = _evaluate(model.root, leaves, jax.tree.leaves(inputs), wanted, of)
    return {site.name: captured[site.name] for site in wanted}


def _match(found: Sequence[Site], patterns: Sequence[str]) -> list[Site]:
    """The sites to capture: those that match and are not inside `while`, `cond` and the like."""
    matched: dict[str, Site] = {}
    for pattern in patterns:
        hits = [site for site in found if matches_site(site, pattern)]
        if not hits:
            names = [site.name for site in found]
            raise ValueError(f"sites: {pattern!r} matches no site{nearest(pattern, names)}")
        matched |= {site.name: site for site in hits}
    # A scan stacks what its steps show; other loops have no axis for their steps.
    # In the order of evaluation, whatever the order of patterns.
    wanted = [s for s in found if s.name in matched and set(s.inside) <= {"scan"}]
    lost = [s for s in found if s.name in matched and not set(s.inside) <= {"scan"}]
    if lost:
        text = ", ".join(f"{s.name} (inside {'/'.join(s.inside)})" for s in lost[:5])
        message = f"these sites cannot be captured: {text}"
        if not wanted:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
    return wanted


def _evaluate(
    region: Region,
    leaves: Mapping[ir.Var, Any],
    inputs: Sequence[Any],
    wanted: Sequence[Site],
    of: str,
) -> tuple[evaluate.Environment, Captured]:
    captured: Captured = {}
    graph, holder = region.graph, region.location
    table = evaluate.float_table(graph.equations)
    for site in wanted:
        if site.location[: len(holder)] != holder:
            continue
        # A site in a scan is captured by the scan, which stacks what its steps show.
        index, *inner = site.location[len(holder) :]
        eqn = graph.equations[index]
        if inner:
            table[index] = _capturing_scan(captured, eqn, region, wanted, of)
        else:
            table[index] = _capturing(captured, site, eqn, of, table[index])
    # The dict is filled as the equations run.
    return evaluate.evaluate(graph, leaves, inputs, table), captured


def _capturing(
    captured: Captured,
    site: Site,
    eqn: ir.Equation,
    of: str,
    lowering: evaluate.Lowering[evaluate.Environment],
) -> evaluate.Lowering[evaluate.Environment]:
    """The lowering of a site, which keeps what it reads or gives."""

    def capturing(env: evaluate.Environment) -> evaluate.Values:
        values = lowering(env)
        # The operand that is no weight.
        activation = eqn.inputs[1 - site.weight_position]
        captured[site.name] = values[eqn.outputs[0]] if of == "output" else env.read(activation)
        return values

    return capturing


def _capturing_scan(
    captured: Captured,
    eqn: ir.Equation,
    region: Region,
    wanted: Sequence[Site],
    of: str,
) -> evaluate.Lowering[evaluate.Environment]:
    """Run a scan with the captured activations as further outputs of its body."""

    def capturing(env: evaluate.Environment) -> evaluate.Values:
        (body,) = region.bodies(eqn)

        def step(given: loops.Given) -> loops.Gives:
            inner, seen = _evaluate(body, *body.split(given.values), wanted, of)
            return loops.Gives([inner.read(x) for x in body.graph.outputs], seen)

        found = loops.run(eqn, [env.read(x) for x in eqn.inputs], [step])
        captured.update(found.stacked)
        return dict(zip(eqn.outputs, found.results, strict=True))

    return capturing
