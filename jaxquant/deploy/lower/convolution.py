"""Convolutions as inference runtimes have them: forward ones and transposed ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.graph.contraction import Contraction


@dataclasses.dataclass(frozen=True)
class ConvForm:
    """A convolution with a kernel of a known shape.

    Attributes:
      is_transposed: the gradient of a convolution with these strides, dilations and padding; its
        kernel runs backwards along the window.
      window: the kernel's sizes along the spatial axes, which the next three are of, too.
      strides, dilation: of the window.
      padding: (before, after); with zeros, or what a transposed one leaves away of its result.
      beyond: how many positions a transposed one's result has behind its last window.
      feature_groups: of the channels.
      outputs, inputs: the axes of the JAX kernel along output channels and a group's input ones.
      spatial: its other axes.
      channels: the kernel's sizes along `outputs` and `inputs`.
    """

    is_transposed: bool
    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    beyond: tuple[int, ...]
    feature_groups: int
    outputs: int
    inputs: int
    spatial: tuple[int, ...]
    channels: tuple[int, int]

    @property
    def is_pointwise(self) -> bool:
        """True for a convolution that looks at one position at a time."""
        ones = {*self.window, self.feature_groups} == {1}
        return not self.is_transposed and ones and not any(map(any, self.padding))

    @property
    def is_depthwise(self) -> bool:
        """True for one filter for each input channel."""
        one_each = self.channels == (self.feature_groups, 1)
        return not self.is_transposed and self.feature_groups > 1 and one_each

    def kernel(self, array: np.ndarray, order: Sequence[int]) -> np.ndarray:
        """The JAX kernel with its axes in this order, run backwards where it has to be."""
        flipped = self.spatial if self.is_transposed else ()
        # XLA's convolution of a dilated input does not flip; a runtime's transposed one does.
        return np.flip(array.transpose(order), tuple(order.index(axis) for axis in flipped))


def conv_form(contraction: Contraction, kernel_shape: Sequence[int]) -> ConvForm:
    """The form of a convolution with a kernel of this (JAX) shape.

    Raises:
      NotCovered: runtimes have no such convolution.
    """
    window, own = contraction.window, contraction.operands[1]
    assert window is not None, "a dot is no convolution"
    (outputs,), (inputs,), spatial = own.free, own.contracted, own.window
    if window.batch_groups != 1:
        raise NotCovered("a convolution with batch groups")
    if not spatial:
        raise NotCovered("a convolution without spatial axes")
    if any(not isinstance(pad, int) for pads in window.padding for pad in pads):
        raise NotCovered("padding that depends on a size that varies")
    sizes = tuple(kernel_shape[axis] for axis in spatial)
    # Runtimes have two operators: windows over the input, or the transpose of that.
    form = ConvForm(
        is_transposed=False,
        window=sizes,
        strides=tuple(window.strides),
        dilation=tuple(window.dilation),
        padding=tuple((low, high) for low, high in window.padding),
        beyond=(0,) * len(sizes),
        feature_groups=window.feature_groups,
        outputs=outputs,
        inputs=inputs,
        spatial=tuple(spatial),
        channels=(kernel_shape[outputs], kernel_shape[inputs]),
    )
    if any(d != 1 for d in window.input_dilation):
        return _transposed(form, window.input_dilation)
    # Runtimes cut nothing off an input: a slice before it would have to.
    if any(pad < 0 for pads in form.padding for pad in pads):
        raise NotCovered("a convolution with negative padding")
    return form


def _transposed(form: ConvForm, input_dilation: Sequence[int]) -> ConvForm:
    """The convolution of a dilated input as the gradient of one with that stride.

    The gradient's padding is what the flipped kernel reaches over the edge beyond the padding here.
    """
    if any(stride != 1 for stride in form.strides) or form.feature_groups != 1:
        raise NotCovered("a transposed convolution with strides or groups")
    # By the padding of the gradient: what the window reaches beyond the kept part.
    reach = [(size - 1) * d for size, d in zip(form.window, form.dilation, strict=True)]
    pads = [(r - low, r - high) for r, (low, high) in zip(reach, form.padding, strict=True)]
    beyond = tuple(max(-high, 0) for _, high in pads)
    too_far = any(e >= stride for e, stride in zip(beyond, input_dilation, strict=True))
    if too_far or any(low < 0 for low, _ in pads):
        raise NotCovered("a transposed convolution with so much padding")
    return dataclasses.replace(
        form,
        is_transposed=True,
        strides=tuple(input_dilation),
        padding=tuple((low, max(high, 0)) for low, high in pads),
        beyond=beyond,
    )
