"""What the input channels of a tensor hold on calibration samples, and how far they may go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import ir
from jaxquant.recover.product import Product
from jaxquant.run.float_forms import evaluate_float

ROWS = 1024  # of a site's outputs that are tried, over all samples
_TOP = 8  # samples that tell of a channel's tail
_RARE = 1e-5  # of the samples may lie beyond a channel's range
HEADROOM = 2.0  # of a channel's range over what calibration showed of it, at the least


class Seen(NamedTuple):
    """What the float model showed of one tensor.

    Attributes:
      low, high: float32 [N, I], the least and largest value of N samples' I channels, 0 included.
      rows: for each site that reads it, float32 [R, G, K]; see `jaxquant.recover.product`.
    """

    low: Any
    high: Any
    rows: tuple[Any, ...]


class Divisible(NamedTuple):
    """An int8 tensor, the axes of its input channels (ascending) and the sites that read it."""

    var: ir.Var
    axes: tuple[int, ...]
    readers: tuple[Product, ...]

    @property
    def sizes(self) -> list[int]:
        """Its shape, with size 1 but along the channels."""
        shape = self.readers[0].graph.shape(self.var)
        return [size if axis in self.axes else 1 for axis, size in enumerate(shape)]


def watch(
    graph: ir.Graph,
    params: Any,
    examples: Sequence[tuple[Any, ...]],
    tensors: Mapping[str, Divisible],
) -> dict[str, Seen]:
    """Run the float model on all examples, in one compiled step."""
    needed = list(ir.upstream(graph, [t.var for t in tensors.values()]))
    rng = np.random.default_rng(0)
    count = -(-ROWS // len(examples))
    index = {
        name: [np.sort(rng.permutation(p.positions)[:count]) for p in t.readers]
        for name, t in tensors.items()
    }

    @jax.jit
    def run(params: Any, flat: list[Any]) -> dict[str, Seen]:
        env = evaluate_float(graph, params, flat, equations=needed)
        return {name: _seen(env.read(t.var), t, index[name]) for name, t in tensors.items()}

    batches = [jax.device_get(run(params, jax.tree.leaves(inputs))) for inputs in examples]
    return {name: jax.tree.map(_join, *[batch[name] for batch in batches]) for name in tensors}


def _join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts)


def _seen(x: jax.Array, tensor: Divisible, index: Sequence[np.ndarray]) -> Seen:
    """The first axis is that of the samples, unless it is one of channels: then x is one."""
    x = x.astype(jnp.float32)
    rows = tuple(p.inputs(x, 0, at) for p, at in zip(tensor.readers, index, strict=True))
    rest = tuple(a for a in range(1, x.ndim) if a not in tensor.axes)
    samples = 1 if 0 in tensor.axes else x.shape[0]
    low, high = (f(x, axis=rest, initial=0).reshape(samples, -1) for f in (jnp.min, jnp.max))
    return Seen(low, high, rows)


def reach(peaks: np.ndarray) -> np.ndarray:
    """How far each channel may go in samples that calibration did not see.

    Above the largest few of N peaks, x_0 = peak_{k+1}, the tail of a channel is

        x(p) = x_0 (1 + t ((k / (N p))^g - 1) / g)        where one sample in 1 / p exceeds x(p),

    with t the mean of log(peak_i / x_0), i = 1...k, of the channel itself (Hill, 1975), and the
    tail index g of all channels together, since a few peaks tell next to nothing of it: the moment
    estimator of Dekkers, Einmahl and de Haan, 1989, whose bias for a small k is taken away.  With
    Hill's estimate for both the normal tail of 64 samples seems to reach 3 times as far as it does,
    behind a ReLU 7 times.

    Args:
      peaks: [N, I], the largest size of each sample's channels.

    Returns:
      [I], at least twice the largest peak; infinite where nothing is known, for a channel that was
      zero in all but a few samples.
    """
    samples = len(peaks)
    known = min(_TOP, samples - 1)
    if known < 1:
        return np.full(peaks.shape[1], np.inf)
    top = -np.sort(-np.asarray(peaks, np.float64), axis=0)[: known + 1]
    least = np.where(top[known] > 0, top[known], 1.0)
    logs = np.log(np.maximum(top[:known], least) / least)
    mean, square = logs.mean(axis=0), np.square(logs).mean(axis=0)
    rarer = known / (samples * _RARE)
    further = 1 + mean * _box_cox(rarer, _tail_index(mean, square, known))
    reached = np.maximum(least * further, top[0] * HEADROOM)
    return np.where(top[known] > 0, reached, np.inf)


def _tail_index(mean: np.ndarray, square: np.ndarray, count: int) -> float:
    """The tail index g of some channels, 0 at least: no tail is taken to end.

    Args:
      mean, square: [I], of the logarithms of the `count` largest peaks over the next one.
      count: k.
    """
    tells = mean > 0
    if not tells.any():
        return 0.0
    # The spread of exponential logarithms, those of a power law, is 2 k / (k + 1) in the mean
    spread = np.mean(square[tells] / mean[tells] ** 2) * (count + 1) / count
    bend = 1 - 0.5 / (1 - 1 / spread) if spread > 1 else -np.inf
    return float(max(mean[tells].mean() + min(bend, 0.0), 0.0))


def _box_cox(ratio: float, power: float) -> float:
    """(ratio ** power - 1) / power, and its limit, the logarithm."""
    return float(np.log(ratio)) if power < 1e-6 else (ratio**power - 1) / power
