r"""Quantizes a trained network to INT8 and compares it with the float32 one.

  python experiments/quant_post.py --config=configs/efficientnet_lite0.py

Loads the network with its trained weights, evaluates it, calibrates, quantizes, evaluates again,
prints a table and writes config.json, metrics.jsonl and the report to the work folder. The settings
are those of `configs/common.py`, each to be given as --config.NAME=VALUE.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a clone

import jaxquant
from experiments import data, results
from experiments.evaluate import Evaluation, topk_accuracy
from experiments.settings import described, prepare
from experiments.weights.fetch import FetchError
from experiments.weights.tree import WeightsError

CONFIG = config_flags.DEFINE_config_file("config", None, "Settings.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where to write; by default runs/MODEL-ALGO.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; settings are given as --config.NAME=")
    for noisy in ("jax._src.xla_bridge", "absl"):  # platforms tried; each step of Orbax
        logging.getLogger(noisy).setLevel(logging.WARNING)
    config = CONFIG.value
    workdir = Path(WORKDIR.value or f"runs/{config.model}-{config.algo}")
    try:
        title, result, report = run(config)
    except (data.DataError, FetchError, WeightsError) as error:
        sys.exit(f"error: {error}")
    results.write(workdir, config.to_dict(), result, report)
    print(f"\n{results.table(title, result)}\n\nwritten to {workdir}/")


def run(config: ConfigDict) -> tuple[str, dict[str, Any], Any]:
    """The experiment.

    Returns:
      A title that says what ran on which images, the measurements, and the library's report.
    """
    setup = prepare(config)
    evaluation, calibration = setup.evaluation, setup.calibration
    title = (
        f"{config.model}, {config.algo}: {described(evaluation)} to evaluate on, "
        f"{described(calibration)} to calibrate on"
        + (" (of the same images)" if calibration.name == evaluation.name else "")
    )
    print(title, flush=True)

    fp32 = setup.evaluate_float()
    print(f"FP32: {summary(fp32)}", flush=True)

    started = time.perf_counter()
    qparams, qapply = jaxquant.quant_post(
        setup.variables,
        setup.module.apply,
        setup.calibration_batches,
        algo=config.algo,
        quantizable_op_type=tuple(config.quantizable_op_type),
        is_full_quantize=config.is_full_quantize,
        weight_quantize_type=config.weight_quantize_type,
        activation_quantize_type=config.activation_quantize_type,
        recover=tuple(config.recover),
        skip=tuple(config.skip),
        optimize_for=config.optimize_for,
        progress=config.progress,
    )
    seconds = time.perf_counter() - started

    quantized = jax.jit(qapply)
    int8 = setup.evaluate(lambda images: quantized(qparams, images))
    print(f"INT8: {summary(int8)}", flush=True)
    report = qapply.report()
    return title, results.measurements(fp32, int8, report.summary, seconds), report


def summary(evaluation: Evaluation) -> str:
    """One line on an evaluation."""
    top1, top5 = topk_accuracy(evaluation, 1), topk_accuracy(evaluation, 5)
    return f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, {evaluation.seconds:.1f} s"


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
