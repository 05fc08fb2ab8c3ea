"""Layer normalization along one axis, as Flax (linen and nnx), Haiku and users write it.

`(x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias`: the product is taken apart, so that its
factors may come in any order, and the variance is that of `jnp.var` or the fast one,
`mean(x ** 2) - mean(x) ** 2`.  Scale and bias may be missing.  Source: Ba et al., arXiv:1607.06450.
"""

from __future__ import annotations

from jaxquant.graph import ir, matching, primitives

_SPREADING = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "stop_gradient", "copy")


def match(graph: ir.Graph, last: ir.Equation) -> matching.Match | None:
    """The layer normalization that ends in an equation; None of others."""
    # The last step adds the bias, scales, or divides.
    if last.name not in ("add", "mul", "div") or graph.static[last.outputs[0]]:
        return None
    return _Search(graph).found(last)


class _Search:
    """A search that collects what it went through in `members`."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._members: set[int] = set()

    def found(self, last: ir.Equation) -> matching.Match | None:
        graph, bias = self._graph, None
        product: ir.Atom = last.outputs[0]
        if last.name == "add":
            static = [graph.is_static(x) for x in last.inputs]
            if sum(static) != 1:
                return None
            bias, product = last.inputs[static.index(True)], last.inputs[static.index(False)]
            self._members.add(last.index)

        # Of the factors one is centered, one the inverse deviation, and one the scale, if any.
        factors = self._factors(product)
        vectors = [x for x in factors if graph.is_static(x)]
        others = [x for x in factors if not graph.is_static(x)]
        # A second vector would be another scale, which no kernel has.
        if len(others) != 2 or len(vectors) > 1:
            return None
        # Which of the two is centered, the order does not tell.
        found = self._normalized(*others) or self._normalized(*others[::-1])
        if found is None:
            return None
        source, axis, epsilon = found

        # Scale and bias go along the axis that is normalized, and nothing else does.
        size = graph.shape(source)[axis]
        spread = (*vectors, *(() if bias is None else (bias,)))
        statics = [v for x in spread if (v := self._vector(x, axis, size)) is not None]
        is_whole = matching.is_private(graph, self._members, last.outputs[0])
        if len(statics) < len(spread) or not is_whole:
            return None
        params = {
            "axis": axis,
            "epsilon": epsilon,
            "has_scale": bool(vectors),
            "has_bias": bias is not None,
        }
        return matching.Match((source, *statics), frozenset(self._members), params)

    def _normalized(
        self, centered: ir.Atom, deviation: ir.Atom
    ) -> tuple[ir.Var, int, float] | None:
        """The tensor, the axis and the epsilon of two factors; None where they are others."""
        given = self._centered(centered)
        if given is None or given[1] in self._varying(deviation):
            return None
        epsilon = self._epsilon(deviation, *given)
        return None if epsilon is None else (*given, epsilon)

    def _factors(self, atom: ir.Atom) -> list[ir.Atom]:
        """What a product is of; a division's divisor is one too, since it is recognized later."""
        eqn = matching.producer(self._graph, atom)
        if eqn is None or self._graph.is_static(atom):
            return [atom]
        # A division by a number is a scaling like any other; one by a tensor may be by the
        # deviation.
        divides_by_number = eqn.name == "div" and self._graph.is_static(eqn.inputs[1])
        if eqn.name in ("mul", "div") and not divides_by_number:
            self._members.add(eqn.index)
            # The divisor is kept whole: it is looked into as the deviation.
            first, second = eqn.inputs
            return self._factors(first) + (self._factors(second) if eqn.name == "mul" else [second])
        if matching.is_float_cast(self._graph, eqn):
            self._members.add(eqn.index)
            return self._factors(eqn.inputs[0])
        return [atom]

    def _step(self, atom: ir.Atom, *names: str) -> ir.Equation | None:
        """The equation of one of these names that gives a tensor, perhaps moved or cast."""
        while (eqn := matching.producer(self._graph, atom)) is not None:
            # `where(variance < 0, 0, variance)` and the like: guards that choose what is there.
            is_choice = eqn.name == "select_n" and self._chosen(eqn) is not None
            if eqn.name in names or not (
                eqn.name in _SPREADING or is_choice or matching.is_float_cast(self._graph, eqn)
            ):
                break
            self._members.add(eqn.index)
            chosen = self._chosen(eqn) if is_choice else eqn.inputs[0]
            assert chosen is not None, "the choice is known"
            atom = chosen
        if eqn is None or eqn.name not in names or self._graph.is_static(atom):
            return None
        self._members.add(eqn.index)
        return eqn

    def _varying(self, atom: ir.Atom) -> frozenset[int]:
        """The axes along which what is made of sums may differ, of an operand of the whole tensor.

        Sums that are spread back along other axes than those they have left are another function.
        Axes keep their order, so that they are where they were if the summed one holds copies.
        """
        graph, eqn = self._graph, matching.producer(self._graph, atom)
        wide = frozenset(axis for axis, size in enumerate(graph.shape(atom)) if size != 1)
        # A sum has left its axis; its copies are along it.
        if eqn is None or graph.is_static(atom) or eqn.name == "reduce_sum":
            return wide
        if eqn.name in _SPREADING:
            return wide & primitives.follow_axes(graph, eqn, self._varying(eqn.inputs[0]))
        alike = [x for x in eqn.inputs if len(graph.shape(x)) == len(graph.shape(atom))]
        others = [x for x in alike if not graph.is_static(x)]
        return wide & frozenset().union(*(self._varying(x) for x in others))

    def _chosen(self, eqn: ir.Equation) -> ir.Atom | None:
        """What is always chosen, as by `jnp.var`, which asks whether there are elements."""
        which = matching.number(self._graph, eqn.inputs[0])
        return None if which is None else eqn.inputs[1 + int(which)]

    def _is(self, atom: ir.Atom, source: ir.Var) -> bool:
        """Whether a tensor is another one, perhaps cast."""
        for eqn in matching.behind_casts(self._graph, atom):
            if atom == source:
                break
            self._members.add(eqn.index)
            atom = eqn.inputs[0]
        return atom == source

    def _mean(self, atom: ir.Atom) -> tuple[ir.Atom, int] | None:
        """The tensor and the axis that a tensor holds the means of, perhaps with that axis."""
        graph, eqn = self._graph, self._step(atom, "div", "mul")
        if eqn is None:
            return None
        # Written as a sum over n, or as a sum times 1 / n.
        total, count = eqn.inputs
        if eqn.name == "mul" and graph.is_static(total):
            total, count = count, total
        summed = self._step(total, "reduce_sum")
        divisor = matching.spread_number(graph, count)
        if summed is None or divisor is None or len(summed.params["axes"]) != 1:
            return None
        axis = int(summed.params["axes"][0])
        size = graph.shape(summed.inputs[0])[axis]
        wanted = divisor if eqn.name == "div" else (1 / divisor if divisor else 0)
        # Float32 holds 1 / n to 6e-8; another divisor is no mean.
        if not isinstance(size, int) or abs(wanted - size) > 1e-5 * size:
            return None
        return summed.inputs[0], axis

    def _centered(self, atom: ir.Atom) -> tuple[ir.Var, int] | None:
        """The tensor, and the axis, whose means a tensor has been freed of."""
        graph, eqn = self._graph, self._step(atom, "sub")
        found = None if eqn is None else self._mean(eqn.inputs[1])
        if eqn is None or found is None or found[1] in self._varying(eqn.inputs[1]):
            return None
        # The means may be of a wider copy than what they are taken from.
        roots = [eqn.inputs[0], *(c.inputs[0] for c in matching.behind_casts(graph, eqn.inputs[0]))]
        for root in roots:
            if isinstance(root, int) and self._is(found[0], root) and self._is(eqn.inputs[0], root):
                return root, found[1]
        return None

    def _square(self, atom: ir.Atom) -> ir.Atom | None:
        """What a tensor is the square of."""
        eqn = self._step(atom, "square", "integer_pow", "mul")
        if eqn is None:
            return None
        if eqn.name == "integer_pow" and eqn.params["y"] != 2:
            return None
        return None if eqn.name == "mul" and len({*eqn.inputs}) != 1 else eqn.inputs[0]

    def _epsilon(self, atom: ir.Atom, source: ir.Var, axis: int) -> float | None:
        """What is added to the variance of a tensor whose inverse deviation this is."""
        eqn = self._step(atom, "rsqrt", "sqrt")
        inner = None if eqn is None else self._step(eqn.inputs[0], "add")
        # Either the inverse deviation multiplies, or the deviation divides.
        if eqn is None or inner is None or (eqn.name == "sqrt") != self._divides(atom):
            return None
        for variance, added in (inner.inputs, inner.inputs[::-1]):
            epsilon = matching.spread_number(self._graph, added)
            if epsilon is not None and self._is_variance(variance, source, axis):
                return epsilon
        return None

    def _divides(self, atom: ir.Atom) -> bool:
        """Whether one of the members divides by a tensor."""
        return any(
            eqn.name == "div" and eqn.inputs[1] == atom
            for eqn in (self._graph.equations[index] for index in self._members)
        )

    def _is_variance(self, atom: ir.Atom, source: ir.Var, axis: int) -> bool:
        clipped = self._step(atom, "max")
        if clipped is not None:  # the fast one may come out below zero
            numbers = [matching.spread_number(self._graph, x) for x in clipped.inputs]
            if 0.0 not in numbers:
                return False
            atom = clipped.inputs[1 - numbers.index(0.0)]
        return self._is_fast_variance(atom, source, axis) or self._is_mean_square(
            atom, source, axis, centered=True
        )

    def _is_fast_variance(self, atom: ir.Atom, source: ir.Var, axis: int) -> bool:
        difference = self._step(atom, "sub")
        if difference is None:
            return False
        # The mean of squares less the square of the mean, of one tensor along one axis.
        squares, square = difference.inputs
        mean = self._square(square)
        found = None if mean is None else self._mean(mean)
        if found is None or not self._is(found[0], source) or found[1] != axis:
            return False
        return self._is_mean_square(squares, source, axis, centered=False)

    def _is_mean_square(self, atom: ir.Atom, source: ir.Var, axis: int, centered: bool) -> bool:
        """Whether these are the means of the squares of a tensor, or of it without its means."""
        found = self._mean(atom)
        squared = None if found is None else self._square(found[0])
        if found is None or squared is None or found[1] != axis:
            return False
        return self._centered(squared) == (source, axis) if centered else self._is(squared, source)

    def _vector(self, atom: ir.Atom, axis: int, size: int) -> ir.Var | None:
        """The tensor [size] that is spread along an axis; None where another is."""
        graph = self._graph
        shape = graph.shape(atom)
        if any(n != 1 and (k != axis or n != size) for k, n in enumerate(shape)) or (
            not isinstance(atom, int)
        ):
            return None

        # What spreads a vector adds axes of size 1, in as many steps as the model likes.
        while graph.shape(atom) != (size,):
            eqn = graph.producer.get(atom)
            if eqn is None or eqn.name not in ("broadcast_in_dim", "reshape"):
                return None
            atom = eqn.input_vars[0]
        return atom
