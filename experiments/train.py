r"""Trains a network of the zoo from scratch.

  python experiments/train.py --config=configs/train/cifar10_resnet.py

Writes config.json, metrics.jsonl, checkpoints and, at the end, the weights to the work folder, and
prints the accuracy on the test images. The same command goes on from the last checkpoint where a
run was interrupted. --help lists the settings, each to be given as --config.NAME=VALUE.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a clone

from configs.train import common
from experiments import program
from experiments.files import write_text
from experiments.training import TrainingError
from experiments.training.checkpoints import Checkpoints, save_weights
from experiments.training.job import Job, prepare
from experiments.training.loop import Events, Every, fit, stopping
from experiments.training.monitor import Monitor
from experiments.training.settings import check, check_resumed
from experiments.training.step import State


def main() -> None:
    config = program.config()
    workdir = Path(flags.FLAGS.workdir or f"runs/train-{config.model}")
    with stopping() as should_stop:
        result = run(config, workdir, should_stop)
    if result is None:
        sys.exit(f"stopped; the same command goes on from the checkpoint in {workdir}/")
    print(f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %\nwritten to {workdir}/")


def run(
    config: ConfigDict, workdir: Path, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Trains, or goes on with the training that the work folder has.

    Args:
      config: the settings.
      workdir: where to write.
      should_stop: asked after each step; True saves and ends the run.

    Returns:
      "top1" and "top5" of the evaluation images, in percent; None where the run was stopped.

    Raises:
      TrainingError: the settings are wrong or differ from those of the run, or it diverged.
      ExperimentError: there is no such network or data.
    """
    check(config)
    job = prepare(config)
    with Checkpoints(workdir, config.keep) as saved:
        state = start_or_resume(job, workdir, saved)
        print(described(job, int(state.step)), flush=True)
        with Monitor(job, workdir, int(state.step)) as monitor:
            state = fit(
                state,
                job.update,
                job.batches(int(state.step)),
                steps=job.steps,
                every=intervals(job),
                events=Events(monitor.log, saved.save, monitor.evaluate),
                should_stop=should_stop,
            )
            if int(state.step) < job.steps:
                return None
            result = monitor.evaluate(job.steps, state)
    save_weights(workdir, state)
    return result


def start_or_resume(job: Job, workdir: Path, saved: Checkpoints) -> State:
    """The state to go on from: of the newest checkpoint, or before the first step."""
    settings = workdir / "config.json"
    given = job.config.to_dict()
    if saved.latest() is None:
        state = job.state
    else:
        if not settings.is_file():
            raise TrainingError(f"{workdir}: checkpoints without config.json, of unknown settings")
        check_resumed(given, json.loads(settings.read_text()))
        state = saved.restore(job.state)
    write_text(settings, json.dumps(given, indent=2) + "\n")
    return state


def intervals(job: Job) -> Every:
    """How often to log, to save and to evaluate, in steps."""
    config = job.config
    return Every(
        log=config.log_steps,
        save=config.checkpoint_steps or job.epoch,
        evaluate=max(1, round(config.eval_epochs * job.epoch)) if config.eval_epochs else job.steps,
    )


def described(job: Job, start: int) -> str:
    """One line on what is trained."""
    goes_on = f", from step {start}" if start else ""
    return (
        f"{job.config.model}: {job.steps / job.epoch:.4g} epochs of {job.train.name} "
        f"({job.train.size} images), {job.steps} steps of {job.config.batch_size} images in "
        f"{job.config.dtype} on {len(job.split.device_set)} device(s){goes_on}"
    )


if __name__ == "__main__":
    program.define_config(common.SETTINGS)
    flags.DEFINE_string("workdir", None, "Where to write; by default runs/train-MODEL.")
    program.start(main)
