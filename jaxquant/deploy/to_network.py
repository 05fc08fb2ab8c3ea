"""The plain-data network of a `qapply`."""

from __future__ import annotations

import enum
import math
from typing import Any

import jax
import numpy as np

from jaxquant.deploy.network import Atom, Body, Int8Node, Network, Node, Scalar, Tensor
from jaxquant.files import tensor_names
from jaxquant.graph import evaluate, ir, trace
from jaxquant.graph.regions import Region
from jaxquant.jax_shim import jaxprs
from jaxquant.plan import layout
from jaxquant.plan.bind import Int8Site
from jaxquant.run.program import Program

MAX_CONSTANT = 2**20  # elements of a folded tensor; a larger one is computed in the network


def to_network(program: Program, inputs: tuple[Any, ...]) -> tuple[Network, dict[str, np.ndarray]]:
    """The network of a program, whose graph may have symbolic sizes, and its constants by name."""
    outputs = jax.tree.unflatten(program.graph.out_tree, program.graph.outputs)
    names = _names(inputs[0] if len(inputs) == 1 else inputs, "input"), _names(outputs, "output")
    return _Describer(program).run(*names)


def _names(tree: Any, root: str) -> tuple[str, ...]:
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return tuple("/".join((root, *trace.path_parts(path))) if path else root for path in paths)


_WITH_BODIES = frozenset({"scan", "while", "cond"})


