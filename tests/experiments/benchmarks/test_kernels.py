"""What the benchmark of single layers times computes the layer; and its peaks."""

import math
import os

import numpy as np
import pytest

from experiments.benchmarks.kernels import Layer, layers, programs
from experiments.benchmarks.peak import Peak
from tests.native.cases import needs_kernels

pytestmark = needs_kernels

LAYERS = {
    "3x3": Layer((7, 6), (3, 3, 5, 70), (1, 1), ((1, 1), (1, 1)), 1),
    "strided": Layer((9, 9), (1, 1, 64, 32), (2, 2), ((0, 0), (0, 0)), 1),
    "depthwise": Layer((8, 8), (3, 3, 1, 16), (2, 2), ((0, 1), (0, 1)), 16),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_both_int8_programs_give_the_same(layer: Layer):
    runs, work = programs(layer, batch=2)
    found = np.asarray(runs["native int8"]())
    np.testing.assert_array_equal(found, runs["XLA int8"]())
    assert np.unique(found).size > 10
    assert work.operations == 2 * found.size * math.prod(layer.kernel[:3])
    assert runs["XLA float32"]().shape == found.shape


def test_the_layers_of_a_network():
    found = layers("mobilenet_v1")
    assert sum(found.values()) == 27
    assert sum(layer.groups > 1 for layer in found.elements()) == 13


def test_peaks_of_a_run():
    peak = Peak()
    for program in peak.programs.values():
        program()
    assert peak.operations >= len(os.sched_getaffinity(0)) * (1 << 34) or peak.operations == 0
    share, copied = peak.shares(peak.operations / 4, peak.bytes / 8, {"multiply": 1, "copy": 0.5})
    assert share == 0.25 or (not peak.operations and math.isnan(share))
    assert copied == 0.0625
