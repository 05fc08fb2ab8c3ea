"""Sites that four bits cost most, kept in eight where that is next to free.

Every token reads the same rows of a small table (the positions of a transformer), so that their
errors do not average out, and those of the first and the last site meet the input and the output
as they are.  On MiniLM-L6 the positions alone cost more in 4 bits than the words, which are sixty
times as many.
"""

from __future__ import annotations

import math

from jaxquant.graph import kinds
from jaxquant.graph.model import Model
from jaxquant.plan.candidates import first_and_last
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.rules import Rule

PART = 1 / 50  # of the parameters may be kept in 8 bits


def eight_bit_rules(model: Model, config: QuantConfig) -> tuple[Rule, ...]:
    """A rule for each sensitive site of a model whose weights are to be of 4 bits.

    Those are the embeddings outside of loops, and the first and the last site with a weight: the
    smallest of them, as long as all together hold at most `PART` of the parameters.  Sites that
    read one parameter are of one size together, and so are tied embeddings.

    Args:
      model: the traced model.
      config: what was asked for.
    """
    if config.weight_bits != 4:
        return ()
    graph, ends = model.graph, first_and_last(model.located)
    sizes = {
        # Tied sites share a parameter, and count once.
        site.weight_path: math.prod(graph.shape(site.weight))
        for site in model.sites
        if site.weight is not None and (site.is_lookup or site.name in ends)
    }
    # From the smallest on, as many as fit into the given part of the model's size.
    left = PART * sum(math.prod(graph.shape(var)) for var in graph.leaves)
    kept: list[str] = []
    for path, size in sorted(sizes.items(), key=lambda item: item[1]):
        left -= size
        if left < 0:
            break
        kept.append(path)
    weighted = (*kinds.WEIGHTED_KINDS, kinds.LOOKUP_KIND)
    reason = "an embedding, or the first or last site: sensitive, and small"
    return tuple(
        Rule(f"site:{site.name}", weight_bits=8, reason=reason)
        for site in model.sites
        if site.weight_path in kept and site.kind in weighted and site.stores_weight
    )
