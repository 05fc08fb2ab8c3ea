r"""Quantizes a trained network to INT8 and compares it with the float32 one.

  python experiments/quant_post.py --config=configs/efficientnet_lite0.py

Loads the network with its trained weights, evaluates it, calibrates, quantizes, evaluates again,
prints a table and writes config.json, metrics.jsonl and the report to the work folder. The settings
are those of `configs/common.py`, each to be given as --config.NAME=VALUE.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a clone

import jaxquant
from experiments import data, results, zoo
from experiments.evaluate import Evaluation, agreement, evaluate, sqnr_db, topk_accuracy
from experiments.loader import batches
from experiments.preprocessing import Preprocessing
from experiments.weights.fetch import FetchError
from experiments.weights.tree import Variables, WeightsError, random_variables, template

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
    module, variables = load_model(config)
    preprocessing = model_input(config)
    calibration, evaluation = choose_data(config, preprocessing.size)
    title = (
        f"{config.model}, {config.algo}: {described(evaluation)} to evaluate on, "
        f"{described(calibration)} to calibrate on"
        + (" (of the same images)" if calibration.name == evaluation.name else "")
    )
    print(title, flush=True)

    def evaluated(model: Callable[[np.ndarray], jax.Array]) -> Evaluation:
        labelled = batches(evaluation, preprocessing, config.batch_size, config.workers)
        return evaluate(model, labelled, config.batch_size)

    def calibration_batches() -> Iterator[np.ndarray]:
        labelled = batches(calibration, preprocessing, config.batch_size, config.workers)
        return (images for images, _ in labelled)

    model = jax.jit(module.apply)
    fp32 = evaluated(lambda images: model(variables, images))
    print(f"FP32: {summary(fp32)}", flush=True)

    started = time.perf_counter()
    qparams, qapply = jaxquant.quant_post(
        variables,
        module.apply,
        calibration_batches,
        algo=config.algo,
        quantizable_op_type=tuple(config.quantizable_op_type),
        is_full_quantize=config.is_full_quantize,
        weight_quantize_type=config.weight_quantize_type,
        skip=tuple(config.skip),
        progress=config.progress,
    )
    seconds = time.perf_counter() - started

    quantized = jax.jit(qapply)
    int8 = evaluated(lambda images: quantized(qparams, images))
    print(f"INT8: {summary(int8)}", flush=True)
    report = qapply.report()
    return title, measurements(fp32, int8, report.summary, seconds), report


def load_model(config: ConfigDict) -> tuple[nn.Module, Variables]:
    """The network and its variables; weights of "random" are for smoke tests."""
    if config.weights != "random":
        return zoo.load(config.model, config.weights or None, config.num_classes, config.image_size)
    module = zoo.build(config.model, config.num_classes)
    return module, random_variables(template(module, model_input(config).size))


def model_input(config: ConfigDict) -> Preprocessing:
    """The network's preprocessing, at the image size of the config if it gives one."""
    preprocessing = zoo.find(config.model).preprocessing
    return preprocessing.at_size(config.image_size) if config.image_size else preprocessing


def choose_data(config: ConfigDict, size: int) -> tuple[data.Dataset, data.Dataset]:
    """The images to calibrate on and those to evaluate on.

    Args:
      config: `data_dir` goes before `tfds`, which goes before the embedded `dataset`.
      size: of the images that the network takes, for noise.
    """
    if config.data_dir:
        evaluation = data.folder(config.data_dir)
        calibration = data.folder(config.calib_dir) if config.calib_dir else evaluation
    elif config.tfds:
        folder = config.tfds_dir or None
        evaluation = data.tfds(config.tfds, config.tfds_split, folder)
        calibration = data.tfds(config.tfds, config.tfds_calib_split, folder)
    else:
        calibration, evaluation = data.embedded(config.dataset, size)
    if config.eval_samples:
        evaluation = data.subset(evaluation, config.eval_samples)
    return data.subset(calibration, config.calib_samples), evaluation


def described(dataset: data.Dataset) -> str:
    """The name of a data set and how many images it has."""
    return f"{dataset.name} ({'all' if dataset.size is None else dataset.size} images)"


def summary(evaluation: Evaluation) -> str:
    """One line on an evaluation."""
    top1, top5 = topk_accuracy(evaluation, 1), topk_accuracy(evaluation, 5)
    return f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, {evaluation.seconds:.1f} s"


def measurements(
    fp32: Evaluation, int8: Evaluation, sites: dict[str, int], calibration_seconds: float
) -> dict[str, Any]:
    """Every figure of the experiment, under the names that metrics.jsonl has."""

    def of(evaluation: Evaluation, size: int) -> dict[str, float]:
        return {
            "top1": topk_accuracy(evaluation, 1),
            "top5": topk_accuracy(evaluation, 5),
            "megabytes": size / 1e6,
            "seconds": evaluation.seconds,
        }

    return {
        "fp32": of(fp32, sites["bytes_before"]),
        "int8": of(int8, sites["bytes_after"]),
        "agreement": agreement(fp32.logits, int8.logits),
        "sqnr_db": sqnr_db(fp32.logits, int8.logits),
        "sites_int8": sites["sites_int8"],
        "sites_float": sites["sites_float"],
        "calibration_seconds": calibration_seconds,
        "images": len(fp32.labels),
    }


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
