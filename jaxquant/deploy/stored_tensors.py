"""The weights and constants of one graph as tensors of a network."""

from __future__ import annotations

from jaxquant.code_tables import INT
from jaxquant.deploy import constants
from jaxquant.deploy.found import Found
from jaxquant.deploy.network import Int8Node, Node, Tensor
from jaxquant.deploy.plain_values import plain, scalar
from jaxquant.deploy.restoring import restored_groups, undoing
from jaxquant.deploy.tensors import Tensors
from jaxquant.files import tensor_names
from jaxquant.graph import ir
from jaxquant.graph.regions import Region
from jaxquant.jax_shim import jaxprs
from jaxquant.plan.binding import Binding
from jaxquant.plan.groups import GroupLayout
from jaxquant.plan.layout import WeightSlot
from jaxquant.run.program import Program


class StoredTensors(Tensors):
    """The tensors of a graph, with those that come from `qparams` or from nothing.

    Args:
      program: of the graph.
      binding: of its layer, which differs from the program's in its grids alone.
      region, found, nodes: see `Tensors`.
    """

    def __init__(
        self,
        program: Program,
        binding: Binding,
        region: Region,
        found: Found,
        nodes: list[Node | Int8Node],
    ) -> None:
        super().__init__(region, found, nodes)
        self.program = program
        self.binding = binding

    def fold(self, var: ir.Var) -> None:
        """Give a tensor that depends on nothing its array, which the steps of a loop share."""
        number = str(self.number(var))
        key = self.region.location, var
        if key not in self.found.folded:
            name = self.found.folded[key] = f"constants/{len(self.found.arrays)}"
            self.found.arrays[name] = constants.fold(self.graph, var)
        self.found.constants[number] = self.found.folded[key]

    def stored_name(self, path: tuple[str, ...], var: ir.Var) -> str:
        """The name of what is stored of a weight; where layers have their own, of one layer's.

        Args:
          path: where it is in `qparams`.
          var: the weight, or what follows from it.
        """
        varies = self.binding.model.varies_by_layer(var)
        # Along the scans that hand it out: what all layers share has no axis for them.
        index = tuple(k for k, own in zip(self.binding.layer, varies, strict=True) if own)
        return self.found.slice_of(tensor_names.join(("params", *path)), index)

    def take_stored(self, slot: WeightSlot, var: ir.Var) -> tuple[int, int]:
        """Numbers for the integers and the scales that are stored for a weight.

        Raises:
          ValueError: the weight holds codes, which no format of files knows.
        """
        if slot.weight_dtype != INT:
            raise ValueError(
                f"no exporter writes {slot.weight_dtype!r} weights, as of {'/'.join(slot.path)}: "
                "quantize with integers, weight_bits=8 or 4, to export (files of "
                "jaxquant.save_quantized_model and StableHLO have them)"
            )

        # Without a shape: packed codes and groups have another than the tensor.
        integers, scale = (self.found.new(Tensor((), dtype)) for dtype in ("int8", "float32"))
        for number, path in ((integers, slot.int8), (scale, slot.scale)):
            self.found.leaves[str(number)] = self.stored_name(path, var)
        return integers, scale

    def dequantize(self, slot: WeightSlot, groups: GroupLayout, var: ir.Var) -> int:
        """Add the dequantization of a weight, and give the number of its float.

        Args:
          slot: where it is stored.
          groups: its layout.
          var: the weight, or what follows from it.
        """
        shape = tuple(groups.permuted[axis] for axis in groups.inverse)
        number = self.found.new(Tensor(shape, "float32"))
        params = {"groups": groups, "bits": slot.weight_bits}
        self.add("dequantize", self.take_stored(slot, var), (number,), params)
        return number

    def restore(self, var: ir.Var) -> None:
        """Add what computes a static tensor from the integers of a weight and their scales."""
        restored = self.program.restored[var]
        groups = restored_groups(self.program, restored)
        weight = self.dequantize(self.program.slots[restored.site.name], groups, var)
        self._add_steps(undoing(self.program, restored), weight, self.number(var))

    def _add_steps(self, steps: ir.Graph, given: int, result: int) -> None:
        """Add what computes a tensor from another one.

        Args:
          steps: the computation, of one input.
          given: the number of that.
          result: of the tensor that it gives.
        """
        numbers = {steps.inputs[0]: given}
        for eqn in steps.equations:
            for output in eqn.outputs:
                numbers[output] = self.new(steps, output)
            params = jaxprs.portable_params(eqn.name, eqn.params)
            self.nodes.append(
                Node(
                    op=eqn.name,
                    inputs=tuple(
                        scalar(x.value) if isinstance(x, ir.Literal) else numbers[x]
                        for x in eqn.inputs
                    ),
                    outputs=tuple(numbers[x] for x in eqn.outputs),
                    params={key: plain(value) for key, value in params.items()},
                    scope="",
                )
            )
        # The result has a number already, which others refer to.
        (last,) = steps.outputs
        assert isinstance(last, int), "a weight is no scalar"
        self.add("optimization_barrier", (numbers[last],), (result,), {})
