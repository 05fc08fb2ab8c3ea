"""`qapply`: the int8 model as a pure function of `(qparams, *inputs)`."""

from __future__ import annotations

import dataclasses
import functools
import html
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.backends.choice import Choice, check_backend, choose_backend, table_of
from jaxquant.backends.platforms import XLA_ALONE
from jaxquant.graph import ir
from jaxquant.graph.calls import shapes_text
from jaxquant.graph.model import Model
from jaxquant.plan.bind import bind
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import INT8, Plan
from jaxquant.run.agreement import Agreement, DisagreementError, differences
from jaxquant.run.inputs import Ranges, check_kinds, find_strange, has_values
from jaxquant.run.pickling import NotPickled
from jaxquant.run.program import Program
from jaxquant.run.qparams import check_qparams
from jaxquant.run.source import Source


class QuantizedApply(NotPickled):
    """The quantized counterpart of `apply_fn`; made by `quant_post` and `load_quantized_model`.

    A pure function: `qapply(qparams, *inputs)` takes any batch size and input shape that gives the
    same sites, and works under `jit`, `vmap` and `shard_map`.  It compiles itself once per input
    shape, so calling it outside `jit` is fine too.

    On CPU the convolutions and dots with a weight are native kernels where those can be compiled
    and are faster (`jaxquant.native`), else XLA's; `backend` says which, and why.  Where scales are
    not known beforehand, as in `quant_dynamic` and `quant_weights`, they are dots of few rows.  An
    export has XLA's always.

    Attributes:
      source: the float model.
      plan: which sites are int8, and with which scales.
      backend: "native" or "xla", with the reason: what runs where this process compiles for CPU.
      inputs: the shapes and dtypes of the inputs that it was quantized with; None if not known.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        report: Any,
        inputs: tuple[Any, ...] | None = None,
        backend: str = "auto",
        ranges: Ranges | None = None,
    ):
        check_backend(backend)
        self.plan = plan
        self._backend = backend
        # Shapes alone: a batch of images would live as long as the model.
        self.inputs = None if inputs is None else jax.tree.map(ir.struct, inputs)
        self.source = source
        self._ranges = ranges
        # Without calibrated ranges there is nothing to compare.
        self._looked = not any(ranges or ())
        self._report = report
        self.__name__ = "qapply"

        def int8_model(qparams: Mapping[str, Any], *inputs: Any) -> Any:
            if (empty := self._of_nothing(inputs)) is not None:
                return empty
            return self.program(*inputs).outputs(qparams, jax.tree.leaves(inputs))

        self._jitted = jax.jit(int8_model)

    def __call__(self, qparams: Mapping[str, Any], *inputs: Any) -> Any:
        """The model's outputs for `inputs`, which are those of `apply_fn` after its params.

        Raises:
          ValueError: the qparams are of another model; the inputs are of another kind of dtype than
            in calibration (floats for integers), or give another graph.

        Warns:
          UserWarning: in the first call outside `jit`, the inputs are far outside the range that
            calibration saw; see `check`.
        """
        check_qparams(qparams, self.plan)
        if not self._looked:
            self._look(inputs)
        return self._jitted(qparams, *inputs)

    def check(
        self, qparams: Mapping[str, Any], *inputs: Any, device: jax.Device | None = None
    ) -> Agreement:
        """Whether the model is served rightly: its arrays, its inputs, and the device itself.

        Where the default device is not a CPU, the model runs on both with these inputs, and the
        sums of each site are compared: they are integers, and have to be the same.  Run it once on
        new hardware, and with each new version of jaxlib: compilers have given wrong sums.

        Args:
          qparams: the arrays of the model.
          inputs: a batch as the model will be served, or none.  Its dtypes are compared with those
            of calibration, and its values: other preprocessing than in calibration is silent
            otherwise, since what is beyond a threshold saturates, and what is far below rounds to
            zero.
          device: which one is compared with the CPU; None for the default one.

        Returns:
          What was compared; prints as a line.

        Raises:
          jaxquant.DisagreementError: a site, or the model, gives something else on the device.
          RuntimeError: this process has no CPU device to compare with.
          ValueError: the qparams are of another model; an input is of another kind of dtype; its
            values reach further beyond the calibrated ones than these do from each other, or use
            less than a 32nd of them.  The message has both ranges.
        """
        check_qparams(qparams, self.plan)
        if not inputs:
            return Agreement(None, 0)
        # Cheap things first: kinds and ranges are looked at without the device.
        self._check_kinds(inputs)
        strange = find_strange(self._ranges or (), inputs)
        if strange:
            raise ValueError(_strange(strange))
        # The default device is the one that will serve.
        if device is None and jax.default_backend() != "cpu":
            device = jax.devices()[0]
        return Agreement(None, 0) if device is None else self._compare(qparams, inputs, device)

    def _compare(
        self, qparams: Mapping[str, Any], inputs: tuple[Any, ...], device: jax.Device
    ) -> Agreement:
        """The model on a device and on the CPU."""
        binding = bind(self._model(inputs), self.plan)
        program = Program(binding, self.source.params, XLA_ALONE, by_site=True)
        # Packed weights are of this processor's kernels; the comparison is of XLA's forms.
        arrays = {name: value for name, value in qparams.items() if name != "packed"}
        found = differences(program, arrays, jax.tree.leaves(inputs), device)
        if not found:
            return Agreement(device, len(binding.sites))
        sites = "\n".join(f"  {name}: {told}" for name, told in found.items())
        raise DisagreementError(
            f"{device.device_kind} computes something else than the CPU:\n{sites}\nDo not serve "
            "the model there: try another jaxlib, or leave these sites float (`rules=`)"
        )

    def _check_kinds(self, inputs: tuple[Any, ...]) -> None:
        if self.inputs is not None and MODES[self.plan.mode].tensor_scales:
            check_kinds(self.inputs, inputs)

    def _look(self, inputs: tuple[Any, ...]) -> None:
        """Compare the values of the first inputs that have any with the calibrated ones."""
        if not has_values(inputs):
            return
        self._looked = True
        strange = find_strange(self._ranges or (), inputs)
        if strange:
            warnings.warn(_strange(strange), stacklevel=3)

    @property
    def input_shapes(self) -> tuple[str, ...]:
        """The inputs' dtypes and shapes; those of a loaded model have names for what may vary."""
        return self.source.input_shapes(self.inputs or ())

    def program(self, *inputs: Any) -> Program:
        """The int8 program for inputs of these shapes.

        Raises:
          ValueError: these shapes give another graph than the one that was quantized, or an input
            is of another kind of dtype.
        """
        self._check_kinds(inputs)
        model = self._model(inputs)
        try:
            binding = bind(model, self.plan)
        except ValueError as error:
            if self.inputs is not None and _ranks(inputs) != _ranks(self.inputs):
                error.add_note(
                    f"qapply was called with inputs of {shapes_text(inputs)}; it was quantized "
                    f"with {shapes_text(self.inputs)}, which have other numbers of axes. Inside "
                    "jax.vmap it sees one sample at a time: pass x[None] there and take [0] of the "
                    "result, or quantize it with single samples"
                )
            raise
        table = table_of(self._backend, self.backend)
        return Program(binding, self.source.params, table)

    def _model(self, inputs: tuple[Any, ...]) -> Model:
        """The float model for such inputs; what it raises gets a note of those that it took."""
        try:
            # The error of the float model names its code; what the user changed are the shapes.
            return self.source(inputs)
        except Exception as error:
            if self.inputs is not None:
                error.add_note(
                    f"qapply was called with inputs of {shapes_text(inputs)}; it was quantized "
                    f"with {shapes_text(self.inputs)}, and takes other sizes where the float model "
                    "does"
                )
            raise

    def _of_nothing(self, inputs: tuple[Any, ...]) -> Any:
        """The outputs where all of them are empty, as for a batch of no samples; else None.

        There is nothing to compute then, and the model may well compute something else: JAX leaves
        out operations that have no element.
        """
        # One empty input is not enough: outputs may still have elements.
        if not any(0 in x.shape for x in jax.tree.leaves(inputs)):
            return None
        graph = self._model(inputs).graph
        if not all(0 in graph.shape(x) for x in graph.outputs):
            return None
        empty = [jnp.zeros(graph.shape(x), graph.dtype(x)) for x in graph.outputs]
        return jax.tree.unflatten(graph.out_tree, empty)

    @functools.cached_property
    def backend(self) -> Choice:
        return choose_backend(self._backend, MODES[self.plan.mode].tensor_scales)

    def with_backend(self, backend: str) -> QuantizedApply:
        """The same model on another backend.

        Args:
          backend: "native", "xla", or "auto" for native kernels where they run and are faster.

        Raises:
          ValueError: there is no such backend.
          RuntimeError: the native kernels do not run here.
        """
        return QuantizedApply(
            self.source, self.plan, self._report, self.inputs, backend, self._ranges
        )

    def with_summary(self, entries: Mapping[str, Any]) -> QuantizedApply:
        """The same model, with more entries in its report's summary."""
        report = self._report
        if report is not None:
            report = dataclasses.replace(report, summary={**report.summary, **entries})
        return QuantizedApply(
            self.source, self.plan, report, self.inputs, self._backend, self._ranges
        )

    def prepare(self, qparams: Mapping[str, Any], *inputs: Any) -> dict[str, Any]:
        """`qparams` with the weights packed for the native kernels as well.

        `qapply` takes either; without packed weights it packs them in every call, or leaves a dot
        of a few rows to XLA.  They serve any batch and image size.

        Args:
          qparams: the arrays of the model.
          inputs: a sample input of the model, or its shape and dtype; without it, what the model
            was quantized with.

        Returns:
          `qparams` with an entry "packed"; unchanged where XLA runs the model, or kernels that read
          weights as they are stored, those of `quant_weights`.

        Raises:
          ValueError: the inputs are not known.
        """
        if self.backend.name != "native" or not MODES[self.plan.mode].integer:
            return dict(qparams)
        if not inputs and self.inputs is None:
            raise ValueError("qapply.prepare(qparams, *inputs) needs a sample input of this model")
        # Shapes suffice to find the calls; packed weights serve any batch.
        program = self.program(*jax.tree.map(ir.struct, inputs or self.inputs))
        return {**qparams, "packed": jax.jit(program.pack)(qparams)}

    def __repr__(self) -> str:
        return plan_line(self.plan)

    def _repr_html_(self) -> str:
        report = self.report()
        return f"<pre>{html.escape(repr(self))}</pre>" if report is None else report._repr_html_()

    def report(self) -> Any:
        """Every site, int8 or why not, with its scales and SQNR; prints as a table."""
        if self._report is None:
            return None
        summary = {**self._report.summary, "backend": str(self.backend)}
        return dataclasses.replace(self._report, summary=summary)


def _strange(difference: str) -> str:
    return (
        f"the inputs are far from those of calibration: {difference}. Preprocess them as in "
        "calibration, or calibrate with such data"
    )


def plan_line(plan: Plan) -> str:
    """One line on an int8 model."""
    quantized = sum(site.status == INT8 for site in plan.sites)
    return (
        f"<qapply: {quantized} of {len(plan.sites)} sites quantized ({plan.mode}), thresholds by "
        f"{plan.algo}; .report() tells of each>"
    )


def _ranks(inputs: tuple[Any, ...]) -> list[int]:
    """How many axes each input has."""
    return [len(x.shape) for x in jax.tree.leaves(inputs)]
