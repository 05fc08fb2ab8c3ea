"""What the input channels of a tensor hold on calibration samples, and how far they may go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.float_forms import evaluate_float
from jaxquant.recover.product import Product

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


class Target(NamedTuple):
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
    targets: Mapping[str, Target],
) -> dict[str, Seen]:
    """Run the float model on all examples, in one compiled step."""
    needed = list(ir.walk_back(graph, [t.var for t in targets.values()]))
    rng = np.random.default_rng(0)
    count = -(-ROWS // len(examples))
    index = {
        name: [np.sort(rng.permutation(p.positions)[:count]) for p in t.readers]
        for name, t in targets.items()
    }

    @jax.jit
    def run(params: Any, flat: list[Any]) -> dict[str, Seen]:
        env = evaluate_float(graph, params, flat, equations=needed)
        return {name: _seen(env.read(t.var), t, index[name]) for name, t in targets.items()}

    batches = [jax.device_get(run(params, jax.tree.leaves(inputs))) for inputs in examples]
    return {name: jax.tree.map(_join, *[batch[name] for batch in batches]) for name in targets}


def _join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts)


def _seen(x: jax.Array, target: Target, index: Sequence[np.ndarray]) -> Seen:
    """The first axis is that of the samples, unless it is one of channels: then x is one."""
    x = x.astype(jnp.float32)
    rows = tuple(p.inputs(x, 0, at) for p, at in zip(target.readers, index, strict=True))
    rest = tuple(a for a in range(1, x.ndim) if a not in target.axes)
    samples = 1 if 0 in target.axes else x.shape[0]
    low, high = (f(x, axis=rest, initial=0).reshape(samples, -1) for f in (jnp.min, jnp.max))
    return Seen(low, high, rows)


def reach(peaks: np.ndarray) -> np.ndarray:
    """How far each channel may go in samples that calibration did not see.

    The tail above the largest few of N peaks falls like a power of the size, whose exponent 1/t is
    estimated from them (Hill, 1975): t = mean log(peak_i / peak_{k+1}), i = 1...k.  One sample in
    1/p exceeds peak_1 * (1 / (N p)) ** t.

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
    tail = np.mean(np.log(np.maximum(top[:known], least) / least), axis=0)
    further = np.maximum((1 / (samples * _RARE)) ** tail, HEADROOM)
    return np.where(top[known] > 0, top[0] * further, np.inf)
