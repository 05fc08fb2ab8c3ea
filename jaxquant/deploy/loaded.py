"""The `qapply` of a loaded model: an exported program instead of the model's code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from jax import export

from jaxquant.plan.plan import Plan
from jaxquant.report.report import Report
from jaxquant.run.qapply import check_qparams, describe_plan

if TYPE_CHECKING:
    from jaxquant.deploy.artifact import Artifact


class LoadedApply:
    """The int8 model as a function `qapply(qparams, *inputs)`, as `load_quantized_model` returns.

    A pure function to call, `jit` and shard like the one that was saved.  It has no derivative and
    no `vmap`; its inputs have the shapes and dtypes of the model that was saved, with any batch
    size.

    Attributes:
      plan: which sites are int8, and with which scales.
      artifact: what the file holds beside the arrays.
    """

    def __init__(self, artifact: Artifact, exported: export.Exported) -> None:
        self.artifact = artifact
        self._exported = exported
        self._jitted = jax.jit(exported.call)
        self.__name__ = "qapply"

    @property
    def plan(self) -> Plan:
        return self.artifact.plan

    @property
    def input_shapes(self) -> tuple[str, ...]:
        """The inputs' dtypes and shapes; sizes with a name may vary."""
        arguments = self._exported.in_avals[self._num_arrays() :]
        return tuple(f"{aval.dtype}[{', '.join(map(str, aval.shape))}]" for aval in arguments)

    def __call__(self, qparams: Mapping[str, Any], *inputs: Any) -> Any:
        """The model's outputs for `inputs`."""
        self.check(qparams)
        return self._jitted(qparams, *inputs)

    def check(self, qparams: Mapping[str, Any]) -> None:
        """Raise ValueError where the qparams are of another plan."""
        check_qparams(qparams, self.plan)

    def __repr__(self) -> str:
        return describe_plan(self.plan)

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def report(self) -> Report:
        """Every site, int8 or why not, as it was when the model was quantized."""
        return self.artifact.report

    def _num_arrays(self) -> int:
        arguments, _ = jax.tree.unflatten(self._exported.in_tree, self._exported.in_avals)
        return len(jax.tree.leaves(arguments[0]))
