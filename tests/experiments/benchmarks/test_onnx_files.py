"""Timing ONNX files."""

import sys

import numpy as np
import pytest

import jaxquant
from tests.networks import images, quantize

onnx_files = pytest.importorskip("experiments.benchmarks.onnx_files")


def test_each_file_is_timed_with_inputs_that_it_takes(tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    w = images(1, (4, 3))
    model = quantize(w, lambda p, x: x["a"] @ p + x["n"], {"a": images(0, (5, 4)), "n": w[:1] * 0})
    file = tmp_path / "model.onnx"
    jaxquant.export_onnx(file, *model, shapes=({"a": "b, 4", "n": "1, 3"},))
    inputs = onnx_files.noise(file, 7)
    assert [array.shape for array in inputs.values()] == [(7, 4), (1, 3)]
    monkeypatch.setattr(onnx_files, "RUNTIMES", {"onnxruntime": onnx_files.onnxruntime})
    monkeypatch.setattr(sys, "argv", ["onnx_files", str(file), "--rounds=1", "--batch=3"])
    onnx_files.main()
    assert str(file) in capsys.readouterr().out


def test_the_least_time_of_each_counts(monkeypatch):
    ticks = iter(np.cumsum([0, 5, 0, 7, 0, 2, 0, 9]))
    monkeypatch.setattr(onnx_files.time, "process_time", lambda: next(ticks))
    programs = {"a": lambda: None, "b": lambda: None}
    assert onnx_files.least_in_turn(programs, 2) == {"a": 2, "b": 7}
