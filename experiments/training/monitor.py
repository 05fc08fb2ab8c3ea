"""What is seen of a run: the progress bar, and lines of metrics.jsonl."""

import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from experiments.training.job import Job
from experiments.training.log import Log
from experiments.training.step import State


class Monitor:
    """Shows and records how a job goes; a context manager."""

    def __init__(self, job: Job, workdir: Path, start: int) -> None:
        """`start`: the step that the run begins at."""
        self._job = job
        self._log = Log(workdir, start)
        self._bar = tqdm(
            total=job.steps,
            initial=start,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not job.config.progress,
        )
        self._step, self._time = start, time.perf_counter()  # of the last look at the clock

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records the means of the training metrics since the last call."""
        steps, seconds = step - self._step, time.perf_counter() - self._time
        self._log.write(
            step,
            epoch=step / self._job.epoch,
            learning_rate=float(self._job.rate(step - 1)),
            images_per_second=steps * self._job.config.batch_size / seconds,
            **metrics,
        )
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(loss=f"{metrics['loss']:.3f}", top1=f"{metrics['accuracy']:.1f} %")
        self._step, self._time = step, time.perf_counter()

    def evaluate(self, step: int, state: State) -> dict[str, float]:
        """Measures and records the accuracy on the evaluation images."""
        started = time.perf_counter()
        result = self._job.accuracy(state)
        epoch = step / self._job.epoch
        self._log.write(step, epoch=epoch, **{f"test_{k}": v for k, v in result.items()})
        self._bar.write(f"epoch {epoch:.4g}: top-1 {result['top1']:.2f} % of the test images")
        self._time += time.perf_counter() - started  # the speed is that of training
        return result
