"""Makes the graph of a stored form, for inputs of any sizes that it allows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from jaxquant.deploy.plain_trees import plain_tree
from jaxquant.deploy.stored import replay, sizes, values
from jaxquant.deploy.stored.form import Constant, Leaf, StoredForm, Tensor
from jaxquant.deploy.stored.trees import decode_tree
from jaxquant.graph import ir
from jaxquant.graph.model import Model
from jaxquant.graph.tables import with_looked_up_rows
from jaxquant.jax_shim import prng

_CONSTRAINT = re.compile(r"(.+?)(==|<=|>=)(.+)")


class StoredGraph:
    """A model as it was stored: gives its graph for inputs, as a trace of its code did.

    Attributes:
      form: what is stored.
      arrays: the arrays that the model closed over, by name.
      params: shapes and dtypes of the parameters, a nested dict.
      example: shapes and dtypes of the inputs that the model was quantized with.
    """

    def __init__(self, form: StoredForm, arrays: Mapping[str, np.ndarray]) -> None:
        """Check what needs no sizes.

        Raises:
          ValueError: the form is damaged, or the arrays are not those that it names.
        """
        self.form, self.arrays = form, arrays
        self._input_tree = decode_tree(form.input_tree)
        self._output_tree = decode_tree(form.output_tree)
        # Parameters and constants have no size that varies.
        self._leaves = tuple(_struct(leaf.tensor, {}) for leaf in form.leaves)
        self._constants = tuple(_constant(c, arrays) for c in form.constants)
        inner = [constant for body in form.bodies for constant in body.constants]
        self._closed_over = {c.array: _constant(c, arrays) for c in inner}
        # Every array is read by something: one too many is as suspicious as one too few.
        named = {c.array for c in (*form.constants, *inner) if c.array}
        if named != set(arrays):
            raise ValueError(f"it names other arrays than {sorted(arrays)[:5]}")
        if len(form.example) != len(form.inputs):
            raise ValueError(f"it has {len(form.inputs)} inputs and {len(form.example)} examples")
        self.params, self._order = _nested(form.leaves, self._leaves)
        dtypes = [values.decode_dtype(tensor.dtype) for tensor in form.inputs]
        structs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(form.example, dtypes, strict=True)]
        example = self._unflatten(self._input_tree, structs)
        if not isinstance(example, tuple):
            raise ValueError("its inputs are no tuple of arguments")
        self.example: tuple[Any, ...] = example

    def specs(self, constraints: Sequence[str] = ()) -> tuple[Any, ...]:
        """Shapes and dtypes of the inputs, with sizes that vary, as the model was saved with.

        Args:
          constraints: what is known of the sizes beside what the file says.
        """
        texts = [", ".join(map(str, tensor.shape)) for tensor in self.form.inputs]
        shapes = jax.tree.unflatten(self._input_tree, texts)
        known = (*self.form.constraints, *constraints)
        return tuple(export.symbolic_args_specs(self.example, shapes, constraints=known))

    def __call__(self, inputs: Sequence[Any]) -> Model:
        """The model for inputs of these shapes, which may have symbolic sizes.

        Raises:
          ValueError: the inputs are not of the structure, the dtypes or the shapes that the model
            was saved with, or the form is damaged.
        """
        structs = jax.tree.map(ir.struct, plain_tree(tuple(inputs)))
        known = self._sizes(structs)
        builder = replay.Replay(self.form, self._closed_over, known)
        flat = jax.tree.leaves(structs)
        # Abstractly: shapes and dtypes are found, nothing is computed.
        jax.eval_shape(builder.run, self._leaves, self._constants, flat)

        # Numbers go to leaves, constants, inputs and results in turn, as they were written.
        count = len(self._leaves)
        constants = range(count, count + len(self._constants))
        given = range(constants.stop, constants.stop + len(flat))
        paths = ["/".join(leaf.path) for leaf in self.form.leaves]
        paths += [constant.path for constant in self.form.constants]
        if len(builder.outputs) != self._output_tree.num_leaves:
            raise ValueError("its outputs are not of their structure")
        graph = ir.Graph(
            avals=tuple(builder.avals),
            equations=tuple(builder.equations),
            leaves=self._order,
            inputs=tuple(given),
            constants=dict(zip(constants, self._constants, strict=True)),
            outputs=tuple(builder.outputs),
            paths=dict(enumerate(paths)),
            static=tuple(builder.static),
            out_tree=self._output_tree,
        )
        return Model(with_looked_up_rows(graph))

    def _sizes(self, structs: Any) -> dict[str, Any]:
        if jax.tree.structure(structs) != self._input_tree:
            raise ValueError(
                f"the model takes inputs of the structure {self._input_tree}, got "
                f"{jax.tree.structure(structs)}"
            )
        # Each size as the file spells it, with the size that is given for it.
        wanted: list[tuple[str | int, Any]] = []
        flat = jax.tree.leaves(structs)
        for tensor, struct in zip(self.form.inputs, flat, strict=True):
            if len(tensor.shape) != len(struct.shape) or (
                values.encode_dtype(struct.dtype) != tensor.dtype
            ):
                raise self._mismatch(flat, "an input is of another dtype or rank")
            wanted += zip(tensor.shape, struct.shape, strict=True)

        # Names are solved for all inputs together: a batch is one size wherever it stands.
        try:
            known = sizes.solve(wanted)
            self._check_constraints(known)
        except ValueError as error:
            raise self._mismatch(flat, str(error)) from None
        return known

    def _check_constraints(self, known: Mapping[str, Any]) -> None:
        """Where the model was traced under an assumption, another size would be another model."""
        if any(export.is_symbolic_dim(size) for size in known.values()):
            return  # jax.export holds on to the constraints of these
        for constraint in self.form.constraints:
            match = _CONSTRAINT.fullmatch(constraint)
            if match is None:
                raise ValueError(f"the constraint {constraint[:60]!r} is damaged")
            left, compare, right = match.groups()
            if not (sizes.names(left) | sizes.names(right)) <= set(known):
                continue  # an equality by which one name was replaced
            a, b = sizes.evaluate(left, known), sizes.evaluate(right, known)
            if not {"==": a == b, "<=": a <= b, ">=": a >= b}[compare]:
                raise ValueError(f"it was saved for {constraint}")

    def _mismatch(self, flat: Sequence[Any], reason: str) -> ValueError:
        given = ", ".join(f"{x.dtype}[{', '.join(map(str, x.shape))}]" for x in flat)
        return ValueError(
            f"the saved model takes {', '.join(self.input_shapes())}, got {given}: {reason}. Give "
            "shapes=... where the model is saved to let other sizes vary"
        )

    def input_shapes(self, _: tuple[Any, ...] = ()) -> tuple[str, ...]:
        """The inputs' dtypes and shapes; sizes with a name may vary."""
        return tuple(
            f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]" for tensor in self.form.inputs
        )

    @staticmethod
    def _unflatten(tree: Any, leaves: Sequence[Any]) -> Any:
        if tree.num_leaves != len(leaves):
            raise ValueError("its inputs are not of their structure")
        return jax.tree.unflatten(tree, leaves)


