"""Which loops take as many steps as what they compute asks for, as a solver with an error bound."""

from __future__ import annotations

import jax.numpy as jnp

from jaxquant.graph import ir
from jaxquant.graph.once import once
from jaxquant.graph.regions import Region


@once
def is_adaptive(body: Region) -> bool:
    """Whether the test of a `while` reads floats that its body computes, or what follows from them.

    Numbers that are chosen by floats (the tokens of a text) are not counted as such.

    Args:
      body: of the loop; any other region is not adaptive.
    """
    eqn, holder = body.equation, body.holder
    if eqn is None or holder is None or eqn.name != "while" or body.key == "cond_jaxpr":
        return False
    test = next(each for each in holder.bodies(eqn) if each.key == "cond_jaxpr")
    read = test.graph.needed(test.graph.outputs[0])
    carried = [k for k, var in enumerate(test.arguments) if var in read]
    first = eqn.params["cond_nconsts"]
    results = [body.graph.outputs[k - first] for k in carried if k >= first]
    return any(_is_of_floats(body.graph, result) for result in results)


def _is_of_floats(graph: ir.Graph, result: ir.Atom) -> bool:
    """Whether a float or a truth value that is no constant depends on floats."""
    stack, seen = [result], set[ir.Atom]()
    while stack:
        atom = stack.pop()
        if graph.is_static(atom) or atom in seen:
            continue
        seen.add(atom)
        if jnp.issubdtype(graph.dtype(atom), jnp.floating):
            return True
        made = graph.producer.get(atom) if isinstance(atom, int) else None
        if made is not None and graph.dtype(atom) == jnp.bool_:
            stack += made.inputs
    return False
