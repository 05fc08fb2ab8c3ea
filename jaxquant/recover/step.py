"""What a recovery step is: what it is given, what it gives, and when it runs.

To add one, write a file with a `STEP` beside this one, and its name into the table of names
(`jaxquant.plan.rules.RECOVERY_STEPS`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant.calibration.padding import Padding
from jaxquant.graph.model import FloatModel
from jaxquant.plan.bind import bind
from jaxquant.progress import Progress
from jaxquant.recover.compare import Comparison
from jaxquant.run.program import Program, program_by_site
from jaxquant.weights.sites import Divisors


@dataclasses.dataclass(frozen=True)
class Data:
    """All batches of calibration data.

    Attributes:
      read: gives them from the first on, in each call.
      total: how many there are; None where that is not known.
    """

    read: Callable[[], Iterable[tuple[Any, ...]]]
    total: int | None


@dataclasses.dataclass(frozen=True)
class Task:
    """What every step is given beside the int8 model.

    Attributes:
      source: the float model.
      examples: batches of calibration samples, which may be of several shapes.
      file: where a step may keep what took long; None for nowhere.
      progress: shows the steps.
      data: all batches, of which the examples are some; None where those are all.
      padding: which positions of the samples are not looked at; None for none.
    """

    source: FloatModel
    examples: Sequence[tuple[Any, ...]]
    file: str | os.PathLike[str] | None
    progress: Progress
    data: Data | None = None
    padding: Padding | None = None
    _compared: dict[Any, Comparison] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def batches(self) -> Data:
        """All batches that there are."""
        return self.data or Data(lambda: self.examples, len(self.examples))

    @property
    def alike(self) -> Sequence[tuple[Any, ...]]:
        """The examples of the first one's shapes."""
        first = _shapes(self.examples[0])
        return [inputs for inputs in self.examples if _shapes(inputs) == first]

    def comparison(self, program: Program, inputs: tuple[Any, ...] | None = None) -> Comparison:
        """Both models side by side: compiled once for all that compare with this program.

        Args:
          program: the int8 model.
          inputs: of the shapes to compare for; None for those that the program is for.
        """
        own = tuple(program.graph.shape(var) for var in program.graph.inputs)
        shapes = own if inputs is None else _shapes(inputs)
        # By shapes: each of them is another compilation, which takes most of the time.
        if (program, shapes) not in self._compared:
            params, here = self.source.params, program
            if inputs is not None and shapes != own:
                here = program_by_site(bind(self.source.trace(inputs), program.whole_plan), params)
            self._compared[program, shapes] = Comparison(here, params, self.padding)
        return self._compared[program, shapes]


def _shapes(inputs: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(np.shape(x) for x in jax.tree.leaves(inputs))


@dataclasses.dataclass(frozen=True)
class Draft:
    """The int8 model on its way through the steps, each of which gives another one.

    Attributes:
      program: what runs; it holds the plan.
      qparams: its arrays.
      uncorrected: the same before bias correction; None without that step.
      divisors: what the channels of tensors are divided by before they are quantized.
      notes: a line for the report of what each step did.
      by_site: what became of the weights of single sites, for the report.
      source: the float model with other parameters that compute the same, of which `qparams` is
        made; None where it is the task's.
    """

    program: Program
    qparams: Any
    uncorrected: Any = None
    divisors: Divisors = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    by_site: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: FloatModel | None = None

    def told(self, sites: Mapping[str, str]) -> dict[str, str]:
        """`by_site` with more of some sites, behind what the steps before said."""
        more = {
            name: "; ".join(filter(None, (self.by_site.get(name), text)))
            for name, text in sites.items()
        }
        return {**self.by_site, **more}

    def replaced(self, name: str, note: str, **changes: Any) -> Draft:
        """The model with some attributes changed by a step, and a line of what it did."""
        return dataclasses.replace(self, notes={**self.notes, name: note}, **changes)


class Step(NamedTuple):
    """A recovery step, of the sites inside loops and choices too.

    Attributes:
      names: what it is asked for by; `plan.recovered_by(name)` has the sites.
      run: gives the repaired model; it leaves the one that it is given as it is.
      check: raises ImportError where a package that the step needs is not installed.
      is_automatic: it runs where nobody asks for it, too, and sees for itself what is to be done.
      keeps_file: it keeps in a file what it did.
    """

    names: tuple[str, ...]
    run: Callable[[Task, Draft], Draft]
    check: Callable[[], None] = lambda: None
    is_automatic: bool = False
    keeps_file: bool = False

    def is_asked_for(self, names: Sequence[str]) -> bool:
        """Whether one of its names is among those that are asked for."""
        return not set(self.names).isdisjoint(names)
