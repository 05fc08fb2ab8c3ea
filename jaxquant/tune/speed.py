"""Which convolutions and dots run longer in int8 than in float, on this machine.

Measured, not predicted: which forms are slow differs with the backend, the chip and the compiler's
version.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibration.observations import Observations
from jaxquant.graph import ir
from jaxquant.graph.model import Model
from jaxquant.graph.sites import Site
from jaxquant.plan.binding import Binding
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.make import make_plan
from jaxquant.plan.rules import Rule
from jaxquant.progress import Progress
from jaxquant.tune.one_site import BothForms, Surroundings, both_forms, key, one_site, surroundings

LEAST_ROUNDS, MOST_ROUNDS = 5, 51
SECONDS = 0.3  # of a site, after which no round beyond the least is begun
FEWEST_ROUNDS, MOST_SECONDS = 3, 3.0  # of a slow site, after which no round is begun


def slower_in_int8(
    model: Model, observations: Observations, config: QuantConfig, progress: Progress
) -> tuple[Rule, ...]:
    """A rule for each site that would become int8 and whose int8 form is slower: it stays float.

    Equal sites are timed once.  Once some stay float, those that they surround are looked at again.
    Several processes go by the times of the first.

    Raises:
      ValueError: no site becomes int8; see `jaxquant.plan.make.make_plan`.
    """
    known: dict[Any, float] = {}
    left: tuple[Rule, ...] = ()
    # Which sites become int8 does not depend on the thresholds.
    quick = dataclasses.replace(config, algo="abs_max")
    while True:
        sites = _in_surroundings(make_plan(model, observations, quick.with_rules(left)))
        known |= _time(model.graph, [s for s in sites if s.key not in known], config, progress)
        slower = tuple(
            Rule(f"site:{s.site.name}", dtype="float", reason=_reason(known[s.key]))
            for s in sites
            if known[s.key] > 1
        )
        # Sites that stay float leave their neighbours in other surroundings: timed anew where these
        # differ.
        if not slower:
            return left
        left += slower


def _reason(times: float) -> str:
    return f"int8 runs {times:.2f} times as long as float here (optimize_for='speed')"


class _Found(NamedTuple):
    site: Site
    around: Surroundings
    key: Any


def _in_surroundings(binding: Binding) -> list[_Found]:
    """The int8 convolutions and dots."""
    graph, found = binding.graph, []
    for int8_site in binding.sites:
        site = int8_site.site
        if site.contraction is not None:
            around = surroundings(graph, binding, int8_site)
            found.append(_Found(site, around, key(graph, site, around)))
    return found


def _time(
    graph: ir.Graph, sites: Sequence[_Found], config: QuantConfig, progress: Progress
) -> dict[Any, float]:
    """The slowdown of each different site, by its key."""
    if not sites:
        return {}
    # Layers that repeat are timed once.
    different = {each.key: each for each in sites}
    found = []
    with progress.stage("timing", len(different), "site") as stage:
        for each in stage.each(different.values()):
            model = one_site(graph, each.site, each.around, config.weight_quantize_type)
            found.append(slowdown(both_forms(model)))
    return dict(zip(different, _of_the_first_process(found), strict=True))


def slowdown(timed: BothForms) -> float:
    """How many times as long int8 takes as float: the median over rounds, in which both take turns.

    1 where it is not slower in three of four rounds.
    """
    result = jnp.zeros(timed.result.shape, timed.result.dtype)
    ratios: list[float] = []
    spent = 0.0
    for number in range(MOST_ROUNDS + 1):
        in_float, result = _seconds(timed.in_float, timed.arguments, result)
        in_int8, result = _seconds(timed.in_int8, timed.arguments, result)
        if number == 0:
            continue  # it compiled
        # Ratios of neighbours in time: a busy machine slows both.
        ratios.append(in_int8 / in_float)
        spent += in_float + in_int8
        is_clear = max(ratios) < 1  # int8 was faster each time
        if number >= FEWEST_ROUNDS and spent > MOST_SECONDS:
            break
        if number >= LEAST_ROUNDS and (is_clear or spent > SECONDS):
            break
    return statistics.median(ratios) if np.quantile(ratios, 0.25) > 1 else 1.0


def _seconds(
    program: Callable[..., jax.Array], arguments: Sequence[Any], result: jax.Array
) -> tuple[float, jax.Array]:
    # Waited for, since JAX returns before the device is done.
    start = time.perf_counter()
    result = jax.block_until_ready(program(*arguments, result))
    return time.perf_counter() - start, result


def _of_the_first_process(values: Sequence[float]) -> list[float]:
    """Its numbers, so that every process makes the same model."""
    if jax.process_count() == 1 or not values:
        return list(values)
    from jax.experimental import multihost_utils

    # float32 is enough for ratios.
    received = multihost_utils.broadcast_one_to_all(np.asarray(values, np.float32))
    return [float(value) for value in received]
