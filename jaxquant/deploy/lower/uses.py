"""Who makes and who reads the tensors of a network, and which operations are one to a runtime."""

from __future__ import annotations

from jaxquant.deploy.lower.scales import Scales
from jaxquant.deploy.network import Int8Node, Network, Node, Scalar, Var

_FLOATS = ("float32", "bfloat16", "float16")


class Uses:
    """The makers and readers of a network's tensors.

    Attributes:
      moves: tensor -> the operation that hands int8 values on to it.

    Args:
      network: whose.
      scales: of its int8 tensors.
    """

    def __init__(self, network: Network, scales: Scales) -> None:
        self.network = network
        self._scales = scales
        self.moves = {var: node for node in network.moves for var in node.outputs}
        self._readers: dict[Var, list[Node | Int8Node]] = {}
        self._makers: dict[Var, Node | Int8Node] = {}
        self._results = {x for x in network.outputs if isinstance(x, int)}
        for node in network.walk():
            bodies = node.bodies if isinstance(node, Node) else ()
            # What a body gives is read by whoever repeats it, in float.
            self._results |= {x for body in bodies for x in body.outputs if isinstance(x, int)}
            ends = (node.output,) if isinstance(node, Int8Node) else node.outputs
            self._makers.update(dict.fromkeys(ends, node))
            inputs = node.operands if isinstance(node, Int8Node) else node.inputs
            for atom in inputs:
                if isinstance(atom, int):
                    self._readers.setdefault(atom, []).append(node)

    def place(self, node: Node) -> str:
        """Where an operation is, for an error: its scope, its line, the parameters around it."""
        where = f"the operation {node.op!r}" + (f" in {node.scope!r}" if node.scope else "")
        if node.source:
            where += f", {node.source}"
        near = self._nearest(node)
        return where + (f", behind {near}" if near else "")

    def _nearest(self, node: Node) -> str:
        """The site or parameter that an operation reads, perhaps through others; "" if none."""
        # Breadth first: what is nearest tells a reader most.
        queue, seen = [x for x in node.inputs if isinstance(x, int)], set[Var]()
        while queue:
            var = queue.pop(0)
            if var in seen:
                continue
            seen.add(var)
            if str(var) in self.network.leaves:
                return f"parameter {self.network.leaves[str(var)]!r}"
            maker = self._makers.get(var)
            if isinstance(maker, Int8Node):
                return f"site {maker.name!r}"
            if maker is not None:
                queue += [x for x in maker.inputs if isinstance(x, int)]
        return ""

    def is_quantized(self, var: Var) -> bool:
        """True where a tensor is read only to be quantized, perhaps behind clips and max pools.

        Runtimes quantize before those, so they run the site before them in int8.
        """
        # The network clips first and quantizes then.  Both orders give the same integers, so a
        # runtime may turn them round where nobody reads the float in between.
        reader = self.only_reader(var)
        if reader is not None and str(var) not in self.network.entries:
            clips = (with_scalar(reader, "max") or with_scalar(reader, "min")) is not None
            # between the steps of an unrolled loop a tensor has another number
            is_transparent = clips or reader.op in ("reduce_window_max", "optimization_barrier")
            return is_transparent and self.is_quantized(reader.outputs[0])
        entry = self.network.entries.get(str(var))
        if entry is None or self.is_read_in_float(var):
            return False
        return not self._scales.is_divided(entry)

    def is_read_in_float(self, var: Var) -> bool:
        """True where somebody reads the float of a tensor that others read in int8."""

        # It is rounded for everybody, so the int8 form says all there is.
        if var in self.network.rounded:
            return False
        return var in self._results or any(
            node.dynamic if isinstance(node, Int8Node) else not node.reads_int8
            for node in self._readers.get(var, ())
        )

    def lower_bound(self, node: Node) -> tuple[Var, Scalar] | None:
        """The tensor and the number of max(x, low) that only min(_, high) reads: one clip."""
        split = with_scalar(node, "max")
        if split is None or (node.reads_int8 and str(split[0]) in self.network.scales):
            return None
        (var,) = node.outputs
        reader = self.only_reader(var)
        if reader is None or with_scalar(reader, "min") is None:
            return None

        # Of integers a clip is an operation of its own, and so is one that int8 is read of.
        if str(var) in self.network.scales or self.network.tensors[var].dtype not in _FLOATS:
            return None
        return split

    def only_reader(self, var: Var) -> Node | None:
        """The operation on floats that alone reads a tensor, which is no result either."""
        readers = self._readers.get(var, [])
        if var in self._results or len(readers) != 1 or not isinstance(readers[0], Node):
            return None
        return readers[0]


def with_scalar(node: Node, op: str) -> tuple[Var, Scalar] | None:
    """The tensor and the number of an operation of this name that has both."""
    if node.op != op or len(node.inputs) != 2:
        return None
    a, b = node.inputs
    if isinstance(a, int) and isinstance(b, Scalar):
        return a, b
    if isinstance(a, Scalar) and isinstance(b, int):
        return b, a
    return None
