"""The script for a rented device, here on CPU."""

import json

import pytest

from experiments.benchmarks import accelerator


@pytest.mark.parametrize("name", ["groups", "depthwise, strided", "three axes"])
def test_forms_are_compared_with_numpy(name):
    assert accelerator.form_is_exact(name).startswith("exact")


def test_a_wrong_form_is_told(monkeypatch):
    wrong = lambda *args: accelerator.jnp.zeros((2, 7, 7, 7), accelerator.jnp.int32)  # noqa: E731
    monkeypatch.setattr(accelerator.conv, "conv", wrong)
    assert "WRONG" in accelerator.form_is_exact("odd channels")


def test_what_is_measured_is_kept_at_once(tmp_path, capsys):
    record = accelerator.Record(tmp_path / "found.json", minutes=1)
    record.attempt("forms", "fails", lambda: 1 / 0)
    record.attempt("forms", "works", lambda: 2)
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept == {"forms": {"fails": "ZeroDivisionError: division by zero", "works": 2}}
    late = accelerator.Record(None, minutes=0)
    late.attempt("forms", "late", lambda: 3)
    assert late.found == {}
    assert "time is up" in capsys.readouterr().out


def test_ratios_to_bfloat16():
    record = accelerator.Record(None, minutes=1)
    record.add("networks", "net: bfloat16", {"1": 2.0, "peak_bytes": 5})
    record.add("networks", "net: static", {"1": 1.0, "peak_bytes": 5})
    record.add("networks", "other: static", {"1": 1.0})
    accelerator.tell_ratios(record)
    assert record.found["ratios"] == {"net: static": {"1": 0.5}}
