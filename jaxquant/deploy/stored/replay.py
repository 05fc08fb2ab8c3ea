"""Apply a stored graph, equation by equation, to abstract values: what a trace would find."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.deploy.stored import primitives, values
from jaxquant.deploy.stored.form import Atom, Body, Equation, StoredForm
from jaxquant.graph import ir
from jaxquant.jax_shim import jaxprs, symbols

MAX_ELEMENTS = 2**40  # of a tensor: XLA multiplies sizes without looking at overflows
_MAX_STEPS = 2**16  # equations of a graph and of the bodies that it reads
_STEPS_OF_A_BODY = 16  # what reading one takes beside its equations
_MAX_DEPTH = 16  # of bodies in each other
_MAX_UNROLL = 2**10

# What models compute of sizes.
_FOLDED: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "max": max,
    "min": min,
    "mul": operator.mul,
    "neg": operator.neg,
    "sub": operator.sub,
}


class Replay:
    """One graph, as it comes into being.

    Attributes:
      avals, static, equations, outputs: those of the `ir.Graph`.
    """

    def __init__(
        self, form: StoredForm, closed_over: Mapping[str, Any], known: Mapping[str, Any]
    ) -> None:
        """Begin.

        Args:
          form: the stored graph.
          closed_over: the values of the constants of its bodies, by the names of their arrays.
          known: the sizes that vary.
        """
        self._form, self._closed_over, self._known = form, closed_over, known
        self._steps = 0
        self.avals: list[Any] = []
        self.static: list[bool] = []
        self.equations: list[ir.Equation] = []
        self.outputs: list[ir.Atom] = []
        self._atoms: list[ir.Atom] = []  # by the number that a tensor has in the form
        self._values: list[Any] = []  # likewise
        self._bodies: dict[Any, Any] = {}  # those that were read, by number and operands
        self._sizes: set[int] = set()  # likewise: those that are made of sizes alone, and numbers

    def run(self, leaves: Sequence[Any], constants: Sequence[Any], inputs: Sequence[Any]) -> None:
        """Apply all equations; the arguments are traced.

        Raises:
          ValueError: the form is damaged; the message says which equation.
        """
        # Static is what depends on no input: parameters and constants are, and what follows of
        # both.
        for given, static in ((leaves, True), (constants, True), (inputs, False)):
            for value in given:
                self._new(value, static)
        for place, equation in enumerate(self._form.equations):
            try:
                self._apply(equation)
            except Exception as error:  # a primitive raises what it likes about its operands
                raise ValueError(f"{_described(place, equation)}: {_text(error)}") from error
        self.outputs = [self._atom(x) for x in self._form.outputs]

    def _apply(self, equation: Equation) -> None:
        inputs = tuple(self._atom(x) for x in equation.inputs)
        numbers = [x.value if isinstance(x, ir.Literal) else None for x in inputs]
        # Computing with sizes gives numbers, not tensors, once the sizes are known.
        if (number := self._folded(equation, numbers, self._sizes)) is not None:
            self._sizes.add(len(self._atoms))
            self._atoms.append(ir.Literal(number))
            self._values.append(number)
            return
        operands = [x.value if isinstance(x, ir.Literal) else self._value(a)
                    for x, a in zip(inputs, equation.inputs, strict=True)]  # fmt: skip
        params = self._params(equation, operands, 0)
        primitive = primitives.primitive(equation.op)
        results = self._bind(equation, operands, params)
        static = all(isinstance(x, ir.Literal) or self.static[x] for x in inputs)
        outputs = tuple(self._new(value, static) for value in results)
        index = len(self.equations)
        self.equations.append(
            ir.Equation(
                index, primitive, inputs, outputs, params, equation.scope, tuple(equation.calls)
            )
        )

    def _folded(
        self, equation: Equation, operands: Sequence[np.ndarray | None], sizes: Collection[int]
    ) -> np.ndarray | None:
        """The number that an equation makes of sizes that are known; None of anything else.

        A trace with numbers for the sizes has the number there, and a site's fingerprint with it.

        Args:
          equation: of the graph, or of a body.
          operands: those that are numbers; None in the place of the others.
          sizes: which atoms are made of sizes alone, and numbers.
        """
        if equation.op == primitives.SIZE:
            size = values.decode(equation.params["dim"], self._known, self._no_body)
            return np.asarray(size, symbols.size_dtype()) if isinstance(size, int) else None
        numbers = [x for x in operands if x is not None]
        if len(numbers) != len(operands) or not any(x in sizes for x in equation.inputs):
            return None
        if equation.op == "convert_element_type":
            dtype = values.decode(equation.params["new_dtype"], self._known, self._no_body)
            return numbers[0].astype(dtype)
        # Only arithmetic on sizes: anything else that is constant was folded when it was saved.
        # Python's numbers do not wrap around, and sizes do not come near it.
        integers = all(number.dtype.kind == "i" for number in numbers)
        if equation.op in _FOLDED and integers:
            result = _FOLDED[equation.op](*(number.item() for number in numbers))
            return np.asarray(result, numbers[0].dtype)
        return None

    def _new(self, value: Any, static: bool) -> ir.Var:
        aval = jax.typeof(value)
        self._atoms.append(len(self.avals))
        self._values.append(value)
        self.avals.append(aval)
        self.static.append(static)
        return len(self.avals) - 1

    def _atom(self, atom: Atom) -> ir.Atom:
        if isinstance(atom, int):
            return self._atoms[_checked(atom, len(self._atoms))]
        return ir.Literal(values.decode_scalar(list(atom)))

    def _value(self, atom: Atom) -> Any:
        assert isinstance(atom, int)
        return self._values[atom]

    def _bind(self, equation: Equation, operands: Sequence[Any], params: Any) -> list[Any]:
        # Counted before it is bound, so that a file is refused before its work is done.
        self._count(1)
        results = jaxprs.bind(primitives.primitive(equation.op), operands, dict(params))
        return _checked_results(equation, results)

    def _params(self, equation: Equation, operands: Sequence[Any], depth: int) -> dict[str, Any]:
        avals = [jax.typeof(x) for x in operands]
        params = {}
        for key, data in equation.params.items():
            body = functools.partial(self._jaxpr, equation, key, avals, depth)
            params[key] = values.decode(data, self._known, body)
        # What JAX takes on trust from its own traces is checked, since a file may say anything.
        if equation.op == "scan":
            _check_loop(params["jaxpr"], avals[params["num_consts"] :], params["num_carry"])
            if not 0 < params["unroll"] <= _MAX_UNROLL:
                raise ValueError(f"it unrolls {params['unroll']} steps")
        if equation.op == "while":
            first = params["cond_nconsts"] + params["body_nconsts"]
            _check_loop(params["body_jaxpr"], avals[first:], len(avals) - first)
            _check_outputs(params["cond_jaxpr"].out_avals, [jax.typeof(np.asarray(True))])
        if equation.op == "cond":
            for branch in params["branches"][1:]:
                _check_outputs(branch.out_avals, params["branches"][0].out_avals)
        # Names of parameters differ between releases of JAX; a file has one of them.
        return jaxprs.own_params(equation.op, params)

    def _jaxpr(
        self, equation: Equation, key: str, avals: Sequence[Any], depth: int, number: int
    ) -> Any:
        """A body for the operands that an equation hands it."""
        if depth >= _MAX_DEPTH:
            raise ValueError("bodies are too deep in each other")
        body = self._form.bodies[_checked(number, len(self._form.bodies))]
        given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in _fed(equation, key, avals)]
        if len(given) != body.inputs:
            raise ValueError(f"a body takes {body.inputs} operands, not {len(given)}")
        # Bodies that read the one before them twice would be as many as powers of two.
        known = (number, tuple((x.shape, x.dtype) for x in given))
        if known not in self._bodies:
            self._count(_STEPS_OF_A_BODY)
            run = functools.partial(self._run_body, body, number, depth + 1)
            self._bodies[known] = jax.make_jaxpr(run)(*given)
        closed = self._bodies[known]
        # A scatter holds its body without constants.
        return closed.jaxpr if key == "update_jaxpr" else closed

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MAX_STEPS:
            raise ValueError(f"it has more than {_MAX_STEPS} equations, those of bodies included")

    def _run_body(self, body: Body, number: int, depth: int, *inputs: Any) -> list[Any]:
        found = [self._closed_over[constant.array] for constant in body.constants]
        found += inputs
        sizes: set[int] = set()  # see `_folded`

        def read(atom: Atom) -> Any:
            if isinstance(atom, int):
                return found[_checked(atom, len(found))]
            return values.decode_scalar(list(atom))

        for equation in body.equations:
            _check_bodies(equation, number)
            operands = [read(x) for x in equation.inputs]
            # Traced operands have no value; whatever else is read is a number.
            numbers = [None if isinstance(x, jax.core.Tracer) else x for x in operands]
            if (folded := self._folded(equation, numbers, sizes)) is not None:
                sizes.add(len(found))
                found.append(folded)
                continue
            scope = equation.scope
            with jax.named_scope(scope) if scope else contextlib.nullcontext():
                if equation.op == primitives.CALL:
                    results = self._call(equation, operands, depth)
                else:
                    params = self._params(equation, operands, depth)
                    results = self._bind(equation, operands, params)
            found += results
        return [read(x) for x in body.outputs]

    def _call(self, equation: Equation, operands: Sequence[Any], depth: int) -> list[Any]:
        avals = [jax.typeof(x) for x in operands]
        body = functools.partial(self._jaxpr, equation, "body", avals, depth)
        closed = values.decode(equation.params["body"], self._known, body)
        name = equation.params["name"]

        def called(*xs: Any) -> Any:
            return jaxprs.jaxpr_as_fun(closed)(*xs)

        # A call's name is part of where an operation is.
        called.__name__ = called.__qualname__ = str(name)
        return _checked_results(equation, list(jax.jit(called)(*operands)))

    @staticmethod
    def _no_body(number: int) -> Any:
        raise ValueError("a body where there is none")


def _checked(number: int, count: int) -> int:
    if not 0 <= number < count:
        raise ValueError(f"it names number {number} of {count}")
    return number


def _checked_results(equation: Equation, results: list[Any]) -> list[Any]:
    if len(results) != equation.outputs:
        raise ValueError(f"it gives {len(results)} results, not {equation.outputs}")
    for result in results:
        shape = jax.typeof(result).shape
        # Sizes that vary are bounded where they become numbers.
        known = math.prod(size for size in shape if isinstance(size, int))
        if known > MAX_ELEMENTS or any(isinstance(d, int) and d < 0 for d in shape):
            raise ValueError(f"it gives a tensor of the shape {shape}")
    return results


def _fed(equation: Equation, key: str, avals: Sequence[Any]) -> Sequence[Any]:
    """Shapes and dtypes of what a body reads."""
    op, given = equation.op, equation.params
    if op == primitives.CALL:
        return avals
    # A step sees one entry of what the scan goes along.
    if op == "scan":
        kept = _count(given, "num_consts") + _count(given, "num_carry")
        rows = [a.update(shape=a.shape[1:]) for a in avals[kept:]]
        return [*avals[:kept], *rows]
    if op == "while":
        cond, own = _count(given, "cond_nconsts"), _count(given, "body_nconsts")
        consts = avals[:cond] if key == "cond_jaxpr" else avals[cond : cond + own]
        return [*consts, *avals[cond + own :]]
    if op == "cond":
        return avals[1:]
    if op.startswith("scatter") and key == "update_jaxpr":
        # Two numbers: what is there, and what comes to it.
        return [avals[0].update(shape=())] * 2
    raise ValueError(f"{op} with a body")


def _count(params: Mapping[str, Any], key: str) -> int:
    count = params[key]
    if type(count) is not int or not 0 <= count <= 2**16:
        raise ValueError(f"its {key} is {str(count)[:40]!r}")
    return count


def _check_bodies(equation: Equation, number: int) -> None:
    """Raise ValueError where a body reads one that is not before it."""
    stack: list[Any] = [*equation.params.values()]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack += item
        elif isinstance(item, dict):
            # By number, and those before alone: so no chain of bodies comes back to one.
            inner = item.get("body")
            if type(inner) is int and inner >= number:
                raise ValueError("a body reads itself")
            stack += item.values()


def _check_loop(body: Any, carry: Sequence[Any], count: int) -> None:
    if len(body.out_avals) < count or len(carry) < count:
        raise ValueError("a loop hands on another number of values than it takes")
    _check_outputs(body.out_avals[:count], carry[:count])


def _check_outputs(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    # Dtypes too: JAX compares them in its own traces, and trusts a file's.
    pairs = [[(a.shape, a.dtype) for a in avals] for avals in (found, wanted)]
    if pairs[0] != pairs[1]:
        raise ValueError("a body of control flow gives something else than is read")


def _described(place: int, equation: Equation) -> str:
    where = f" at {equation.scope[:100]!r}" if equation.scope else ""
    return f"equation {place}, {equation.op[:60]!r}{where}"


def _text(error: Exception) -> str:
    lines = str(error).strip().split("\n")
    return f"{lines[0][:300]}" or type(error).__name__
