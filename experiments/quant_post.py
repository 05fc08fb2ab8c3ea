r"""Quantizes a trained network to INT8 and compares it with the float32 one.

  python experiments/quant_post.py --config=configs/efficientnet_lite0.py

Loads the network with its trained weights, calibrates, quantizes, evaluates both models, prints a
table and writes config.json, metrics.jsonl and the report to the work folder; with
--config.save_model_path=FILE.safetensors the int8 model too. --help lists the settings, each to be
given as --config.NAME=VALUE.
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a clone

import jaxquant
from configs import common
from experiments import program, results
from experiments.errors import SettingsError, refusing_settings
from experiments.evaluate import Evaluation, topk_accuracy
from experiments.settings import described, prepare


def main() -> None:
    config = program.config()
    workdir = Path(flags.FLAGS.workdir or f"runs/{config.model}-{config.algo}")
    program.check_workdir(workdir, config.to_dict())
    title, result, qapply = run(config)
    results.write(workdir, config.to_dict(), result, qapply)
    print(f"\n{results.table(title, result)}\n\nwritten to {workdir}/")


def run(config: ConfigDict) -> tuple[str, dict[str, Any], Any]:
    """The experiment.

    Returns:
      A title that says what ran on which images, the measurements, and `qapply`.

    Raises:
      ExperimentError: a setting means nothing, or data or weights are not there.
    """
    saved = config.save_model_path
    if saved and not saved.endswith(".safetensors"):
        raise SettingsError(f"save_model_path is a .safetensors file, got {saved!r}")
    setup = prepare(config)
    evaluation, calibration = setup.evaluation, setup.calibration
    title = (
        f"{config.model}, {config.algo}: {described(evaluation)} to evaluate on, "
        f"{described(calibration)} to calibrate on"
        + (" (of the same images)" if calibration.name == evaluation.name else "")
    )
    print(title, flush=True)

    # Before the evaluations, which take longest: a setting that is refused is refused at once.
    started = time.perf_counter()
    with refusing_settings():
        qparams, qapply = jaxquant.quant_post(
            setup.variables,
            setup.module.apply,
            setup.calibration_batches,
            algo=config.algo,
            quantizable_op_type=tuple(config.quantizable_op_type),
            is_full_quantize=config.is_full_quantize,
            target=config.target,
            weight_quantize_type=config.weight_quantize_type,
            activation_quantize_type=config.activation_quantize_type,
            recover=tuple(config.recover),
            skip=tuple(config.skip),
            rules=[jaxquant.Rule(**rule) for rule in config.rules],
            optimize_for=config.optimize_for,
            progress=config.progress,
        )
    seconds = time.perf_counter() - started
    if saved:
        Path(saved).expanduser().parent.mkdir(parents=True, exist_ok=True)
        file = Path(saved).expanduser()
        jaxquant.save_quantized_model(file, qparams, qapply, progress=config.progress)
        print(f"the int8 model: {saved}", flush=True)

    fp32 = setup.evaluate_float()
    print(f"FP32: {summary(fp32)}", flush=True)
    quantized = jax.jit(qapply)
    int8 = setup.evaluate(lambda images: quantized(qparams, images))
    print(f"INT8: {summary(int8)}", flush=True)
    return title, results.measurements(fp32, int8, qapply.report().summary, seconds), qapply


def summary(evaluation: Evaluation) -> str:
    """One line on an evaluation."""
    top1, top5 = topk_accuracy(evaluation, 1), topk_accuracy(evaluation, 5)
    return f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, {evaluation.seconds:.1f} s"


if __name__ == "__main__":
    program.define_config(common.SETTINGS)
    flags.DEFINE_string("workdir", None, "Where to write; by default runs/MODEL-ALGO.")
    program.start(main)
