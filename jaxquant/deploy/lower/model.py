"""An int8 model as an exporter takes it: its network, its arrays, its grids, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.deploy import program, tree
from jaxquant.deploy.lower.scales import Scales
from jaxquant.deploy.lower.uses import Uses
from jaxquant.deploy.network import Int8Node, Network
from jaxquant.deploy.to_network import to_network
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.plan.binding import Binding


@dataclasses.dataclass(frozen=True)
class Lowered:
    """An int8 model.

    Attributes:
      network: its operations.
      arrays: its parameters and constants, by the names that the network has for them.
      sites: name of an int8 site, in an unrolled scan of one layer's -> the arrays of its epilogue.
      scales: the grids of its int8 tensors.
      uses: who makes and reads its tensors.
    """

    network: Network
    arrays: Mapping[str, np.ndarray]
    sites: Mapping[str, Mapping[str, np.ndarray]]
    scales: Scales
    uses: Uses

    def entries(self, site: Int8Node) -> list[str]:
        """The entries that say what the operands of a site are worth; of a dynamic one, none."""
        if site.dynamic:
            return []
        return [self.network.scales[str(var)] for var in site.operands]


def lower(
    qparams: Mapping[str, Any],
    qapply: Any,
    shapes: Any = None,
    constraints: Sequence[str] = (),
    operators: Collection[str] = (),
) -> Lowered:
    """Describe an int8 model for an exporter.

    Args:
      qparams: the arrays of the int8 model.
      qapply: the function that came with them.
      shapes, constraints: see `jaxquant.save_quantized_model`.
      operators: the kinds of `jaxquant.graph.operators` that the format has.

    Raises:
      ValueError: the model cannot be traced with sizes that vary, or the arrays are another
        model's.
      TypeError: `qapply` is another function.
    """
    plain = tree.plain(qparams, qapply)
    # In XLA's form: what other backends pack or transpose, no file has.
    by_xla = qapply.with_backend("xla")

    def as_network(inputs: tuple[Any, ...]) -> tuple[Binding, Network, dict[str, np.ndarray]]:
        traced = by_xla.program(*inputs)
        return traced.binding, *to_network(traced, inputs, operators)

    binding, network, constants = program.traced(by_xla, shapes, constraints, as_network)
    scales = Scales(qapply.plan, plain["tensors"])
    arrays = {**tree.flatten(plain), **constants}
    # What layers have apart is one array in `qparams`: exporters ask for it by layer.
    for name, part in network.slices.items():
        arrays[name] = arrays[part.array][part.index]
    return Lowered(
        network=network,
        arrays=arrays,
        sites={
            each.site.name + layer_suffix(part.layer): {
                key: np.asarray(array[part.layer])
                for key, array in plain["sites"][each.site.name].items()
            }
            for part in binding.all_layers()
            for each in part.sites
            if each.site.name in plain["sites"]
        },
        scales=scales,
        uses=Uses(network, scales),
    )
