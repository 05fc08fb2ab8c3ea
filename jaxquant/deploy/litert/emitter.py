"""Walks the plain-data network and emits the LiteRT graph: floats, int8 forms, sites."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxquant.deploy.litert import (
    contraction,
    elementwise,
    indexing,
    moving,
    on_integers,
    reduction,
    stored,
)
from jaxquant.deploy.litert.builder import Builder
from jaxquant.deploy.litert.chains import Chain, follow
from jaxquant.deploy.litert.contraction import Result
from jaxquant.deploy.litert.graph import Grid
from jaxquant.deploy.lower.convolution import conv_form
from jaxquant.deploy.lower.elementwise import scaled
from jaxquant.deploy.lower.emitter import LAZY, BaseEmitter
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.model import Lowered
from jaxquant.deploy.lower.values import Size, Value, straight
from jaxquant.deploy.network import Atom, Int8Node, Node, Scalar, Var
from jaxquant.graph.contraction import Contraction

EmitSite = Callable[["Emitter", Int8Node, "Chain | None"], Value]


class Emitter(BaseEmitter[Builder]):
    """The float values and the int8 forms of a network's tensors, emitted once each.

    Args:
      model: what is exported.
      builder: of the graph.
      emit_site: gives the result of an int8 site: int8 at the end of its chain, or, where somebody
        reads it in float before, float.

    Attributes:
      in_float: the sites that run on floats since nobody quantizes what they give, by name.
    """

    function = "export_litert"

    def __init__(self, model: Lowered, builder: Builder, emit_site: EmitSite) -> None:
        super().__init__(model, builder)
        self.in_float: list[str] = []
        self._emit_site = emit_site
        self._dequantized: dict[str, str] = {}  # int8 tensor -> its float
        self._passed: set[Var] = set()  # what is inside a chain, which nobody else reads

    def emit(self, nodes: Sequence[Node | Int8Node]) -> None:
        """Emit operations in their order.

        Raises:
          ValueError: an operation is not covered; the message names it and where it is.
        """
        for node in nodes:
            if isinstance(node, Int8Node):
                with self._at(node.name, f"site {node.name!r}"):
                    # First what follows: whether a site can be int8 depends on who reads it.
                    chain = follow(self.model, node.output)
                    value = self._emit_site(self, node, chain)
                    self._set(node.output, value, chain)
            elif node.picks:
                for var in node.outputs:
                    self._floats[var] = self.dequantized(var)
            elif not self._passed.issuperset(node.outputs):
                with self._at(node.scope, self.model.uses.place(node)):
                    self._float_node(node)

    def _set(self, var: Var, value: Value, chain: Chain | None) -> None:
        """Keep a result: of an operation in int8 that at the end of its chain."""
        if self.builder.grid(value) is None:
            self._floats[var] = value
            return
        assert chain is not None, "int8 is at the end of a chain"
        self._int8[chain.end] = value
        self._passed.update(chain.passed)

    def grid(self, var: Var) -> Grid:
        """What the int8 form of a tensor is worth."""
        entry = self.network.scales[str(var)]
        return Grid.of(self.model.scales.scale(entry), self.model.scales.zero_point(entry))

    def value(self, atom: Atom) -> Value:
        """The float (or whole-number) value of a tensor."""
        if isinstance(atom, Scalar):
            return self.builder.named(atom.array().astype(elementwise.litert_dtype(atom.dtype)))

        # What the model rounds on a grid is read as rounded wherever it is read in float.
        if atom in self.network.rounded or (atom in self._int8 and atom not in self._floats):
            return self.dequantized(atom)
        if atom in self._weights and atom not in self._floats:
            self._floats[atom] = stored.dequantized(self.builder, self._weights[atom])
        if atom not in self._floats:
            key = str(atom)
            # Parameters and constants become tensors of the file when they are first read.
            name = self.network.leaves.get(key) or self.network.constants.get(key)
            if name is None:
                raise NotCovered(f"tensor {atom}, which nothing gives")
            array = self.model.arrays[name]
            array = array.astype(elementwise.litert_dtype(str(array.dtype)))
            self._floats[atom] = self.builder.named(array, name)
        return self._floats[atom]

    def dequantized(self, var: Var) -> Value:
        """What the int8 form of a tensor is worth, in float."""
        value, entry = self._operand(self.int8(var)), self.network.scales[str(var)]
        if not self.model.scales.is_divided(entry):
            return value

        # The weights of the sites that read it hold the divisors; all others get them back.
        return elementwise.apply(self.builder, "MUL", [value, self._divisors(entry, value.rank)])

    def operand(self, var: Var) -> Value:
        """What sites read as the float of a tensor: without what their weights hold, if divided."""
        return self._operand(self.int8_operand(var))

    def int8_operand(self, var: Var) -> Value:
        """What sites read as the int8 form of a tensor, with all the copies that it holds."""
        return self.full(self.int8(var), var)

    def _operand(self, value: Value) -> Value:
        # A transpose is another value of the same tensor.
        if value.name not in self._dequantized:
            self._dequantized[value.name] = self.builder.dequantize(value).name
        return dataclasses.replace(value, name=self._dequantized[value.name])

    def int8(self, var: Var) -> Value:
        """The int8 form of a tensor."""
        if var not in self._int8:
            entry = self.network.entries.get(str(var))
            if entry is None:
                self._move(self.model.uses.moves[var])
                return self._int8[var]
            # Quantized where it is first read in int8, once for all that read it.
            value = self.full(self._floats.get(var) or self.value(var), var)
            # Channels are divided by their own numbers first, so that one scale serves them all.
            if self.model.scales.is_divided(entry):
                divisors = self._divisors(entry, value.rank, inverse=True)
                value = elementwise.apply(self.builder, "MUL", [value, divisors])
            self._int8[var] = self.builder.quantize(value, self.grid(var))
        return self._int8[var]

    def _divisors(self, entry: str, rank: int, inverse: bool = False) -> Value:
        array = self.model.scales.divisors(entry)
        array = (1 / array if inverse else array).astype(np.float32)
        return self.builder.named(
            array.reshape([1] * (rank - array.ndim) + list(array.shape)), "divisors"
        )

    def dtype(self, atom: Atom) -> str:
        dtype = atom.dtype if isinstance(atom, Scalar) else self.network.tensors[atom].dtype
        return elementwise.litert_dtype(dtype)

    def _move(self, node: Node) -> None:
        """An operation that hands int8 values on: its result has the scale of its operands."""
        with self._at(node.scope, self.model.uses.place(node)):
            values = [
                self.int8(x) if isinstance(x, int) and str(x) in self.network.scales
                else self.value(x)
                for x in node.inputs
            ]  # fmt: skip
            if node.op in ("max", "min"):  # a ReLU of int8, with the integer that stands for 0
                results = [on_integers.clipped(self.builder, node, values)]
            else:
                results = self.apply(node, values)
            self._int8.update(zip(node.outputs, results, strict=True))

    def _float_node(self, node: Node) -> None:
        if self._is_weight(node):
            return
        if node.op == "look_up":
            table, indices = self._stored(node), self.value(node.inputs[2])
            self._floats[node.outputs[0]] = stored.look_up(self.builder, table, indices)
            return
        if node.contraction is not None and not node.reads_int8:
            self._floats[node.outputs[0]] = self._contract(node)
            return
        if node.op in on_integers.OPERATIONS and node.reads_int8:
            chain = follow(self.model, node.outputs[0])
            names = [x for x in node.inputs if isinstance(x, int) and str(x) in self.network.scales]
            # int8 from int8 where the operator has such a form and a grid to put it on.
            is_plain = chain is not None and chain.factor == 1
            if chain is not None and is_plain and len(names) == len(node.inputs) == 2:
                values = [self.full(self.int8(x), x) for x in names]
                result = self.end_of(chain)
                value = on_integers.emit(self.builder, node, values, result)
                self._set(node.outputs[0], self.behind(value, chain, result), chain)
                return
        # As `qapply` reads them: rounded where the operation reads the int8 form.
        values = [
            self.dequantized(x)
            if node.reads_int8 and isinstance(x, int) and str(x) in self.network.scales
            else self.value(x)
            for x in node.inputs
        ]
        self._floats.update(zip(node.outputs, self.apply(node, values), strict=True))

    def end_of(self, chain: Chain) -> Result:
        """What an int8 operation gives that may fuse the clips of its chain."""
        return on_integers.fused(self.grid(chain.end), chain)

    def behind(self, value: Value, chain: Chain, result: Result) -> Value:
        """What an operation gives with the clips and pools of its chain that it does not fuse."""
        value = on_integers.bounded(self.builder, value, chain, result)
        for node in chain.pools:
            value = reduction.max_pool(self.builder, node, value, self.shape(node.outputs[0]))
        return value

    def apply(self, node: Node, values: Sequence[Value]) -> list[Value]:
        """The results of an operation on values."""
        shapes = [self.shape(var) for var in node.outputs]
        if node.op in moving.SEVERAL:
            return moving.SEVERAL[node.op](self.builder, node, self._copied(node, values), shapes)
        if len(node.outputs) != 1 or node.bodies:
            raise NotCovered(f"the operation {node.op!r}")
        return [self._one(node, list(values), shapes[0])]

    def _one(self, node: Node, values: list[Value], shape: tuple[Size, ...]) -> Value:
        if node.op in indexing.TABLE:
            (table,) = self._copied(node, values[:1], (0,))
            return indexing.TABLE[node.op](self.builder, node, [table, *values[1:]], shape)
        # These change the axes alone; the copies wait for somebody who needs them.
        if node.op in moving.TABLE:
            if node.op not in LAZY:
                values = self._copied(node, values)
            return moving.TABLE[node.op](self.builder, node, values, shape)
        if node.op in reduction.OPERATIONS:
            return reduction.emit(self.builder, node, self._copied(node, values)[0], shape)
        # A number is carried along with a value that has a factor, and may cancel it.
        if (value := scaled(node, values)) is not None:
            return value
        if node.op == "softmax":  # which sums along an axis
            values = self._copied(node, values)
        return elementwise.emit(self.builder, node, values, [self.dtype(x) for x in node.inputs])

    def _contract(self, node: Node) -> Value:
        """A convolution or dot on floats."""
        given, builder, shape = node.contraction, self.builder, self.shape(node.outputs[0])
        assert given is not None, "this is asked of convolutions and dots"
        if given.choosing is not None:
            raise NotCovered("a ragged dot, whose rows choose their weight")
        if given.window is not None:
            return self._convolve(node, given)
        # A constant operand is the weight of a dense layer, from either side.
        for side in (0, 1):
            weight = self._matrix(node.inputs[1 - side], given, 1 - side)
            if weight is not None:
                (x,) = self._copied(node, (self.value(node.inputs[side]),), (side,))
                bias = contraction.no_bias(builder, int(builder.tensors[weight].shape[0]), None)
                return contraction.dense(builder, given, side, x, [weight, bias], shape, Result())
        dtype = self.dtype(node.outputs[0])  # JAX takes floats with integers
        values = self._copied(node, [self.value(x) for x in node.inputs[:2]])
        values = [elementwise.cast(builder, value, dtype) for value in values]
        return contraction.dot(builder, given, values, shape, Result())

    def _matrix(self, atom: Atom, given: Contraction, side: int) -> str | None:
        """A constant operand of a dot as the weight [N, K] of a dense layer; None for no such."""
        own = given.operands[side]
        if given.has_batch or isinstance(atom, Scalar):
            return None
        if atom in self._weights and set(own.contracted) == set(self._weights[atom].summed):
            weight = self._weights[atom]
            # Its columns lie in the order of its own axes; the matrix has to have them in the
            # dot's.
            order = [own.contracted.index(axis) for axis in weight.summed]
            if order == sorted(order):
                return stored.matrix(self.builder, weight, tuple(own.free))
        # A parameter that stays float, or one that the model computes of constants.
        value = self.value(atom)
        array, shape = self.builder.array(value.name), self.shape(atom)
        # A value holds no copies of axes that it is broadcast along; the stored matrix has to.
        sizes = [size for size in shape if isinstance(size, int)]
        if array is None or value.order != straight(value.rank) or len(sizes) < len(shape):
            return None
        array = np.broadcast_to(array, sizes)
        width = math.prod(array.shape[axis] for axis in own.contracted)
        matrix = array.transpose((*own.free, *own.contracted)).reshape(-1, width)
        return self.builder.constant(matrix, "weight")

    def _convolve(self, node: Node, given: Contraction) -> Value:
        """A convolution on floats whose kernel is a constant, or stored."""
        builder, kernel = self.builder, node.inputs[1]
        (x,) = self._copied(node, (self.value(node.inputs[0]),), (0,))
        if kernel in self._weights:
            weight = self._weights[kernel]
            form = conv_form(given, weight.shape)
            name = stored.kernel(builder, weight, form)
        else:
            value = self.value(kernel)
            array = builder.array(value.name)
            if array is None or value.order != straight(value.rank):
                # The runtime's layout is made here, so the kernel has to be known here.
                raise NotCovered("a convolution whose kernel the model computes")
            form = conv_form(given, array.shape)
            name = builder.constant(contraction.kernel(form, array)[0], "kernel")
        # Kernels read a bias always.
        bias = contraction.no_bias(builder, form.channels[0], None)
        return contraction.conv(
            builder, given, form, x, [name, bias], self.shape(node.outputs[0]), Result()
        )
