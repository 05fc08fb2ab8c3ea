"""What the input channels of a tensor hold on calibration samples, and how far they may go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.calibration.padding import Padding, real_in
from jaxquant.graph.model import Model
from jaxquant.recover.divisible import Divisible, Seen
from jaxquant.recover.looks import Look, States, look_at
from jaxquant.recover.repeats import is_repeated, unrolled
from jaxquant.run.layers import Layer

ROWS = 1024  # of a site's outputs that are tried, over all samples
_TOP = 8  # samples that tell of a channel's tail
_RARE = 1e-5  # of the samples may lie beyond a channel's range
HEADROOM = 2.0  # of a channel's range over what calibration showed of it, at the least


def watch(
    model: Model,
    params: Any,
    examples: Sequence[tuple[Any, ...]],
    tensors: Sequence[Divisible],
    padding: Padding | None = None,
) -> dict[str, dict[Layer, Seen]]:
    """Run the float model on all examples, in one compiled step.

    What belongs to padding counts for nothing, and of its rows there are none.

    In a loop whose steps share a layer the rows are drawn from all steps, and ranges are over them.

    Returns:
      Tensor name -> layer -> what was seen; without the layers that no example came to.
    """
    # A tensor in a loop is looked at in the loop's own graph.
    looks: dict[Model, dict[str, Look]] = {}
    for tensor in tensors:
        looks.setdefault(tensor.model, {})[tensor.name] = tensor.look
    # As many rows of each example as make up all of them together.
    drawn = _draw(model, tensors, -(-ROWS // len(examples)))
    start = {tensor.name: tensor.start(drawn[tensor.name]) for tensor in tensors}

    @jax.jit
    def run(params: Any, inputs: tuple[Any, ...], states: States) -> States:
        real, flat = real_in(padding, model, inputs), jax.tree.leaves(inputs)
        return look_at(looks, model, jax.tree.leaves(params), flat, states, real)

    found: dict[str, dict[Layer, list[Seen]]] = {tensor.name: {} for tensor in tensors}
    for inputs in examples:
        # Off the device at once: of all examples together it would not hold them.
        states = jax.device_get(run(params, inputs, start))
        for tensor in tensors:
            state = states[tensor.name]
            for layer in np.ndindex(tensor.model.scans):
                # A layer that no step of this example came to has shown nothing.
                if state.steps[layer]:
                    seen = jax.tree.map(lambda x, layer=layer: x[layer], state.seen)
                    found[tensor.name].setdefault(layer, []).append(seen)
    # Of every example something was seen; the rows and peaks are of all of them.
    joined = {
        name: {layer: jax.tree.map(_join, *seen) for layer, seen in layers.items()}
        for name, layers in found.items()
    }
    if padding is None:
        return joined
    return {
        name: {layer: _without_padding(seen) for layer, seen in layers.items()}
        for name, layers in joined.items()
    }


def _without_padding(seen: Seen) -> Seen:
    """What was seen, without the rows of padding, which are NaN."""
    return seen._replace(rows=tuple(x[~np.isnan(x).all(axis=(1, 2))] for x in seen.rows))


def _join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts)


def _draw(
    model: Model, tensors: Sequence[Divisible], count: int
) -> dict[str, dict[Layer, list[np.ndarray]]]:
    """Draw, for each tensor and layer, the output positions of its readers' rows.

    They are drawn in the order in which a model without scans has the tensors, so that it draws the
    same ones.
    """
    rng = np.random.default_rng(0)
    found: dict[str, dict[Layer, list[np.ndarray]]] = {tensor.name: {} for tensor in tensors}
    items: dict[Model, list[tuple[int, Divisible]]] = {}
    for tensor in tensors:
        items.setdefault(tensor.model, []).append((tensor.first_reader, tensor))
    for tensor, layer in unrolled(model, items):
        # A whole permutation each, however few are taken: so the draws of later tensors do not
        # depend on how many rows an earlier one needs.
        draws = [rng.permutation(product.positions) for product in tensor.readers]
        if is_repeated(tensor.model):  # a step has few of the positions of all
            draws = [np.resize(draw, count) for draw in draws]
        # Ascending, so that rows are gathered in the order in which they lie.
        found[tensor.name][layer] = [np.sort(draw[:count]) for draw in draws]
    return found


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
    # Hill's estimator is of the logarithms of the largest over the next one.
    logs = np.log(np.maximum(top[:known], least) / least)
    mean, square = logs.mean(axis=0), np.square(logs).mean(axis=0)
    # So much rarer is the sample that is asked for than the last that was seen.
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
    # A column of equal peaks has no spread to tell from.
    if not tells.any():
        return 0.0
    # The spread of exponential logarithms, those of a power law, is 2 k / (k + 1) in the mean
    spread = np.mean(square[tells] / mean[tells] ** 2) * (count + 1) / count
    bend = 1 - 0.5 / (1 - 1 / spread) if spread > 1 else -np.inf
    return float(max(mean[tells].mean() + min(bend, 0.0), 0.0))


def _box_cox(ratio: float, power: float) -> float:
    """(ratio ** power - 1) / power, and its limit, the logarithm."""
    return float(np.log(ratio)) if power < 1e-6 else (ratio**power - 1) / power