def _struct(tensor: Tensor, known: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    shape = tuple(sizes.evaluate(d, known) if isinstance(d, str) else d for d in tensor.shape)
    if len(shape) > 32 or not all(d >= 0 for d in shape) or math.prod(shape) > replay.MAX_ELEMENTS:
        raise ValueError(f"an array has the shape {shape}")
    return jax.ShapeDtypeStruct(shape, values.decode_dtype(tensor.dtype))


def _constant(constant: Constant, arrays: Mapping[str, np.ndarray]) -> Any:
    """The value of a constant; its shape and dtype where the value is not kept."""
    struct = _struct(constant.tensor, {})
    if not constant.array:
        return struct
    if constant.array not in arrays:
        raise ValueError(f"the array {constant.array[:60]!r} is not there")
    value: Any = arrays[constant.array]
    if prng.is_key_dtype(struct.dtype):
        # Keys are stored as the numbers behind them.
        value = jax.random.wrap_key_data(value, impl=prng.key_implementation(struct.dtype))
    if (value.shape, value.dtype) != (struct.shape, struct.dtype):
        raise ValueError(f"the array {constant.array!r} is {value.dtype}{list(value.shape)}")
    return value


def _nested(
    leaves: Sequence[Leaf], structs: Sequence[Any]
) -> tuple[dict[str, Any], tuple[ir.Var, ...]]:
    """The parameters as a nested dict, and the numbers of its leaves in the order of JAX."""
    tree: dict[str, Any] = {}
    for number, leaf in enumerate(leaves):
        if not 0 < len(leaf.path) <= 64:
            raise ValueError("the path of a parameter is damaged")
        place = tree
        for key in leaf.path[:-1]:
            # Two paths may not be one inside the other: a dict cannot hold both.
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(f"the parameter {'/'.join(leaf.path)[:60]!r} is inside of another")
        if leaf.path[-1] in place:
            raise ValueError(f"the parameter {'/'.join(leaf.path)[:60]!r} is there twice")
        place[leaf.path[-1]] = number
    order = tuple(jax.tree.leaves(tree))
    return jax.tree.map(lambda number: structs[number], tree), order
