"""An int8 model as an exporter takes it: its network, its arrays, its grids, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.deploy import program, tree
from jaxquant.deploy.lower.scales import Scales
from jaxquant.deploy.lower.uses import Uses
from jaxquant.deploy.network import Int8Node, Network
from jaxquant.deploy.to_network import to_network
from jaxquant.plan.modes import STATIC


@dataclasses.dataclass(frozen=True)
class Lowered:
    """An int8 model.

    Attributes:
      network: its operations.
      arrays: its parameters and constants, by the names that the network has for them.
      sites: name of an int8 site -> the arrays of its epilogue.
      scales: the grids of its int8 tensors.
      uses: who makes and reads its tensors.
    """

    network: Network
    arrays: Mapping[str, np.ndarray]
    sites: Mapping[str, Mapping[str, np.ndarray]]
    scales: Scales
    uses: Uses

    def entries(self, site: Int8Node) -> list[str]:
        """The entries that say what the operands of a site are worth."""
        return [self.network.scales[str(var)] for var in site.operands]


def lower(
    file_format: str,
    qparams: Mapping[str, Any],
    qapply: Any,
    shapes: Any = None,
    constraints: Sequence[str] = (),
) -> Lowered:
    """Describe an int8 model for an exporter.

    Args:
      file_format: what errors call the format.
      qparams: the arrays of the int8 model.
      qapply: the function that came with them.
      shapes, constraints: see `jaxquant.save_quantized_model`.

    Raises:
      ValueError: the model's tensors have no scales of their own, it cannot be traced with sizes
        that vary, or the arrays are another model's.
      TypeError: `qapply` is another function.
    """
    if getattr(qapply, "plan", None) and qapply.plan.mode != STATIC:
        raise ValueError(
            f"{file_format} export covers models whose tensors have scales of their own, as "
            f"quant_post makes them; this one is {qapply.plan.mode!r}. Use "
            "jaxquant.export_stablehlo"
        )
    plain = tree.plain(qparams, qapply)
    by_xla = qapply.with_backend("xla")
    network, constants = program.traced(
        by_xla, shapes, constraints, lambda inputs: to_network(by_xla.program(*inputs), inputs)
    )
    scales = Scales(qapply.plan, plain["tensors"])
    return Lowered(
        network=network,
        arrays={**tree.flatten(plain), **constants},
        sites={
            name: {key: np.asarray(array) for key, array in arrays.items()}
            for name, arrays in plain["sites"].items()
        },
        scales=scales,
        uses=Uses(network, scales),
    )
