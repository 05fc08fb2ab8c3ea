"""Walks the plain-data network and emits the ONNX graph: floats, int8 forms, sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxquant.deploy.lower.convolution import conv_form
from jaxquant.deploy.lower.elementwise import scaled
from jaxquant.deploy.lower.emitter import LAZY, BaseEmitter
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.model import Lowered
from jaxquant.deploy.lower.stored import Stored
from jaxquant.deploy.lower.uses import with_scalar
from jaxquant.deploy.lower.values import Size, Value, straight
from jaxquant.deploy.network import Atom, Int8Node, Node, Scalar, Var
from jaxquant.deploy.onnx import (
    contraction,
    elementwise,
    indexing,
    lookups,
    operators,
    ordering,
    reduction,
    scattering,
    shaping,
    stored,
)
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.deploy.onnx.quantization import Quantizer
from jaxquant.deploy.onnx.target import WeightForm

WITH_DTYPES = {**indexing.TABLE, **scattering.TABLE, **ordering.TABLE, **shaping.SEVERAL}
# What emits an operation that holds others: of its operands with all their copies, its results.
EmitBodies = Callable[["Emitter", Node, Sequence[Value]], list[Value]]


class Emitter(BaseEmitter[Builder]):
    """The float values and the int8 forms of a network's tensors, emitted once each.

    Args:
      model: what is exported.
      quantizer: what makes the int8 forms.
      emit_site: gives the float result of an int8 site.
      with_bodies: the operations that hold others, such as loops, and what emits them.
    """

    function = "export_onnx"

    def __init__(
        self,
        model: Lowered,
        quantizer: Quantizer,
        emit_site: Callable[[Emitter, Int8Node], Value],
        with_bodies: Mapping[str, EmitBodies],
    ) -> None:
        super().__init__(model, quantizer.builder)
        self.quantizer = quantizer
        self._emit_site = emit_site
        self._with_bodies = with_bodies
        self._lows: dict[Var, tuple[Value, Value]] = {}
        self._layouts: dict[Var, Sequence[int]] = {}
        self.tables, self._unsigned = self._find_tables()

        # Laid out for the convolution once, before it is quantized; others that read it turn it
        # back.
        for node in self.network.walk():
            given = node.node.contraction if isinstance(node, Int8Node) else None
            if not isinstance(node, Int8Node) or node.dynamic:
                continue
            if given is not None and given.window is not None:
                self._layouts.setdefault(node.operands[0], contraction.input_order(given))

    def _find_tables(self) -> tuple[frozenset[str], frozenset[str]]:
        """The tables, by name, that rows are looked up in; those that dots read as uint8."""
        looked_up, dequantized, multiplied = set[str](), set[str](), set[str]()
        for node in self.network.walk():
            if isinstance(node, Int8Node):
                multiplied.add(node.weight)
            elif node.op in ("look_up", "dequantize"):
                found = looked_up if node.op == "look_up" else dequantized
                found.add(self.network.leaves[str(node.inputs[0])])
        target = self.quantizer.target
        # A table that a tied head reads as uint8 is stored so once, for both.
        unsigned = multiplied if target.dot_weight() is WeightForm.UINT8 else set[str]()
        unsigned |= dequantized if target.is_onnxruntime else set()
        return frozenset(looked_up), frozenset(looked_up & unsigned)

    def emit(self, nodes: Sequence[Node | Int8Node]) -> None:
        """Emit operations in their order: those of the network, or of the body of a loop.

        Raises:
          ValueError: an operation is not covered; the message names it and where it is.
        """
        for node in nodes:
            if isinstance(node, Int8Node):
                with self._at(node.name, f"site {node.name!r}"):
                    self._floats[node.output] = self._emit_site(self, node)
            elif node.picks:
                for var in node.outputs:
                    self._floats[var] = self.dequantized(var)
            else:
                with self._at(node.scope, self.model.uses.place(node)):
                    self._float_node(node)

    def value(self, atom: Atom) -> Value:
        """The float (or whole-number) value of a tensor."""
        if isinstance(atom, Scalar):
            dtype = elementwise.onnx_dtype(atom.dtype)
            return Value(self.builder.constant(atom.array().astype(dtype)), (), ())
        # Everybody reads such a tensor as what its int8 form stands for.
        if atom in self.network.rounded:
            return self.dequantized(atom)
        if atom in self._weights and atom not in self._floats:
            weight = self._weights[atom]
            order = straight(len(weight.shape))
            self._floats[atom] = stored.dequantized(self.builder, weight, order)

        # Parameters and constants become initialisers when they are first read.
        if atom not in self._floats:
            key = str(atom)
            name = self.network.leaves.get(key) or self.network.constants.get(key)
            if name is None:
                raise NotCovered(f"tensor {atom}, which nothing gives")
            array = self.model.arrays[name]
            array = array.astype(elementwise.onnx_dtype(str(array.dtype)))
            self._floats[atom] = Value(
                self.builder.constant(array, name), array.shape, straight(array.ndim)
            )
        return self._floats[atom]

    def dequantized(self, var: Var) -> Value:
        """What the int8 form of a tensor is worth, in float."""
        return self.quantizer.restored(self.operand(var), self.network.scales[str(var)])

    def operand(self, var: Var) -> Value:
        """What sites read as the float of a tensor: without what their weights hold, if divided."""
        return self.quantizer.dequantize(self.int8(var), self.network.scales[str(var)])

    def int8(self, var: Var) -> Value:
        """The int8 form of a tensor."""
        if var not in self._int8:
            if str(var) in self.network.entries:
                # With all its copies: what reads int8 reads it as the model's shape says.
                value = self.full(self._floats.get(var) or self.value(var), var)
                if var in self._layouts:  # the order that the convolution behind it reads
                    value = self.builder.ordered(value, self._layouts[var])
                # By the entry that it is read by: of several that share their numbers some may be
                # int8 in the file, and some uint8.
                self._int8[var] = self.quantizer.quantize(value, self.network.scales[str(var)])
            else:
                self._move(self.model.uses.moves[var])
        return self._int8[var]

    def _move(self, node: Node) -> None:
        """An operation that hands int8 values on: its result has the scale of its operands."""
        with self._at(node.scope, self.model.uses.place(node)):
            if node.op == "gather":  # int8 has no NaN: qapply fills with what stands for zero
                node = dataclasses.replace(node, params={**node.params, "fill_value": 0.0})
            # Dequantized, moved, quantized: on one grid that is exact, and runtimes run it in int8.
            values = [
                self.dequantized(x) if isinstance(x, int) and str(x) in self.network.scales
                else self.value(x)
                for x in node.inputs
            ]  # fmt: skip
            results = self.apply(node, values)
            for var, value in zip(node.outputs, results, strict=True):
                entry = self.network.scales[str(var)]
                self._int8[var] = self.quantizer.quantize(self.full(value, var), entry)

    def _float_node(self, node: Node) -> None:
        if self._is_clipped_later(node) or self._is_weight(node):
            return
        if (result := self._on_stored(node)) is not None:
            self._floats[node.outputs[0]] = result
            return
        values = [
            self.dequantized(x)
            if node.reads_int8 and isinstance(x, int) and str(x) in self.network.scales
            else self._lows[x][0] if isinstance(x, int) and x in self._lows
            else self.value(x)
            for x in node.inputs
        ]  # fmt: skip
        # max and then min of constants are one Clip, which runtimes fuse.
        low = next((x for x in node.inputs if isinstance(x, int) and x in self._lows), None)
        if low is not None:
            high = next(v for v, x in zip(values, node.inputs) if isinstance(x, Scalar))
            results = [elementwise.clip(self.builder, *self._lows[low], high)]
        else:
            results = self.apply(node, values)
        self._floats.update(zip(node.outputs, results, strict=True))

    def _stored(self, node: Node) -> Stored:
        """What is stored for the weight that an operation reads first."""
        is_table = self.network.leaves[str(node.inputs[0])] in self.tables
        return dataclasses.replace(super()._stored(node), is_table=is_table)

    def _on_stored(self, node: Node) -> Value | None:
        """What an operation on a stored weight gives; None of one that reads it in float."""
        given, shape = node.contraction, self.shape(node.outputs[0])
        if node.op == "look_up":
            (indices,) = self._copied(node, [self.value(node.inputs[2])], (2,))
            table = self._stored(node)
            is_unsigned = self.network.leaves[str(node.inputs[0])] in self._unsigned
            return lookups.look_up(self.builder, node, table, indices, shape, is_unsigned)
        pairs = enumerate(node.inputs[:2])
        weights = [
            (k, self._weights[x]) for k, x in pairs if isinstance(x, int) and x in self._weights
        ]
        if given is None or len(weights) != 1:
            return None
        ((position, weight),) = weights
        # A dot with a matrix has an operator of its own; else the weight is dequantized in the
        # file.
        is_matrix = stored.is_matrix(weight, given, position)
        if not is_matrix and (given.window is None or position == 0):
            return None
        side = 1 - position
        (x,) = self._copied(node, [self.value(node.inputs[side])], (side,))
        if is_matrix:
            is_onnxruntime = self.quantizer.target.is_onnxruntime
            return stored.dot(self.builder, given, side, x, weight, shape, is_onnxruntime)
        order = contraction.kernel_order(conv_form(given, weight.shape))
        kernel = stored.dequantized(self.builder, weight, order)
        return self._contract(node, [x, kernel], shape)

    def _is_clipped_later(self, node: Node) -> bool:
        """Put off a lower bound whose upper one comes behind it: both become one Clip."""
        split = self.model.uses.lower_bound(node)
        if split is None:
            return False
        tensor, low = split
        self._lows[node.outputs[0]] = (self.value(tensor), self.value(low))
        return True

    def apply(self, node: Node, values: Sequence[Value]) -> list[Value]:
        """The results of an operation on float values."""
        shapes = [self.shape(var) for var in node.outputs]
        if node.contraction is not None:
            operands = self._of_one_type(node, self._copied(node, values))
            return [self._contract(node, operands, shapes[0])]
        # By what an emitter has to know: the contraction, the bodies, the dtypes, or the values
        # alone.
        if node.op in self._with_bodies:
            return self._with_bodies[node.op](self, node, self._copied(node, values))
        if node.op in operators.TABLE:
            copied = self._copied(node, values)
            return [operators.TABLE[node.op](self.builder, node, copied)]
        if node.op in WITH_DTYPES:
            dtypes = [elementwise.onnx_dtype(self.dtype(x)) for x in node.inputs]
            copied = self._copied(node, values)
            return WITH_DTYPES[node.op](self.builder, node, copied, shapes, dtypes)
        if node.op == "optimization_barrier":
            return list(values)
        if len(node.outputs) != 1:
            raise NotCovered(f"the operation {node.op!r}")
        return [self._one(node, values, shapes[0])]

    def _one(self, node: Node, values: Sequence[Value], shape: tuple[Size, ...]) -> Value:
        if node.op in shaping.TABLE:
            if node.op not in LAZY:
                values = self._copied(node, values)
            return shaping.TABLE[node.op](self.builder, node, list(values), shape)
        if node.op in reduction.OPERATIONS:
            dtype = elementwise.onnx_dtype(self.dtype(node.inputs[0]))
            return reduction.emit(self.builder, node, self._copied(node, values)[0], shape, dtype)
        if (value := scaled(node, values)) is not None:
            return value
        # max(x, 0) as Relu, which runtimes fuse with what comes before.
        split = with_scalar(node, "max")
        if split is not None and split[1].array() == 0:
            tensor = values[0] if isinstance(node.inputs[0], int) else values[1]
            return elementwise.relu(self.builder, tensor)
        dtypes = [elementwise.onnx_dtype(self.dtype(x)) for x in node.inputs]
        return elementwise.emit(self.builder, node, values, dtypes)

    def dtype(self, atom: Atom) -> str:
        return atom.dtype if isinstance(atom, Scalar) else self.network.tensors[atom].dtype

    def _of_one_type(self, node: Node, values: Sequence[Value]) -> list[Value]:
        """The operands of a product in the type of its result; JAX takes floats with integers."""
        wanted = elementwise.onnx_dtype(self.dtype(node.outputs[0]))
        given = [elementwise.onnx_dtype(self.dtype(x)) for x in node.inputs]
        return [
            value if dtype == wanted else elementwise.cast(self.builder, value, wanted)
            for value, dtype in zip(values, given, strict=True)
        ]

    def _contract(self, node: Node, values: Sequence[Value], shape: tuple[Size, ...]) -> Value:
        given = node.contraction
        if given is not None and given.is_dot:
            return contraction.dot(self.builder, given, values, shape)
        if given is None or given.window is None:
            raise NotCovered(f"the operation {node.op!r}")
        x, kernel = values
        form = conv_form(given, [int(size) for size in kernel.shape])
        if form.is_transposed:
            name = contraction.flipped_kernel(self.builder, form, kernel)
        else:
            name = self.builder.ordered(kernel, contraction.kernel_order(form)).name
        return contraction.conv(self.builder, given, form, x, [name], shape)
