"""Measures one network under several methods: what a process of the accuracy table does."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

import jaxquant
from experiments import results
from experiments.accuracy.methods import Method
from experiments.accuracy.parallel import usable_cores
from experiments.accuracy.rows import Network, Store
from experiments.evaluate import Evaluation
from experiments.settings import Setup, prepare


def measure(network: Network, methods: Sequence[Method], workdir: str) -> None:
    """Evaluates the network, then quantizes and evaluates it with each method.

    What is finished is kept at once: the logits of the float network, then a row a method.  Methods
    that calibrate alike share one calibration, whose time counts for each of them.

    Args:
      network: one that has weights.
      methods: those whose rows are not finished.
      workdir: where to keep them.
    """
    store = Store(workdir)
    setup = prepare(network.config)
    fp32 = store.evaluation(network)
    if fp32 is None:
        _say(network.name, "float32 ...")
        fp32 = setup.evaluate_float()
        store.save_evaluation(network, fp32)
    for group in by_calibration(methods):
        options = group[0].calibration
        _say(network.name, f"calibrate {options or ''} ...")
        started = time.perf_counter()
        observations = jaxquant.calibrate(
            setup.variables,
            setup.module.apply,
            setup.calibration_batches,
            **options,
            progress=False,
        )
        calibration_seconds = time.perf_counter() - started
        for method in group:
            figures = _quantized(setup, observations, method, fp32, calibration_seconds)
            store.save_row(network.row_key(method), figures)
            _say(network.name, f"{method.name}: {_summary(figures)}")


def by_calibration(methods: Sequence[Method]) -> list[list[Method]]:
    """The methods in groups that calibrate with the same options."""
    groups: dict[str, list[Method]] = {}
    for method in methods:
        options = json.dumps(method.calibration, sort_keys=True)
        groups.setdefault(options, []).append(method)
    return list(groups.values())


def _quantized(
    setup: Setup, observations: Any, method: Method, fp32: Evaluation, calibration_seconds: float
) -> dict[str, Any]:
    started = time.perf_counter()
    qparams, qapply = jaxquant.quantize(
        setup.variables,
        setup.module.apply,
        observations,
        **method.options,
        progress=False,
    )
    seconds = calibration_seconds + time.perf_counter() - started
    model = jax.jit(qapply)
    int8 = setup.evaluate(lambda images: model(qparams, images))
    return results.measurements(fp32, int8, qapply.report().summary, seconds) | {
        "cores": usable_cores(),
        "peak_gigabytes": _peak_gigabytes(),
    }


def _peak_gigabytes() -> float | None:
    """The most memory that this process had so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def _summary(figures: dict[str, Any]) -> str:
    return (
        f"top-1 {figures['fp32']['top1']:.2f} -> {figures['int8']['top1']:.2f} %, agreement "
        f"{figures['agreement']:.2f} %, SQNR {figures['sqnr_db']:.1f} dB, calibration and "
        f"quantization {figures['calibration_seconds']:.0f} s, evaluation "
        f"{figures['int8']['seconds']:.0f} s"
    )


def _say(name: str, text: str) -> None:
    print(f"[{name}] {text}", flush=True)
