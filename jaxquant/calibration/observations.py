"""What a calibration sweep saw: plain host data, one record per tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.calibration.padding import Padding
from jaxquant.graph.layer_names import layer_suffix


@dataclasses.dataclass(frozen=True, eq=False)
class TensorStats:
    """Statistics of one tensor over all batches.

    Attributes:
      counts: [2048] uint64 histogram of |x|; bin b holds [b, b + 1) · bin_width.
      bin_width: a power of two.
      min, max: the extreme values; abs_max: the larger of their magnitudes.
      count: elements seen.
    """

    counts: np.ndarray = dataclasses.field(repr=False)
    bin_width: float
    min: float
    max: float
    abs_max: float
    count: int


def merge(stats: Sequence[TensorStats]) -> TensorStats:
    """The statistics of several tensors together; exact, since the bins of histograms nest."""
    width = max(s.bin_width for s in stats)
    counts = np.zeros_like(stats[0].counts)
    for s in stats:
        # Powers of two: each bin of the wider histogram holds so many of this one's.
        ratio = min(int(width / s.bin_width), len(counts))
        folded = s.counts.reshape(-1, ratio).sum(axis=1, dtype=counts.dtype)
        counts[: len(folded)] += folded
    return TensorStats(
        counts=counts,
        bin_width=width,
        min=min(s.min for s in stats),
        max=max(s.max for s in stats),
        abs_max=max(s.abs_max for s in stats),
        count=sum(s.count for s in stats),
    )


@dataclasses.dataclass(frozen=True)
class Origin:
    """What observations were made of.

    Attributes:
      model: digest of the traced function for the shapes of the first batch.
      params: path -> dtype, shape and digest of the values.
      observer: digest of what kept statistics of its own; "" for none.
      options: the arguments that choose what is observed, and on which data.
      jax: the version that traced the function.
    """

    model: str
    params: Mapping[str, str]
    observer: str
    options: Mapping[str, Any]
    jax: str


@dataclasses.dataclass(frozen=True, eq=False)
class Observations:
    """The result of `jaxquant.calibrate`; `jaxquant.save_observations` puts it in a file.

    Attributes:
      tensors: tensor name -> statistics, for every tensor that may become int8.
      batches, samples: how many were seen; a sample is an entry of the first axis of the
        first input that has one.
      examples: the first batches, up to 64 samples, and at least one of each of the first four
        shapes; they give the input shapes and the data on which the float and the int8 model are
        compared.
      observer: the `jaxquant.Observer` that kept statistics of its own; None for none.
      states: tensor name -> its state, in NumPy.
      origin: digests of the model and the parameters that they are of, and the options.
      padding: which positions were not counted; None for none, and where a file cannot tell.
    """

    tensors: Mapping[str, TensorStats]
    batches: int
    samples: int
    examples: tuple[tuple[Any, ...], ...]
    observer: Any = None
    states: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: Origin | None = None
    padding: Padding | None = None

    def of_layer(self, layer: Sequence[int]) -> Observations:
        """The statistics of one layer of the scans over stacked weights, under plain names."""
        suffix = layer_suffix(layer)

        def chosen(found: Mapping[str, Any]) -> dict[str, Any]:
            # By the end of the name: bodies inside have longer ones.
            return {k.removesuffix(suffix): v for k, v in found.items() if k.endswith(suffix)}

        return dataclasses.replace(self, tensors=chosen(self.tensors), states=chosen(self.states))

    def of_layers(self, layers: Sequence[Sequence[int]]) -> list[Observations]:
        """The statistics of each of some layers, under plain names.

        A layer may never have come to a tensor, in a branch that it does not take: there it has
        what the other layers saw together, and of an observer the state of the one that saw most.
        """
        each = [self.of_layer(layer) for layer in layers]
        found = []
        for own in each:
            unseen = {name for name, stats in own.tensors.items() if not stats.count}
            # A layer that no batch came to has what the other layers saw, which is the best guess.
            others = {
                name: [one for one in each if name in one.tensors and one.tensors[name].count]
                for name in unseen
            }
            tensors, states = dict(own.tensors), dict(own.states)
            for name, those in others.items():
                if those:
                    tensors[name] = merge([one.tensors[name] for one in those])
                if those and name in states:
                    states[name] = max(those, key=lambda one: one.tensors[name].count).states[name]
            found.append(dataclasses.replace(own, tensors=tensors, states=states))
        return found

    def __repr__(self) -> str:
        return (
            f"<Observations of {len(self.tensors)} tensors over {self.samples} samples in "
            f"{self.batches} batches; .tensors has each>"
        )
