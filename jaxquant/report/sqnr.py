"""Signal to quantization noise of every site's output, float model against int8 model."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, sites
from jaxquant.run.program import Program


def measure_sqnr(
    program: Program, params: Any, qparams: Any, inputs: tuple[Any, ...]
) -> tuple[dict[str, float], float | None]:
    """The SQNR in dB of every site's output and of the model's outputs, on one batch.

    Both models run whole, so the noise of earlier sites counts: 10 log10(Σ y² / Σ (y - ŷ)²).  A
    site's output is taken behind the affine part of its epilogue.

    Returns:
      Site name -> SQNR, without the sites inside control flow; and the SQNR of all float outputs
      of the model together, None where it has none.  Minus infinity where the int8 model gives NaN
      or infinity and the float model does not.
    """
    graph = program.graph
    ends = {s.site.name: s.epilogue.output for s in program.binding.sites}
    tensors = {
        site.name: ends.get(site.name, site.output)
        for site in sites.find_sites(graph)
        if site.output is not None and jnp.issubdtype(graph.dtype(site.output), jnp.floating)
    }

    @jax.jit
    def measure(params: Any, qparams: Any, flat: list[Any]) -> tuple[Any, Any]:
        leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
        reference = evaluate.evaluate(graph, leaves, flat)
        quantized = program.run(qparams, flat)
        by_site = {
            name: _powers(reference.read(var), quantized.wide(var))
            for name, var in tensors.items()
            if var is not None and var in quantized
        }
        by_output = [
            _powers(jnp.asarray(reference.read(x)), jnp.asarray(quantized.read(x)))
            for x in graph.outputs
            if jnp.issubdtype(graph.dtype(x), jnp.floating)
        ]
        return by_site, by_output

    by_site, by_output = measure(params, qparams, jax.tree.leaves(inputs))
    sites_db = {name: decibel(float(s), float(n)) for name, (s, n) in by_site.items()}
    if not by_output:
        return sites_db, None
    signal, noise = (float(sum(powers)) for powers in zip(*by_output, strict=True))
    return sites_db, decibel(signal, noise)


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite where there is no noise."""
    if noise == 0:
        return math.inf
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)


def _powers(reference: Any, quantized: Any) -> tuple[Any, Any]:
    """Σ y² and Σ (y - ŷ)² where y is finite; infinite noise where ŷ alone is not."""
    reference, quantized = reference.astype(jnp.float32), quantized.astype(jnp.float32)
    compared = jnp.isfinite(reference)
    lost = jnp.any(compared & ~jnp.isfinite(quantized))
    reference = jnp.where(compared, reference, 0)
    noise = jnp.where(compared, reference - quantized, 0)
    return jnp.sum(reference**2), jnp.where(lost, jnp.inf, jnp.sum(noise**2))
