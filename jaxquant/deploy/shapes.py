"""The shapes that a model is exported for, as texts: "b, h, w, 3", "1, 224, 224, 3"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import export

from jaxquant.graph import ir


def input_specs(example: tuple[Any, ...], shapes: Any, constraints: Sequence[str] = ()) -> Any:
    """Shapes and dtypes of the inputs, by the texts.

    As `jax.export.symbolic_args_specs`, but that a number need not be the size that the example
    has: a model that was quantized with batches of 8 may be exported for one image at a time.

    Args:
      example: the inputs that the model was quantized with.
      shapes: a text, a tuple of one for each input, or a prefix of the tree of inputs.
      constraints: what is known of the sizes with names.

    Raises:
      ValueError: `shapes` does not fit the inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> (spec,) = input_specs((jnp.ones((8, 4)),), "1, ...")
      >>> spec.shape
      (1, 4)
    """
    if isinstance(shapes, list):  # as jax.export takes it
        shapes = tuple(shapes)
    leaves, structure = jax.tree.flatten(example)
    texts = _texts(shapes, example)

    # JAX compares a number with the size of the example, so the example gets that size.
    likes = [_like(text, ir.struct(leaf)) for text, leaf in zip(texts, leaves, strict=True)]
    return export.symbolic_args_specs(
        jax.tree.unflatten(structure, likes), shapes, constraints=tuple(constraints)
    )


def _texts(shapes: Any, example: tuple[Any, ...]) -> list[str | None]:
    """The text for each array among the inputs."""

    def is_none(node: Any) -> bool:
        return node is None

    try:
        # One text may stand for all the arrays below it.
        spread = jax.tree.broadcast(shapes, example, is_leaf=is_none)
    except ValueError:
        texts = []
    else:
        texts = jax.tree.leaves(spread, is_leaf=is_none)
    if not texts or not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(
            f"the model has {len(example)} inputs; shapes are a text, such as '1, 224, 224, 3', or "
            "a tuple of one for each input"
        )
    return texts


def _like(text: str | None, struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of an input with the numbers of the text in place of its sizes."""
    if text is None:  # the shape that the input has
        return struct
    parts = _split(text)
    if parts[-1:] == ["..."]:  # the sizes of the remaining axes
        parts[-1:] = ["_"] * (len(struct.shape) - len(parts) + 1)
    if len(parts) != len(struct.shape):
        raise ValueError(f"{text!r} gives {len(parts)} sizes for an array of shape {struct.shape}")
    if any(part.startswith("-") for part in parts):
        raise ValueError(f"{text!r} has a size below 0; one that varies has a name, such as 'b'")
    sizes = [
        int(part) if part.isascii() and part.isdigit() else size
        for part, size in zip(parts, struct.shape, strict=True)
    ]
    return jax.ShapeDtypeStruct(tuple(sizes), struct.dtype)


def _split(text: str) -> list[str]:
    """The parts between the commas that are in no brackets."""
    text = text.strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if not parts[-1].strip():  # "" is the shape of a number, "4," is "4"
        parts.pop()
    return [part.strip() for part in parts]
