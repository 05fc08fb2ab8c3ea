"""The graph: a flat list of equations over numbered tensors.

Invariants: equations are in evaluation order; every tensor is produced once; calls are inlined,
control flow (`scan`, `while`, `cond`, ...) stays one equation; a tensor is *static* when it depends
on parameters and constants alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.graph import contraction
from jaxquant.jax_shim import jaxprs

Var = int  # a tensor: an index into Graph.avals


@dataclasses.dataclass(frozen=True)
class Literal:
    """A scalar written into an equation."""

    value: np.ndarray


Atom = Var | Literal


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One primitive application.

    `scope` is the joined name stack: the Flax module path and any `jax.named_scope`; `calls` are
    the names of the jit-compiled functions that the equation was inlined from, outermost first,
    with a number that tells their calls apart; `modules` are the classes of the Flax modules that
    it is in, outermost first; `source_info` is JAX's, of the line that it comes from.
    """

    index: int
    primitive: jaxprs.Primitive
    inputs: tuple[Atom, ...]
    outputs: tuple[Var, ...]
    params: Mapping[str, Any]
    scope: str
    calls: tuple[str | int, ...] = ()
    modules: tuple[str, ...] = ()
    source_info: Any = None

    @property
    def name(self) -> str:
        return str(self.primitive.name)

    @property
    def input_vars(self) -> tuple[Var, ...]:
        return tuple(x for x in self.inputs if isinstance(x, int))


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A traced function.

    `leaves` are the parameter leaves, `inputs` the flattened model inputs, `constants` the arrays
    that the function closed over; `paths` names leaves and constants; `classes`
    holds the class of every nnx module by its path.  `differentiable` tells that
    calls with their own derivative rule were kept, so that the graph can be differentiated.
    `sized_by_batch` are static operands of sites whose shape follows the batch in another way than
    by copies of one sample; `jaxquant.graph.batch_sizes` finds them, a plan remembers them.
    """

    avals: tuple[Any, ...]
    equations: tuple[Equation, ...]
    leaves: tuple[Var, ...]
    inputs: tuple[Var, ...]
    constants: Mapping[Var, Any]
    outputs: tuple[Atom, ...]
    paths: Mapping[Var, str]
    static: tuple[bool, ...]
    out_tree: Any = None
    classes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    differentiable: bool = False
    sized_by_batch: frozenset[Var] = frozenset()

    @functools.cached_property
    def producer(self) -> dict[Var, Equation]:
        return {var: eqn for eqn in self.equations for var in eqn.outputs}

    @functools.cached_property
    def consumers(self) -> dict[Var, tuple[Equation, ...]]:
        found: dict[Var, list[Equation]] = {}
        for eqn in self.equations:
            # Once for each tensor: `x * x` is one reader of x.
            for var in dict.fromkeys(eqn.input_vars):
                found.setdefault(var, []).append(eqn)
        return {var: tuple(eqns) for var, eqns in found.items()}

    @functools.cached_property
    def output_vars(self) -> frozenset[Var]:
        return frozenset(x for x in self.outputs if isinstance(x, int))

    @functools.cached_property
    def contractions(self) -> Mapping[int, contraction.Contraction]:
        """The convolutions and dots among the equations, by the index of their equation."""
        found = {}
        for eqn in self.equations:
            ranks = [len(self.shape(atom)) for atom in eqn.inputs]
            if (made := contraction.build(eqn.name, eqn.params, ranks)) is not None:
                found[eqn.index] = made
        return found

    def is_static(self, atom: Atom) -> bool:
        return isinstance(atom, Literal) or self.static[atom]

    def shape(self, atom: Atom) -> tuple[int, ...]:
        return atom.value.shape if isinstance(atom, Literal) else tuple(self.avals[atom].shape)

    def dtype(self, atom: Atom) -> Any:
        return atom.value.dtype if isinstance(atom, Literal) else self.avals[atom].dtype

    def sources(self, var: Var) -> list[Var]:
        """The parameter leaves and constants that a static tensor is computed from."""
        found: dict[Var, None] = {}
        seen: set[Var] = set()
        stack = [var]
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if current in self.producer:
                # In reversed order, so that the first operand's sources come first.
                stack.extend(reversed(self.producer[current].input_vars))
            elif current in self.paths:
                found[current] = None
        # In ascending order, which is that of parameters.
        return sorted(found)

    def needed(self, atom: Atom) -> set[Atom]:
        """A tensor, and all that it is computed from."""
        found, stack = set[Atom](), [atom]
        while stack:
            current = stack.pop()
            if isinstance(current, int) and current not in found:
                found.add(current)
                if current in self.producer:
                    stack.extend(self.producer[current].inputs)
        return found

    def fingerprint(self, atom: Atom) -> str:
        """A digest of how a static tensor is computed from parameters, named by their paths.

        Equal in graphs that were traced for other input shapes unless the values depend on them:
        the size to which something is broadcast does not count, nor do the sizes of whole axes.
        """
        if isinstance(atom, Literal):
            return _digest("literal", atom.value.dtype.name, atom.value.tobytes().hex())
        # Tensors that depend on inputs have none.
        return self._fingerprints.get(atom, "")

    @functools.cached_property
    def _fingerprints(self) -> dict[Var, str]:
        found = {var: _digest("source", self.paths[var]) for var in (*self.leaves, *self.constants)}
        for eqn in self.equations:
            if not eqn.outputs or not self.static[eqn.outputs[0]]:
                continue
            inputs = [
                self.fingerprint(x) if isinstance(x, Literal) else found.get(x, "")
                for x in eqn.inputs
            ]
            # A broadcast adds no information, and its size may be the batch's.
            if self._only_copies(eqn):
                found[eqn.outputs[0]] = inputs[0]
                continue
            params = str(self._params_without_sizes(eqn))
            for position, var in enumerate(eqn.outputs):
                found[var] = _digest(eqn.name, params, *inputs, str(position))
        return found

    def _only_copies(self, eqn: Equation) -> bool:
        """True where axes of size 1 become longer, and nothing else happens; or nothing at all.

        JAX leaves some such equations out where the axes stay as they are, for a batch of one, and
        conversions of a number to the dtype that it has, where sizes are symbolic.
        """
        # A cast to the dtype that is there already, of a literal too.
        if eqn.name == "convert_element_type":
            return self.dtype(eqn.inputs[0]) == self.dtype(eqn.outputs[0])
        if not eqn.input_vars or len(eqn.outputs) != 1:
            return False
        before, after = self.shape(eqn.inputs[0]), self.shape(eqn.outputs[0])
        if len(before) != len(after):
            return False
        if eqn.name == "broadcast_in_dim":
            return tuple(eqn.params["broadcast_dimensions"]) == tuple(range(len(after)))
        copied = all(a == b or a == 1 for a, b in zip(before, after, strict=True))
        return eqn.name == "tile" and copied

    def _params_without_sizes(self, eqn: Equation) -> dict[str, str]:
        """The parameters, but for the sizes that whole axes have."""
        params = dict(eqn.params)
        for name in ("shape", "new_sizes"):  # broadcasts, reshapes
            params.pop(name, None)
        shape = self.shape(eqn.inputs[0]) if eqn.inputs else ()
        for name in ("limit_indices", "slice_sizes"):
            # A slice of a whole axis is the whole axis in any size.
            if name in params:
                sizes = zip(params[name], shape, strict=True)
                params[name] = tuple(None if size == whole else size for size, whole in sizes)
        # Parameters are compared as text: some hold objects that do not compare.
        return {k: str(v) for k, v in sorted(params.items())}


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def upstream(graph: Graph, roots: Sequence[Var]) -> Iterator[Equation]:
    """The equations that `roots` depend on, in evaluation order."""
    needed: set[int] = set()
    stack = list(roots)
    while stack:
        eqn = graph.producer.get(stack.pop())
        if eqn is not None and eqn.index not in needed:
            needed.add(eqn.index)
            stack.extend(eqn.input_vars)
    # Indices go in evaluation order, whatever the way they were found.
    for index in sorted(needed):
        yield graph.equations[index]


def struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, without its data."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if hasattr(leaf, "aval") or isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    array = np.asarray(leaf)
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))
