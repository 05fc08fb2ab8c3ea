"""Embeddings that stay float for what they hold: tables with infinities, as of a mask."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxquant.graph.model import Model
from jaxquant.plan.rules import Rule


def float_tables(model: Model, params: Any) -> tuple[Rule, ...]:
    """A rule for each embedding of the model's own graph whose table holds infinities.

    No integer stands for one, and a table may well have some: a mask that is looked up and added
    to scores.
    """
    graph = model.graph
    leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True)) | dict(graph.constants)
    found = []
    for site in model.sites:
        if not site.is_lookup or site.inside or site.weight is None:
            continue
        tables = [leaves[var] for var in graph.sources(site.weight)]
        if any(bool(np.isinf(np.asarray(table)).any()) for table in tables):
            found.append(site.name)
    reason = "its table holds infinities, which have no int8 form"
    return tuple(Rule(f"site:{name}", dtype="float", reason=reason) for name in found)
