"""The exported program of an int8 model: StableHLO with a symbolic batch, for several platforms."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax import export

from jaxquant.deploy.assumptions import assumed_in, undecided
from jaxquant.deploy.plain_trees import plain_tree, with_lists
from jaxquant.deploy.shapes import input_specs
from jaxquant.deploy.stored.read import StoredGraph
from jaxquant.graph import ir
from jaxquant.jax_shim import compilation
from jaxquant.run.qapply import QuantizedApply

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = "batch"  # the name of the symbolic dimension
_MOST_ASSUMPTIONS = 16  # about sizes: each costs a trace

Traced = TypeVar("Traced")


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
    example = qapply.inputs
    if example is None:
        raise ValueError("this qapply does not know the shapes of its inputs")
    # A loaded model knows its own names of sizes.
    if shapes is None and isinstance(qapply.source, StoredGraph):
        return qapply.source.specs(constraints)
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


def traced(
    qapply: QuantizedApply,
    shapes: Any,
    constraints: Sequence[str],
    trace: Callable[[tuple[Any, ...]], Traced],
) -> Traced:
    """What a function gives for the inputs of a model, with symbolic sizes.

    Where it fails because JAX cannot decide about a size, and the model takes inputs for which it
    goes one way alone (a text that is no longer than the table of its positions), it is tried again
    with that for a constraint.

    Args:
      qapply, shapes, constraints: see `symbolic_inputs`.
      trace: takes shapes and dtypes.

    Raises:
      ValueError: as `symbolic_inputs`, or the model cannot be traced for such inputs.
    """
    if isinstance(constraints, str):
        raise ValueError(f"constraints={constraints!r} is a text; give a tuple: ({constraints!r},)")
    # The model may ask something of a size ("b >= 2"): what held for its example is assumed, one
    # thing after the other, and said in the file.
    assumed: tuple[str, ...] = ()
    while True:
        inputs = symbolic_inputs(qapply, shapes, (*constraints, *assumed))
        try:
            return trace(inputs)
        except Exception as error:
            found = assumed_in(error, inputs, qapply.inputs)
            if (
                found is None
                or found.constraint in assumed
                or len(assumed) == _MOST_ASSUMPTIONS
                or _takes(qapply, found.beyond)
            ):
                _explain(error, inputs)
                raise
        assumed = (*assumed, found.constraint)


def _takes(qapply: QuantizedApply, inputs: tuple[Any, ...] | None) -> bool:
    """Whether the float model can be traced for some shapes; None are those that it may take."""
    if inputs is None:
        return True
    try:
        qapply.source(inputs)
    except Exception:  # whatever the model says of sizes that it does not take
        return False
    return True


def export_program(
    qparams: Mapping[str, Any],
    qapply: QuantizedApply,
    shapes: Any = None,
    constraints: Sequence[str] = (),
    platforms: Sequence[str] = PLATFORMS,
) -> export.Exported:
    """Export `qapply`, for sizes as `symbolic_inputs` has them.

    The program takes and gives plain dicts where `qapply` has containers of Flax, and lists where
    it has dicts with the keys 0, 1, 2, ...

    Raises:
      ValueError: the model cannot be traced for such inputs, or calls code of another library.
    """
    structs, own = jax.tree.map(ir.struct, qparams), jax.tree.structure(qapply.inputs)

    def plain_qapply(qparams: Mapping[str, Any], *plain_inputs: Any) -> Any:
        # By leaves: the containers are another's, the order of the leaves is the same.
        given = jax.tree.unflatten(own, jax.tree.leaves(plain_inputs))
        return with_lists(plain_tree(qapply(qparams, *given)))

    # The name is that of the function in the file.
    plain_qapply.__name__ = qapply.__name__

    def trace(inputs: tuple[Any, ...]) -> export.Exported:
        to_export = export.export(jax.jit(plain_qapply), platforms=tuple(platforms))
        return to_export(structs, *with_lists(plain_tree(inputs)))

    # Paths of this machine have no place in a file that is handed on.
    with compilation.without_source_locations():
        exported = traced(qapply, shapes, constraints, trace)
    check_portable(exported)
    return exported


def _explain(error: Exception, inputs: tuple[Any, ...]) -> None:
    """Raise a ValueError that says what to do, where an error is about the inputs' sizes."""
    if (divisor := _UNDIVIDED.search(str(error))) is not None:
        number, size = divisor.groups()
        raise ValueError(
            f"the model takes no inputs of {_shapes(inputs)}: {error}\n"
            f'Give shapes=... with a multiple of {number} in place of {size}, such as "{number}*b, '
            '...": the first axis is split over so many devices'
        ) from error
    if isinstance(error, TypeError) and not _is_symbolic_trouble(error):
        raise ValueError(
            f"the model takes no inputs of {_shapes(inputs)}: {error}\n"
            "Give shapes=... with the sizes that it takes, and numbers where they cannot vary: "
            "without it the first axis of every input is the batch"
        ) from error
    if _is_symbolic_trouble(error):
        raise ValueError(
            f"the model computes something else for some sizes of {_shapes(inputs)}: {error}\n"
            f"Give shapes=... with numbers in place of the sizes that cannot vary{_advice(error)}"
        ) from error


# What `shard_map` says of a size that it cannot split.
_UNDIVIDED = re.compile(r"but (\d+) does not evenly divide (\w+)")


def _is_symbolic_trouble(error: Exception) -> bool:
    """True for an error that numbers in place of symbols would not give.

    JAX tells of most by their class; a size that it could not decide on stands in others as a
    minimum or maximum: "incompatible shapes (s, 8), (min(16, s), 8)".
    """
    # By name: not every JAX has all of these classes.
    names = ("InconclusiveDimensionOperation", "ConcretizationTypeError", "NonConcreteBooleanIndex")
    text = str(error)
    return (
        type(error).__name__.startswith(names)
        or "symbolic" in text.lower()
        or undecided(error) is not None
    )


def _advice(error: Exception) -> str:
    """The constraint that would decide what an error could not, as the end of a sentence."""
    known = undecided(error)
    if known is None:
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
        # Derivatives would double the file, and need another program for each argument.
        return bytes(exported.serialize(vjp_order=0))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the model's inputs or outputs cannot be saved ({error}). Let apply_fn take and "
            "return tuples, lists and dicts, or register the class with "
            "jax.export.register_pytree_node_serialization"
        ) from error
