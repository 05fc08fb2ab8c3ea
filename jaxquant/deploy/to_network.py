"""The plain-data network of a `qapply`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.deploy import constants
from jaxquant.deploy.found import Found
from jaxquant.deploy.joined import Joined
from jaxquant.deploy.network import Atom, Body, Int8Node, Network, Node
from jaxquant.deploy.plain_values import plain
from jaxquant.deploy.site_nodes import SiteNodes
from jaxquant.files import tensor_names
from jaxquant.graph import ir, trace
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.graph.regions import CONTROL_FLOW, Region
from jaxquant.jax_shim import jaxprs
from jaxquant.plan.binding import Binding
from jaxquant.plan.liveness import float_leaves
from jaxquant.run.program import Program


def to_network(
    program: Program, inputs: tuple[Any, ...], operators: Collection[str] = ()
) -> tuple[Network, dict[str, np.ndarray]]:
    """The network of a program, whose graph may have symbolic sizes, and its constants by name.

    Args:
      program: the program.
      inputs: what it was traced for.
      operators: the kinds of `jaxquant.graph.operators` that are one operation of the network.
    """
    graph = program.graph
    outputs = jax.tree.unflatten(graph.out_tree, graph.outputs)
    translated = _Translator(program, program.binding, program.model.root, Found(operators), [])
    # Inputs are numbered first, in the caller's order.
    numbers = tuple(translated.number(var) for var in graph.inputs)
    translated.add_equations()
    found = translated.found
    network = Network(
        outputs=translated.outputs(),
        inputs=numbers,
        input_names=_names(inputs[0] if len(inputs) == 1 else inputs, "input"),
        output_names=_names(outputs, "output"),
        nodes=tuple(translated.nodes),
        moves=tuple(found.moves),
        entries=found.entries,
        scales=found.scales,
        leaves=found.leaves,
        constants=found.constants,
        slices=found.slices,
        rounded=frozenset(found.rounded),
        tensors=tuple(found.tensors),
    )
    return network, found.arrays


def _names(tree: Any, root: str) -> tuple[str, ...]:
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return tuple("/".join((root, *trace.path_parts(path))) if path else root for path in paths)


class _Translator(SiteNodes):
    """Describes one graph: the model's own, a body that a loop repeats, or one step of a scan.

    Args:
      program: of the graph.
      binding: of its layer, which differs from the program's in its grids alone.
      region: the graph as one of the model's.
      found: what is translated so far.
      nodes: where the operations go.
      outer: the translator of the graph that holds the body; None for the model's own graph.
      step: which step of an unrolled scan this is; None for no such step.
    """

    def __init__(
        self,
        program: Program,
        binding: Binding,
        region: Region,
        found: Found,
        nodes: list[Node | Int8Node],
        outer: _Translator | None = None,
        step: int | None = None,
    ) -> None:
        super().__init__(program, binding, region, found, nodes)
        self._outer = outer
        self._step = step
        self._static_done: set[ir.Var] = set()

    def add_equations(self) -> None:
        """Add the operations of the graph, in the order of a program."""
        graph, binding, forms = self.graph, self.binding, self.binding.forms
        suffix = layer_suffix(binding.layer)
        by_index = {graph.producer[s.epilogue.output].index: s for s in binding.sites}
        for tensors, names in (
            (self.found.entries, binding.names),
            (self.found.scales, binding.scales),
        ):
            tensors |= {str(self.number(var)): name + suffix for var, name in names.items()}
        self.found.rounded.update(map(self.number, forms.rounded))

        for index in sorted(forms.moves):
            eqn = graph.equations[index]
            self.need_static(eqn.inputs)
            self.found.moves.append(self.node(eqn))
        # Operators of several equations are found in what runs, which is less than the graph.
        joined = self._joined(self.program.equations, binding)
        # By what stands for an equation: an operator of several, an int8 site, a loop, or itself.
        for eqn in self.program.equations:
            if eqn.index in joined.inside:
                continue
            if eqn.index in joined.by_last:
                self._operator(joined, eqn)
            elif eqn.index in by_index and by_index[eqn.index].site.is_lookup:
                self.add_lookup(by_index[eqn.index].site)
            elif eqn.index in by_index and not self.program.mode.integer:
                self.add_dequantized(by_index[eqn.index].site)
            elif eqn.index in by_index:
                self.nodes.append(self.int8_node(by_index[eqn.index]))
            elif eqn.index in self.program.bodies:
                self._loop(eqn)

            # What is static is added when something reads it.
            elif not (eqn.outputs and graph.static[eqn.outputs[0]]):
                picks = eqn.index in binding.picks
                if not picks:
                    self.need_static(eqn.inputs)
                reads = eqn.index in forms.reads_int8 or eqn.index in binding.decisions
                self.nodes.append(self.node(eqn, reads_int8=reads, picks=picks))
        self.need_static(graph.outputs)

    def node(
        self,
        eqn: ir.Equation,
        reads_int8: bool = False,
        picks: bool = False,
        bodies: tuple[Body, ...] | None = None,
    ) -> Node:
        """An equation as it is; its bodies, but for those that are given, are in float."""
        # As data that no JAX is needed for: exporters read names, numbers and lists.
        params = jaxprs.portable_params(eqn.name, eqn.params)
        return Node(
            op=eqn.name,
            inputs=tuple(self.atom(x) for x in eqn.inputs),
            outputs=tuple(self.number(v) for v in eqn.outputs),
            params={key: plain(value) for key, value in params.items()},
            scope=eqn.scope,
            reads_int8=reads_int8,
            picks=picks,
            bodies=self._bodies(eqn) if bodies is None else bodies,
            contraction=self.graph.contractions.get(eqn.index),
            source=jaxprs.line_of(eqn.source_info),
        )

    def _joined(self, equations: Sequence[ir.Equation], binding: Binding | None) -> Joined:
        return Joined(self.graph, self.found.operators, equations, binding)

    def _operator(self, joined: Joined, last: ir.Equation) -> None:
        """Add several equations as one operation."""
        operator = joined.by_last[last.index]
        self.need_static(operator.inputs)
        self.nodes.append(
            Node(
                op=operator.kind,
                inputs=tuple(map(self.number, operator.inputs)),
                outputs=tuple(map(self.number, last.outputs)),
                params=operator.params,
                scope=last.scope,
                reads_int8=joined.reads_int8(operator),
                source=jaxprs.line_of(last.source_info),
            )
        )

    def _bodies(self, eqn: ir.Equation) -> tuple[Body, ...]:
        """The bodies of a loop or a choice; of what else holds programs, none."""
        if eqn.name not in CONTROL_FLOW:
            return ()
        return tuple(map(self._body, self.region.bodies(eqn)))

    def _body(self, region: Region) -> Body:
        """A body in float; its tensors get numbers of this network."""
        inner, graph = self._inside(region, self.program, self.binding, []), region.graph
        for var in graph.constants:
            inner.fold(var)
        # In the graph's own order: nothing in a body is put off.
        inner.add_in_float()
        arguments = tuple(inner.number(var) for var in region.arguments)
        return Body(region.key, arguments, tuple(inner.nodes), inner.outputs())

    def add_in_float(self) -> None:
        """Add the operations of the graph as they are, static ones too."""
        joined = self._joined(self.graph.equations, None)
        for eqn in self.graph.equations:
            if eqn.index in joined.by_last:
                self._operator(joined, eqn)
            elif eqn.index not in joined.inside:
                self.nodes.append(self.node(eqn))

    def _inside(
        self,
        region: Region,
        program: Program,
        binding: Binding,
        nodes: list[Node | Int8Node],
        step: int | None = None,
    ) -> _Translator:
        """The translator of a body of this graph; its arguments are those of the class."""
        return _Translator(program, binding, region, self.found, nodes, self, step)

    def _loop(self, eqn: ir.Equation) -> None:
        """A loop or a choice that holds int8 sites.

        A scan over stacked weights is unrolled: its layers have grids of their own, which runtimes
        take as constants alone.  The others stay what they are, with int8 sites in their bodies.
        """
        programs, bound = self.program.bodies[eqn.index], self.binding.bodies[eqn.index]
        if programs[0].model.layers is not None:
            self._unroll(eqn, programs[0], bound[0].layers)
            return

        # Bodies with int8 sites are bound, in the order of the regions.
        inner = iter(zip(programs, bound, strict=True))
        bodies, unread = [], set[int]()
        for region in self.region.bodies(eqn):
            if region.key == "cond_jaxpr":  # a test, which is in float
                bodies.append(self._body(region))
                continue
            program, body = next(inner)
            translated = self._inside(region, program, body.layers[0], [])
            bodies.append(translated.as_body())
            unread |= translated.not_given()

        # What every step reads alike of the parameters, the bodies have themselves.
        first = {"scan": 0, "while": eqn.params.get("cond_nconsts", 0), "cond": 1}[eqn.name]
        inputs = [x for k, x in enumerate(eqn.inputs) if k - first not in unread]
        self.need_static(inputs)
        node = self.node(eqn, bodies=tuple(bodies))
        counts = {}
        for key in {"num_consts", "body_nconsts"} & set(node.params):
            counts[key] = node.params[key] - sum(k < node.params[key] for k in unread)
        inputs_left = tuple(self.atom(x) for x in inputs)
        self.nodes.append(
            dataclasses.replace(node, inputs=inputs_left, params={**node.params, **counts})
        )

    def not_given(self) -> set[int]:
        """The positions of the arguments of a body that the loop does not give to its steps.

        Those are parameters: the body reads them, or only their int8 form, from where they are.
        """
        region = self.region
        read = float_leaves(self.binding)
        # A slice of stacked weights that is read in float comes by the scan, step by step.
        return {
            k
            for k, var in enumerate(region.arguments)
            if var in self.graph.leaves and not (k in region.scanned and var in read)
        }

    def as_body(self) -> Body:
        """The graph as what a loop repeats, or as a branch."""
        self.add_equations()
        unread = self.not_given()
        arguments = [v for k, v in enumerate(self.region.arguments) if k not in unread]
        inputs = tuple(self.number(var) for var in arguments)
        return Body(self.region.key, inputs, tuple(self.nodes), self.outputs())

    def _unroll(self, eqn: ir.Equation, program: Program, layers: Sequence[Binding]) -> None:
        """The steps of a scan one after the other, each with the arrays of its layer."""
        region = program.model.root
        fixed, carried = jaxprs.scan_counts(eqn.params)
        # Parameters are read by each step from where they are; the scan hands on all else.
        given = [
            None if var in region.graph.leaves else x
            for var, x in zip(region.arguments, eqn.inputs, strict=True)
        ]
        self.need_static(given)
        atoms = [None if x is None else self.atom(x) for x in given]
        slices = {k: self.unstack(eqn.inputs[k]) for k in region.scanned if given[k] is not None}

        # Each step's carry is the next one's; every tensor of a step has a number of its own.
        carry = atoms[fixed : fixed + carried]
        stacks: dict[int, tuple[Atom, ...]] = {}
        steps = range(len(layers))
        for step in reversed(steps) if eqn.params["reverse"] else steps:
            inner = self._inside(region, program, layers[step], self.nodes, step)
            for k, var in enumerate(region.arguments):
                atom = slices[k][step] if k in slices else atoms[k]
                if k in region.carries:
                    atom = carry[k - fixed]
                if atom is not None:
                    inner.alias(var, atom)
            inner.add_equations()
            carry, stacks[step] = list(inner.outputs()[:carried]), inner.outputs()[carried:]

        # The last carry is the scan's result, whichever step was last.
        for var, atom in zip(eqn.outputs, carry, strict=False):
            assert atom is not None, "a carry is computed"
            self.alias(var, atom)
        for k, var in enumerate(eqn.outputs[carried:]):
            parts = tuple(stacks[step][k] for step in steps)
            self.add("stack", parts, (self.number(var),), {"axis": 0})

    def need_static(self, atoms: Iterable[Any]) -> None:
        graph = self.graph
        for var in atoms:
            if not isinstance(var, int) or not graph.static[var] or var in self._static_done:
                continue
            self._static_done.add(var)
            # From the integers where they are stored, else as a parameter, a constant, or computed.
            if var in self.program.restored:
                self.restore(var)
            elif var in self.program.float_paths:
                path = ("params", *self.program.float_paths[var])
                self.found.leaves[str(self.number(var))] = tensor_names.join(path)
            elif var in graph.leaves and self._outer is not None:
                self._take_leaf(var, self._outer)
            elif constants.is_foldable(graph, var):
                self.fold(var)
            elif var in graph.producer:
                eqn = graph.producer[var]
                self.need_static(eqn.inputs)
                self.nodes.append(self.node(eqn))

    def _take_leaf(self, var: ir.Var, outer: _Translator) -> None:
        """Take a leaf of a body, in float, from the graph around it: of a step its slice."""
        position = self.region.arguments.index(var)
        is_slice = position in self.region.scanned
        if is_slice and self._step is None:
            return  # the loop gives it to each step
        operand = self.region.operands[position]
        assert isinstance(operand, int), "a leaf stands for a parameter"
        outer.need_static((operand,))
        source, own = str(outer.number(operand)), str(self.number(var))
        index = (self._step,) if is_slice and self._step is not None else ()
        for names in (self.found.leaves, self.found.constants):
            if source in names:
                names[own] = self.found.slice_of(names[source], index)
                return
        self.alias(var, outer.unstack(operand)[index[0]] if index else outer.number(operand))
