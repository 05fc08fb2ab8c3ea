"""Embeddings that stay float for what they hold: tables with infinities, as of a mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxquant.graph.checks import count, values_of
from jaxquant.graph.model import Model
from jaxquant.plan.rules import Rule


def float_tables(model: Model, params: Any) -> tuple[Rule, ...]:
    """A rule for each embedding of the model's own graph whose table holds infinities.

    No integer stands for one, and a table may well have some: a mask that is looked up and added
    to scores.
    """
    values, found = values_of(model.graph, params), []
    for site in model.sites:
        if not site.is_lookup or site.inside or site.weight is None:
            continue
        # The weight may be made of several leaves: an infinity in any of them arrives.
        if any(count(values[var], np.isinf) for var in model.graph.sources(site.weight)):
            found.append(site.name)
    reason = "its table holds infinities, which have no int8 form"
    return tuple(Rule(f"site:{name}", dtype="float", reason=reason) for name in found)
