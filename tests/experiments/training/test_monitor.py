import time

import pytest

from experiments.training.job import prepare
from experiments.training.log import read
from experiments.training.monitor import Monitor
from tests.experiments.training.tiny import install


def test_lines_say_where_the_run_is_and_how_fast(monkeypatch, tmp_path, capsys):
    config = install(monkeypatch)
    config.progress = True
    job = prepare(config)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def accuracy(self, state):
        clock[0] += 100.0  # is not counted as training
        return {"top1": 12.5, "top5": 50.0}

    monkeypatch.setattr(type(job), "accuracy", accuracy)
    with Monitor(job, tmp_path, start=2) as monitor:
        clock[0] += 1.0
        assert monitor.evaluate(3, job.state) == {"top1": 12.5, "top5": 50.0}
        clock[0] += 1.0
        monitor.log(4, {"loss": 1.5, "accuracy": 25.0})
    test, train = read(tmp_path)
    assert test == {"step": 3, "epoch": 3 / 8, "test_top1": 12.5, "test_top5": 50.0}
    assert train["images_per_second"] == pytest.approx(2 * 8 / 2.0)
    assert (train["epoch"], train["loss"]) == (0.5, 1.5)
    assert train["learning_rate"] == pytest.approx(float(job.rate(3)))
    shown = capsys.readouterr()
    assert "loss=1.500" in shown.err
    assert "top-1 12.50 % of the test images" in shown.out + shown.err
