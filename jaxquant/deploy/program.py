"""The exported program of an int8 model: StableHLO with a symbolic batch, for several platforms."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import export

from jaxquant.deploy.plain_trees import plain_tree, with_lists
from jaxquant.deploy.shapes import input_specs
from jaxquant.deploy.stored.read import StoredGraph
from jaxquant.graph import ir
from jaxquant.jax_shim import compilation
from jaxquant.run.qapply import QuantizedApply

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = "batch"  # the name of the symbolic dimension


def symbolic_inputs(
    qapply: QuantizedApply, shapes: Any = None, constraints: Sequence[str] = ()
) -> tuple[Any, ...]:
    """The inputs of a model, with symbolic dimensions, as shapes and dtypes.

    Args:
      qapply: the model.
      shapes: a string like "b, h, w, 3" or "1, 224, 224, 3", or a tuple of one for each input,
        see `input_specs`.  None makes the first axis of every input array that has one the batch;
        of a loaded model, what the file says.
      constraints: what is known of the sizes with names, such as "s <= 512".

    Raises:
      ValueError: the first axes of the inputs differ, or `shapes` or `constraints` does not fit the
        inputs.
    """
    if isinstance(constraints, str):
        raise ValueError(f"constraints={constraints!r} is a text; give a tuple: ({constraints!r},)")
    example = qapply.inputs
    if example is None:
        raise ValueError("this qapply does not know the shapes of its inputs")
    if shapes is None and not constraints and isinstance(qapply.source, StoredGraph):
        return qapply.source.specs()
    if shapes is None:
        shapes = _batched(example)
    try:
        return tuple(input_specs(example, shapes, constraints))
    except ValueError as error:
        given = f"shapes={shapes!r}" + (f", constraints={constraints!r}" if constraints else "")
        raise ValueError(f"{given} does not fit the model's inputs: {error}") from error


def _batched(example: tuple[Any, ...]) -> Any:
    """The texts for the inputs: the first axis is the batch, of all but numbers (counters)."""
    structs = jax.tree.map(ir.struct, example)
    shapes = [leaf.shape for leaf in jax.tree.leaves(structs)]
    if len({shape[0] for shape in shapes if shape}) != 1:
        raise ValueError(
            f"the model's inputs have the shapes {shapes}; which axis is the batch is not clear. "
            'Give shapes=(...), one string for each input, such as ("batch, 128", "5"); see '
            "jax.export.symbolic_args_specs"
        )
    return jax.tree.map(lambda leaf: f"{BATCH}, ..." if leaf.shape else "", structs)


def export_program(
    qparams: Mapping[str, Any],
    qapply: QuantizedApply,
    inputs: tuple[Any, ...],
    platforms: Sequence[str] = PLATFORMS,
) -> export.Exported:
    """Export `qapply`; `inputs` are shapes and dtypes, symbolic where they may vary.

    The program takes and gives plain dicts where `qapply` has containers of Flax, and lists where
    it has dicts with the keys 0, 1, 2, ...

    Raises:
      ValueError: the model cannot be traced for such inputs, or calls code of another library.
    """
    structs, own = jax.tree.map(ir.struct, qparams), jax.tree.structure(inputs)

    def plain_qapply(qparams: Mapping[str, Any], *plain_inputs: Any) -> Any:
        given = jax.tree.unflatten(own, jax.tree.leaves(plain_inputs))
        return with_lists(plain_tree(qapply(qparams, *given)))

    plain_qapply.__name__ = qapply.__name__
    with explained(inputs), compilation.without_source_locations():
        to_export = export.export(jax.jit(plain_qapply), platforms=tuple(platforms))
        exported = to_export(structs, *with_lists(plain_tree(inputs)))
    check_portable(exported)
    return exported


@contextlib.contextmanager
def explained(inputs: tuple[Any, ...]) -> Iterator[None]:
    """An error about the inputs' sizes becomes a ValueError that says what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TypeError) and not _is_symbolic_trouble(error):
            raise ValueError(
                f"the model takes no inputs of {_shapes(inputs)}: {error}\n"
                "Give shapes=... with the sizes that it takes, and numbers where they cannot vary: "
                "without it the first axis of every input is the batch"
            ) from error
        if not _is_symbolic_trouble(error):
            raise
        raise ValueError(
            f"the model computes something else for some sizes of {_shapes(inputs)}: {error}\n"
            f"Give shapes=... with numbers in place of the sizes that cannot vary{_advice(error)}"
        ) from error


def _is_symbolic_trouble(error: Exception) -> bool:
    """True for an error that numbers in place of symbols would not give.

    JAX tells of most by their class; a size that it could not decide on stands in others as a
    minimum or maximum: "incompatible shapes (s, 8), (min(16, s), 8)".
    """
    names = ("InconclusiveDimensionOperation", "ConcretizationTypeError", "NonConcreteBooleanIndex")
    text = str(error)
    return (
        type(error).__name__.startswith(names)
        or "symbolic" in text.lower()
        or _UNDECIDED.search(text) is not None
    )


_COMPARISON = re.compile(r"comparison '(.+?)' (<=|>=|<|>) '(.+?)' is inconclusive")
_UNDECIDED = re.compile(r"\b(?:min|max)\((\d+), (\w+)\)")  # such as a size cut at that of a table


def _advice(error: Exception) -> str:
    """The constraint that would decide what an error could not, as the end of a sentence."""
    text = str(error)
    if found := _COMPARISON.search(text):
        left, sign, right = found.groups()
        # jax.export reads <=, >= and == alone.
        strict = {"<": f"{left} <= {right} - 1", ">": f"{left} >= {right} + 1"}
        known = strict.get(sign, f"{left} {sign} {right}")
    elif found := _UNDECIDED.search(text):
        known = f"{found[2]} <= {found[1]}"
    else:
        return ""
    return f', or say what holds for every size that you serve: constraints=("{known}",), perhaps'


def _shapes(inputs: Any) -> str:
    return ", ".join(f"({', '.join(map(str, x.shape))})" for x in jax.tree.leaves(inputs))


def check_portable(exported: export.Exported) -> None:
    """Raise ValueError where a program calls code from outside of StableHLO.

    Such a call runs what the machine that loads it has under that name, or nothing at all.
    """
    called = set(re.findall(r"custom_call\s+@([\w.$\"-]+)", exported.mlir_module()))
    called |= set(re.findall(r'call_target_name\s*=\s*"([^"]*)"', exported.mlir_module()))
    foreign = sorted(called - _PORTABLE_CALLS)
    if foreign:
        raise ValueError(f"the program calls {', '.join(foreign)}, which is outside of StableHLO")


# Annotations that the compiler reads and jax.export's checks of symbolic sizes: they run no code.
_PORTABLE_CALLS = frozenset(
    {
        "Sharding",
        "SPMDFullToShardShape",
        "SPMDShardToFullShape",
        "shape_assertion",
        "stablehlo.shape_refinement_operand_wrapper",
    }
)


def serialize(exported: export.Exported) -> bytes:
    """The bytes of an exported program.

    Raises:
      ValueError: its inputs or outputs are in a container that jax.export does not know.
    """
    try:
        return bytes(exported.serialize(vjp_order=0))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the model's inputs or outputs cannot be saved ({error}). Let apply_fn take and "
            "return tuples, lists and dicts, or register the class with "
            "jax.export.register_pytree_node_serialization"
        ) from error
