"""Signal to quantization noise of every site's output, float model against int8 model."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, sites
from jaxquant.run.program import Program


def site_sqnr(
    program: Program, params: Any, qparams: Any, inputs: tuple[Any, ...]
) -> dict[str, float]:
    """Site name -> SQNR in dB of its output, epilogue's affine part included, on one batch.

    Both models run whole, so the noise of earlier sites counts: 10 log10(Σ y² / Σ (y - ŷ)²).
    Sites inside control flow are left out.
    """
    graph = program.graph
    ends = {s.site.name: s.epilogue.output for s in program.binding.sites}
    tensors = {
        site.name: ends.get(site.name, site.output)
        for site in sites.find_sites(graph)
        if site.output is not None and jnp.issubdtype(graph.dtype(site.output), jnp.floating)
    }

    @jax.jit
    def measure(params: Any, qparams: Any, flat: list[Any]) -> dict[str, tuple[Any, Any]]:
        leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
        reference = evaluate.evaluate(graph, leaves, flat)
        quantized = program.run(qparams, flat)
        return {
            name: _powers(reference.read(var), quantized.wide(var))
            for name, var in tensors.items()
            if var is not None and var in quantized
        }

    powers = measure(params, qparams, jax.tree.leaves(inputs))
    return {name: decibel(float(s), float(n)) for name, (s, n) in powers.items()}


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite where there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _powers(reference: Any, quantized: Any) -> tuple[Any, Any]:
    reference, quantized = reference.astype(jnp.float32), quantized.astype(jnp.float32)
    return jnp.sum(reference**2), jnp.sum((reference - quantized) ** 2)