class _Describer:
    def __init__(self, program: Program) -> None:
        self._program = program
        self._region, self._graph = program.model.root, program.graph
        self._numbers: dict[ir.Var, int] = {}
        self._tensors: list[Tensor] = []
        self._nodes: list[Node | Int8Node] = []
        self._leaves: dict[str, str] = {}
        self._constants: dict[str, str] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._static_done: set[ir.Var] = set()

    def run(
        self, input_names: tuple[str, ...], output_names: tuple[str, ...]
    ) -> tuple[Network, dict[str, np.ndarray]]:
        graph, binding, forms = self._graph, self._program.binding, self._program.binding.forms
        by_index = {graph.producer[s.epilogue.output].index: s for s in binding.sites}
        inputs = tuple(self._number(var) for var in graph.inputs)
        moves = []
        for index in sorted(forms.moves):
            eqn = graph.equations[index]
            self._need_static(eqn.inputs)
            moves.append(self._node(eqn))
        for eqn in self._program.equations:
            if eqn.index in by_index:
                self._nodes.append(self._site(by_index[eqn.index]))
            elif not (eqn.outputs and graph.static[eqn.outputs[0]]):
                selects = eqn.index in binding.selects
                if not selects:
                    self._need_static(eqn.inputs)
                reads = eqn.index in forms.reads_int8 or eqn.index in binding.decisions
                self._nodes.append(self._node(eqn, reads_int8=reads, selects=selects))
        self._need_static(graph.outputs)
        network = Network(
            outputs=tuple(self._atom(x) for x in graph.outputs),
            inputs=inputs,
            input_names=input_names,
            output_names=output_names,
            nodes=tuple(self._nodes),
            moves=tuple(moves),
            entries={str(self._number(var)): name for var, name in binding.names.items()},
            scales={str(self._number(var)): name for var, name in binding.scales.items()},
            leaves=self._leaves,
            constants=self._constants,
            tensors=tuple(self._tensors),
        )
        return network, self._arrays

    def _number(self, var: ir.Var) -> int:
        if var not in self._numbers:
            self._numbers[var] = len(self._tensors)
            shape = tuple(d if isinstance(d, int) else str(d) for d in self._graph.shape(var))
            self._tensors.append(Tensor(shape, str(self._graph.dtype(var))))
        return self._numbers[var]

    def _atom(self, atom: ir.Atom) -> Atom:
        return _scalar(atom.value) if isinstance(atom, ir.Literal) else self._number(atom)

    def _node(self, eqn: ir.Equation, reads_int8: bool = False, selects: bool = False) -> Node:
        params = jaxprs.portable_params(eqn.name, eqn.params)
        return Node(
            op=eqn.name,
            inputs=tuple(self._atom(x) for x in eqn.inputs),
            outputs=tuple(self._number(v) for v in eqn.outputs),
            params={key: _plain(value) for key, value in params.items()},
            scope=eqn.scope,
            reads_int8=reads_int8,
            selects=selects,
            bodies=self._bodies(eqn),
            contraction=self._graph.contractions.get(eqn.index),
            source=jaxprs.line_of(eqn.source_info),
        )

    def _bodies(self, eqn: ir.Equation) -> tuple[Body, ...]:
        """The bodies of a loop or a choice; of what else holds programs, none."""
        if eqn.name not in _WITH_BODIES:
            return ()
        return tuple(map(self._body, self._region.bodies(eqn)))

    def _body(self, region: Region) -> Body:
        """A body; its tensors get numbers of this network."""
        inner, graph = _Describer(self._program), region.graph
        inner._region, inner._graph, inner._tensors = region, graph, self._tensors
        inner._constants, inner._arrays = self._constants, self._arrays
        for var, value in graph.constants.items():
            name = f"constants/{len(self._arrays)}"
            self._constants[str(inner._number(var))] = name
            self._arrays[name] = np.asarray(jax.device_get(value))
        return Body(
            region.key,
            tuple(inner._number(var) for var in region.arguments),
            tuple(inner._node(eqn) for eqn in graph.equations),
            tuple(inner._atom(atom) for atom in graph.outputs),
        )

    def _site(self, int8_site: Int8Site) -> Int8Node:
        graph, site, epilogue = self._graph, int8_site.site, int8_site.epilogue
        eqn = graph.equations[site.equation]
        weight, computed = "", None
        axes: tuple[int, ...] = ()
        if site.weight is not None:
            axes = site.channel_axes
            if site.computes_weight:
                self._need_static((site.weight,))
                computed = self._number(site.weight)
            else:
                weight = tensor_names.join(("params", *self._program.slots[site.name].int8))
        return Int8Node(
            name=site.name,
            kind=site.kind,
            node=self._node(eqn),
            operands=tuple(self._number(v) for v in site.operands),
            weight=weight,
            computed_weight=computed,
            weight_position=site.weight_position,
            weight_axes=axes,
            movements=tuple(self._node(e) for e in epilogue.movements),
            channel_sizes=tuple(int(size) for size in epilogue.channels.sizes),
            channel_axes=epilogue.channels.axes,
            output=self._number(epilogue.output),
        )

    def _need_static(self, atoms: Any) -> None:
        """Give the static tensors among `atoms` a leaf, a constant or nodes that compute them."""
        graph = self._graph
        for var in atoms:
            if not isinstance(var, int) or not graph.static[var] or var in self._static_done:
                continue
            self._static_done.add(var)
            key = str(self._number(var))
            if var in self._program.float_paths:
                path = ("params", *self._program.float_paths[var])
                self._leaves[key] = tensor_names.join(path)
            elif var in self._program.restored:
                self._restore(var)
            elif self._is_foldable(var):
                name = f"constants/{len(self._arrays)}"
                self._constants[key] = name
                self._arrays[name] = self._fold(var)
            elif var in graph.producer:
                eqn = graph.producer[var]
                self._need_static(eqn.inputs)
                self._nodes.append(self._node(eqn))

    def _restore(self, var: ir.Var) -> None:
        """Nodes that compute a static tensor from the integers of a weight and their scales."""
        program = self._program
        site = program.restored[var].site
        view = layout.weight_view(self._graph, site, program.mode.integer)
        is_per_channel = program.plan.weight_quantize_type == "channel_wise_abs_max"
        channels = math.prod(view.shape[d] for d in view.channels)
        slot = program.slots[site.name]
        stored = {
            slot.int8: jax.ShapeDtypeStruct(view.shape, np.int8),
            slot.scale: jax.ShapeDtypeStruct((channels,) if is_per_channel else (), np.float32),
        }

        def restore(_: Any, *arrays: jax.Array) -> jax.Array:
            params: dict[str, Any] = {}
            for path, array in zip(stored, arrays, strict=True):
                layout.put(params, path, array)
            return program.weights.restore(program.restored[var], {"params": params})

        steps = trace.trace(restore, (), tuple(stored.values()))
        numbers: dict[ir.Var, int] = {}
        for path, source in zip(stored, steps.inputs, strict=True):
            numbers[source] = self._new(steps, source)
            self._leaves[str(numbers[source])] = tensor_names.join(("params", *path))
        for eqn in steps.equations:
            for output in eqn.outputs:
                is_result = output == steps.outputs[0]
                numbers[output] = self._number(var) if is_result else self._new(steps, output)
            self._nodes.append(
                Node(
                    op=eqn.name,
                    inputs=tuple(
                        _scalar(x.value) if isinstance(x, ir.Literal) else numbers[x]
                        for x in eqn.inputs
                    ),
                    outputs=tuple(numbers[x] for x in eqn.outputs),
                    params={key: _plain(value) for key, value in eqn.params.items()},
                    scope="",
                    contraction=steps.contractions.get(eqn.index),
                )
            )

    def _new(self, graph: ir.Graph, var: ir.Var) -> int:
        """A number for a tensor of another graph."""
        self._tensors.append(Tensor(graph.shape(var), str(graph.dtype(var))))
        return len(self._tensors) - 1

    def _is_foldable(self, var: ir.Var) -> bool:
        """True for a tensor of known size that no parameter is in."""
        if var in self._graph.constants:
            return True
        if var in self._graph.leaves or set(self._graph.sources(var)) & set(self._graph.leaves):
            return False
        behind = list(ir.walk_back(self._graph, [var]))
        if any(eqn.name == "dim_as_value" for eqn in behind):  # a size that varies
            return False
        shapes = [self._graph.shape(v) for eqn in behind for v in (*eqn.input_vars, *eqn.outputs)]
        known = all(isinstance(size, int) for shape in shapes for size in shape)
        return known and math.prod(self._graph.shape(var)) <= MAX_CONSTANT

    def _fold(self, var: ir.Var) -> np.ndarray:
        table = evaluate.float_table(ir.walk_back(self._graph, [var]))
        env = evaluate.evaluate(self._graph, {}, [None] * len(self._graph.inputs), table)
        return np.asarray(jax.device_get(env.read(var)))


def _scalar(value: np.ndarray) -> Scalar:
    number = np.asarray(value).item() if value.dtype.kind in "biu" else float(value)
    if isinstance(number, float) and not math.isfinite(number):
        return Scalar(str(number), str(value.dtype))
    return Scalar(number, str(value.dtype))


def _plain(value: Any) -> Any:
    """A parameter of a primitive as plain data; what has no such form becomes its type's name."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: _plain(item) for key, item in value._asdict().items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return str(np.dtype(value))
    if jax.export.is_symbolic_dim(value):
        return str(value)
    if hasattr(value, "lhs_spec") or hasattr(value, "offset_dims"):
        return {k: _plain(v) for k, v in vars(value).items() if not k.startswith("_")}
    return f"<{type(value).__name__}>"
