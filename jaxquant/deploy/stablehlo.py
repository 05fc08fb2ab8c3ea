"""Export an int8 model as StableHLO."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxquant.deploy import program, tree
from jaxquant.files import atomic
from jaxquant.keywords import named
from jaxquant.progress import Progress


@named
def export_stablehlo(
    path: str | os.PathLike[str],
    qparams: Mapping[str, Any],
    qapply: Any,
    *,
    shapes: Any = None,
    constraints: Sequence[str] = (),
    platforms: Sequence[str] = program.PLATFORMS,
    progress: bool = True,
) -> None:
    """Write the int8 program as portable StableHLO, for CPU, GPU (CUDA) and TPU.

    The file is a serialized `jax.export.Exported`; the arrays are no part of it, but its first
    argument.  It has the form of each platform, one of which runs; what compiles the file without
    JAX compiles all of them, and `platforms` leaves away those that it is not for.
    `docs/deploying.md` shows how to call it, from JAX and without.

    Args:
      path: of the file to write.
      qparams, qapply, shapes, constraints, progress: as for `jaxquant.save_quantized_model`.
      platforms: some of "cpu", "cuda" and "tpu".

    Raises:
      ValueError: another platform is asked for, or none.
      ValueError, OSError: as `jaxquant.save_quantized_model`.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, jaxquant
      >>> params, apply_fn = {"w": jnp.eye(4)}, lambda p, x: x @ p["w"]
      >>> qparams, qapply = jaxquant.quant_post(
      ...     params, apply_fn, [jnp.ones((2, 4))], algo="abs_max", progress=False)
      >>> folder = tempfile.TemporaryDirectory()
      >>> jaxquant.export_stablehlo(f"{folder.name}/model.jaxexport", qparams, qapply)
      >>> with open(f"{folder.name}/model.jaxexport", "rb") as file:
      ...     exported = jax.export.deserialize(bytearray(file.read()))
      >>> exported.platforms, exported.in_avals[-1].str_short()
      (('cpu', 'cuda', 'tpu'), 'float32[batch,4]')
      >>> exported.call(qparams, jnp.ones((3, 4))).shape
      (3, 4)
      >>> folder.cleanup()
    """
    names = _checked(platforms)
    with Progress("export_stablehlo", progress) as shown:
        with shown.stage("lowering"):
            plain = tree.plain(qparams, qapply)
            # Native kernels are calls that no other machine has.
            by_xla = qapply.with_backend("xla")
            exported = program.export_program(plain, by_xla, shapes, constraints, names)
        with shown.stage("saving"):
            atomic.write_file(path, [program.serialize(exported)])


def _checked(platforms: Sequence[str]) -> tuple[str, ...]:
    """The platforms, each once, in the order that numbers them in the file."""
    given = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    if not given or not set(given) <= set(program.PLATFORMS):
        raise ValueError(f"platforms={platforms!r}: give some of {program.PLATFORMS}")
    return tuple(name for name in program.PLATFORMS if name in given)
