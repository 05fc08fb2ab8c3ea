"""What a model is deployed as: its program, its network, its plan and its report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant._version import __version__
from jaxquant.deploy import program as programs
from jaxquant.deploy import tree
from jaxquant.deploy.describe import describe
from jaxquant.deploy.loaded import LoadedApply
from jaxquant.deploy.network import Network
from jaxquant.plan.plan import Plan
from jaxquant.report.report import Report
from jaxquant.run.qapply import QuantizedApply


@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
    """A model ready to be written.

    Attributes:
      program: the serialized `jax.export.Exported`, of `(qparams, *inputs)`.
      constants: the arrays of `network` that are not in `qparams`, by name.
      versions: of what made the program: "jaxquant" and "jax".
    """

    plan: Plan
    report: Report
    program: bytes
    network: Network
    constants: Mapping[str, np.ndarray]
    versions: Mapping[str, str]


def make_artifact(
    qparams: Mapping[str, Any], qapply: Any, shapes: Any = None, constraints: Sequence[str] = ()
) -> tuple[dict[str, Any], Artifact]:
    """The `qparams` as a plain nested dict of arrays, and what is written beside them.

    Args:
      qparams: the arrays of the int8 model.
      qapply: the function that came with them, from `quant_post`, `quantize` or
        `load_quantized_model`.
      shapes, constraints: see `jaxquant.save_quantized_model`; a loaded model has its own.

    Raises:
      ValueError: they do not belong together, or cannot be exported or saved.
      TypeError: `qapply` is another function.
    """
    if not isinstance(qapply, (QuantizedApply, LoadedApply)):
        raise TypeError(
            "qapply is what jaxquant.quant_post or load_quantized_model returned, got "
            f"{type(qapply).__name__}"
        )
    qapply.check(qparams)
    # Packed weights belong to this machine's kernels.
    plain = tree.unflatten(tree.flatten({k: v for k, v in qparams.items() if k != "packed"}))
    if isinstance(qapply, LoadedApply):
        if shapes is not None or constraints:
            raise ValueError(
                "a loaded model has the shapes that it was saved with; give shapes where the model "
                "is quantized and saved"
            )
        return plain, qapply.artifact
    inputs = programs.symbolic_inputs(_example(qapply), shapes, constraints)
    portable = qapply.with_backend("xla")
    exported = programs.export_program(plain, portable, inputs)
    network, constants = describe(portable.program(*inputs), inputs)
    artifact = Artifact(
        plan=qapply.plan,
        report=qapply.report(),
        program=programs.serialize(exported),
        network=network,
        constants=constants,
        versions={"jaxquant": __version__, "jax": jax.__version__},
    )
    return plain, artifact


def _example(qapply: QuantizedApply) -> tuple[Any, ...]:
    if qapply.inputs is None:
        raise ValueError("this qapply does not know the shapes of its inputs")
    return qapply.inputs
